"""What tests of the ways to start a run share: the run, what it must equal, and that nothing of it is left."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from bigmodel.rundir import read_json_lines
from tests.ranks import command, run_ranks
from tests.tiny_run import write_run

STEPS = 60
LAUNCHER = [sys.executable, "-m", "launcher"]


def train_reference(folder: Path, shards: Path) -> dict[int, dict[str, Any]]:
    """The lines of the same run, by ranks that the test forks: two nodes of one rank each."""
    run_file = write_run(folder, shards)
    run_ranks(2, command, ["train", str(run_file), *steps()], folder / "printed", ranks_per_node=1)
    return steps_of(folder / "run")


def steps(number: int = STEPS) -> list[str]:
    return ["--set", f"training.steps={number}"]


def steps_of(run: Path) -> dict[int, dict[str, Any]]:
    """The last line of each step in metrics.jsonl."""
    return {line["step"]: line for line in read_json_lines(run / "metrics.jsonl") if line["kind"] == "step"}


def assert_same_training(run: Path, reference: dict[int, dict[str, Any]], exact: bool = True) -> None:
    """Every step got the same data, counted; with as many ranks the losses are the same bits, else they agree.

    Not `exact`: more ranks than packs of a step, so that empty packs fill, which count as padding.
    """
    found = steps_of(run)
    assert sorted(found) == sorted(reference) == list(range(1, STEPS + 1))
    for step, line in reference.items():
        for name in ("targets", "documents", *(("positions", "padding") if exact else ())):
            assert found[step][name] == line[name], (step, name)
        if exact:
            assert found[step]["loss"] == line["loss"], step
        else:  # the same tokens and weights at step 1; then sums in another order, and training that amplifies them
            assert found[step]["loss"] == pytest.approx(line["loss"], rel=1e-6 if step == 1 else 1e-3), step


def left_of(run: Path) -> list[str]:
    """Processes that still work for a run: their command line names its run file."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = " ".join(process.info["cmdline"] or [])
        if f"{run}.toml" in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(f"{process.pid}: {words}")
    return found


def ranks_of(run: Path) -> dict[int, psutil.Process]:
    """The trainers of a run, by rank."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if f"{run}.toml" in words and words[2:4] == ["bigmodel", "train"]:
            found[int(process.environ()["RANK"])] = process
    return found


def assert_no_orphans(run: Path, seconds: float = 40) -> None:
    until(lambda: not left_of(run), lambda: "\n".join(left_of(run)), seconds)


def wait_for_step(run: Path, step: int, seconds: float = 200) -> None:
    def logs() -> str:
        return "\n".join(path.read_text() for path in (run / "logs").glob("*"))

    until(lambda: max(steps_of(run), default=0) >= step, logs, seconds)


def until(condition: Callable[[], bool], explain: Callable[[], str], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.02)
