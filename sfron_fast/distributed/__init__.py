"""Shards of DTensors, and ranks that share a batch."""
