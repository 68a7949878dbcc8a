"""Inspection before and after a run: data, batches, memory, loss, time."""
