"""Settings: what a run file, and the DeepSpeed JSON it names, may say. Imports neither torch nor deepspeed."""
