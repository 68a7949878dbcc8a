"""The interval between two saves: a fixed number of steps, or the interval that loses the least time to failures.

In: settings and, after each save, the seconds that it paused training. Out: the steps with a save.
Guarantee: equal on all ranks, because rank 0 measures and decides.

Example: a save costs 10 s, failures come every 24 h on average: save every 22 minutes.
"""

import time

from bigmodel.config.settings import CheckpointSettings
from bigmodel.distributed.world import World
from bigmodel.planning.save_interval import best_interval_seconds


class Interval:
    """Decides when the next save is due. Make one on every rank; `plan` is collective."""

    def __init__(self, settings: CheckpointSettings, world: World) -> None:
        self._settings, self._world = settings, world
        self._next_step = 0  # for a measured interval; 0: not measured yet
        self._last: tuple[int, float] | None = None  # a step of this start and its end time: the base of step timing

    def due(self, step: int, in_flight: bool) -> bool:
        """Whether the interval ends at this step; call it at the end of each step. in_flight: a save is unfinished."""
        self._last = self._last or (step, time.perf_counter())
        if self._next_step:
            return step >= self._next_step and not in_flight  # the save in flight sets the next step
        return step % self._settings.every_steps == 0

    def next_step(self, step: int) -> int:
        """The next step after `step` at which the interval ends, as known now."""
        every = self._settings.every_steps
        return max(self._next_step, step + 1) if self._next_step else (step // every + 1) * every

    def plan(self, step: int, began: float, held_seconds: float) -> None:
        """With `hours_between_failures`: set the step of the next save from the cost of the save of `step`."""
        mean = self._settings.hours_between_failures * 3600
        before, then = self._last or (step, began)
        self._last = (step, began)
        if mean and step > before:
            seconds_per_step = max((began - then) / (step - before), 1e-6)
            count = max(1, round(best_interval_seconds(held_seconds, mean) / seconds_per_step))
            self._next_step = self._world.broadcast_object(step + count)
