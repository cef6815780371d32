"""Data, loss and optimiser put together into a training run."""
