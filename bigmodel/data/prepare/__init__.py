"""From text to shards: read, clean, tokenize, write, verify."""
