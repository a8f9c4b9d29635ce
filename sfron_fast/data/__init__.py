"""Batches, and loaders that can be stopped anywhere and found again."""
