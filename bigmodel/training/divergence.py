"""Divergence: when a run left its course, and which checkpoints are from before.

In: the steps of a run. Out: the step since which it is off course; when it ends, advice, and a record for the next
start (bigmodel/training/checkpoint/health.py). A divergence begins with the first of the last steps in a row without a
finite loss and gradient, or earlier: where the loss rose out of the range of the steps before it and did not come back.
The update of the step before that made these weights, so a checkpoint is from before only if it was saved before that
update. Example: bad steps 10 to 19, checkpoints 4, 8, 9 and 12: 9 and 12 hold the weights that step 10 could not use.
"""

import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from bigmodel.config.settings import Settings, UserError
from bigmodel.distributed.world import World
from bigmodel.run_directory import read_json_lines, record_event
from bigmodel.training.checkpoint.failures import NotFiniteError
from bigmodel.training.checkpoint.finite import not_finite
from bigmodel.training.checkpoint.folder import path_of
from bigmodel.training.checkpoint.health import record_divergence
from bigmodel.training.slices import Place
from bigmodel.training.spikes import usual_of

MAX_BAD_STEPS = 10  # this many in a row without a finite loss and gradient mean divergence; fp16 lowers its scale first
NEW_COURSE_STEPS = 1000
ORDINARY_STEPS, LEAST_STEPS = 128, 32  # that make the usual loss; before so many no loss is high
HIGH_DEVIATIONS = 6.0
TAIL_BYTES = 1 << 22  # of metrics.jsonl: more than 1,000 steps


def refuse_divergence(bad_steps: int, done: int, settings: Settings, world: World, made: str) -> None:
    """Collective. Raise `UserError` if the `bad_steps` bad steps in a row that end with step `done` are too many.

    made: who made the last one, in words."""
    if bad_steps == MAX_BAD_STEPS:
        raise UserError(
            f"{MAX_BAD_STEPS} steps in a row up to step {done} had no finite loss or gradient: the run diverged; "
            f"{world.on_rank_zero(lambda: way_back(settings))}; the last one: {made}; documents: events.jsonl"
        )


class Held(Protocol):
    """The part of the engine that `refuse_broken_state` uses."""

    def names(self) -> list[str]: ...
    def held(self, name: str) -> Mapping[str, tuple[int | Place, Tensor]]: ...


def refuse_broken_state(engine: Held, done: int, settings: Settings, world: World) -> None:
    """Collective, after a step that was not finite: raise `MachineError` if weights or moments were not finite before.

    No step without finite gradients is applied, so neither its data nor its rank made them so. The next start resumes
    from a healthy checkpoint. Costs one pass over the state of the rank.
    """
    held = ((name, *piece) for name in engine.names() for piece in engine.held(name).items())
    told = world.gather_objects(not_finite({f"{key}.{name}@{at}": flat for name, key, (at, flat) in held}))
    broken = [(rank, problem) for rank, problem in enumerate(told) if problem]
    if not broken:
        return
    ranks = ", ".join(str(rank) for rank, _ in broken)
    detail = f"rank{'s' if len(broken) > 1 else ''} {ranks}: {broken[0][1]}"
    if world.rank == 0:
        record_event(
            settings.run.directory, "broken_state", step=done, ranks=[rank for rank, _ in broken], detail=detail
        )
    change = (
        f"check the device and the memory of rank {broken[0][0]} (if it comes again at this step, lower "
        f"optimizer.learning_rate = {settings.optimizer.learning_rate})"
    )
    raise NotFiniteError(
        f"step {done}: no finite loss or gradient, because the state itself is broken: {detail}; "
        f"{world.on_rank_zero(lambda: way_back(settings, change))}",
        done,
    )


def refuse_smallest_scale(scale: float, settings: Settings, world: World) -> None:
    """Collective. Raise `UserError`: in fp16 the gradient is not finite at the smallest loss scale."""
    raise UserError(
        f"fp16: the gradient is not finite at the smallest loss scale, {scale:g}: the run diverged, or needs "
        f'training.precision = "bf16"; {world.on_rank_zero(lambda: way_back(settings))}'
    )


def way_back(settings: Settings, change: str = "") -> str:
    """Record the divergence with which a run ends; what to change, and where the next start resumes. On rank 0."""
    directory, remote = settings.run.directory / "checkpoints", settings.checkpoint.remote
    first = began(line for line in read_json_lines(settings.run.directory / "metrics.jsonl") if line["kind"] == "step")
    change = change or f"lower optimizer.learning_rate = {settings.optimizer.learning_rate}"
    found, problem = record_divergence(directory, first, remote)
    later = ", ".join(map(str, found.suspect))
    places = f"{directory} and {remote}" if remote else str(directory)
    if not found.last_good:
        return (
            f"it began at step {first}, and no checkpoint from before is left ({later or 'none'} in {places}, saved "
            f"after it began); {change} and start over with --fresh"
        )
    path = path_of(directory, found.last_good)
    if problem:
        return (
            f"it began at step {first}; the newest healthy checkpoint from before is {path}; this could not be "
            f"recorded ({problem}): move the later ones (steps {later}) away, {change} and start again"
        )
    aside = f" and sets the later ones of {places} aside (steps {later})" if later else ""
    return (
        f"it began at step {first}; the next start resumes from the newest healthy checkpoint from before, "
        f"{path}{aside}: {change} and start again"
    )


class Course:
    """Whether a run is on its course: `first` is the first of the steps off course with which it so far ends, or 0.

    A step is off course if it was skipped, if its loss is not finite, or if its loss is `HIGH_DEVIATIONS` above the
    usual of the last `ORDINARY_STEPS` ordinary ones; training.spikes plays no part. 1,000 finite
    steps at a higher loss are a new course: other data, another objective.
    """

    def __init__(self) -> None:
        self.first = 0
        self._ordinary: deque[float] = deque(maxlen=ORDINARY_STEPS)
        self._high: list[float] = []

    @classmethod
    def resumed(cls, run_directory: Path, step: int) -> "Course":
        """After the steps up to `step` in metrics.jsonl, of which the last `TAIL_BYTES` are read."""
        course = cls()
        for line in read_json_lines(run_directory / "metrics.jsonl", TAIL_BYTES):
            if line["kind"] == "step" and line["step"] <= step:
                course.see(line["step"], line["loss"], line["skipped"])
        return course

    def see(self, step: int, loss: float, skipped: bool) -> int:
        """Add a step; returns `first`. Costs 20 us."""
        is_high = _is_high(loss, self._ordinary)
        if skipped or is_high or not math.isfinite(loss):
            self.first = self.first or step
            self._high += [loss] if is_high and not skipped else []
            if len(self._high) < NEW_COURSE_STEPS:
                return self.first
            self._ordinary.extend(self._high)
        else:
            self._ordinary.append(loss)
        self.first, self._high = 0, []
        return 0


def _is_high(loss: float, ordinary: Collection[float]) -> bool:
    if len(ordinary) < LEAST_STEPS or not math.isfinite(loss):
        return False
    usual, deviation = usual_of(ordinary)
    return loss > usual + HIGH_DEVIATIONS * deviation


def began(steps: Iterable[Mapping[str, Any]]) -> int:
    """The first step of the divergence with which these steps end."""
    course, last = Course(), 0
    for line in steps:
        last = line["step"]
        course.see(last, line["loss"], line["skipped"])
    return course.first or last
