"""The network: Linen modules that hold parameters and nothing else."""
