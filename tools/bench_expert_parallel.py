"""Benchmark of ranks that share experts, on two gloo ranks of one CPU: a layer beside the same layer unshared.

    python -m tools.bench_expert_parallel     # 8 experts of 768, rows of 512 channels; 10 pairs

Both ranks have the same number of rows, spread evenly over the experts, so that half of them go to the other rank. CPU
seconds of a rank for forward and backward, both sides in turn in one run; the median, smallest and largest ratio of the
pairs. Without rows the rest is what an exchange costs by itself: counts there, nothing there and back.
"""

import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from bigmodel.config.expert_settings import ExpertSettings
from bigmodel.config.settings import ModelSettings
from bigmodel.launcher.network import free_port
from bigmodel.metrics.phases import Phases
from bigmodel.model.experts import Experts
from bigmodel.training.zero.expert_parallel import ExpertParallel
from tools.measure import Record

RANKS, EXPERTS, WIDTH, CHANNELS = 2, 8, 768, 512


def make_layer(rank: int, shared: bool) -> Experts:
    """Random weights; shared: of this rank's half of the experts."""
    settings = ModelSettings(
        hidden_size=CHANNELS, num_heads=8, experts=ExpertSettings(count=EXPERTS, per_token=2, width=WIDTH)
    )
    layer = Experts(settings, EXPERTS, WIDTH)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if shared:
        ExpertParallel(torch.nn.ModuleList([layer]), RANKS, rank, Phases(torch.device("cpu"))).connect(dist.group.WORLD)
    return layer


def cpu_seconds(layer: Experts, rows: int) -> float:
    x_AH = torch.randn(rows, CHANNELS, requires_grad=True)
    offsets_E1 = torch.arange(EXPERTS + 1, dtype=torch.int32) * (rows // EXPERTS)
    dist.barrier()
    started = time.process_time()
    layer(x_AH, offsets_E1).sum().backward()
    seconds = time.process_time() - started
    layer.zero_grad(set_to_none=True)
    return seconds


def measure(rank: int, port: int, rows: int, pairs: int, answers: Any) -> None:
    """On a rank: pairs of (alone, shared, shared without rows)."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    alone, shared = make_layer(rank, False), make_layer(rank, True)
    found = []
    for number in range(-1, pairs):  # the first one warms up
        if number % 2:
            one, two = cpu_seconds(alone, rows), cpu_seconds(shared, rows)
        else:
            two, one = cpu_seconds(shared, rows), cpu_seconds(alone, rows)
        found.append((one, two, cpu_seconds(shared, 0)))
    if rank == 0:
        answers.put(found[1:])
    dist.barrier()
    dist.destroy_process_group()


def main(
    rows: Annotated[int, typer.Option(help="of a rank: its tokens times 2")] = 4_096,
    pairs: Annotated[int, typer.Option(help="of measurements")] = 10,
    out: Annotated[Path, typer.Option(help="folder for the JSON")] = Path("benchmarks"),
) -> None:
    """Time both sides on two ranks."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    answers = context.Queue()
    ranks = [context.Process(target=measure, args=(rank, port, rows, pairs, answers)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    found = answers.get(timeout=600)
    for process in ranks:
        process.join()
    alone, shared, empty = (statistics.median(one) for one in zip(*found, strict=True))
    ratios = [two / one for one, two, _ in found]
    record = Record(out, "bench_expert_parallel", "cpu")
    record.add({
        "case": f"{rows:,} rows of {CHANNELS}, {EXPERTS} experts of {WIDTH}", "contender": "2 ranks share",
        "pairs": pairs, "alone_ms": 1e3 * alone, "shared_ms": 1e3 * shared, "without_rows_ms": 1e3 * empty,
        "ratio": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios),
    })  # fmt: skip
    record.show(["case", "alone_ms", "shared_ms", "without_rows_ms", "ratio", "smallest", "largest"])


if __name__ == "__main__":
    typer.run(main)
