"""Programs for whoever works on bigmodel: benchmarks and drawings. Each runs as `python -m tools.NAME`. Nothing
imports them."""
