"""Kernels for GPUs, in Pallas: Triton, and Mosaic for Hopper."""
