"""Checks of the five guarantees on a user's settings and data."""
