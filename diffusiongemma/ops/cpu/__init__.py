"""Implementations that are faster on CPUs, in plain JAX."""
