"""Checkpoints: format, saver, copies in an object store."""
