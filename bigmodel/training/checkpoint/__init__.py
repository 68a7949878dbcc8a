"""Checkpoints: their format, how they are written, their copy in an object store."""
