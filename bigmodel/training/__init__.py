"""The training loop, the learning rate, the summary at the end of a run."""
