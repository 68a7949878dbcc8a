"""Objectives: from a chunk of a document to an example, the inputs and labels of the model."""
