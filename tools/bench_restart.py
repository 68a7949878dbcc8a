"""From kill -9 of a rank to the first step after it: three ways to start again, in turn.

    python -m tools.bench_restart [--rounds 3]      writes benchmarks/bench_restart.json, 9 minutes

The run: configs/tiny.toml on two ranks under `launch local`, a save every 20 steps. The ways: the launcher ends and the
command is given again at once, restart in place, and in place with standbys, which exist from the second minute on.
Times are those of metrics.jsonl. CPU seconds: all processes of the launch, from the kill to that step. Memory of a
standby: what only it has (USS) and its share of what others have too (PSS).
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psutil

from bigmodel.checks.scratch import scratch_folder
from bigmodel.config.settings import load_settings
from bigmodel.run_directory import read_json_lines
from tools.measure import ROOT, Record

RUN_FILE = ROOT / "configs" / "tiny.toml"
WAYS = ("the command again", "in place", "in place, standbys")
FIRST_STEPS = 30  # before a kill
SETTLE_SECONDS = 15.0  # for the imports of the standbys
LONGEST_SECONDS = 300.0
POLL_SECONDS = 0.05
Result = TypeVar("Result")


class Launch:
    """`launch local` of one way, in a run directory of its own; the command can be given again."""

    def __init__(self, way: str, work: Path) -> None:
        self.way, self.work, self.directory = way, work, work / "run"
        (work / "cluster.toml").write_text(
            f"[restart]\nlimit = {0 if way == WAYS[0] else 2}\n"
            + f"standby = {str(way == WAYS[2]).lower()}\n" * (way != WAYS[0])
        )
        self.start()

    def start(self) -> None:
        settings = (
            f"run.directory={self.directory}", "checkpoint.every_steps=20", "training.steps=1000000",
            "evaluation.every_steps=1000000", "evaluation.at_end=false",
        )  # fmt: skip
        words = ["launch", "local", str(RUN_FILE), "--ranks", "2", "--cluster", str(self.work / "cluster.toml")]
        options = [word for setting in settings for word in ("--set", setting)]
        with open(self.work / "printed", "ab") as printed:
            command = [sys.executable, "-m", "bigmodel", *words, *options]
            self.process = psutil.Popen(command, stdout=printed, stderr=printed, stdin=subprocess.DEVNULL)

    def ranks(self) -> list[psutil.Process]:
        return [process for process in self._trainers() if "--standby" not in process.cmdline()]

    def standbys(self) -> list[psutil.Process]:
        return [process for process in self._trainers() if "--standby" in process.cmdline()]

    def _trainers(self) -> list[psutil.Process]:
        return [process for process in self.process.children() if "train" in process.cmdline()]

    def processor_seconds(self) -> dict[int, float]:
        """Of each process of the launch, by its number."""
        seconds = {}
        for process in [self.process, *self.process.children(recursive=True)]:
            times = process.cpu_times()
            seconds[process.pid] = times.user + times.system
        return seconds

    def first_step(self, since: float) -> float | None:
        """When the first step after a start that is later than `since` (Unix time) ended; None: not yet."""
        started = False
        for line in read_json_lines(self.directory / "metrics.jsonl"):
            started = started or (line["kind"] == "start" and line["time"] > since)
            if started and line["kind"] == "step":
                return float(line["time"])
        return None

    def steps(self) -> int:
        return sum(line["kind"] == "step" for line in read_json_lines(self.directory / "metrics.jsonl"))


@contextmanager
def launched(way: str) -> Iterator[Launch]:
    with scratch_folder() as work:
        launch = Launch(way, work)
        try:
            yield launch
        finally:
            launch.process.terminate()
            launch.process.wait(LONGEST_SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks", help="folder of the results")
    options = parser.parse_args()
    if not (load_settings(RUN_FILE).data.directory / "manifest.json").exists():
        subprocess.run([sys.executable, "-m", "bigmodel", "prepare", str(RUN_FILE)], check=True)
    record = Record(options.out, "bench_restart", "cpu")
    record.head["load_average"] = str(os.getloadavg())
    rows = []
    for number in range(options.rounds):
        for way in WAYS:
            rows.append(kill_once(way, random.Random(number)))
            record.add({"case": f"round {number + 1}", "contender": way, **rows[-1]})
    for way in WAYS:
        mine = [row for row, contender in zip(rows, WAYS * options.rounds, strict=True) if contender == way]
        record.add({"case": "median", "contender": way, **medians(mine)})
    record.show(["case", "contender", "seconds", "processor_seconds", "standby_own_mb", "standby_share_mb"])


def kill_once(way: str, chance: random.Random) -> dict[str, float]:
    """Seconds and CPU seconds from the kill of a rank to the first step after it, and MB (1e6 bytes) of a standby."""
    with launched(way) as launch:
        wait_for(lambda: launch.steps() >= FIRST_STEPS)
        memory = {}
        if way == WAYS[2]:
            wait_for(lambda: len(launch.standbys()) == 2)
            time.sleep(SETTLE_SECONDS)
            used = [standby.memory_full_info() for standby in launch.standbys()]
            memory = {
                "standby_own_mb": statistics.fmean(one.uss for one in used) / 1e6,
                "standby_share_mb": statistics.fmean(one.pss for one in used) / 1e6,
            }
        before, killed = launch.processor_seconds(), time.time()
        os.kill(chance.choice(launch.ranks()).pid, signal.SIGKILL)
        spent = 0.0
        if way == WAYS[0]:
            launch.process.wait(LONGEST_SECONDS)
            spent, before = time.time() - killed, {}
            launch.start()
        first = wait_for(lambda: launch.first_step(killed))
        after = launch.processor_seconds()
    row = {"seconds": first - killed, "end_seconds": spent} if spent else {"seconds": first - killed}
    used_seconds = sum(seconds - before.get(process, 0.0) for process, seconds in after.items())
    return {**row, "processor_seconds": used_seconds, **memory}


def wait_for(found: Callable[[], Result | None]) -> Result:
    """The first result of `found` that is true."""
    until = time.monotonic() + LONGEST_SECONDS
    while not (result := found()):
        if time.monotonic() > until:
            raise SystemExit(f"nothing within {LONGEST_SECONDS:g} s")
        time.sleep(POLL_SECONDS)
    return result


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


if __name__ == "__main__":
    main()
