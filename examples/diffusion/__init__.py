"""Diffusion models of digits that forget a class."""
