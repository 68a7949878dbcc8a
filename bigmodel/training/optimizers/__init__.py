"""Optimizers on DeepSpeed's flat fp32 masters."""
