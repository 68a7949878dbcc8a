"""Quality of a model: validation loss, generated text, baselines."""
