"""The rates of DeepSpeed's schedulers, to the last bit: the same sums in the same order.

In: a step, counted from 0, and settings. Out: the learning rate of its update. Written against DeepSpeed 0.19.8; a
test compares with its classes.

DeepSpeed sets a rate when the scheduler is made and after each update. So step 0 has the rate of the construction,
and step n that of iteration n - 1:

    WarmupLR, log, 10 warm-up steps, peak 1: 0, 0, 0.301, 0.477, ..., 0.954, 1 at steps 0, 1, 2, 3, ..., 9, 10

Here a skipped step counts like any other; DeepSpeed's schedulers stand still in it.
"""

import math
from collections.abc import Callable

from bigmodel.config.schedule_settings import ScheduleSettings
from bigmodel.config.settings import Settings


def deepspeed_constant(step: int, settings: Settings) -> float:
    """WarmupLR: lowest_rate + (peak - lowest_rate) * g; g: the warm-up, then 1."""
    return _between(settings, _warm(step, settings.schedule, after=1.0))


def deepspeed_linear(step: int, settings: Settings) -> float:
    """WarmupDecayLR: as above; after the warm-up g = (total - iteration) / (total - warmup), at least 0."""
    total, warmup = _total(settings), _warmup(settings.schedule)
    falling = max(0.0, float(total - (step - 1)) / float(max(1.0, total - warmup)))
    return _between(settings, _warm(step, settings.schedule, after=falling))


def deepspeed_cosine(step: int, settings: Settings) -> float:
    """WarmupCosineLR: 0 in step 0; peak * (initial_ratio + (1 - initial_ratio) * g) in the warm-up; then peak times
    final_ratio + (1 - final_ratio) * (1 + cos(pi * p)) / 2, p = (iteration - warmup + 1) / (total - warmup)."""
    schedule, peak = settings.schedule, settings.optimizer.learning_rate
    warmup, iteration = _warmup(schedule), step - 1
    if step == 0:
        return 0.0
    if iteration < warmup:
        ratio_delta = 1.0 - schedule.initial_ratio
        return peak * (schedule.initial_ratio + _warm(step, schedule, after=1.0) * ratio_delta)
    progress = min(1.0, (iteration - warmup + 1) / max(1, _total(settings) - warmup))
    ratio = (1 + math.cos(math.pi * progress)) / 2
    return peak * max(0.0, schedule.final_ratio + (1.0 - schedule.final_ratio) * ratio)


def one_cycle(step: int, settings: Settings) -> float:
    """OneCycle (Smith 2018): up to the peak, down to lowest_rate, then lowest_rate / (1 + decay_rate * intervals)."""
    schedule = settings.schedule
    after = step - _cycle_steps(schedule)
    if after <= 0:
        return _between(settings, _cycle(step, schedule))
    if not schedule.decay_rate or not schedule.decay_interval:
        return schedule.lowest_rate
    return schedule.lowest_rate / (1 + schedule.decay_rate * (after / schedule.decay_interval))


def range_test(step: int, settings: Settings) -> float:
    """LRRangeTest (Smith 2018): learning_rate * (1 + growth * step / rise_steps), rounded down if in stairs."""
    schedule = settings.schedule
    intervals = float(step) / schedule.rise_steps
    intervals = math.floor(intervals) if schedule.staircase else intervals
    return settings.optimizer.learning_rate * (1 + schedule.growth * intervals)


DEEPSPEED_RATES: dict[str, Callable[[int, Settings], float]] = {
    "deepspeed_constant": deepspeed_constant,
    "deepspeed_linear": deepspeed_linear,
    "deepspeed_cosine": deepspeed_cosine,
    "one_cycle": one_cycle,
    "range_test": range_test,
}


def beta1(step: int, settings: Settings) -> float | None:
    """The optimizer's beta1 in a step of one_cycle; None: it does not change.

    Lowest in step 0, as in DeepSpeed, though the rate is lowest there too; from step 1 on high where the rate is low.
    """
    schedule = settings.schedule
    if schedule.beta1_range is None:
        return None
    lowest, highest = schedule.beta1_range
    if step == 0:
        return lowest
    if step > _cycle_steps(schedule):
        return highest
    return highest - (highest - lowest) * _cycle(step, schedule)


def _between(settings: Settings, share: float) -> float:
    lowest = settings.schedule.lowest_rate
    return lowest + (settings.optimizer.learning_rate - lowest) * share


def _warm(step: int, schedule: ScheduleSettings, after: float) -> float:
    """The share of the warm-up that is done in a step; `after` it."""
    warmup, iteration = _warmup(schedule), step - 1
    if step == 0:
        return 0.0
    if iteration >= warmup:
        return after
    if schedule.warmup == "log":
        return 1.0 / math.log(warmup) * math.log(iteration + 1)
    return iteration / warmup


def _warmup(schedule: ScheduleSettings) -> int:
    return max(2, schedule.warmup_steps)


def _total(settings: Settings) -> int:
    return settings.schedule.total_steps or settings.training.steps


def _fall_steps(schedule: ScheduleSettings) -> float:
    return float(schedule.rise_steps if schedule.fall_steps is None else schedule.fall_steps)


def _cycle_steps(schedule: ScheduleSettings) -> float:
    return float(schedule.rise_steps) + _fall_steps(schedule)


def _cycle(step: int, schedule: ScheduleSettings) -> float:
    """The height in the cycle: 0 at its ends, 1 after rise_steps."""
    rise, fall, total = float(schedule.rise_steps), _fall_steps(schedule), _cycle_steps(schedule)
    rise_share = rise / total
    x = 1.0 + step / total - math.floor(1 + step / total)
    rising = x <= rise_share
    stairs = schedule.rise_stairs if rising or schedule.fall_stairs is None else schedule.fall_stairs
    if not stairs:
        return x / rise_share if rising else (x - 1) / (rise_share - 1)
    within = step % total
    return math.floor(within * stairs / rise if within <= rise else (total - within) * stairs / fall) / stairs
