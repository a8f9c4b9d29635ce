"""Squares of every sample's own gradient, from one forward and backward of a whole batch."""
