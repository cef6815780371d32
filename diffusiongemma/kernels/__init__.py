"""Compute kernels, each with a twin in plain JAX, here or in `model`."""
