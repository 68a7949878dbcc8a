"""Benchmark of a mixture of experts on CPU: forward and backward beside the dense model of equal active parameters.

    python -m tools.bench_experts             # 25M active parameters, 8 experts, 2 a token; 10 pairs

Both models have 6 layers of 512 channels and a vocabulary of 8,192; the dense one a feed-forward layer of 1,536, the
mixture experts of 768. Both compute the same packs in turn, in one process and thread: CPU seconds of forward and
backward. A row has the medians, and the median, smallest and largest ratio of the pairs. The optimizer is not in it: it
updates 2.7 times the parameters.
"""

import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from bigmodel.config.expert_settings import ExpertSettings
from bigmodel.config.settings import DataSettings, ModelSettings
from bigmodel.data.load.batch import Batch, build_batch, make_dropout_seeds
from bigmodel.data.plan.shuffle import Chunk
from bigmodel.model.init import init_weights
from bigmodel.model.transformer import Transformer
from tools.measure import Record

VOCABULARY, DOCUMENT = 8_192, 256
COMMON = {"num_layers": 6, "hidden_size": 512, "num_heads": 8, "num_kv_heads": 4}


def make_models(dtype: torch.dtype) -> tuple[Transformer, Transformer]:
    """The dense model, and the mixture of experts."""
    settings = (
        ModelSettings(**COMMON, intermediate_size=1_536),
        ModelSettings(**COMMON, intermediate_size=768, experts=ExpertSettings(count=8, per_token=2)),
    )
    models = [Transformer(one, VOCABULARY) for one in settings]
    for model in models:
        init_weights(model, seed=1)
        model.to(dtype)
    return models[0], models[1]


def make_batch(positions: int, seed: int) -> Batch:
    """Documents of DOCUMENT random tokens, without padding."""
    documents = positions // DOCUMENT
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCABULARY, (documents, DOCUMENT + 1), generator=generator).numpy()
    data = DataSettings(max_document_length=DOCUMENT, sequence_length=positions, max_documents=documents)
    pack = tuple(Chunk(0, 0, row, 0, DOCUMENT, 0) for row in range(documents))
    return build_batch([pack], lambda chunk: tokens[chunk.row], data, make_dropout_seeds(1, 0, [0], positions))


def cpu_seconds(model: Transformer, batch: Batch) -> float:
    started = time.process_time()
    (model(batch) / len(batch.tokens)).backward()
    seconds = time.process_time() - started
    model.zero_grad(set_to_none=True)
    return seconds


def main(
    positions: Annotated[int, typer.Option(help="of a micro-batch")] = 2_048,
    pairs: Annotated[int, typer.Option(help="of measurements")] = 10,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = Path("benchmarks"),
) -> None:
    """Time both models in turn."""
    torch.set_num_threads(1)
    models = make_models(getattr(torch, precision))
    record = Record(out, "bench_experts", "cpu")
    measured = []
    for number in range(-1, pairs):  # the first one warms up
        batch = make_batch(positions, seed=number + 2)
        order = (0, 1) if number % 2 else (1, 0)
        seconds = {place: cpu_seconds(models[place], batch) for place in order}
        if number >= 0:
            measured.append((seconds[0], seconds[1]))
    ratios = [mixture / dense for dense, mixture in measured]
    dense, mixture = (statistics.median(one) for one in zip(*measured, strict=True))
    record.add({
        "case": f"{positions:,} positions, {precision}", "contender": "mixture of experts", "pairs": pairs,
        "dense_us_per_token": 1e6 * dense / positions, "experts_us_per_token": 1e6 * mixture / positions,
        "ratio": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios),
        "parameters": [sum(one.numel() for one in model.parameters()) for model in models],
    })  # fmt: skip
    record.show(["case", "dense_us_per_token", "experts_us_per_token", "ratio", "smallest", "largest"])


if __name__ == "__main__":
    typer.run(main)
