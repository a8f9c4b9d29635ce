"""Published systems on images."""
"""Demonstrations of published systems on images."""
