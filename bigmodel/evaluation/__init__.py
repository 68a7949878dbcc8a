"""How good a model is: validation loss, generated text, baselines."""
