"""Divergence: when a run left its course, and which checkpoints are from before.

In: the steps in metrics.jsonl, the checkpoints of a run. Out: advice for the user. A divergence begins with the first
of the last steps in a row without a finite loss and gradient, or earlier: where the loss rose out of the range of the
steps before it and did not come back. The update of the step before that made these weights, so a checkpoint counts as
good only if it was saved before that update. Example: bad steps 10 to 19, checkpoints 4, 8, 9 and 12: 9 and 12 hold the
weights that step 10 could not use; 8 is the newest good one.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bigmodel.config.settings import Settings, UserError
from bigmodel.distributed.world import World
from bigmodel.metrics.run_accounting import SPIKE_STEPS, is_spike
from bigmodel.run_directory import read_json_lines
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.checkpoint import remote as store

MAX_BAD_STEPS = 10  # this many in a row without a finite loss and gradient mean divergence; fp16 lowers its scale first


def refuse_divergence(bad_steps: int, done: int, settings: Settings, world: World) -> None:
    """Collective. Raise `UserError` if the `bad_steps` bad steps in a row that end with step `done` are too many."""
    if bad_steps == MAX_BAD_STEPS:
        raise UserError(
            f"{MAX_BAD_STEPS} steps in a row up to step {done} had no finite loss or gradient: the run diverged; "
            f"{world.on_rank_zero(lambda: way_back(settings))}"
        )


def refuse_smallest_scale(scale: float, settings: Settings, world: World) -> None:
    """Collective. Raise `UserError`: in fp16 the gradient is not finite at the smallest loss scale."""
    raise UserError(
        f"fp16: the gradient is not finite at the smallest loss scale, {scale:g}: the run diverged, or needs "
        f'training.precision = "bf16"; {world.on_rank_zero(lambda: way_back(settings))}'
    )


def way_back(settings: Settings) -> str:
    """What to change, and where to resume, from the records of a run."""
    directory, remote = settings.run.directory / "checkpoints", settings.checkpoint.remote
    first = began(line for line in read_json_lines(settings.run.directory / "metrics.jsonl") if line["kind"] == "step")
    saved = sorted({*checkpoint.steps(directory), *(store.steps(remote) if remote else ())})
    good, suspect = good_and_suspect(saved, first)
    change = f"lower optimizer.learning_rate = {settings.optimizer.learning_rate}"
    later = ", ".join(str(step) for step in suspect)
    places = f"{directory} and {remote}" if remote else str(directory)
    if not good:
        return (
            f"it began at step {first}, and no checkpoint from before is left ({later or 'none'} in {places}, saved "
            f"after it began); {change} and start over with --fresh"
        )
    newest = checkpoint.path_of(directory, good[-1])
    remove = f"remove the later ones from {places} (steps {later}, saved after it began), " if suspect else ""
    return f"it began at step {first}; the newest checkpoint from before is {newest}: {remove}{change} and start again"


def began(steps: Iterable[Mapping[str, Any]]) -> int:
    """The first step of the divergence with which these steps end.

    A loss rises out of its range where it is a spike among the last `SPIKE_STEPS` ordinary steps (`is_spike`, which
    needs 32 of them).
    """
    ordinary: deque[float] = deque(maxlen=SPIKE_STEPS)
    first, last = 0, 0
    for line in steps:
        last = line["step"]
        if line["skipped"] or is_spike(line["loss"], ordinary) or not math.isfinite(line["loss"]):
            first = first or last
        else:
            first = 0
            ordinary.append(line["loss"])
    return first or last


def good_and_suspect(saved: Sequence[int], first: int) -> tuple[list[int], list[int]]:
    """Checkpoints saved before the update of step `first` - 1, and the others."""
    return [step for step in saved if step < first - 1], [step for step in saved if step >= first - 1]
