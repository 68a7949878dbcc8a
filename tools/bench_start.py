"""CPU seconds of a start beside the import of torch and DeepSpeed alone, in turn.

    python -m tools.bench_start [--pairs 10] [--against CHECKOUT]      writes benchmarks/bench_start.json, minutes

The run: configs/tiny.toml on one rank in this process's environment, one step, its save and its summary, no evaluation;
then the same command again, which finds the run finished. --against: the same of another checkout of bigmodel. CPU
seconds are those of a whole process and its children, user and system.
"""

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bigmodel.checks.scratch import scratch_folder
from tools.measure import ROOT, Record

IMPORTS = "import of torch and DeepSpeed"
RUN_FILE = "configs/tiny.toml"
SETTINGS = {
    "training.steps": 1, "schedule.warmup_steps": 0, "schedule.decay_steps": 0, "evaluation.at_end": "false",
    "checkpoint.every_steps": 1,
}  # fmt: skip


def main(
    pairs: Annotated[int, typer.Option(help="measurements of each side")] = 10,
    against: Annotated[Path | None, typer.Option(help="another checkout, with the same commands")] = None,
    output: Annotated[Path, typer.Option(help="folder of the result")] = ROOT / "benchmarks",
) -> None:
    """Measure, write bench_start.json and print CPU seconds and ratios."""
    record = Record(output, "bench_start", "cpu")
    trees = {"": ROOT} | ({f", {against.name}": against} if against else {})
    found: dict[str, list[float]] = {}
    with scratch_folder() as work:
        words = ["prepare", RUN_FILE, "--set", f"data.directory={work / 'data'}"]
        cpu_seconds([sys.executable, "-m", "bigmodel", *words], ROOT)
        for _ in range(pairs):
            found.setdefault(IMPORTS, []).append(cpu_seconds([sys.executable, "-c", "import torch, deepspeed"], work))
            for label, tree in trees.items():
                for what in ("a run of one step", "the finished run again"):
                    found.setdefault(what + label, []).append(cpu_seconds(train(work), tree))
                shutil.rmtree(work / "run")
    for name, seconds in found.items():
        ratios = [one / base for one, base in zip(seconds, found[IMPORTS], strict=True)]
        record.add({"case": RUN_FILE, "contender": name, "cpu_s": spread(seconds), "of_the_import": spread(ratios)})
    record.show(["case", "contender", "cpu_s", "of_the_import"])


def train(work: Path) -> list[str]:
    """The command, in a run directory under `work`."""
    settings = SETTINGS | {"data.directory": work / "data", "run.directory": work / "run"}
    options = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return [sys.executable, "-m", "bigmodel", "train", RUN_FILE, *options]


def cpu_seconds(command: Sequence[str], folder: Path) -> float:
    """Of a command that succeeds, run in a folder; what it prints is shown only if it fails."""
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}\n{printed}")
    return usage.ru_utime + usage.ru_stime


def spread(values: Sequence[float]) -> str:
    """Median, least, greatest and number."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}, n={len(values)})"


if __name__ == "__main__":
    typer.run(main)
