"""The model behind `tools.simulate_goodput`: a run that saves, fails and goes on, over a month.

In: what saves and failures cost under a design, the times of the failures, intervals. Out: the effective training-time
ratio, productive seconds over all seconds, and where the rest went.

    |--- interval ---|pause|--- interval ---|pause|-- X          detect, wait, restart |--- interval ---| ...
                     |---- write ----> may be resumed from
    lost at X: all work after the last save whose writing had ended (here the first one, or none)

Failures are the events; between two of them the saves follow by arithmetic, for all seeds and intervals at once.
Failures come at any time: one during a recovery begins the recovery again. One save is written at a time, so an
interval shorter than the writing waits for it. Not in the model: steps (work is continuous), a step slowed by a save
in the background, silent corruption (found late, so that several saves are lost), planned stops.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LOSSES = ("save", "replay", "detect", "wait", "restart")


@dataclass(frozen=True)
class Design:
    """What saves and failures cost, in seconds; shares are of all failures."""

    pause: float  # training stands still at each save
    write: float  # from the beginning of a save until a restart can use it; at least `pause`
    detect: float  # from a crash until all ranks have ended
    restart: float  # from then to the first new step
    hang_share: float = 0.0  # failures that are hangs
    hang_detect: float = 0.0  # from a hang until all ranks have ended
    node_share: float = 0.0  # failures that take the node with them
    node_wait: float = 0.0  # for another node, where no spare is free
    spares: int = 0  # nodes that take over at once
    repair: float = 0.0  # until a failed node is a spare again
    lost_share: float = 0.0  # failures after which the saves are gone; those in the store remain
    store_interval: float = math.inf  # productive seconds between saves to the store, beside the others
    store_pause: float = 0.0
    store_write: float = 0.0
    store_restart: float = 0.0  # instead of `restart`, from the store


class Failures(NamedTuple):
    """Failures of several months (seeds, failures): seconds since the start, and three uniform draws each."""

    times: Array
    hang: Array
    node: Array
    lost: Array


class Outcome(NamedTuple):
    """Of each month and interval (seeds, intervals): the ratio, and the shares of the time lost by cause."""

    ratio: Array
    lost: dict[str, Array]


def draw_failures(mean_seconds: float, seconds: float, seeds: int, seed: int = 0) -> Failures:
    """Failures of a Poisson process over `seconds`, for months numbered from `seed`; times after the end are unused.

    The same seed gives the same failures to every design and interval.
    """
    count = math.ceil(seconds / mean_seconds + 8 * math.sqrt(seconds / mean_seconds) + 20)
    months = [np.random.default_rng([seed, month]) for month in range(seeds)]
    times = np.stack([one.exponential(mean_seconds, count).cumsum() for one in months])
    draws = np.stack([one.random((3, count)) for one in months], axis=1)
    return Failures(times, *draws)


def simulate(design: Design, failures: Failures, intervals: Array, seconds: float, start: float = 0.0) -> Outcome:
    """`intervals` (intervals,): productive seconds between saves. `start`: seconds before the first step."""
    run = _Run(design, np.asarray(intervals, np.float64), len(failures.times))
    free_at = np.zeros((len(failures.times), design.spares))
    resumed = np.full((len(failures.times), 1), start)  # when training goes on, or would have
    lost = {cause: np.zeros((len(failures.times), len(run.interval))) for cause in LOSSES}
    lost["restart"] += min(start, seconds)
    for number in range(failures.times.shape[1]):
        time, hang, node, gone = (column[:, number, None] for column in failures)
        if (time >= seconds).all():
            break
        happens = time < seconds
        run.train(np.where(happens, np.maximum(0.0, time - resumed), 0.0))
        from_store = happens & (gone < design.lost_share)
        run.go_back(happens, from_store)
        spent = {
            "detect": np.where(hang < design.hang_share, design.hang_detect, design.detect),
            "wait": _wait(design, free_at, time, happens & (node < design.node_share)),
            "restart": np.where(from_store, design.store_restart, design.restart),
        }
        unfinished = np.where(
            happens, np.maximum(0.0, np.minimum(resumed, seconds) - time), 0.0
        )  # of a recovery cut short
        lost["restart"] -= unfinished
        left = np.where(happens, seconds - time, 0.0)
        for cause, amount in spent.items():
            taken = np.minimum(left, amount)
            lost[cause] += taken
            left = left - taken
        resumed = np.where(happens, time + sum(spent.values()), resumed)
    run.train(np.maximum(0.0, seconds - resumed))
    lost["save"], lost["replay"] = run.paused, run.replayed
    return Outcome(run.progress / seconds, {cause: value / seconds for cause, value in lost.items()})


class _Run:
    """Training of all months (seeds, intervals): productive seconds that still count, and those that can be loaded."""

    def __init__(self, design: Design, interval: Array, seeds: int) -> None:
        self.design, self.interval = design, interval
        self.pause = design.pause + design.store_pause * interval / design.store_interval
        self.cycle = np.maximum(interval + self.pause, design.write)
        self.progress, self.saved, self.stored, self.paused, self.replayed = np.zeros((5, seeds, len(interval)))

    def train(self, uptime: Array) -> None:
        """`uptime` (seeds, 1): seconds without a failure."""
        design, began, done = self.design, self.progress, self._work(uptime)
        self.saved = began + self.interval * np.maximum(
            0.0, np.floor((uptime - self.interval - design.write) / self.cycle) + 1
        )
        if design.store_interval < math.inf:
            written = began + self._work(np.maximum(0.0, uptime - design.store_write))
            at_store = np.floor(written / design.store_interval) * design.store_interval
            self.stored = np.maximum(self.stored, at_store)
        self.progress = began + done
        self.paused = self.paused + uptime - done

    def go_back(self, happens: NDArray[np.bool_], from_store: NDArray[np.bool_]) -> None:
        kept = np.where(happens, np.where(from_store, self.stored, self.saved), self.progress)
        self.replayed = self.replayed + self.progress - kept
        self.progress = kept

    def _work(self, uptime: Array) -> Array:
        return np.floor(uptime / self.cycle) * self.interval + np.minimum(uptime % self.cycle, self.interval)


def _wait(design: Design, free_at: Array, time: Array, takes_node: NDArray[np.bool_]) -> Array:
    """Seconds until another node is there (seeds, 1). `free_at` (seeds, spares) is updated.

    The failed node is repaired and becomes a spare. Where no spare comes back earlier, another node does.
    """
    if not design.spares:
        return np.where(takes_node, design.node_wait, 0.0)
    next_free = free_at.argmin(axis=1)[:, None]
    wait = np.maximum(0.0, np.take_along_axis(free_at, next_free, axis=1) - time)
    uses_spare = takes_node & (wait <= design.node_wait)
    back_at = np.where(uses_spare, time + design.repair, np.take_along_axis(free_at, next_free, axis=1))
    np.put_along_axis(free_at, next_free, back_at, axis=1)
    return np.where(takes_node, np.minimum(wait, design.node_wait), 0.0)


def spares_needed(failures_at_once: float) -> int:
    """Spares of which one is nearly always free: mean and three deviations of a Poisson count of nodes in repair."""
    return math.ceil(failures_at_once + 3 * math.sqrt(failures_at_once))
