"""Meshes, processes, memory, and settings of a process."""
