"""The journey of the data: text to shards (prepare, store), a planned order (plan), batches (load)."""
