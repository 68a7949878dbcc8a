"""Phases: where a rank's step goes, by the clock of the device that does the work.

    with phases("backward"): ...      names nest: what is inside is not counted outside
    phases.take()                     seconds by phase since the last call

On a CPU, and for phases that belong to the host (waiting for data, evaluation, checkpoint), by the host's clock. On a
GPU forward, backward, communication and optimizer lie between two CUDA events on the current stream; nothing waits for
them: an event that has not happened yet is counted by a later `take`. Costs 2 microseconds a phase on a CPU.
"""

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from bigmodel.metrics.recorder import Seat

HOST_PHASES = ("data", "evaluation", "checkpoint")
BUSY_PHASES = ("forward", "backward", "optimizer")  # what a rank does without waiting for another


class Phases:
    """The timers of one rank. Enter and leave phases from one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since: Any = None  # when the innermost open phase went on: a host time or an event
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.busy_seconds = 0.0  # of the last `take`

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._on_gpu and name in HOST_PHASES:
            began = time.perf_counter()
            try:
                yield
            finally:
                self.add(name, time.perf_counter() - began)
            return
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def add(self, name: str, seconds: float) -> None:
        """Count time that was measured elsewhere."""
        self._seconds[name] += seconds

    def take(self) -> Mapping[str, float]:
        """Seconds by phase since the last call; those whose events have not happened come with a later one."""
        while self._pending and self._pending[0][2].query():
            name, began, ended = self._pending.pop(0)
            self._seconds[name] += began.elapsed_time(ended) / 1000
        taken, self._seconds = self._seconds, defaultdict(float)
        self.busy_seconds = sum(taken.get(name, 0.0) for name in BUSY_PHASES)
        return taken

    def busy_row(self, seat: Seat) -> list[float]:
        """One number per rank, 0 but for this one's busy seconds: added up over the ranks, everybody's."""
        row = [0.0] * seat.world_size
        row[seat.rank] = self.busy_seconds
        return row

    def _mark(self) -> None:
        """The innermost open phase, if any, lasted from the last mark to now."""
        now: Any = torch.cuda.Event(enable_timing=True) if self._on_gpu else time.perf_counter()
        if self._on_gpu:
            now.record()
            if self._open:
                self._pending.append((self._open[-1], self._since, now))
        elif self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now


def slowest(busy_seconds: Sequence[float]) -> tuple[int | None, float | None]:
    """The rank that was busy longest, and by how much longer than the median rank; None for a single rank."""
    if len(busy_seconds) < 2:
        return None, None
    rank = max(range(len(busy_seconds)), key=busy_seconds.__getitem__)
    return rank, busy_seconds[rank] - statistics.median_low(busy_seconds)


class CompileTime:
    """Seconds that this process has spent in torch.compile and in Triton's compiler, each second once."""

    def __init__(self) -> None:
        self._triton = 0.0
        self._told = 0.0
        try:
            from triton import knobs

            knobs.compilation.listener = self._on_triton
        except ImportError:
            pass  # no Triton here: nothing that it could compile

    def take(self) -> float:
        """Since the last call."""
        total = self._triton + _dynamo_seconds()
        taken, self._told = total - self._told, total
        return taken

    def _on_triton(self, *, times: Any, cache_hit: bool, **others: Any) -> None:
        if torch._guards.CompileContext.current_compile_id() is None:  # else inside of what dynamo times
            self._triton += max(0, times.total) / 1e6  # Triton goes by the time of day, which can be set back


def _dynamo_seconds() -> float:
    dynamo = sys.modules.get("torch._dynamo.utils")
    return sum(dynamo.compilation_time_metrics.get("_compile.compile_inner", ())) if dynamo else 0.0
