"""Batches, built ahead of the step that trains on them."""
