"""Programs for developers: benchmarks, fault injection, generators of documents. Run as `python -m tools.NAME`.
Nothing imports them."""
