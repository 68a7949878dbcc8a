"""Suggestions of `show data`: settings that suit the data better."""
