"""The plan: which document comes when, in which pack, on which rank. Pure functions of settings and seed."""
