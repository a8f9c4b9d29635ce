"""Demonstrations of published systems on images."""
