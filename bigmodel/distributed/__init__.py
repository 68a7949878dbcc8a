"""Ranks: meeting, consistency check, signals."""
