"""Settings of a run file and of its DeepSpeed JSON. Imports neither torch nor deepspeed."""
