"""Shards on disk or in an object store, their manifest and their tokenizer."""
