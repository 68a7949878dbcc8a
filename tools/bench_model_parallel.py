"""Benchmark of ranks that share a model or packed sequences, on gloo ranks of one CPU.

    python -m tools.bench_model_parallel                      # all cases, 10 rounds
    python -m tools.bench_model_parallel --case "8k, mixed"   # one case

Each contender is a group of processes of one thread, which hold an engine and do a step together. In each round every
contender of a case does one step of the same documents, one after the other. Of a step:

- `cpu_us_per_token`: CPU seconds of all ranks, by the tokens of the step; `ratio`: to those of the case's first
  contender in the same round, median, smallest and largest;
- `slowest`: the largest CPU seconds of a rank over the mean of the ranks, median of the rounds;
- `sent_MB`: bytes that a rank sends to other ranks, counted from the arguments of torch.distributed: of n ranks
  (n - 1) / n of what is exchanged, gathered or scattered, twice that of what is added up, as a ring would;
- `peak_MB`: most memory of a rank during a step above its memory before the model was made (Linux; largest of ranks).
"""

import contextlib
import inspect
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import typer

from bigmodel.config.settings import DataSettings, Settings
from bigmodel.data.load.batch import Batch, build_batch, make_dropout_seeds
from bigmodel.data.plan.shuffle import Chunk
from bigmodel.launcher.network import free_port
from tools.measure import Record, Row

WARM_UP, MB = 1, 1e6
Pack = Sequence[int]  # lengths of its documents


class Model(NamedTuple):
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocabulary: int


class Contender(NamedTuple):
    """What the ranks share, and how."""

    stage: int
    tensors: bool = False
    sequences: str = ""  # training.sequence_parallel_method
    contiguous: bool = False  # positions of a rank, where keys are gathered


class Case(NamedTuple):
    ranks: int
    model: Model
    packs: list[Pack]  # of equal length
    contenders: dict[str, Contender]


WIDE = Model(8, 512, 8, 4, 1280, 8192)  # 26 M parameters
SMALL = Model(1, 128, 4, 2, 384, 1024)
# Of ZeRO 3: as with a model that is too large to stay gathered from forward to backward.
GATHERED_LITTLE = {
    "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 4_000_000,
}  # fmt: skip
MATRICES = {"ZeRO 1": Contender(1), "ZeRO 3": Contender(3), "tensors": Contender(1, tensors=True)}
SEQUENCES = {
    "ulysses": Contender(1, sequences="ulysses"),
    "all_gather": Contender(1, sequences="all_gather"),
    "all_gather, contiguous": Contender(1, sequences="all_gather", contiguous=True),
}
MIXED = [4096, 2048, *[256] * 8]
CASES = {
    "26 M, 2 ranks": Case(2, WIDE, [[300, 150, 62]] * 2, MATRICES),
    "8k, one document": Case(2, SMALL, [[8192]], SEQUENCES),
    "8k, mixed": Case(2, SMALL, [MIXED], SEQUENCES),
    "8k, 64 documents": Case(2, SMALL, [[128] * 64], SEQUENCES),
    "8k, mixed, 4 ranks": Case(4, SMALL, [MIXED], SEQUENCES),
    "26 M, 4 ranks": Case(4, WIDE, [[300, 150, 62]] * 4, MATRICES),
    "quick": Case(2, Model(1, 32, 2, 2, 64, 64), [[40, 24]] * 2, MATRICES | SEQUENCES),
}


class Group:
    """The processes of one contender."""

    def __init__(self, case: str, contender: str) -> None:
        context, port = multiprocessing.get_context("spawn"), free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(CASES[case].ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=run_rank, args=(case, contender, rank, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def step(self) -> list[Row]:
        """Of each rank: cpu (seconds), sent and peak (bytes)."""
        for pipe in self._pipes:
            pipe.send(True)
        return [pipe.recv() for pipe in self._pipes]

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def run_rank(case_name: str, contender_name: str, rank: int, port: int, pipe: Connection) -> None:
    """A rank: a step for each thing received."""
    from bigmodel.distributed.world import start_world

    case = CASES[case_name]
    contender = case.contenders[contender_name]
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.ranks, "LOCAL_WORLD_SIZE": case.ranks}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sent = count_sent()
    world = start_world()
    step, before = make_step(case, contender, world)
    while pipe.recv():
        sent[0], began = 0, time.process_time()
        _forget_peak()
        step()
        seconds = time.process_time() - began
        pipe.send({"cpu": seconds, "sent": sent[0], "peak": _memory("VmHWM") - before})


def make_step(case: Case, contender: Contender, world: Any) -> tuple[Callable[[], None], int]:
    """The training step of this rank; its memory before the model was made, in bytes."""
    from bigmodel.checks.scratch import scratch_folder
    from bigmodel.config.deepspeed_config import resolve_deepspeed
    from bigmodel.model.init import init_weights
    from bigmodel.model.recurrent.model import build_model
    from bigmodel.training.zero import context_parallel
    from bigmodel.training.zero.engine import Engine, creation, import_deepspeed
    from tools.bench_position_sharing import contiguous

    if contender.contiguous:
        context_parallel.share_positions = contiguous  # type: ignore[assignment]
    sharing = bool(contender.tensors or contender.sequences)
    mine = range(len(case.packs)) if sharing else range(world.rank, len(case.packs), world.size)
    with scratch_folder() as folder:
        path = folder / "zero.json"
        zero = {"stage": contender.stage} | GATHERED_LITTLE
        path.write_text(json.dumps({"train_micro_batch_size_per_gpu": len(mine), "zero_optimization": zero}))
        effective, settings = resolve_deepspeed(settings_of(case, contender, path), world.size)
    import_deepspeed()
    before = _memory("VmRSS")
    with creation(effective) as whole:
        model = build_model(settings.model, case.model.vocabulary)
    init_weights(model, 1, whole)
    engine = Engine(model, settings, effective, world)
    batch, num_labels = batch_of(case, mine), sum(sum(pack) for pack in case.packs)

    def step() -> None:
        engine.micro_batch(batch, num_labels, last=True)
        engine.gradient_norm()
        engine.update(1e-3)

    return step, before


def settings_of(case: Case, contender: Contender, path: Path) -> Settings:
    sizes = {name: size for name, size in case.model._asdict().items() if name != "vocabulary"}
    model = sizes | {"tied_embeddings": True}
    training: dict[str, Any] = {"global_batch_size": len(case.packs), "steps": 1000, "deepspeed": str(path)}
    training["precision"] = "fp32"
    if contender.tensors:
        training["tensor_parallel_ranks"] = case.ranks
    if contender.sequences:
        training |= {"sequence_parallel_ranks": case.ranks, "sequence_parallel_method": contender.sequences}
    size = sum(case.packs[0])
    data = {"sequence_length": size, "max_document_length": size}
    return Settings.model_validate({"model": model, "training": training, "data": data})


def batch_of(case: Case, packs: Sequence[int]) -> Batch:
    """The micro-batch of these packs, random tokens."""
    size, generator = sum(case.packs[0]), np.random.default_rng(1)
    most = max(map(len, case.packs))
    data = DataSettings(max_document_length=size, sequence_length=size, max_documents=most)
    plan = [tuple(Chunk(0, 0, 0, 0, length, 0) for length in case.packs[pack]) for pack in packs]
    seeds = make_dropout_seeds(1, 0, packs, size)
    return build_batch(plan, lambda chunk: generator.integers(3, case.model.vocabulary, chunk.length + 1), data, seeds)


SENT: dict[str, tuple[str, float]] = {  # function of torch.distributed: its whole tensor, and how often it travels
    "all_gather_into_tensor": ("output_tensor", 1.0),
    "reduce_scatter_tensor": ("input", 1.0),
    "all_to_all_single": ("input", 1.0),
    "all_reduce": ("tensor", 2.0),
    "reduce": ("tensor", 1.0),
    "broadcast": ("tensor", 1.0),
}


def count_sent() -> list[float]:
    """Count from now on; the list's one number is the bytes that this rank sent."""
    total = [0.0]

    def counted(name: str, parameter: str, times: float) -> Any:
        function = getattr(dist, name)
        signature = inspect.signature(function)

        def call(*positional: Any, **named: Any) -> Any:
            given = signature.bind(*positional, **named).arguments
            ranks = dist.get_world_size(given.get("group"))
            total[0] += times * (ranks - 1) / ranks * given[parameter].nbytes
            return function(*positional, **named)

        return call

    for name, (parameter, times) in SENT.items():
        setattr(dist, name, counted(name, parameter, times))
    return total


def _memory(field: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def rows_of(case: Case, found: dict[str, list[list[Row]]]) -> Iterator[Row]:
    """found: contender -> round -> rank."""
    tokens = sum(sum(pack) for pack in case.packs)
    totals = {name: [sum(rank["cpu"] for rank in ranks) for ranks in rounds] for name, rounds in found.items()}
    first = next(iter(totals.values()))
    for name, rounds in found.items():
        ratios = [total / other for total, other in zip(totals[name], first, strict=True)]
        slowest = [max(rank["cpu"] for rank in ranks) * len(ranks) / sum(rank["cpu"] for rank in ranks)
                   for ranks in rounds]  # fmt: skip
        yield {
            "contender": name, "rounds": len(rounds),
            "cpu_us_per_token": 1e6 * statistics.median(totals[name]) / tokens,
            "ratio": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios),
            "slowest": statistics.median(slowest), "slowest_smallest": min(slowest), "slowest_largest": max(slowest),
            "sent_MB": max(rank["sent"] for rank in rounds[-1]) / MB,
            "peak_MB": max(rank["peak"] for ranks in rounds for rank in ranks) / MB,
        }  # fmt: skip


def measure(case: str, rounds: int) -> dict[str, list[list[Row]]]:
    """contender -> round -> rank."""
    with contextlib.ExitStack() as ending:
        groups = {name: Group(case, name) for name in CASES[case].contenders}
        for group in groups.values():
            ending.callback(group.end)
        found: dict[str, list[list[Row]]] = {name: [] for name in groups}
        for number in range(WARM_UP + rounds):
            for name, group in groups.items():
                ranks = group.step()
                if number >= WARM_UP:
                    found[name].append(ranks)
    return found


def main(
    case: Annotated[list[str] | None, typer.Option(help=f"one of {'; '.join(CASES)}; may be repeated")] = None,
    rounds: Annotated[int, typer.Option(help="steps of each contender")] = 10,
    out: Annotated[Path, typer.Option(help="folder of the JSON")] = Path("benchmarks"),
) -> None:
    """Measure every contender of every case; the file is complete after each case."""
    record = Record(out, "bench_model_parallel", "cpu")
    for name in case or [name for name in CASES if name != "quick"]:
        for row in rows_of(CASES[name], measure(name, rounds)):
            record.add({"case": name} | row)
    record.show(
        ["case", "contender", "cpu_us_per_token", "ratio", "smallest", "largest", "slowest", "sent_MB", "peak_MB"]
    )


if __name__ == "__main__":
    typer.run(main)
