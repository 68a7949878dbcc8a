"""One job of an ablation: its data, its training by `bigmodel launch local`, its result.

In: a `Job`. Out: files beside its run directory, OUT/runs/NAME/seed-N:

    seed-1/             the run directory         seed-1.log           output of the commands and of the launcher
    seed-1.job.json     what the job is           seed-1.cpu.jsonl     CPU seconds by step
    seed-1.result.json  when it is finished       seed-1.lock          held while it is worked on
    seed-1.files/       {out}, for commands

Guarantees: a job is worked on by one process at a time. A kill at any time loses nothing: a launcher whose caller was
killed trains on and keeps the lock; a killed training resumes from its checkpoint. Costs: every half second the CPU
times of the ranks are read. Imports no torch.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from bigmodel.config.settings import UserError
from bigmodel.data.store.manifest import MANIFEST
from bigmodel.run_directory import EXIT_STOPPED, append_json_line, lock, read_json, read_json_lines, write_json
from tools.ablation_variants import Job, record_begin

POLL_SECONDS = 0.5
FAMILY_POLLS = 10  # between two looks for new processes
TAIL_BYTES = 20_000
Show = Callable[[int, str], None]  # steps done, words


class Failed(Exception):
    """A job cannot be finished; the text has the reason and the log."""


class Stopped(Exception):
    """A signal asks this program to end."""


# ---- the whole job


@contextmanager
def locked(job: Job, wait: bool) -> Iterator[IO[Any] | None]:
    """The job's open lock file; None if another process works on it and `wait` is False."""
    job.directory.parent.mkdir(parents=True, exist_ok=True)
    with open(job.beside("lock"), "a") as file:
        try:
            lock(file, str(job.beside("lock")), "" if wait else "busy")
        except UserError as error:
            if not str(error).endswith(": busy"):
                raise
            yield None
        else:
            yield file


def finished(job: Job) -> bool:
    return job.beside("result.json").exists()


def work(job: Job, ranks: int, held: IO[Any], show: Show) -> None:
    """Finish a job whose lock is held. Raises `Failed`, and `Stopped` after the launcher has saved and ended."""
    if not job.beside("job.json").exists():
        record_begin(job)
    if job.variant.commands:  # what a killed attempt has left would be in the way
        shutil.rmtree(job.beside("files"), ignore_errors=True)
        shutil.rmtree(job.directory, ignore_errors=True)
    job.beside("files").mkdir(exist_ok=True)
    if job.variant.commands:
        for command in job.variant.commands:
            run(job, job.command(command), held, show)
        write_json(job.beside("result.json"), _read_loss(job))
        return
    settings = [word for override in job.overrides for word in ("--set", override)]
    _prepare(job, settings, held, show)
    for number, command in enumerate(job.variant.before):
        stamp = job.beside("files") / f".before-{number}"
        if not stamp.exists():
            run(job, job.command(command), held, show)
            stamp.touch()
    if not _is_trained(job):
        words = ["bigmodel", "launch", "local", str(job.variant.run_file), "--ranks", str(ranks), *settings]
        run(job, words, held, show, sampled=True)
    write_json(job.beside("result.json"), result_of_training(job))


def _is_trained(job: Job) -> bool:
    """Whether the last launch has finished, perhaps after its caller was killed."""
    events = [line for line in read_json_lines(job.directory / "events.jsonl") if line["event"].startswith("launch")]
    return bool(events) and events[-1].get("cause") == "finished"


def _prepare(job: Job, settings: list[str], held: IO[Any], show: Show) -> None:
    """Prepare the job's data unless they are there. Jobs that share them wait for each other."""
    data = job.settings().data
    if data.remote or (data.directory / MANIFEST).exists():
        return
    locks = job.out / "data"
    locks.mkdir(parents=True, exist_ok=True)
    name = str(data.directory.resolve()).strip("/").replace("/", "-")[-200:]
    with open(locks / f"{name}.lock", "a") as file:
        lock(file, file.name)
        if not (data.directory / MANIFEST).exists():
            run(job, ["bigmodel", "prepare", str(job.variant.run_file), *settings], held, show)


# ---- a command


def run(job: Job, words: Sequence[str], held: IO[Any], show: Show, sampled: bool = False) -> None:
    """Run a command, `bigmodel` and `python` with this interpreter, with its output in the job's log.

    The command inherits the lock: it stays held if this process is killed. Ctrl-C reaches the command as one SIGTERM.
    """
    program = {"bigmodel": [sys.executable, "-m", "bigmodel"], "python": [sys.executable]}.get(words[0], [words[0]])
    with open(job.beside("log"), "ab") as log:
        try:
            process = subprocess.Popen(
                [*program, *words[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[held.fileno()],
            )
        except OSError as error:
            raise Failed(f"{words[0]}: {error.strerror}") from None
    try:
        code = _wait(process, Sampler(job, process.pid, show) if sampled else None)
    except Stopped:
        process.terminate()
        process.wait()
        raise
    if code == EXIT_STOPPED:
        raise Stopped
    if code:
        raise Failed(f"`{' '.join(words[:2])}` ended with {code}: {last_words(job)} ({job.beside('log')})")


def _wait(process: "subprocess.Popen[bytes]", sampler: "Sampler | None") -> int:
    while True:
        try:
            return process.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if sampler:
                sampler.look()


def last_words(job: Job) -> str:
    """The message at the end of the log: the last line of our own, else the last line."""
    with open(job.beside("log"), "rb") as file:
        file.seek(max(0, os.path.getsize(file.name) - TAIL_BYTES))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("bigmodel: ")]
    return (ours or lines or ["no output"])[-1].removeprefix("bigmodel: ")


@contextmanager
def stoppable() -> Iterator[None]:
    """The first SIGINT, SIGTERM or SIGHUP raises `Stopped`; the next one does what it did before. Main thread only."""
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def restore() -> None:
        for one, handler in before.items():
            signal.signal(one, handler)

    def stop(_number: int, _frame: object) -> None:
        restore()
        raise Stopped

    for one in before:
        signal.signal(one, stop)
    try:
        yield
    finally:
        restore()


# ---- CPU seconds


class Sampler:
    """CPU seconds of the launcher and its ranks beside the last recorded step, as lines of seed-N.cpu.jsonl."""

    def __init__(self, job: Job, process: int, show: Show) -> None:
        self._file, self._show = job.beside("cpu.jsonl"), show
        self._steps = Tail(job.directory / "metrics.jsonl")
        self._launcher = psutil.Process(process)
        self._family = [self._launcher]
        self._polls, self._told = 0, -1
        self._attempt = f"{time.time():.3f}"

    def look(self) -> None:
        """Write a line if there are new steps."""
        try:
            if self._polls % FAMILY_POLLS == 0 or len(self._family) < 2:
                self._family = [self._launcher, *self._launcher.children(recursive=True)]
            seconds = sum(_cpu_seconds(process) for process in self._family)
        except psutil.Error:
            return
        self._polls += 1
        step, loss = self._steps.last()
        if step > 0 and step != self._told:
            append_json_line(self._file, {"attempt": self._attempt, "cpu_seconds": round(seconds, 3), "step": step})
            self._told = step
            self._show(step, f"loss {loss:.3f}")


def _cpu_seconds(process: psutil.Process) -> float:
    """Of a process and of its children that have ended."""
    try:
        return float(sum(process.cpu_times()[:4]))
    except psutil.Error:  # it has ended: its parent counts it
        return 0.0


class Tail:
    """The steps that are added to a metrics.jsonl; those that it has already do not count. A resumed run replaces the
    file by a shorter one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file, self._place = self._now()
        self._found = (0, float("nan"))

    def _now(self) -> tuple[int, int]:
        """Inode and size."""
        if not self._path.exists():
            return 0, 0
        found = self._path.stat()
        return found.st_ino, found.st_size

    def last(self) -> tuple[int, float]:
        """The last new step and its loss; step 0: none yet."""
        number, size = self._now()
        if self._file and (number != self._file or size < self._place):
            self._place = size
        self._file = number
        if size <= self._place:
            return self._found
        with open(self._path, "rb") as file:
            file.seek(self._place)
            whole, end, _ = file.read().rpartition(b"\n")
        self._place += len(whole) + len(end)
        for line in reversed(whole.splitlines()):
            if b'"kind": "step"' in line[:40]:
                record = json.loads(line)
                self._found = (record["step"], record["loss"])
                break
        return self._found


@dataclass(frozen=True)
class Cost:
    """CPU seconds of training up to a step: without starts, without what a restart repeats. Steps that nobody watched
    cost nothing and are not among `measured`: pairs (a, b) for the steps above a, up to b."""

    steps: list[int]
    seconds: list[float]
    measured: list[tuple[int, int]]


def cost_of(lines: Sequence[dict[str, Any]]) -> Cost:
    """From the lines of `Sampler`: each attempt's steps that are new, at the rate between two of its lines."""
    steps, seconds, measured = [0], [0.0], list[tuple[int, int]]()
    for before, after in zip([None, *lines], lines, strict=False):
        reached, total = steps[-1], seconds[-1]
        if after["step"] <= reached:
            continue
        if before and before["attempt"] == after["attempt"]:
            new = (after["step"] - max(before["step"], reached)) / (after["step"] - before["step"])
            total += new * (after["cpu_seconds"] - before["cpu_seconds"])
            measured.append((max(before["step"], reached), after["step"]))
        steps.append(after["step"])
        seconds.append(total)
    return Cost(steps, seconds, measured)


# ---- results


def result_of_training(job: Job) -> dict[str, Any]:
    """The numbers of a finished run. Raises `Failed` without a validation loss."""
    lines = list(read_json_lines(job.directory / "metrics.jsonl"))
    steps = {line["step"]: line for line in lines if line["kind"] == "step"}
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    if not evaluations:
        raise Failed(f"{job.directory}/metrics.jsonl has no evaluation ({job.beside('log')})")
    last = evaluations[-1]
    cost = cost_of(list(read_json_lines(job.beside("cpu.jsonl"))))
    tokens = sum(steps[step]["positions"] for a, b in cost.measured for step in range(a + 1, b + 1) if step in steps)
    starts = [line for line in lines if line["kind"] == "start"]
    scores = {name: last["scores"][name] for name in ("accuracy", "macro_f1")} if last.get("scores") else {}
    return {
        "loss": last["nats_per_token"],
        "best_loss": min(line["nats_per_token"] for line in evaluations),
        "bits_per_byte": last["bits_per_byte"],
        **scores,
        "parameters": starts[-1]["parameters"] if starts else None,
        "steps": max(steps, default=0),
        "tokens": sum(line["positions"] for line in steps.values()),
        "cpu_seconds": cost.seconds[-1],
        "tokens_per_cpu_second": tokens / cost.seconds[-1] if cost.seconds[-1] else None,
    }


def _read_loss(job: Job) -> dict[str, Any]:
    """The loss in the file that a variant's commands have written, and the scores beside it."""
    file, (*outer, key) = Path(job.filled(job.variant.result)), job.variant.key.split(".")
    if job.variant.pattern:
        found = re.search(job.variant.pattern, file.read_text(errors="replace") if file.exists() else "")
        if not found:
            raise Failed(f"{file}: has no {job.variant.pattern!r}; correct pattern")
        try:
            return {"loss": float(found[1])}
        except (TypeError, ValueError):  # None: a group that may be absent
            raise Failed(f"{file}: {job.variant.pattern!r} finds {found[1]!r}, no number; correct pattern") from None
    try:
        values = read_json(file)
        for name in outer:
            values = values[name]
        names = ("accuracy", "macro_f1") if "macro_f1" in values else ()
        return {"loss": float(values[key]), **{name: float(values[name]) for name in names}}
    except UserError as error:
        raise Failed(str(error)) from None
    except (KeyError, TypeError, ValueError):
        raise Failed(f"{file}: has no number {job.variant.key!r}; set key to the name of the loss in it") from None
