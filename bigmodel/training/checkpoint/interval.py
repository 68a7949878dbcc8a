"""The interval between two saves: fixed in steps, or the one that loses least time to failures.

Takes the settings and, after each save, the seconds for which it held training; gives the steps at which a save is
due. Guarantees: the answer is equal on all ranks, for rank 0 measures and decides.
"""

import math
import time

from bigmodel.config.settings import CheckpointSettings
from bigmodel.distributed.world import World


class Interval:
    """When the next save is due. Make one on every rank; `plan` is collective."""

    def __init__(self, settings: CheckpointSettings, world: World) -> None:
        self._settings, self._world = settings, world
        self._next_step = 0  # with a measured interval; 0: not measured yet
        self._last: tuple[int, float] | None = None  # a step of this start and when it ended: steps are timed from it

    def due(self, step: int, in_flight: bool) -> bool:
        """Whether the interval ends at this step; asked at the end of each. in_flight: a save is not finished yet."""
        self._last = self._last or (step, time.perf_counter())
        if self._next_step:
            return step >= self._next_step and not in_flight  # the one in flight sets the next
        return step % self._settings.every_steps == 0

    def plan(self, step: int, began: float, held_seconds: float) -> None:
        """With `hours_between_failures`: the step of the next save, from what the save of `step` cost."""
        mean = self._settings.hours_between_failures * 3600
        before, then = self._last or (step, began)
        self._last = (step, began)
        if mean and step > before:
            seconds_per_step = max((began - then) / (step - before), 1e-6)
            count = max(1, round(best_interval_seconds(held_seconds, mean) / seconds_per_step))
            self._next_step = self._world.broadcast_object(step + count)


def best_interval_seconds(cost: float, mean_between_failures: float) -> float:
    """Time from one save to the next that loses least: Daly 2006, eq. 37, whose first term is Young 1974.

    cost: seconds that a save holds training. sqrt(2CM) * (1 + sqrt(C/2M)/3 + (C/2M)/9) - C; M where C >= 2M.
    """
    ratio = cost / (2 * mean_between_failures)
    if ratio >= 1:
        return mean_between_failures
    return math.sqrt(2 * cost * mean_between_failures) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost
