"""The model: architecture, initial weights, weights of Hugging Face models."""
