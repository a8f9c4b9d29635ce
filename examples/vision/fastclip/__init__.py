"""FastClip: spectral norms of layers as a model runs them, a bound on them, and AMUN under it."""
