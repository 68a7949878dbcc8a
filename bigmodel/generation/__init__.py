"""Text from a model: a key-value cache, sampling, beam search, and a loop over many requests at once."""
