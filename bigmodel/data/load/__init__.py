"""Batches: what the model gets, built ahead of the step that trains on it."""
