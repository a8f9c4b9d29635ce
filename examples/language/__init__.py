"""The fictitious-author benchmark: a language model learns authors, then forgets some of them."""
