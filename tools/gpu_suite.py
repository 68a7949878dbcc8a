"""One command for a short time on a GPU: correctness, then speed.

    python -m tools.gpu_suite

Most important first; each part runs in its own process and is killed at its limit, so the whole ends within 8 minutes
on a machine with nothing compiled. At most, in seconds:

    correctness                 140   tests/gpu, bf16 before other types; most of it is compilation
    hopper                       25   the same of attention(kernel="hopper"), on sm_90; says nothing about the others
    bench_attention             110   80 of rows, 30 of grace for the start, the last row and the plot
    bench_linear_cross_entropy   55   25 and 30
    bench_block                  45   15 and 30
    bench_seq2seq                50   20 and 30: whole training steps
    tune_attention               50   20 and 30: other tile shapes; a session with time left runs it alone for longer

Results are written at once, so a kill loses only the running measurement: benchmarks write their rows, this program
gpu_suite.json and gpu_suite.md. A part that fails or runs out of time does not stop the others. Exit code: 0 if the
tests passed, 1 if not; 2 without a GPU.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from tools.measure import ROOT, hardware

# Beyond a benchmark's own time limit: for its start, the last row and the plot.
GRACE_SECONDS = 30


@dataclass(frozen=True)
class Part:
    """`arguments` of python; a benchmark gets `seconds` as its limit and is killed GRACE_SECONDS later."""

    name: str
    arguments: tuple[str, ...]
    seconds: int
    is_benchmark: bool = True

    @property
    def limit_seconds(self) -> int:
        return self.seconds + (GRACE_SECONDS if self.is_benchmark else 0)


# Verbose, so the log of a stopped run shows its progress; compilation takes most of the time.
PYTEST = ("-m", "pytest", "-v", "--maxfail", "10", "--no-header", "-p", "no:cacheprovider", "--durations", "10")
CORRECTNESS: tuple[str, ...] = (
    *PYTEST,
    *("tests/gpu/test_linear_cross_entropy_on_gpu.py", "tests/gpu/test_attention_on_gpu.py"),
    *("tests/gpu/test_recurrent_on_gpu.py", "tests/gpu/test_linear_distillation_on_gpu.py"),
    "tests/gpu/test_experts_on_gpu.py",
)
HOPPER = (*PYTEST, "tests/gpu/test_attention_hopper_on_gpu.py")

PARTS = (
    Part("correctness", CORRECTNESS, 140, False),
    Part("hopper", HOPPER, 25, False),
    Part("bench_attention", ("-m", "tools.bench_attention"), 80),
    Part("bench_linear_cross_entropy", ("-m", "tools.bench_linear_cross_entropy"), 25),
    Part("bench_block", ("-m", "tools.bench_block"), 15),
    Part("bench_seq2seq", ("-m", "tools.bench_seq2seq"), 20),
    Part("tune_attention", ("-m", "tools.tune_attention"), 20),
)


@dataclass
class Outcome:
    name: str
    state: str  # passed, failed or out of time
    seconds: float
    last_lines: list[str]


def run_part(part: Part, out: Path) -> Outcome:
    """Run one part; its output goes into `out`/NAME.log."""
    options = ["--out", str(out), "--seconds", str(part.seconds)] if part.is_benchmark else []
    log = out / f"{part.name}.log"
    environment = os.environ | {"BIGMODEL_GPU_TESTS": "1"}
    started = time.monotonic()
    with log.open("w") as file:
        command = [sys.executable, *part.arguments, *options]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            state = "passed" if process.wait(part.limit_seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # also kills the compiler's processes
            process.wait()
            state = f"out of time ({part.limit_seconds} s)"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Outcome(part.name, state, round(time.monotonic() - started, 1), lines[-3:])


def write_summary(outcomes: list[Outcome], device: str, out: Path) -> None:
    """Write gpu_suite.json and gpu_suite.md: the parts that ran so far, and the rows of their benchmarks."""
    (out / "gpu_suite.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    lines = [f"# GPU suite: {device}", "", "| part | state | seconds |", "|---|---|---|"]
    lines += [f"| {outcome.name} | {outcome.state} | {outcome.seconds:.0f} |" for outcome in outcomes]
    for outcome in outcomes:
        rows_file = out / f"{outcome.name}.json"
        if rows_file.exists():
            lines += ["", *markdown_of(json.loads(rows_file.read_text()))]
        elif outcome.state != "passed":
            lines += ["", f"## {outcome.name}", "", "```", *outcome.last_lines, "```"]
    (out / "gpu_suite.md").write_text("\n".join(lines) + "\n")


def markdown_of(benchmark: dict) -> list[str]:
    """The rows of a benchmark as a table."""
    rows = benchmark["rows"]
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in ("not_run", "dtype")))
    lines = [f"## `{benchmark['command']}`", "", f"{benchmark['date']}, commit {benchmark['commit']}", ""]
    lines += ["| " + " | ".join(column.replace("_", " ") for column in columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [_text(row.get(column)) for column in columns]
        if "not_run" in row:
            cells[2] = row["not_run"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def main(
    out: Annotated[Path, typer.Option(help="folder for results and logs")] = Path("benchmarks"),
) -> None:
    """Correctness, then every benchmark."""
    if not torch.cuda.is_available():
        print("gpu_suite: torch sees no GPU here; run it on a machine with one", file=sys.stderr)
        raise typer.Exit(2)
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for part in PARTS:
        outcomes.append(run_part(part, out))
        write_summary(outcomes, hardware("cuda"), out)
        print(f"{part.name}: {outcomes[-1].state}, {outcomes[-1].seconds:.0f} s", *outcomes[-1].last_lines, sep="\n  ")
    raise typer.Exit(0 if outcomes[0].state == "passed" else 1)


if __name__ == "__main__":
    typer.run(main)
