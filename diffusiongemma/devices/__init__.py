"""Meshes, processes, device memory, and process-wide settings."""
