"""A run file for a model of 30 k parameters on the tiny corpus: a step takes 20 ms."""

from pathlib import Path

RUN = """
[run]
directory = "{directory}"
seed = 3

[data]
directory = "{shards}"
context_tokens = 48
pack_tokens = 96
pack_documents = 8
lanes = 2
window_packs = 20

[model]
layers = 2
width = 32
heads = 4
key_value_heads = 2
feed_forward_width = 48
qk_norm = true
dropout = 0.1

[optimizer]
learning_rate = 0.01

[schedule]
warmup_steps = 2

[training]
steps = 10
packs_per_step = 4
precision = "{precision}"
deepspeed = "{deepspeed}"

[evaluation]
at_end = false

[checkpoint]
every_steps = 4
"""


def write_run(folder: Path, shards: Path, precision: str = "fp32", stage: int = 1, name: str = "run") -> Path:
    """`folder`/`name`.toml, which trains into `folder`/`name`; its DeepSpeed JSON has ZeRO `stage`."""
    deepspeed = folder / f"{name}-deepspeed.json"
    deepspeed.write_text(f'{{"zero_optimization": {{"stage": {stage}, "stage3_param_persistence_threshold": 0}}}}')
    run_file = folder / f"{name}.toml"
    run_file.write_text(
        RUN.format(directory=folder / name, shards=shards, precision=precision, deepspeed=deepspeed.name)
    )
    return run_file
