"""Ranks: how they meet, what they agree on, which signals end them."""
