"""launcher: starts the ranks of a run and ends them together. Never imports torch."""
