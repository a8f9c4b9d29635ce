"""LUNE: a language model forgets from wrong answers, by adapters alone."""
