"""Objectives: from a chunk of a document to an example, what the model reads and what it predicts."""
