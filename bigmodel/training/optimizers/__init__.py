"""Optimizers, as DeepSpeed runs them on flat fp32 masters."""
