"""Shared code of the launcher tests: the run, its reference, and checks for leftover processes."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from bigmodel.run_directory import read_json_lines
from tests.support.batches import batches_of, record_batches
from tests.support.ranks import command, run_ranks
from tests.support.tiny_run import write_run

STEPS = 60
LAUNCHER = [sys.executable, "-m", "bigmodel", "launch"]


def train_reference(folder: Path, shards: Path, ranks_per_node: int = 1) -> dict[int, dict[str, Any]]:
    """Lines and batches of the same run by two ranks that the test forks."""
    run_file = write_run(folder, shards)
    run_ranks(2, train_recorded, run_file, folder / "printed", ranks_per_node=ranks_per_node)
    batches = batches_of(folder / "run")
    return {step: {**line, "batches": batches[step]} for step, line in steps_of(folder / "run").items()}


def train_recorded(run_file: Path, printed: Path) -> int:
    """Train on a rank and record its batches."""
    record_batches(run_file)
    return command(["train", str(run_file), *steps()], printed)


def recording(environment: dict[str, str]) -> dict[str, str]:
    """The variable that makes trainers call `record_batches`."""
    here = Path(__file__).parent
    folders = (str(here / "recording"), str(here.parents[1]), environment.get("PYTHONPATH", ""))
    return {"PYTHONPATH": os.pathsep.join(folders)}


def steps(number: int = STEPS) -> list[str]:
    return ["--set", f"training.steps={number}"]


def steps_of(run: Path) -> dict[int, dict[str, Any]]:
    """The last line of each step in metrics.jsonl."""
    return {line["step"]: line for line in read_json_lines(run / "metrics.jsonl") if line["kind"] == "step"}


def assert_same_training(run: Path, reference: dict[int, dict[str, Any]], exact: bool = True) -> None:
    """Asserts bitwise equal tensors in every step, and losses that are bitwise equal on the same number of ranks, else
    close.

    exact = False: a step has fewer packs than ranks; empty packs fill it and count as padding.
    """
    found = steps_of(run)
    assert sorted(found) == sorted(reference) == list(range(1, STEPS + 1))
    batches = batches_of(run)
    for step, line in reference.items():
        assert len(line["batches"]) == 4  # one pack each
        assert batches[step] == line["batches"], step
        for name in ("targets", "documents", *(("positions", "padding") if exact else ())):
            assert found[step][name] == line[name], (step, name)
        if exact:
            assert found[step]["loss"] == line["loss"], step
        else:  # same tokens and weights at step 1; then sums in another order, amplified by training
            assert found[step]["loss"] == pytest.approx(line["loss"], rel=1e-6 if step == 1 else 1e-3), step


def assert_logged(run: Path, hosts: list[str]) -> None:
    """Asserts that every rank has a log named by its host, and that `launcher logs` shows rank 0's first line."""
    names = {path.name for path in (run / "logs").glob("*.log")}
    assert names >= {f"{host}-rank-{rank}.log" for rank, host in enumerate(hosts)}, names
    shown = subprocess.run([*LAUNCHER, "logs", str(run)], capture_output=True, text=True, check=True).stdout
    assert f"[{hosts[0]} rank 0] starting: " in shown or f"[{hosts[0]} rank 0] resuming at step " in shown


def left_of(run: Path) -> list[str]:
    """Live processes of a run: their command line names its run file or one of its logs."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = " ".join(process.info["cmdline"] or [])
        if (f"{run}.toml" in words or f"{run}/logs/" in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(f"{process.pid}: {words}")
    return found


def ranks_of(run: Path) -> dict[int, psutil.Process]:
    """Rank -> trainer process of a run, without standbys and what became of them."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if f"{run}.toml" in words and words[2:4] == ["bigmodel", "train"] and "--standby" not in words:
            with suppress(psutil.NoSuchProcess):  # it has just ended
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
