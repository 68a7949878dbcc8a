"""Spikes: a loss or gradient norm far above the usual, and the steps that a rewind leaves out.

In: loss and gradient norm of each step, which are equal on all ranks. Out: which of them spike; and for
`training.spikes.policy` = "rewind" the declaration in RUN_DIR/left_out.json of the steps that the run leaves out when
it starts again. Guarantees:
- The windows are in every checkpoint, to the last bit, so that a resumed run judges as the uninterrupted one.
- The declaration is written whole before the run ends, and every later start heeds it, on any number of ranks. The left
  out steps keep their place in the plan: their batches are drawn and computed, but not applied.
- A checkpoint that was trained on left out steps is removed: each has the declarations that it knew in its state.
  Copies in `checkpoint.remote` of the steps between are not used.

Example: a spike in step 250, left_out_steps 10, checkpoints 100, 200 and 245: the run goes back to 200, and steps 241
to 250 have no update. Checkpoint 245 is removed.
"""

import os
import statistics
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bigmodel.config.settings import SpikeSettings, UserError
from bigmodel.run_directory import read_json, write_json
from bigmodel.training.checkpoint.folder import path_of, state_of, steps

SIGNALS = ("loss", "gradient_norm")
FILE = "left_out.json"
SIGMA_OF_MEDIAN_DISTANCE = 1.4826  # for normally distributed values
LEAST_DEVIATION = 1e-3  # of the median


@dataclass(frozen=True)
class Spike:
    signal: str
    value: float
    usual: float
    deviation: float

    def __str__(self) -> str:
        name = self.signal.replace("_", " ")
        return f"{name} {self.value:.4g}, usually {self.usual:.4g} with a deviation of {self.deviation:.2g}"


class Spikes:
    """The windows of the last steps. `state`: of the checkpoint that the run resumes; {}: a new run."""

    def __init__(self, settings: SpikeSettings, state: Mapping[str, Any]) -> None:
        self._settings, saved = settings, state.get("spikes", {})
        self._recent = {name: deque[float](saved.get(name, ()), maxlen=settings.window) for name in SIGNALS}

    def see(self, loss: float, gradient_norm: float) -> list[Spike]:
        """The spikes of a step; finite values only. Spikes belong to the usual of later steps: a level that lasts for
        half a window is the usual then."""
        found = []
        for name, value in zip(SIGNALS, (loss, gradient_norm), strict=True):
            recent = self._recent[name]
            if len(recent) * 4 >= self._settings.window:
                usual, deviation = usual_of(recent)
                if value > usual + self._settings.sigmas * deviation:
                    found.append(Spike(name, value, usual, deviation))
            recent.append(value)
        return found

    def state(self) -> dict[str, Any]:
        return {"spikes": {name: list(recent) for name, recent in self._recent.items()}}


def usual_of(values: Collection[float]) -> tuple[float, float]:
    """Median, and robust standard deviation: 1.4826 times the median distance from it, at least a thousandth of it."""
    median = statistics.median(values)
    distance = statistics.median(abs(one - median) for one in values)
    return median, max(SIGMA_OF_MEDIAN_DISTANCE * distance, LEAST_DEVIATION * abs(median))


@dataclass(frozen=True)
class Rewind:
    """A spike in step `at`: back to the checkpoint of step `to`; steps `first` to `at` are left out."""

    at: int
    to: int
    first: int

    @property
    def steps(self) -> range:
        return range(self.first, self.at + 1)


def plan_rewind(
    at: int, saved: Sequence[int], settings: SpikeSettings, earlier: Sequence[Rewind] = ()
) -> Rewind | None:
    """Where a spike in step `at` leads, from the steps of the saved checkpoints; None: there is none from before.

    The newest checkpoint from before the steps to leave out; without one the oldest, and fewer steps are left out.
    Raises `UserError` after too many `earlier` ones to that checkpoint.
    """
    first = max(at - settings.left_out_steps + 1, 1)
    before = [step for step in saved if step < first] or [min((step for step in saved if step < at), default=0)]
    to = max(before)
    if to and sum(one.to == to for one in earlier) >= settings.max_rewinds:
        raise UserError(
            f"training.spikes.max_rewinds = {settings.max_rewinds}: the run went back to step {to} that often, and "
            f"spikes again in step {at}; lower optimizer.learning_rate, or raise training.spikes.sigmas or "
            "left_out_steps, and start again"
        )
    return Rewind(at, to, max(first, to + 1)) if to else None


def read_rewinds(directory: Path) -> list[Rewind]:
    """The declared rewinds of a run, the oldest first. Raises `UserError` for a damaged file."""
    file = directory / FILE
    try:
        return [Rewind(**one) for one in read_json(file)] if file.exists() else []
    except TypeError:
        raise UserError(f"{file}: not a list of steps that rewinds left out; restore it from a copy") from None


def declare(directory: Path, rewind: Rewind) -> None:
    write_json(directory / FILE, [asdict(one) for one in [*read_rewinds(directory), rewind]])


def forget(directory: Path) -> None:
    """For a fresh start."""
    (directory / FILE).unlink(missing_ok=True)


def remove_trained_on(directory: Path, rewinds: Sequence[Rewind]) -> None:
    """Remove the checkpoints in `directory` that were trained on steps that are left out now. On rank 0 of the run that
    owns them. Damaged ones stay, for `checkpoint.newest` to report."""
    for step in steps(directory) if rewinds else ():
        path = path_of(directory, step)
        try:
            known = declared_in(state_of(path))
        except (OSError, ValueError, LookupError):
            continue
        if any(one.first <= step and one not in known for one in rewinds):
            os.rename(path, path.with_name(f"{path.name}.partial-rewound"))  # removed by `checkpoint.newest`


def is_trained_on(step: int, rewinds: Sequence[Rewind]) -> bool:
    """Whether a copy of this step in a store may have been trained on left out steps."""
    return any(one.first <= step < one.at for one in rewinds)


def declared_in(state: Mapping[str, Any]) -> list[Rewind]:
    return [Rewind(**one) for one in state.get("left_out", ())]
