"""Hanging ranks of a node: found, named with their stacks, and ended. Runs in the exporter.

In: the beats and processes of the node's ranks, a few times a second. Out: a line in the terminal and in events.jsonl,
and the end of a rank that does not go on; whoever started it then ends the others, and the run is requeued.

    stopped (SIGSTOP) for hang_seconds                     -> named and ended
    no progress in its own work for hang_seconds           -> named; after three times as long ended
    waits for data, or for a disk (state D)                -> named; its own limits end it
    waits in a collective, compiles, is in a debugger      -> nothing: it waits for another rank, or works

hang_seconds, or ten usual steps if that is longer, counts time in which this process itself ran: a node that was
suspended as a whole does not blame its ranks. Evaluations and saves have no usual length: only stopped processes are
named there. A node judges its own ranks by what it sees of them; nodes exchange nothing, so this costs the same on one
node and on a thousand. GPUs: the host thread of every rank waits for its device in the same place, whoever is late, so
a rank is named only where its stack differs from most of the node's.
"""

import ctypes
import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from bigmodel.metrics.beat import Pulse, read_beat
from bigmodel.metrics.profiling import STACKS_SIGNAL, group_stacks, main_stack
from bigmodel.metrics.rank_record import is_alive
from bigmodel.run_directory import record_event

USUAL_STEPS = 10
EARLY = 0.9  # of the limit: looking and telling take the rest
PATIENCE = 3.0  # limits before a rank that was not stopped is ended
LARGEST_SHARE = 0.25  # of the collective timeout: a rank is ended before the others give up and are blamed
MAX_LOOK_SECONDS = 1.0  # between two looks; more means that this process did not run
DUMP_SECONDS = 1.0
STACK_LINES = 15
OWN_WORK = ("", "forward", "backward", "optimizer")
WAITS = ("torch/distributed/", "deepspeed/comm/")
WORKS = ("torch/_dynamo/", "torch/_inductor/", "/triton/", "/pdb.py", "/bdb.py", "/debugpy/")
LIBC = ctypes.CDLL(None)
READS_DATA = "bigmodel/data/load/"

Record = Mapping[str, Any]  # of a rank: see bigmodel/metrics/rank_record.py


class Limits(NamedTuple):
    """hang_seconds: 0 switches the watch off. collective_seconds: the other ranks wait no longer."""

    hang_seconds: float = 0.0
    collective_seconds: float = 600.0


class Finding(NamedTuple):
    """Why a rank counts as hanging. patience: limits after which it is ended."""

    how: str
    patience: float
    stack: list[str]  # of its main thread, the innermost frame first


class _Rank:
    """What the watch knows of one rank."""

    def __init__(self, pulse: Pulse) -> None:
        self.pulse = pulse
        self.still_seconds = self.stopped_seconds = 0.0  # without a change of the beat; of them, in state T
        self.looked_at = 0.0  # still_seconds at the last look at its stack
        self.step_seconds: deque[float] = deque(maxlen=20)
        self.told: Finding | None = None

    def see(self, pulse: Pulse, seconds: float, state: str) -> None:
        before, self.pulse = self.pulse, pulse
        if pulse.changes != before.changes:
            self.still_seconds = self.looked_at = 0.0
        else:
            self.still_seconds += seconds
        self.stopped_seconds = self.stopped_seconds + seconds if self.still_seconds and state == "T" else 0.0
        if pulse.step_seconds and (pulse.step > before.step or not self.step_seconds):
            self.step_seconds.append(pulse.step_seconds)

    @property
    def usual_step(self) -> float:
        """Seconds; 0: not known yet."""
        return statistics.median(self.step_seconds) if self.step_seconds else 0.0

    @property
    def where(self) -> str:
        return f"{f'in {self.pulse.phase} of' if self.pulse.phase else 'in'} step {self.pulse.step + 1}"


class HangWatch:
    """Call `look` a few times a second with the records of the node's live ranks; `say` prints a line."""

    def __init__(self, folder: Path, run_directory: Path, limits: Limits, say: Callable[[str], None]) -> None:
        self._folder, self._directory, self._limits, self._say = folder, run_directory, limits, say
        self._ranks: dict[int, _Rank] = {}
        self._looked = time.monotonic()

    def look(self, records: Iterable[Record]) -> None:
        if not self._limits.hang_seconds:
            return
        now = time.monotonic()
        seconds, self._looked = min(now - self._looked, MAX_LOOK_SECONDS), now
        alive = {record["rank"]: record for record in records}
        self._ranks = {rank: known for rank, known in self._ranks.items() if rank in alive}
        for rank, record in alive.items():
            if pulse := read_beat(self._folder, rank):
                self._ranks.setdefault(rank, _Rank(pulse)).see(pulse, seconds, process_state(record["pid"]))
        for rank, known in self._ranks.items():
            if known.told and not known.still_seconds:
                self._goes_on(rank, known)
        for rank, finding in (self._stopped(alive) or self._stuck(alive)).items():
            self._tell(rank, finding)
        self._end({rank: alive[rank] for rank, known in self._ranks.items() if self._is_over(known)})

    def named(self) -> set[int]:
        """The ranks that have been named and have not gone on since. For another thread."""
        return {rank for rank, known in list(self._ranks.items()) if known.told}

    def _limit(self, known: _Rank) -> float:
        longer = max(self._limits.hang_seconds, USUAL_STEPS * known.usual_step)
        return EARLY * min(longer, LARGEST_SHARE * self._limits.collective_seconds)

    def _is_over(self, known: _Rank) -> bool:
        return known.told is not None and known.still_seconds >= known.told.patience * self._limit(known)

    def _stopped(self, alive: Mapping[int, Record]) -> dict[int, Finding]:
        """Ranks that something stopped. They are to be ended, so they may run for the moment that a stack takes."""
        due = [
            rank
            for rank, known in self._ranks.items()
            if not known.told and known.stopped_seconds >= self._limit(known)
        ]
        stacks = dump_stacks(self._folder, [alive[rank] for rank in due], wake=True)
        how = "was stopped (SIGSTOP: process state T)"
        return {rank: Finding(how, 0.0, main_stack(stacks.get(rank, ""))[:STACK_LINES]) for rank in due}

    def _stuck(self, alive: Mapping[int, Record]) -> dict[int, Finding]:
        """Ranks that make no progress in their own work."""
        due = {
            rank: known
            for rank, known in self._ranks.items()
            if known.usual_step and known.still_seconds - known.looked_at >= self._limit(known)
        }
        suspects = [rank for rank, known in due.items() if known.pulse.phase in OWN_WORK and not known.told]
        if not suspects:
            return {}
        for known in due.values():
            known.looked_at = known.still_seconds
        stacks = dump_stacks(self._folder, [alive[rank] for rank in due])
        if any(alive[rank].get("gpu") for rank in due) and stacks:
            suspects = [rank for rank in suspects if rank not in group_stacks(stacks)[0][0]]
        judged = {rank: judge(main_stack(stacks.get(rank, "")), process_state(alive[rank]["pid"])) for rank in suspects}
        return {rank: finding for rank, finding in judged.items() if finding}

    def _tell(self, rank: int, finding: Finding) -> None:
        known = self._ranks[rank]
        known.told = finding
        left = finding.patience * self._limit(known) - known.still_seconds
        then = "the run ends" if left <= 0 else "its own limit ends the run"
        if 0 < left < float("inf"):
            then = f"the run ends in {left:.0f} s unless it goes on"
        here = os.uname().nodename
        seconds = f"{known.still_seconds:.0f} s without progress"
        headline = f"bigmodel: rank {rank} on {here} {finding.how} {known.where}, {seconds}; {then}"
        self._say("\n  |".join([headline, *finding.stack]))
        place = {"step": known.pulse.step + 1, "phase": known.pulse.phase, "seconds": round(known.still_seconds, 2)}
        limit = round(self._limit(known) / EARLY, 2)
        self._record(
            "rank_hangs", rank=rank, host=here, how=finding.how, **place, limit_seconds=limit, stack=finding.stack
        )

    def _goes_on(self, rank: int, known: _Rank) -> None:
        known.told = None
        here = os.uname().nodename
        self._say(f"bigmodel: rank {rank} on {here} goes on")
        self._record("rank_goes_on", rank=rank, host=here)

    def _end(self, records: Mapping[int, Record]) -> None:
        """Record the cause of the end, then kill these ranks."""
        if not records:
            return
        known = {rank: (self._ranks[rank], self._ranks[rank].told) for rank in records}
        found = [
            f"rank {rank} on {os.uname().nodename} {told.how} {at.where}" for rank, (at, told) in known.items() if told
        ]
        step = min(at.pulse.step for at, _ in known.values())
        self._record("launch_ended", cause="hang", detail="; ".join(found), step=step)
        for rank, record in records.items():
            if is_alive(dict(record)):
                with suppress(ProcessLookupError):
                    os.kill(record["pid"], signal.SIGKILL)
            del self._ranks[rank]

    def _record(self, kind: str, **details: Any) -> None:
        try:
            record_event(self._directory, kind, **details)
        except OSError as error:  # a full disk must not keep a hanging run alive
            self._say(f"bigmodel: events.jsonl: {error.strerror}; not recorded: {kind} {details}")


def judge(stack: list[str], state: str) -> Finding | None:
    """What a rank without progress does, from its stack and process state; None: it waits for others, or works."""
    top = stack[:3]
    if not stack or any(part in line for line in top for part in WAITS):
        return None
    if any(part in line for line in stack for part in WORKS):
        return None
    if any(READS_DATA in line for line in stack):
        return Finding("waits for data", float("inf"), stack[:STACK_LINES])
    if state == "D":
        return Finding("waits for a disk or a device (state D)", float("inf"), stack[:STACK_LINES])
    return Finding("hangs", PATIENCE, stack[:STACK_LINES])


def dump_stacks(folder: Path, records: Iterable[Record], wake: bool = False) -> dict[int, str]:
    """The stacks of all threads of these ranks, by rank, as bigmodel/metrics/profiling.py has ranks write them.

    wake: the processes are stopped; they run on from here. A rank without a handler is left out.
    """
    files = {record["rank"]: (record["pid"], folder / f"stacks-{record['rank']}") for record in records}
    files = {rank: (pid, file) for rank, (pid, file) in files.items() if file.exists()}
    for pid, file in files.values():
        os.truncate(file, 0)
        with suppress(ProcessLookupError):
            _signal_main_thread(pid, STACKS_SIGNAL)
            if wake:
                os.kill(pid, signal.SIGCONT)
    deadline = time.monotonic() + DUMP_SECONDS
    before, texts = None, dict[int, str]()
    while before != texts or not all("Current thread" in text for text in texts.values()):  # the main thread is last
        if time.monotonic() > deadline:
            break
        time.sleep(0.03)
        before, texts = texts, {rank: file.read_text(errors="replace") for rank, (_, file) in files.items()}
    return {rank: text for rank, text in texts.items() if text}


def _signal_main_thread(pid: int, number: int) -> None:
    """Not os.kill: another thread of a stopped process may take the signal, and the main thread then runs on."""
    if hasattr(LIBC, "tgkill") and LIBC.tgkill(pid, pid, number) == 0:
        return
    os.kill(pid, number)


def process_state(pid: int) -> str:
    """The letter of /proc: T is stopped, D waits for a device; "" if the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
