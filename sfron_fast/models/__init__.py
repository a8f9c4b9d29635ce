"""What is asked of a model whatever it computes: names, digests, modes, buffers."""
