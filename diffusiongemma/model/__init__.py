"""The network: Linen modules that hold only parameters."""
