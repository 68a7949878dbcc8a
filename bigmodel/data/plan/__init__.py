"""The plan: which chunk comes when, in which pack, on which rank. Pure functions of seed, lengths and settings."""
