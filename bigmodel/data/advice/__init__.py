"""Suggestions of `show data`: settings that would suit the data better."""
