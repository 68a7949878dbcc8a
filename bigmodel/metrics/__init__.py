"""Measurements during a run, and the process that serves them to Prometheus."""
