"""The learning rate of each step: a pure function of the step number and the settings.

Time is counted in steps or in tokens (`schedule.unit`). A schedule in tokens keeps its shape over the data while the
batch size ramps up. Tokens of a step: packed sequences x sequence_length, padding included.

Example: peak 1.0, 10 warm-up steps, cosine to 0.1 over 100 steps: 0.1 at step 0, 1.0 at step 9, 0.1 at step 99.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from bigmodel.config.settings import Settings, positions_before
from bigmodel.training.deepspeed_rates import DEEPSPEED_RATES, beta1


@dataclass(frozen=True)
class Clock:
    """The end of a step, and the lengths of warm-up, decay and the whole run, all in one unit."""

    done: float
    warmup: float
    decay: float
    total: float


def cosine(clock: Clock, final_ratio: float) -> float:
    """r + (1 - r) * (1 + cos(pi * p)) / 2, p = (done - warmup) / (total - warmup). Loshchilov & Hutter 2017.

    p is 0 at the last step of the warm-up and 1 at the last step of the run.
    """
    return final_ratio + (1.0 - final_ratio) * (1.0 + math.cos(math.pi * _progress(clock))) / 2.0


def linear(clock: Clock, final_ratio: float) -> float:
    """1 - (1 - r) * p, p as in `cosine`."""
    return 1.0 - (1.0 - final_ratio) * _progress(clock)


def wsd(clock: Clock, final_ratio: float) -> float:
    """Warm-up, stable, decay (Hu et al. 2024): 1, then 1 - (1 - r) * p during the last `decay`; p ends at 1."""
    into_decay = clock.done - (clock.total - clock.decay)
    progress = min(into_decay / clock.decay, 1.0) if into_decay > 0 and clock.decay else 0.0
    return 1.0 - (1.0 - final_ratio) * progress


def inverse_square_root(clock: Clock, final_ratio: float) -> float:
    """max(r, sqrt(warmup / done)) (Vaswani et al. 2017)."""
    return max(final_ratio, math.sqrt(max(clock.warmup, 1.0) / clock.done))


def constant(clock: Clock, final_ratio: float) -> float:
    """1: the peak from the warm-up to the end."""
    return 1.0


SCHEDULES: dict[str, Callable[[Clock, float], float]] = {
    "cosine": cosine,
    "wsd": wsd,
    "linear": linear,
    "inverse_square_root": inverse_square_root,
    "constant": constant,
}


def learning_rate(step: int, settings: Settings) -> float:
    """The learning rate for the update of step `step`, counted from 0.

    Linear warm-up: peak * (r + (1 - r) * done / warmup), r = initial_ratio; above 0 already in the first update.
    DeepSpeed's schedules: `bigmodel.training.deepspeed_rates`.
    """
    schedule, peak = settings.schedule, settings.optimizer.learning_rate
    if schedule.kind in DEEPSPEED_RATES:
        return DEEPSPEED_RATES[schedule.kind](step, settings)
    clock = _clock(step, settings)
    if clock.done <= clock.warmup:
        start = peak * schedule.initial_ratio
        return start + (peak - start) * clock.done / clock.warmup
    return peak * SCHEDULES[schedule.kind](clock, schedule.final_ratio)


def betas(step: int, settings: Settings) -> tuple[float, float] | None:
    """The optimizer's betas for the update of step `step`; None: those of [optimizer]."""
    changed = beta1(step, settings)
    return None if changed is None else (changed, settings.optimizer.beta2)


def _clock(step: int, settings: Settings) -> Clock:
    schedule = settings.schedule
    if schedule.unit == "steps":
        return Clock(step + 1, schedule.warmup_steps, schedule.decay_steps, settings.training.steps)
    done, total = (positions_before(end, settings) for end in (step + 1, settings.training.steps))
    return Clock(done, schedule.warmup_tokens, schedule.decay_tokens, total)


def _progress(clock: Clock) -> float:
    return min((clock.done - clock.warmup) / max(clock.total - clock.warmup, 1e-9), 1.0)
