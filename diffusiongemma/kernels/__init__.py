"""Compute kernels, each beside a plain-XLA twin of the same signature."""
