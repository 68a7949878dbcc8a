"""The best evaluation of a run, and its early end when evaluations get no better.

In: settings, the evaluations during training. Out: whether this step's checkpoint is to be kept as the best
(`checkpoint.keep_best`), and whether the run ends (`training.early_stop`). Guarantees: equal on all ranks, because
evaluations are; the state is in every checkpoint, so that a run that is killed and resumed decides as the uninterrupted
one does. An evaluation that is not finite is never better.

Example, patience 2: losses 3.0, 2.5, 2.6, 2.5 at steps 10, 20, 30, 40: the best is step 20, the run ends after step 40.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bigmodel.config.measures import MEASURES
from bigmodel.config.settings import Settings, UserError
from bigmodel.evaluation.evaluate import Evaluation
from bigmodel.sizes import counted_noun


@dataclass(frozen=True)
class Best:
    """The best value of a measure, its step, and the number of evaluations since then."""

    metric: str
    value: float | None = None
    step: int = 0
    waited: int = 0

    def after(self, step: int, value: float, min_delta: float = 0.0) -> "Best":
        sign = -1.0 if MEASURES[self.metric].is_better_high else 1.0
        if math.isfinite(value) and (self.value is None or sign * value < sign * self.value - min_delta):
            return Best(self.metric, value, step)
        return Best(self.metric, self.value, self.step, self.waited + 1)


class Judge:
    """What the evaluations of a run mean for it. `state`: of the checkpoint that the run resumes; {}: a new run."""

    def __init__(self, settings: Settings, state: Mapping[str, Any]) -> None:
        self._keep, self._stop = settings.checkpoint.keep_best, settings.training.early_stop
        self._best = _resumed(self._keep, state.get("best")) if self._keep else None
        self._waiting = _resumed(self._stop.metric, state.get("early_stop")) if self._stop else None
        self._seen: int = state.get("evaluated", 0)

    @property
    def is_on(self) -> bool:
        return bool(self._best or self._waiting)

    @property
    def stops(self) -> bool:
        """Whether the run ends early."""
        return bool(self._stop and self._waiting and self._waiting.waited >= self._stop.patience)

    @property
    def reason(self) -> str:
        """Why it ends early."""
        assert self._stop
        assert self._waiting
        best = f"{self._waiting.value:.4g} of step {self._waiting.step}" if self._waiting.step else "none"
        margin = f", by more than min_delta = {self._stop.min_delta:g}," if self._stop.min_delta else ""
        return (
            f"no better {self._stop.metric} than {best}{margin} in {counted_noun(self._waiting.waited, 'evaluation')} "
            f"(training.early_stop.patience = {self._stop.patience})"
        )

    def lacks(self, step: int) -> bool:
        """Whether the evaluation of this step has not been seen: the run was stopped before it."""
        return self.is_on and self._seen < step

    def is_best(self, step: int) -> bool:
        """Whether the last evaluation was of this step and the best of all."""
        return bool(self._best and self._best.step == step == self._seen)

    def see(self, step: int, evaluation: Evaluation) -> None:
        """Raises `UserError` for a measure that this data do not have."""
        self._seen = step
        if self._best:
            self._best = self._best.after(step, _value(evaluation, self._best.metric))
        if self._stop and self._waiting:
            value = _value(evaluation, self._waiting.metric)
            self._waiting = self._waiting.after(step, value, self._stop.min_delta)

    def state(self) -> dict[str, Any]:
        """For a checkpoint; {} if neither setting is on."""
        found = {"best": self._best, "early_stop": self._waiting}
        kept = {name: asdict(best) for name, best in found.items() if best}
        return {**kept, "evaluated": self._seen} if kept else {}


def _resumed(metric: str, saved: Mapping[str, Any] | None) -> Best:
    """Of another metric than the settings': begun anew."""
    return Best(**saved) if saved and saved["metric"] == metric else Best(metric)


def _value(evaluation: Evaluation, metric: str) -> float:
    value: Any = evaluation
    for name in MEASURES[metric].attribute.split("."):
        value = getattr(value, name, None)
    if value is None:
        raise UserError(
            f'"{metric}" of checkpoint.keep_best or training.early_stop.metric is not known for this run; choose '
            f"another of {', '.join(MEASURES)}"
        )
    return float(value)
