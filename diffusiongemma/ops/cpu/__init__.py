"""Ways to compute that are faster on CPUs, in plain JAX."""
