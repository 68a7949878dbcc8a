"""Phases: seconds of a rank's step by phase, from the clock of the device that does the work.

    with phases("backward"): ...      phases nest: inner seconds do not count for the outer phase
    phases.take()                     seconds by phase since the last call

On a CPU, and for phases of the host (waiting for data, evaluation, checkpoint), the host's clock. On a GPU forward,
backward, communication, exchange (of rows between ranks that share experts) and optimizer are timed by two CUDA events
on the current stream. Nothing waits for an event: a later `take` counts it. Cost: 2 microseconds per phase on a CPU.
"""

import heapq
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from bigmodel.metrics.recorder import Seat

HOST_PHASES = ("data", "evaluation", "checkpoint")
BUSY_PHASES = ("forward", "backward", "optimizer")  # a rank's own work, without waiting for other ranks
MOST_RANKS = 64  # whose lags are all recorded
SLOWEST = 16  # ranks whose lags are recorded, of more


class Phases:
    """The timers of one rank. Enter and leave phases from one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since: Any = None  # when the innermost open phase last started or continued: a host time or an event
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.busy_seconds = 0.0  # of the last `take`
        self.entered: Callable[[str], None] = lambda name: None  # called with each new phase, "" outside of all

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.entered(name)
        if self._on_gpu and name in HOST_PHASES:
            began = time.perf_counter()
            try:
                yield
            finally:
                self.add(name, time.perf_counter() - began)
                self.entered("")
            return
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()
            self.entered(self._open[-1] if self._open else "")

    def add(self, name: str, seconds: float) -> None:
        """Count time that was measured elsewhere."""
        self._seconds[name] += seconds

    def take(self) -> Mapping[str, float]:
        """Seconds by phase since the last call; phases with pending events come with a later call."""
        while self._pending and self._pending[0][2].query():
            name, began, ended = self._pending.pop(0)
            self._seconds[name] += began.elapsed_time(ended) / 1000
        taken, self._seconds = self._seconds, defaultdict(float)
        self.busy_seconds = sum(taken.get(name, 0.0) for name in BUSY_PHASES)
        return taken

    def busy_row(self, seat: Seat) -> list[float]:
        """One number per rank: this rank's busy seconds, else 0. Summed over the ranks it has all busy seconds.

        Example: rank 1 of 3, busy for 0.5 s: [0.0, 0.5, 0.0].
        """
        row = [0.0] * seat.world_size
        row[seat.rank] = self.busy_seconds
        return row

    def _mark(self) -> None:
        """Count the time since the last call for the innermost open phase, if any."""
        now: Any = torch.cuda.Event(enable_timing=True) if self._on_gpu else time.perf_counter()
        if self._on_gpu:
            now.record()
            if self._open:
                self._pending.append((self._open[-1], self._since, now))
        elif self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now


def slowest(busy_seconds: Sequence[float]) -> tuple[int | None, float | None]:
    """The rank with the most busy seconds, and its excess over the median rank; None for a single rank."""
    if len(busy_seconds) < 2:
        return None, None
    rank = max(range(len(busy_seconds)), key=busy_seconds.__getitem__)
    return rank, busy_seconds[rank] - statistics.median_low(busy_seconds)


def lags(busy_seconds: Sequence[float]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Milliseconds that ranks worked longer than the median rank, less than 0 for faster ones, and these ranks.

    Up to `MOST_RANKS` ranks: of all, in order, and () for the ranks; of more, the `SLOWEST` slowest ones. Of a single
    rank: ((), ()).
    """
    if len(busy_seconds) < 2:
        return (), ()
    usual, ranks = statistics.median_low(busy_seconds), range(len(busy_seconds))
    chosen = ranks if len(ranks) <= MOST_RANKS else heapq.nlargest(SLOWEST, ranks, busy_seconds.__getitem__)
    found = tuple(round(1000 * (busy_seconds[rank] - usual), 1) for rank in chosen)
    return found, () if chosen is ranks else tuple(chosen)


class CompileTime:
    """Seconds of this process in torch.compile and Triton's compiler, each second counted once."""

    def __init__(self) -> None:
        self._triton = 0.0
        self._told = 0.0
        try:
            from triton import knobs

            knobs.compilation.listener = self._on_triton
        except ImportError:
            pass  # no Triton, so nothing to compile

    def take(self) -> float:
        """Seconds since the last call."""
        total = self._triton + _dynamo_seconds()
        taken, self._told = total - self._told, total
        return taken

    def _on_triton(self, *, times: Any, cache_hit: bool, **others: Any) -> None:
        if torch._guards.CompileContext.current_compile_id() is None:  # else dynamo's time includes it
            self._triton += max(0, times.total) / 1e6  # Triton uses the time of day, which can be set back


def _dynamo_seconds() -> float:
    dynamo = sys.modules.get("torch._dynamo.utils")
    return sum(dynamo.compilation_time_metrics.get("_compile.compile_inner", ())) if dynamo else 0.0
