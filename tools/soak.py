"""Faults at random in small runs of two or three ranks: each is named within its bound, and nothing is lost.

    make soak MINUTES=10        (python -m tools.soak --minutes 10)

Runs of a small model are trained one after another. Each start of a run meets one fault, drawn from the seed: kill -9,
SIGSTOP, SIGSTOP and SIGCONT in turn, an exception, a stalled loader, a full disk while saving and while writing
metrics, a truncated, flipped or deleted file of a checkpoint, another number of ranks, a value that is not finite on
one rank or on all, a flipped bit in a replica. After the last start the run is compared with the undisturbed one
(tools/soak_run.py has the guarantees, tools/soak_faults.py the faults and bounds).

Exit code 0 if every guarantee held, 1 at the first that did not: then the seed, the last fault and a command that
repeats the run are printed, and its folder stays. Ctrl-C ends it with the table so far. `--defect` plants a defect;
the soak must then fail.
"""

import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bigmodel.checks.scratch import scratch_folder
from bigmodel.run_directory import write_json
from tests.support.tiny_corpus import prepared
from tools.soak_defects import DEFECTS
from tools.soak_faults import BAD_DATA, KINDS, deck
from tools.soak_run import Row, Run, Soaked, undisturbed
from tools.soak_trace import Broken, Design, Trace, compare

ROOT = Path(__file__).parents[1]
STEPS = 80  # of a run
STAGES, REPLICATED, WORLD_SIZES = (0, 1, 2, 3), (0, 1, 2), (2, 3)
SPOILT_SHARE = 0.25  # of the runs: one step of their data is not finite
LINE_WIDTH = 100


class Soak:
    """Runs below `folder`, each from a seed of its own; undisturbed ones are trained when they are needed first."""

    def __init__(
        self, folder: Path, shards: Path, seed: int, kinds: Sequence[str] = tuple(KINDS), defect: str = "",
        steps: int = STEPS,
    ) -> None:  # fmt: skip
        self.rows: list[Row] = []
        self.runs = self.number = 0
        self.last = "no fault yet"
        self._folder, self._shards, self._seed, self._kinds = folder, shards, seed, kinds
        self._defect, self._steps = defect, steps
        self._expected: dict[Design, Trace] = {}

    def run(self, number: int) -> None:
        """Train run `number` and compare it. Raises `Broken`; then its folder stays."""
        chance = random.Random(f"{self._seed}/{number}")
        waiting = deck(chance, self._kinds, number)
        is_spoilt = chance.random() < SPOILT_SHARE and waiting[0] != BAD_DATA
        spoilt = (chance.randrange(2, self._steps),) if is_spoilt else ()
        stage = chance.choice(REPLICATED if waiting[0] == "flipped bit" else STAGES)
        design = Design(stage, chance.choice(WORLD_SIZES), spoilt)
        left_out = [] if stage in REPLICATED else ["flipped bit"]  # no rank holds what another one holds
        left_out += [BAD_DATA] if spoilt else []  # which may begin at the spoilt step
        waiting = [kind for kind in waiting if kind not in left_out]
        folder = self._folder / f"run-{number}"
        soaked = Soaked(Run(folder, self._shards, design, self._steps, self._defect), chance, waiting, self._tell)
        self.number = number
        try:
            soaked.go()
        finally:
            self.rows += soaked.rows
        expected = self._undisturbed(design)
        compare(soaked.run.trace(), expected, design, self._steps, exact=not soaked.changed_ranks)
        shutil.rmtree(folder)
        self.runs += 1

    def _undisturbed(self, design: Design) -> Trace:
        if design not in self._expected:
            self._expected[design] = undisturbed(
                self._folder / f"undisturbed-{len(self._expected)}", self._shards, design, self._steps
            )
        return self._expected[design]

    def _tell(self, fault: str) -> None:
        self.last = f"run {self.number}: {fault}"
        if sys.stderr.isatty():
            text = f"{len(self.rows)} faults in {self.runs} runs; {self.last}"[:LINE_WIDTH]
            print(f"\r{text:{LINE_WIDTH}}", end="", file=sys.stderr, flush=True)


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One row per kind: how often, and seconds to detect (median, worst, bound) and to recover (median, worst)."""
    found = []
    for kind in dict.fromkeys(KINDS):
        own = [row for row in rows if row.kind == kind]
        recovered = [row.recovered for row in own if row.recovered is not None]
        if own:
            found.append(
                {"fault": kind, "count": len(own)}
                | _seconds("detected", [row.detected for row in own])
                | {"bound": round(max(row.bound for row in own), 2)}
                | _seconds("recovered", recovered)
            )
    return found


def _seconds(name: str, values: Sequence[float]) -> dict[str, float | None]:
    median, worst = (statistics.median(values), max(values)) if values else (None, None)
    return {f"{name}_median": median and round(median, 2), f"{name}_worst": worst and round(worst, 2)}


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="seconds from a fault to its naming, and to the end of the next start's first step")
    for column in rows[0] if rows else ():
        table.add_column(column.replace("_", " "), justify="left" if column == "fault" else "right")
    for row in rows:
        table.add_row(*("goes on" if value is None else str(value) for value in row.values()))
    return table


def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="the last run is trained to its end")] = 10.0,
    seed: Annotated[int, typer.Option(help="of designs, faults, ranks and steps; 0: drawn")] = 0,
    run: Annotated[int, typer.Option(help="only this run of the seed; -1: all")] = -1,
    defect: Annotated[str, typer.Option(help=f"plant one of: {', '.join(list(DEFECTS)[1:])}")] = "",
    out: Annotated[Path | None, typer.Option(help="folder for soak.json; none: it is not written")] = None,
) -> None:
    if defect not in DEFECTS:
        raise SystemExit(f"--defect {defect}: choose one of {', '.join(list(DEFECTS)[1:])}")
    seed = seed or random.SystemRandom().randrange(1, 10**6)
    head = head_of(out) if out else {}
    print(f"seed {seed}", flush=True)
    code, began = 0, time.monotonic()
    with scratch_folder("soak-") as scratch:
        soak = Soak(scratch, prepared(scratch / "corpus", shard_tokens=1500), seed, defect=defect)
        try:
            for number in [run] if run >= 0 else range(10**9):
                soak.run(number)
                if time.monotonic() - began > 60 * minutes:
                    break
        except Broken as error:
            code = 1
            kept = shutil.copytree(scratch, ROOT / "runs" / f"soak-{seed}-{os.getpid()}", symlinks=True)
            print(f"\nBROKEN: {error}\nseed {seed}, last fault: {soak.last}; its folder: {kept}")
            planted = f" --defect {defect!r}" if defect else ""
            print(f"again: python -m tools.soak --seed {seed} --run {soak.number}{planted}")
        except SystemExit as stop:  # Ctrl-C and the like, as scratch_folder raises it
            code = stop.code if isinstance(stop.code, int) else 1
            print(f"\ninterrupted: seed {seed}, last fault: {soak.last}")
    report(soak, head, time.monotonic() - began, seed, out)
    raise typer.Exit(code)


def head_of(out: Path) -> dict[str, Any]:
    from tools.measure import Record  # here, because each rank imports this module, and that one takes half a second

    return Record(out, "soak", "cpu").head


def report(soak: Soak, head: dict[str, Any], seconds: float, seed: int, out: Path | None) -> None:
    rows = summary(soak.rows)
    Console(markup=False, emoji=False).print("", table_of(rows))
    print(f"{len(soak.rows)} faults in {soak.runs} whole runs, {seconds:.0f} s, seed {seed}")
    if out:
        more = {"seed": seed, "seconds": round(seconds), "runs": soak.runs, "load_average": os.getloadavg()}
        write_json(out / "soak.json", {**head, **more, "rows": rows})
        print(out / "soak.json")


if __name__ == "__main__":
    typer.run(main)
