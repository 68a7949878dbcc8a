"""The model of `tools.simulate_goodput` against a real run: two ranks, killed at drawn times, started again.

    python -m tools.goodput_experiment                    # 9 minutes; writes benchmarks/goodput_experiment.json

First a run of its own gives the costs: saves, detection and restarts of a few kills. Then the run that counts: a rank
drawn by chance gets SIGKILL at times drawn with a mean of `mean` seconds, the other one is ended, and both are started
again at once. Its ratio is that of its run accounting, productive seconds over all; beside it the ratios of many
simulated runs of the same length (90% of them lie in the interval), and of one with the same times of the kills.

The ranks are forked from a server that has the imports, as in the tests, and this program ends and starts them in place
of the launcher: a start takes a second instead of ten.
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import typer

from bigmodel.config.settings import load_settings
from bigmodel.launcher.record import last_metrics, record_end
from bigmodel.metrics.run_accounting import RunAccounting
from bigmodel.run_directory import EXIT_USER, read_json_lines, write_json
from tests.support.ranks import command, finish, kill, start_ranks
from tools.goodput_facts import Costs, costs_of, failures_of
from tools.goodput_model import Design, Failures, draw_failures, simulate
from tools.measure import ROOT, Record

RANKS = 2
MONTHS = 400  # simulated runs
POLL_SECONDS = 0.05
END_SECONDS = 120.0


def main(
    seconds: Annotated[float, typer.Option(min=30, help="length of the run that counts")] = 360.0,
    mean: Annotated[float, typer.Option(min=5, help="mean seconds between kills")] = 75.0,
    every: Annotated[int, typer.Option(min=1, help="steps between saves")] = 25,
    kills: Annotated[int, typer.Option(min=1, help="kills of the run that gives the costs")] = 3,
    seed: Annotated[int, typer.Option(help="of the times and the ranks")] = 1,
    run_file: Annotated[Path, typer.Option(help="what is trained")] = ROOT / "configs" / "tiny.toml",
    work: Annotated[Path, typer.Option(help="folder of the runs; it must not exist")] = ROOT / "runs" / "goodput",
    out: Annotated[Path, typer.Option(help="folder of the numbers")] = ROOT / "benchmarks",
) -> None:
    work.mkdir(parents=True)
    if not (load_settings(run_file).data.directory / "manifest.json").exists():
        subprocess.run([sys.executable, "-m", "bigmodel", "prepare", str(run_file)], check=True)
    head = Record(out, "goodput_experiment", "cpu").head
    chance = random.Random(seed)
    kill_after_saves(Run(run_file, work / "costs", every), kills, every, chance)
    costs = costs_of(work / "costs")
    run = Run(run_file, work / "run", every)
    kill_at_drawn_times(run, seconds, mean, chance)
    found = compared(work / "run", costs, every, mean)
    write_json(out / "goodput_experiment.json", {**head, "load_average": os.getloadavg(), **found})
    print("\n".join(f"{name}: {value}" for name, value in found.items()))


class Run:
    """A run that is started again after each failure, until it is stopped."""

    def __init__(self, run_file: Path, directory: Path, every: int) -> None:
        settings = (
            f"run.directory={directory}", f"checkpoint.every_steps={every}", "training.steps=1000000",
            "evaluation.every_steps=1000000", "evaluation.at_end=false",
        )  # fmt: skip
        options = [word for setting in settings for word in ("--set", setting)]
        self.arguments, self.directory = ["train", str(run_file), *options], directory
        self.ranks = self._start()

    def keep_alive(self) -> bool:
        """Start it again if a rank has ended; returns whether that was so."""
        if all(rank.is_alive() for rank in self.ranks):
            return False
        since, codes = time.time(), finish(self.ranks)
        if EXIT_USER in codes:
            raise SystemExit(f"the run cannot start; {self.directory.with_suffix('.printed')}.0 says why")
        record_end(self.directory, "failed", 1, since=since)
        self.ranks = self._start()
        return True

    def kill_a_rank(self, chance: random.Random) -> bool:
        """SIGKILL to a rank drawn by chance; False if one has ended already."""
        alive = all(rank.is_alive() for rank in self.ranks)
        if alive:
            chance.choice(self.ranks).kill()
        return alive

    @property
    def step(self) -> int:
        return last_metrics(self.directory).get("step", 0)

    def end(self) -> None:
        for rank in self.ranks:
            rank.terminate()
        for rank in self.ranks:
            rank.join(END_SECONDS)
        kill(self.ranks)

    def _start(self) -> list[BaseProcess]:
        self.directory.mkdir(exist_ok=True)
        return start_ranks(RANKS, command, self.arguments, self.directory.with_suffix(".printed"))


@contextmanager
def ended(run: Run) -> Iterator[None]:
    try:
        yield
    finally:
        run.end()


def kill_after_saves(run: Run, kills: int, every: int, chance: random.Random) -> None:
    """Kill a rank each time when two more saves and some steps are done; end after two more."""
    with ended(run):
        for number in range(kills + 1):
            wanted = run.step - run.step % every + 2 * every + chance.randrange(every)
            while run.step < wanted:
                run.keep_alive()
                time.sleep(POLL_SECONDS)
            if number < kills:
                run.kill_a_rank(chance)
                while not run.keep_alive():
                    time.sleep(POLL_SECONDS)


def kill_at_drawn_times(run: Run, seconds: float, mean: float, chance: random.Random) -> None:
    """The time until the next kill runs on also while the run starts again."""
    began = time.time()
    following = began + chance.expovariate(1 / mean)
    with ended(run):
        while time.time() < began + seconds:
            run.keep_alive()
            if time.time() >= following and run.kill_a_rank(chance):
                following += chance.expovariate(1 / mean)
            time.sleep(POLL_SECONDS)


def compared(run: Path, before: Costs, every: int, mean: float) -> dict[str, Any]:
    """The measured ratio beside predictions: with the costs of the run before, and with its own."""
    accounting = RunAccounting()
    for line in read_json_lines(run / "metrics.jsonl"):
        accounting.add(line)
    assert accounting.began is not None
    wall, at = accounting.wall_seconds, [since - accounting.began for since, _ in failures_of(run)]
    return {
        "kills": len(at),
        "wall_seconds": round(wall, 1),
        "measured_ratio": round(accounting.seconds["productive"] / wall, 4),
        "predicted": predicted(before, every, mean, wall, at),
        "predicted_with_its_own_costs": predicted(costs_of(run), every, mean, wall, at),
        "measured_seconds": {cause: round(value, 2) for cause, value in accounting.seconds.items() if value},
        "every_steps": every,
        "mean_seconds_between_kills": mean,
    }


def predicted(costs: Costs, every: int, mean: float, wall: float, at: Sequence[float]) -> dict[str, Any]:
    """Ratios of runs of `wall` seconds: of many, and of one with kills at these seconds."""
    pause, write, detect, restart = (fmean(values) for values in costs[:4])
    design, interval = Design(pause, write, detect, restart), np.array([every * costs.step])
    many = simulate(design, draw_failures(mean, wall, MONTHS), interval, wall, costs.starts[0]).ratio * costs.busy
    times = np.array([at])
    one = simulate(design, Failures(times, *np.ones((3, *times.shape))), interval, wall, costs.starts[0])
    return {
        "ratio": round(float(many.mean()), 4),
        "90_percent": [round(float(bound), 4) for bound in np.quantile(many, (0.05, 0.95))],
        "ratio_for_these_kills": round(float(one.ratio[0, 0]) * costs.busy, 4),
        "lost_seconds_for_these_kills": {cause: round(float(lost[0, 0]) * wall, 2) for cause, lost in one.lost.items()},
        "costs": {name: _rounded(value) for name, value in costs._asdict().items()},
    }


def _rounded(value: float | list[float]) -> float | list[float]:
    return [round(one, 3) for one in value] if isinstance(value, list) else round(value, 4)


if __name__ == "__main__":
    typer.run(main)
