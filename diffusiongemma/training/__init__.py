"""The training run: data, loss, optimiser, checkpoints and evaluation."""
