"""One run of `tools.soak`: started again after each fault until it is done, then compared with the undisturbed run.

In: a seed, a design (ZeRO stage, number of ranks), the kinds of faults. Out: a `Row` per fault. Raises `Broken`
if a guarantee does not hold:

- a fault happens, and is named within its bound: the right rank and no other, with its exit code and cause; the other
  ranks end by themselves;
- the launcher's decision is a restart after each fault of a machine, none after one of a user or a stop;
- a published checkpoint is whole from the moment it can be seen; none that was reported as saved is lost, nor more than
  two intervals of steps; the next start resumes from the newest whole one, after bad data from the newest healthy one;
- at the end each step is there once, with the batches, losses and weights of the undisturbed run, bit for bit; after a
  change of the number of ranks losses may differ by rounding. Steps are skipped only where the data are spoilt, and
  are declared.

The ranks are forked from a server that has the imports, and this program starts and ends them in place of a launcher.
"""

import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from bigmodel.launcher.record import last_metrics, launches, record_end
from bigmodel.launcher.restart import Situation, decide
from bigmodel.run_directory import AGAIN, EXIT_STOPPED, EXIT_USER, read_json_lines, record_event
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.checkpoint.health import is_healthy
from tests.support.faulty import Fault
from tests.support.ranks import kill, start_ranks
from tests.support.tiny_run import write_run
from tools.soak_faults import (
    DAMAGE_SECONDS,
    DAMAGE_STEPS,
    HANG_SECONDS,
    KINDS,
    OF_ALL,
    OTHER_RANKS,
    SLOW,
    STALL_SECONDS,
    Plan,
    Seen,
    damage,
    draw,
    with_journal,
)
from tools.soak_rank import train_recorded
from tools.soak_trace import Broken, Design, Trace, steps_of, trace_of

EVERY_STEPS = 4  # between saves
BATCH = 6  # packed sequences of a step: an even share for two ranks and for three
POLL_SECONDS = 0.01
LOOK_EVERY = 3  # polls
GRACE_SECONDS = 15.0  # for ranks whose peer died, as of the launcher
START_SECONDS = 300.0  # longest start: a rank that never ends is found; much more than a busy machine needs
CAUSES = {EXIT_STOPPED: "stopped", EXIT_USER: "user_error", **AGAIN}  # by exit code, as the launcher has them
ANY_LIMIT = 100  # of restarts: only the cause decides
SLOW_DUTY = 0.06, 0.02  # seconds stopped and running in turn


class Row(NamedTuple):
    """A fault and how it went; seconds from the fault. recovered: to the end of the first step of the next start."""

    kind: str
    detected: float
    bound: float
    recovered: float | None


def in_time(row: Row) -> Row:
    """The row. Raises `Broken` if its fault was named too late."""
    if row.detected > row.bound:
        raise Broken(f"{row.kind}: named after {row.detected:.2f} s; the bound is {row.bound:.2f} s")
    return row


class Run:
    """A run in `folder`, started as often as needed."""

    def __init__(self, folder: Path, shards: Path, design: Design, steps: int, defect: str = "") -> None:
        folder.mkdir(parents=True)
        self.folder, self.directory, self.steps = folder, folder / "run", steps
        self.design, self.world_size, self._defect = design, design.world_size, defect
        run_file = write_run(folder, shards, stage=design.stage)
        every = 1 if design.stage else EVERY_STEPS  # above ZeRO 0 each update gathers the weights anew
        changes = (
            f"training.steps={steps}",
            f"training.global_batch_size={BATCH}",
            f"training.hang_seconds={HANG_SECONDS}",
            f"training.replica_check_every_steps={every}",
            f"data.stall_seconds={STALL_SECONDS}",
            f"checkpoint.every_steps={EVERY_STEPS}",
            "checkpoint.on_failure=continue",
        )
        self._arguments = ["train", str(run_file), *(word for change in changes for word in ("--set", change))]
        self.starts: list[Path] = []  # where each start records its batches, and below it its output

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def start(self, fault: Fault) -> "Start":
        place = self.folder / f"start-{len(self.starts)}.toml"
        self.starts.append(place)
        record = {"by": "soak", "job": "", "restart": len(self.starts) - 1, "world_size": self.world_size}
        self.directory.mkdir(exist_ok=True)
        record_event(self.directory, "launch", **record, reached=last_metrics(self.directory).get("step", 0))
        output = place.with_suffix(".printed")
        ranks = start_ranks(self.world_size, train_recorded, fault, self._defect, place, self._arguments, output)
        return Start(self.directory, ranks, output)

    def whole(self) -> list[int]:
        """Steps of the published checkpoints that are whole."""
        return [step for step in checkpoint.steps(self.checkpoints) if not self.problems(step)]

    def problems(self, step: int) -> list[str]:
        return checkpoint.verify(checkpoint.path_of(self.checkpoints, step), checkpoint.ALONE)

    def trace(self) -> Trace:
        return trace_of(self.directory, self.starts, checkpoint.path_of(self.checkpoints, self.steps))


class Start:
    """The ranks of one start."""

    def __init__(self, directory: Path, ranks: list[BaseProcess], output: Path) -> None:
        self.directory, self.ranks, self._output = directory, ranks, output
        self.dead: tuple[int, int] | None = None
        self.late: list[int] = []  # ranks that were alive after the grace
        self._since = sum(1 for _ in read_json_lines(directory / "events.jsonl"))
        self._began = time.monotonic()
        self._deadline = float("inf")

    def poll(self) -> bool:
        """Whether ranks are left. If one has failed the others get some seconds to end by themselves."""
        ended = [(number, rank.exitcode or 0) for number, rank in enumerate(self.ranks) if not rank.is_alive()]
        if ended and not self.dead:
            self.dead = next((one for one in ended if one[1] < 0), ended[0])
            self._deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > self._deadline:
            self.late += [number for number, rank in enumerate(self.ranks) if rank.is_alive()]
            kill(self.ranks)
        if time.monotonic() > self._began + START_SECONDS:
            raise Broken(f"ranks did not end in {START_SECONDS:g} s: {[rank.exitcode for rank in self.ranks]}")
        return len(ended) < len(self.ranks)

    def seen(self) -> Seen:
        over = not any(rank.is_alive() for rank in self.ranks)
        codes = [rank.exitcode or 0 for rank in self.ranks] if over else []
        events = list(read_json_lines(self.directory / "events.jsonl"))[self._since :]
        return Seen(self.directory, self.dead, codes, events, [self.printed(rank) for rank in range(len(self.ranks))])

    def printed(self, rank: int) -> str:
        file = Path(f"{self._output}.{rank}")
        return file.read_text(errors="replace") if file.exists() else ""


@dataclass
class Watched:
    """A start under a plan: when its fault happened, and when and whom the run named."""

    plan: Plan
    journal: Path
    named: list[int] | None = None
    named_at: float = 0.0

    @property
    def happened(self) -> float:
        text = self.journal.read_text() if self.journal.exists() else ""
        return float(text) if text else 0.0

    def look(self, seen: Seen) -> None:
        if self.named is None and self.happened:
            found = KINDS[self.plan.kind].named(seen)
            if self.plan.kind != SLOW or found == [self.plan.fault.rank]:  # busy cores make others slow for a while
                self.named, self.named_at = found, time.time()


class Soaked:
    """A run under faults drawn from `waiting`; `go` trains it to its end."""

    def __init__(self, run: Run, chance: random.Random, waiting: list[str], tell: Callable[[str], None]) -> None:
        self.run, self.rows = run, list[Row]()
        self._chance, self._waiting, self._tell = chance, waiting, tell
        self._damaged: dict[Path, tuple[str, float]] = {}  # file -> kind, time; until the next start names it
        self._checked: set[int] = set()  # inodes of folders of checkpoints; also of those that we damaged
        self.changed_ranks = False
        self._left: tuple[int, float] | None = None  # of the last start, if it ended: its row, time of its fault
        self._back: int | None = None  # where the next start resumes, if the last one diverged

    def go(self) -> None:
        while self._one_start():
            pass

    def _one_start(self) -> bool:
        run, good = self.run, self.run.whole()
        plan = draw(self._chance, self._waiting, max(good, default=0), run.steps, run.world_size, len(good))
        journal = run.folder / f"fault-{len(run.starts)}"
        watched = Watched(plan, journal)
        self._tell(f"{plan.kind} at step {plan.fault.step}, rank {plan.fault.rank}" if plan.kind else "to its end")
        began = time.time()
        start = run.start(with_journal(plan, journal, run.directory, run.design.spoilt))
        try:
            self._watch(start, watched)
        finally:
            kill(start.ranks)
        self._resumed(start, good, began)
        self._check_published()  # before this program damages one
        self._check_saved(began)
        self._judge(start, watched)
        if plan.world_size != run.world_size:
            run.world_size, self.changed_ranks = plan.world_size, True
        return set(start.seen().codes) != {0}

    def _watch(self, start: Start, watched: Watched) -> None:
        acts, polls = DRIVEN.get(watched.plan.kind), 0
        while start.poll():
            polls += 1
            if polls % LOOK_EVERY == 0:
                watched.look(start.seen())
                self._check_published()
                if acts and last_metrics(self.run.directory).get("step", 0) >= watched.plan.fault.step:
                    acts(start, watched)
                    acts = None
            time.sleep(POLL_SECONDS)
        watched.look(start.seen())

    def _resumed(self, start: Start, good: Sequence[int], began: float) -> None:
        """Nothing is lost: it went on from the newest whole checkpoint, and named those that are not."""
        seen = start.seen()
        event = next((event for event in seen.events if event["event"] == "start"), None)
        if event is None:
            raise Broken(f"the start did not begin: {seen.printed[0][-2000:]}")
        expected = max(good, default=0) if self._back is None else self._back
        if event["step"] != expected:
            raise Broken(f"resumed at step {event['step']} instead of {expected}; whole checkpoints: {list(good)}")
        self._back = None
        first = next((line for line in steps_of(self.run.directory).values() if line["time"] > began), None)
        if self._left and first:
            number, since = self._left
            self.rows[number] = self.rows[number]._replace(recovered=first["time"] - since)
        self._left = None
        for file, (kind, since) in self._damaged.items():
            if f"checkpoint {file.parent} is damaged: {file.name}" not in seen.printed[0]:
                raise Broken(f"{kind}: {file} was taken, or not named: {seen.printed[0][:500]}")
            bound = DAMAGE_SECONDS + DAMAGE_STEPS * self._usual_step()
            self.rows.append(in_time(Row(kind, event["time"] - since, bound, first["time"] - since if first else None)))
        self._damaged = {}

    def _judge(self, start: Start, watched: Watched) -> None:
        """The fault was named in time, the right rank, the right code and cause."""
        plan, seen = watched.plan, start.seen()
        if not plan.kind and set(seen.codes) != {0}:
            raise Broken(f"no fault was planned, and the ranks ended with {seen.codes}: {seen.printed[0][-2000:]}")
        if not plan.kind:
            return
        if not watched.happened:
            raise Broken(f"the fault did not happen; exit codes {seen.codes}: {seen.printed[0][-2000:]}")
        kind, rank, world_size = KINDS[plan.kind], plan.fault.rank, len(seen.codes)
        expected = list(range(world_size)) if plan.kind in OF_ALL else [rank]
        undecided = plan.kind == "flipped bit" and world_size == 2 and self.run.design.stage == 0
        if watched.named is None:
            raise Broken(f"nothing names rank {rank}; exit codes {seen.codes}: {seen.printed[0][-2000:]}")
        if watched.named != expected and not (undecided and watched.named == [0, 1]):
            raise Broken(f"rank {watched.named} was named")
        codes = set(seen.codes) if kind.code is None else {seen.codes[rank]}
        if codes != {kind.code or 0}:
            raise Broken(f"exit codes {seen.codes}; expected {kind.code or 0} of rank {rank}")
        if start.late:
            raise Broken(f"ranks {start.late} still ran {GRACE_SECONDS:g} s after another one had ended")
        since = watched.happened
        bound = kind.bound_seconds + kind.bound_steps * self._usual_step()
        row = in_time(Row(plan.kind, watched.named_at - since, bound, None))
        if kind.code is not None:
            self._end(start, kind.cause, None if plan.kind in OF_ALL else rank)
        if kind.code == EXIT_USER:
            self._back = self._newest_before(plan.fault.step)
        if kind.damage:
            self._damage(kind.damage, plan.kind)
            return
        self.rows.append(row)
        self._left = (len(self.rows) - 1, since) if kind.code is not None else None

    def _usual_step(self) -> float:
        return statistics.median(line["step_seconds"] for line in steps_of(self.run.directory).values())

    def _end(self, start: Start, cause: str, rank: int | None) -> None:
        """Record the end as a launcher does: by the first rank that died; the run's own cause goes before. Then the
        launcher's decision."""
        first, code = start.dead or (0, 0)
        record_end(self.run.directory, CAUSES.get(code, "failed"), code, f"rank {first} ended with {code}")
        history = launches(read_json_lines(self.run.directory / "events.jsonl"))
        last = history[-1]
        if last.cause != cause or (rank is not None and f"rank {rank} " not in last.detail):
            raise Broken(f"the recorded cause is {last.cause} ({last.detail}); expected {cause} of rank {rank}")
        decision = decide(Situation(history, ["here"], 1), ANY_LIMIT)
        if decision.restart != (cause not in ("stopped", "user_error")):
            raise Broken(f"after {cause} the launcher decides: restart {decision.restart}, {decision.reason}")

    def _newest_before(self, step: int) -> int:
        """The newest healthy checkpoint whose weights a step before this one has used; without a mark the newest."""
        used = [saved for saved in self.run.whole() if saved < step - 1]
        healthy = [saved for saved in used if is_healthy(checkpoint.path_of(self.run.checkpoints, saved))]
        return max(healthy or used, default=0)

    def _damage(self, how: str, kind: str) -> None:
        good = self.run.whole()
        if len(good) < 2:
            return
        file = damage(how, self.run.checkpoints, good[-1], self._chance)
        self._damaged[file] = kind, time.time()

    def _check_saved(self, began: float) -> None:
        """What a start since `began` reported as saved is there, and not much is lost."""
        lines = list(read_json_lines(self.run.directory / "metrics.jsonl"))
        reported = [line["step"] for line in lines if line["kind"] == "checkpoint" and line["time"] > began]
        newest = max(self.run.whole(), default=0)
        if newest < max(reported, default=0):
            raise Broken(f"step {max(reported)} was reported as saved, and the newest whole checkpoint is {newest}")
        done = max((line["step"] for line in lines if line["kind"] == "step"), default=0)
        if done - newest > 2 * EVERY_STEPS:
            raise Broken(f"{done - newest} steps are lost: {done} done, the newest whole checkpoint is {newest}")

    def _check_published(self) -> None:
        """Each checkpoint is read once, as soon as it has its name."""
        for step in checkpoint.steps(self.run.checkpoints):
            place = checkpoint.path_of(self.run.checkpoints, step)
            with suppress(FileNotFoundError):  # retention has removed it
                inode = place.stat().st_ino
                problems = self.run.problems(step) if inode not in self._checked else []
                if problems and place.exists():
                    raise Broken(f"{place} is published and not whole: {problems[0]}")
                self._checked.add(inode)


def stop_all(start: Start, watched: Watched) -> None:
    watched.journal.write_text(repr(time.time()))
    for rank in start.ranks:
        rank.terminate()


def slow_down(start: Start, watched: Watched) -> None:
    """Stop and continue the rank in turn, until it is named or over."""
    rank = start.ranks[watched.plan.fault.rank]

    def alternate() -> None:
        while rank.is_alive() and watched.named is None:
            with suppress(ProcessLookupError):
                for number, seconds in zip((signal.SIGSTOP, signal.SIGCONT), SLOW_DUTY, strict=True):
                    os.kill(rank.pid or 0, number)
                    time.sleep(seconds)

    watched.journal.write_text(repr(time.time()))
    threading.Thread(target=alternate, daemon=True).start()


DRIVEN = {SLOW: slow_down, OTHER_RANKS: stop_all}


def undisturbed(folder: Path, shards: Path, design: Design, steps: int) -> Trace:
    run = Run(folder, shards, design, steps)
    start = run.start(Fault(spoilt=design.spoilt))
    try:
        while start.poll():
            time.sleep(POLL_SECONDS)
    finally:
        kill(start.ranks)
    seen = start.seen()
    if set(seen.codes) != {0}:
        raise Broken(f"the undisturbed run ended with {seen.codes}: {seen.printed[0][-2000:]}")
    found = run.trace()
    assert found.weights, "the undisturbed run has saved nothing"
    return found
