"""Cost of metrics: CPU milliseconds per scrape and per step, each over at least 10,000 calls.

    python -m tools.bench_metrics [--calls 10000]      writes benchmarks/bench_metrics.json

Measured in CPU seconds of the working process, because wall time on a shared machine is not comparable. Records are
those of a run with 8 ranks on the node and 20 sources. The cost of a step is the cost of the loop's calls: phases (of
8 micro-batches), the record, the compile clock and the check for a profile request; on rank 0, which also writes the
line, and on another rank.
"""

import argparse
import os
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from bigmodel.checks.scratch import scratch_folder
from bigmodel.metrics.exporter import Ranks
from bigmodel.metrics.phases import CompileTime, Phases
from bigmodel.metrics.profiling import Profiler
from bigmodel.metrics.recorder import Flops, LossGroup, Metrics, Seat, StepRecord
from tools.measure import ROOT, Record

RANKS, SOURCES, MICRO_BATCHES, COLLECTIVES = 8, 20, 8, 12


def step_record(step: int, seconds: float) -> StepRecord:
    return StepRecord(
        step=step,
        loss=2.5,
        gradient_norm=0.5,
        learning_rate=1e-3,
        targets=8_000_000,
        positions=8_000_000,
        padding=4_000,
        documents=9_000,
        step_seconds=seconds,
        data_wait_seconds=0.001,
        imbalance=1.01,
        flops=Flops(4e17, 5e17, 4.5e17),
        parts=tuple(LossGroup("causal", f"source-{n}", 1e6, 400_000) for n in range(SOURCES)),
        slowest_rank=3,
        slowest_rank_lag_seconds=0.01,
    )


def a_step(metrics: Metrics, phases: Phases, profiler: Profiler, compile_time: CompileTime) -> Callable[[int], None]:
    """The calls of the training loop and the engine in a step, without training."""

    def step(number: int) -> None:
        profiler.step()
        phases.add("data", 0.001)
        for _ in range(MICRO_BATCHES):
            with phases("forward"):
                pass
            with phases("backward"):
                pass
        for _ in range(COLLECTIVES):
            with phases("communication"):
                pass
        with phases("optimizer"):
            pass
        compile_time.take()
        metrics.record_step(step_record(number, metrics.lap()), phases.take())

    return step


def milliseconds_a_call(call: Callable[[int], object], calls: int) -> float:
    began = time.process_time()
    for number in range(1, calls + 1):
        call(number)
    return (time.process_time() - began) / calls * 1e3


@contextmanager
def a_node(directory: Path) -> Iterator[Metrics]:
    """Rank 0 with its exporter, and the records of seven more ranks, written by this process."""
    with Metrics(directory, seat=Seat(0, RANKS, 0, 0, RANKS), start="bench") as metrics:
        others = []
        for rank in range(1, RANKS):
            others.append(Metrics(directory, seat=Seat(rank, RANKS, 0, rank, RANKS), start="bench"))
            others[-1].record_step(step_record(1, 1.0), {"forward": 0.3, "backward": 0.6, "communication": 0.05})
        metrics.record_step(step_record(1, 1.0), {"forward": 0.3, "backward": 0.6, "communication": 0.05})
        yield metrics
        for other in others:
            other.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    calls = parser.parse_args().calls
    record = Record(ROOT / "benchmarks", "bench_metrics", "cpu")
    phases, compile_time = Phases(torch.device("cpu")), CompileTime()
    with scratch_folder() as scratch, a_node(scratch) as metrics:
        other = Metrics(scratch, seat=Seat(1, RANKS, 0, 1, RANKS), start="bench")
        for name, one in (("rank 0", metrics), ("another rank", other)):
            profiler = Profiler(one.folder, 0)
            cost = milliseconds_a_call(a_step(one, phases, profiler, compile_time), calls)
            profiler.close()
            record.add({"case": "step", "contender": name, "cpu_ms": round(cost, 4), "calls": calls})
        cost = milliseconds_a_call(lambda number: look(other.folder), calls)
        record.add({"case": "look for a request", "contender": "one stat", "cpu_ms": round(cost, 5), "calls": calls})
        ranks = Ranks(metrics.folder, scratch)
        few = max(1, calls // 10)
        cost = milliseconds_a_call(lambda number: render(ranks), few)
        record.add({"case": "page made", "contender": "8 ranks", "cpu_ms": round(cost, 4), "calls": few})
        record.add({"case": "scrape", "contender": "exporter, as fast as asked", **scrapes(metrics, calls)})
        other.close()
    record.show(["case", "contender", "cpu_ms", "calls"])


def look(folder: Path) -> None:
    with suppress(OSError):
        os.stat(folder / "profile.json")


def render(ranks: Ranks) -> bytes:
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(ranks)
    return generate_latest(registry)


def scrapes(metrics: Metrics, calls: int) -> dict[str, float]:
    """CPU time of the exporter process over `calls` sequential HTTP requests."""
    port = int(metrics.endpoint.rpartition(":")[2])
    exporter = next(
        process
        for process in psutil.Process().children()
        if "bigmodel.metrics.exporter" in process.cmdline()
        and any(c.laddr.port == port for c in process.net_connections("tcp"))
    )
    before, began = sum(exporter.cpu_times()[:2]), time.monotonic()
    size = 0
    for _ in range(calls):
        with urllib.request.urlopen(f"http://{metrics.endpoint}/metrics", timeout=30) as answer:
            size = len(answer.read())
    wall, spent = time.monotonic() - began, sum(exporter.cpu_times()[:2]) - before
    return {
        "cpu_ms": round(spent / calls * 1e3, 4),
        "calls": calls,
        "scrapes_per_second": round(calls / wall),
        "page_bytes": size,
    }


if __name__ == "__main__":
    main()
