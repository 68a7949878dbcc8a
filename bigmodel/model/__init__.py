"""The model: architecture, attention masks, initial weights, Hugging Face weights."""
