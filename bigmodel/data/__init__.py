"""The data's journey: text to shards (prepare, store), order (plan), examples (objectives), batches (load)."""
