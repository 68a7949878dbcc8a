"""A run file for a model of 30 k parameters on the tiny corpus: a step takes 20 ms."""

from pathlib import Path

RUN = """
[run]
directory = "{directory}"
seed = 3

[data]
directory = "{shards}"
max_document_length = 48
sequence_length = 96
max_documents = 8
lanes = 2
packing_buffer = 20

[model]
num_layers = 2
hidden_size = 32
num_heads = 4
num_kv_heads = 2
intermediate_size = 48
qk_norm = true
dropout = 0.1
{experts}
[optimizer]
learning_rate = 0.01

[schedule]
warmup_steps = 2

[training]
steps = 10
global_batch_size = 4
precision = "{precision}"
deepspeed = "{deepspeed}"

[evaluation]
at_end = false

[checkpoint]
every_steps = 4
"""


# By model.experts.balance.
EXPERTS = {
    "": "",
    "loss": "\n[model.experts]\ncount = 4\nwidth = 24\nbalance_weight = 0.1\nrouter_z_weight = 0.01\n",
    "bias": '\n[model.experts]\ncount = 4\nwidth = 24\nshared = 1\nbalance = "bias"\nscores = "sigmoid"\n',
}


def write_run(
    folder: Path, shards: Path, precision: str = "fp32", stage: int = 1, name: str = "run", balance: str = ""
) -> Path:
    """Write `folder`/`name`.toml, which trains into `folder`/`name`, and its DeepSpeed JSON with ZeRO `stage`. balance:
    of experts; "": there are none."""
    deepspeed = folder / f"{name}-deepspeed.json"
    deepspeed.write_text(f'{{"zero_optimization": {{"stage": {stage}, "stage3_param_persistence_threshold": 0}}}}')
    run_file = folder / f"{name}.toml"
    run_file.write_text(
        RUN.format(
            directory=folder / name,
            shards=shards,
            precision=precision,
            deepspeed=deepspeed.name,
            experts=EXPERTS[balance],
        )
    )
    return run_file
