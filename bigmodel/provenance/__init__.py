"""What a model was trained on, step by step, from the plan of its run."""
