"""Tiny models that are trained on the spot, for examples and benchmarks."""
