"""The five guarantees, checked on a user's own settings and data."""
