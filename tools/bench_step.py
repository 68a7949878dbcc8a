"""Benchmark of a training step on CPU: bigmodel beside plain torch loops and the Hugging Face Trainer.

    python -m tools.bench_step                                     # all cases, 12 rounds
    python -m tools.bench_step --case tiny --other ../checkout     # and bigmodel of another checkout

Each contender trains the same model on the same packs in its own process, on one thread. In each round every contender
does one step, one after the other; a row is a contender's CPU seconds against bigmodel's of the same round: the median
of the ratios, the smallest and the largest, and of the last rounds real tokens per CPU second. `outside`: the share of
bigmodel's step outside forward, backward and optimizer. "two ranks": ZeRO 1, CPU seconds of both ranks added up.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from bigmodel.launcher.network import free_port
from tools.measure import ROOT, Record, Row
from tools.step_contenders import CASES, HUGGINGFACE, STEPS, batches

OURS, TWO_RANKS, OTHER = "bigmodel", "two ranks", "bigmodel, other checkout"
WARM_UP = 2


class Contender:
    """Processes that do a step together when told to."""

    def __init__(self, name: str, case: str, ranks: int = 1, folder: Path = ROOT) -> None:
        self.name, port = name, free_port()
        common = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(folder)}
        program = [sys.executable, "-m", "tools.step_contenders", OURS if name in (TWO_RANKS, OTHER) else name, case]
        self.processes = [
            subprocess.Popen(
                program, cwd=folder, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(ranks)
        ]  # fmt: skip
        self._answers()  # the first step, with the start

    def step(self) -> dict[str, float]:
        """CPU seconds, added up over ranks; the other numbers are those of the first rank."""
        for process in self.processes:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        answers = self._answers()
        return answers[0] | {"cpu": sum(answer["cpu"] for answer in answers)}

    def _answers(self) -> list[dict[str, float]]:
        lines = [process.stdout.readline() for process in self.processes if process.stdout]
        if not all(lines):
            raise SystemExit(f"{self.name} ended; see python -m tools.step_contenders {self.name!r}")
        return [json.loads(line) for line in lines]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def measure(case: str, names: list[str], rounds: int, other: Path | None, record: Record) -> None:
    """Rows of one case."""
    with contextlib.ExitStack() as ending:
        contenders = []
        for name in names:
            folder = other if name == OTHER and other else ROOT
            contenders.append(Contender(name, case, 2 if name == TWO_RANKS else 1, folder))
            ending.callback(contenders[-1].end)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(WARM_UP + rounds):
            for contender in contenders:
                step = contender.step()
                if number >= WARM_UP:
                    found[contender.name].append(step)
    tokens = [sum(pack.num_labels for pack in packs) for packs in batches(CASES[case])]
    for name in names:
        record.add({"case": case, "contender": name} | row_of(found[name], found[OURS], tokens))


def row_of(steps: list[dict[str, float]], ours: list[dict[str, float]], tokens: list[int]) -> Row:
    """`ours_is_faster`: CPU seconds of the contender over those of bigmodel in the same round."""
    ratios = [step["cpu"] / own["cpu"] for step, own in zip(steps, ours, strict=True)]
    rates = [tokens[(WARM_UP + number) % len(tokens)] / step["cpu"] for number, step in enumerate(steps)]
    row: Row = {
        "tokens_per_cpu_second": statistics.median(rates),
        "cpu_seconds": statistics.median(one["cpu"] for one in steps),
    }
    row |= {"ours_is_faster": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios)}
    if "outside" in steps[0]:
        row["outside_percent"] = 100 * statistics.median(step["outside"] / step["cpu"] for step in steps)
    return row | {"rounds": len(steps)}


def main(
    case: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(CASES)}; may be repeated")] = None,
    contender: Annotated[list[str] | None, typer.Option(help="only these, beside bigmodel")] = None,
    rounds: Annotated[int, typer.Option(help="pairs of steps")] = 12,
    other: Annotated[Path | None, typer.Option(help="another checkout, with this tool in it")] = None,
    out: Annotated[Path, typer.Option(help="folder of the JSON")] = Path("benchmarks"),
) -> None:
    """Time every contender of every case; the file is complete after each case."""
    record = Record(out, "bench_step", "cpu")
    everyone = [OURS, *(name for name in (*STEPS, HUGGINGFACE, TWO_RANKS) if name != OURS)]
    wanted = [name for name in everyone if contender is None or name in (OURS, *contender)]
    for name in case or [name for name in CASES if name != "quick"]:
        measure(name, wanted + [OTHER] * bool(other), rounds, other, record)
    record.show(
        ["case", "contender", "tokens_per_cpu_second", "ours_is_faster", "smallest", "largest", "outside_percent"]
    )


if __name__ == "__main__":
    typer.run(main)
