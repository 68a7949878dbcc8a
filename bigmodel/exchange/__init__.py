"""Models in and out: export to Hugging Face, start from a Hugging Face folder."""
