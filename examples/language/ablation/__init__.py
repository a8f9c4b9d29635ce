"""Unlearning as ablation: take a result away with all that tells it, and ask for a new proof."""
