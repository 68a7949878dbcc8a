"""Hugging Face models as ours and ours as theirs: settings (`configs`), weights (`weights`), folders (`folder`)."""
