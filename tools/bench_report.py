"""Cost of `bigmodel report --html` for a long run: CPU seconds, memory, size of the page.

    python -m tools.bench_report [--steps 100000] [--rounds 10] [--against CHECKOUT]
                                                        writes benchmarks/bench_report.json; --against: in turn with it

The run is made: its first line is written by the recorder itself, the others are that line with other numbers, for 8
ranks, four sources and norms every hundredth step; an evaluation and a save each thousandth, four restarts. A row is
the median of the rounds over whole processes, imports included. Goals: 5 s, 500 MB, a page of 1.5 MB.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bigmodel.checks.scratch import scratch_folder
from bigmodel.metrics.recorder import Flops, LossGroup, Metrics, Seat, StepRecord
from bigmodel.metrics.run_accounting import RunAccounting
from bigmodel.run_directory import read_json_lines
from tools.measure import ROOT, Record

RANKS, SOURCES, STARTS = 8, ("web", "code", "books", "papers"), 5
NORMS_EVERY, SAVES_EVERY = 100, 1000
PHASES = {"data": 0.01, "forward": 0.2, "backward": 0.4, "communication": 0.1, "optimizer": 0.05}


def step_record(chance: random.Random, step: int, steps: int) -> StepRecord:
    loss = 2.0 + 6.0 * math.exp(-6.0 * step / steps) + chance.gauss(0.0, 0.05)
    layers = ("attention", "embedding", "feed_forward", "norm")
    norms = {name: {"weight_norm": 10.0 + step / steps, "update_norm": chance.random() / 100} for name in layers}
    return StepRecord(
        step=step,
        loss=loss,
        gradient_norm=chance.lognormvariate(0.0, 0.3),
        learning_rate=1e-3 * (1 - step / steps),
        targets=1_000_000,
        positions=1_000_000,
        padding=chance.randrange(2000),
        documents=chance.randrange(800, 1200),
        step_seconds=chance.lognormvariate(-0.3, 0.05),
        data_wait_seconds=0.01 * chance.random(),
        flops=Flops(4e15, 5e15, 4.5e15),
        parts=tuple(LossGroup("causal", name, loss * 250_000, 250_000) for name in SOURCES),
        z_loss=50.0,
        slowest_rank=chance.randrange(RANKS),
        slowest_rank_lag_seconds=chance.expovariate(100.0),
        lag_ms=tuple(round(chance.gauss(0.0, 10.0), 1) for _ in range(RANKS)),
        norms=norms if step % NORMS_EVERY == 0 else None,
    )


def write_run(folder: Path, steps: int) -> Path:
    """A run directory with metrics.jsonl alone."""
    folder.mkdir()
    chance = random.Random(1)
    phases = {name: seconds * chance.uniform(0.9, 1.1) for name, seconds in PHASES.items()}
    with Metrics(
        folder, seat=Seat(0, RANKS, 0, 0, 1), facts={"parameters": 10**9, "device_peak_flops": 1e15}
    ) as metrics:
        metrics.record_step(step_record(chance, 1, steps), phases)
    start, first, *_ = read_json_lines(folder / "metrics.jsonl")
    with open(folder / "metrics.jsonl", "w") as file:
        for line in lines(chance, start, first, steps):
            file.write(json.dumps(line) + "\n")
    return folder


def lines(chance: random.Random, start: dict[str, Any], first: dict[str, Any], steps: int) -> Iterator[dict[str, Any]]:
    """In order, each with the time that its lap gives."""
    accounting, now = RunAccounting(), start["time"]
    flops, parts, phases = first["flops"], first["parts"], first["phases"]
    for step in range(steps):
        if step % -(-steps // STARTS) == 0:
            carried = accounting.carry(now + 60.0 * (step > 0), "died" if step else None) if step else start["carried"]
            now += 60.0 + start["lap"]
            yield _told(accounting, {**start, "time": now, "step": step, "carried": carried})
        record = step_record(chance, step + 1, steps)
        own = {name: getattr(record, name) for name in StepRecord.__slots__ if name not in ("flops", "parts")}
        now += record.step_seconds
        shares = [{**part, "nats": record.loss * part["targets"]} for part in parts]
        more = {"time": now, "lap": record.step_seconds, "flops": flops, "parts": shares, "phases": phases}
        yield _told(accounting, {**first, **own, **more})
        if (step + 1) % SAVES_EVERY == 0:
            loss = {"step": step + 1, "nats_per_token": record.loss, "bits_per_byte": record.loss / 3, "parts": shares}
            now += 10.0
            yield _told(accounting, {"kind": "evaluation", **loss, "seconds": 9.0, "lap": 10.0, "time": now})
            now += 2.0
            save = {"kind": "checkpoint", "step": step + 1, "bytes": 10**10, "seconds": 20.0, "lap": 2.0, "time": now}
            yield _told(accounting, save)


def _told(accounting: RunAccounting, line: dict[str, Any]) -> dict[str, Any]:
    """The line; the accounting has its seconds, for the next start."""
    if line["kind"] == "step":
        accounting.add_step_seconds(line["step"], line["time"], line["lap"], line["data_wait_seconds"], 0.0, False, {})
    else:
        accounting.add(line)
    return line


def measured(command: list[str], checkout: Path) -> tuple[float, float, int]:
    """CPU seconds, wall seconds and peak bytes of a process that runs the code of a checkout."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=checkout, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, command
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - began, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--against", type=Path, help="another checkout of this project, measured in turn")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks")
    given = parser.parse_args()
    record = Record(given.output, "bench_report", "cpu")
    sides = {"report --html": ROOT, **({"report --html, before": given.against} if given.against else {})}
    with scratch_folder() as folder:
        run, page = write_run(folder / "run", given.steps), folder / "page.html"
        command = [sys.executable, "-m", "bigmodel", "report", str(run), "--html", str(page)]
        size = (run / "metrics.jsonl").stat().st_size
        rounds: dict[str, list[tuple[float, ...]]] = {side: [] for side in sides}
        for _ in range(given.rounds):
            for side, checkout in sides.items():
                rounds[side].append((*measured(command, checkout), page.stat().st_size))
    for side, found in rounds.items():
        cpu, wall, peak, pages = zip(*found, strict=True)
        numbers = {
            "cpu_s": round(statistics.median(cpu), 2),
            "least_s": round(min(cpu), 2),
            "most_s": round(max(cpu), 2),
            "wall_s": round(statistics.median(wall), 2),
            "peak_mb": round(max(peak) / 1e6),
            "page_mb": round(max(pages) / 1e6, 3),
            "lines_mb": round(size / 1e6),
        }
        record.add({"case": f"{given.steps:,} steps, {given.rounds} rounds", "contender": side, **numbers})
    record.show(("case", "contender", "cpu_s", "least_s", "most_s", "wall_s", "peak_mb", "page_mb", "lines_mb"))


if __name__ == "__main__":
    main()
