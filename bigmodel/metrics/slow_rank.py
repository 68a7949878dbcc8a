"""A slow rank: the one that works longer than the others, step after step.

In: the busy seconds of all ranks in a step (`bigmodel.metrics.phases`). Out: the rank and its excess, while it lasts.
Busy time leaves waiting out, so a rank that waits for a slow one is not slow. Cost: 20 microseconds for 8 ranks.
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

FIRST_STEPS = 5  # not counted: they compile and allocate
STEPS, SECONDS = 20, 5.0  # of the running sums, the longer of both
NAMED, FORGOTTEN = 0.2, 0.1  # excess from which a rank is named, and below which it is not any more
ONE_STEP = 0.1  # of the sums at most from one step: a single pause does not make a rank slow


class Slow(NamedTuple):
    """A rank that works `excess` longer than the rank in the middle; 0.5: half as long again."""

    rank: int
    excess: float


class SlowRank:
    """`see` each step; `now` is the slow rank, or None."""

    def __init__(self) -> None:
        self.now: Slow | None = None
        self._seen = 0
        self._sums: list[float] = []

    def see(self, busy_seconds: Sequence[float]) -> Slow | None:
        """The slow rank after this step."""
        self._seen += 1
        usual = statistics.median_low(busy_seconds)
        if self._seen <= FIRST_STEPS or len(busy_seconds) < 2 or usual <= 0.0:
            return self.now
        steps = max(STEPS, SECONDS / usual)
        before = self._sums or [0.0] * len(busy_seconds)
        most = usual + ONE_STEP * statistics.median_low(before)
        self._sums = [
            total * (1.0 - 1.0 / steps) + min(seconds, most)
            for total, seconds in zip(before, busy_seconds, strict=True)
        ]
        rank = max(range(len(self._sums)), key=self._sums.__getitem__)
        excess = self._sums[rank] / statistics.median_low(self._sums) - 1.0
        limit = FORGOTTEN if self.now and self.now.rank == rank else NAMED
        self.now = Slow(rank, excess) if excess >= limit and self._seen >= FIRST_STEPS + STEPS else None
        return self.now

    def words(self, name: str) -> str:
        """For people. name: of the rank, with its host."""
        return f"{name} is slow: works {self.now.excess:.0%} longer than the others" if self.now else ""
