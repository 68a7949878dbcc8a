"""Who made a loss or gradient that is not finite: the data and settings, or a device.

In: a step whose loss or gradient norm is not finite. Out: a `Verdict`, equal on all ranks. Only then anything is paid:
every rank computes its micro-batches again; those of a suspect are computed by another rank, too. A micro-batch's bytes
and dropout are a pure function of the plan, so a sound device repeats the result.

    suspect again not finite, other rank too       repeatable: data or settings
    suspect again not finite, other rank finite    the suspect's device, or its copy of the weights
    suspect finite this time                       the suspect's device

A suspect is a rank whose loss, or gradient at its embedding, was not finite in the step itself, or whose micro-batches
are not finite again. Without a suspect (an overflow in the sum over micro-batches or ranks, or a wrong weight gradient
that does not come back) nothing is known. Ranks that share packed sequences, experts or matrices compute parts of each
other's values: what one makes may be seen on another alone. Of a bad device among them only the group is known. On one
rank the other rank is itself. Of many suspects, as in a divergence, the first eight are computed by another rank; they
speak for the others whose micro-batches are not finite again.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bigmodel.data.load.stream import Step
from bigmodel.distributed.world import World
from bigmodel.training.zero.engine import Engine

MOST_SUSPECTS = 8  # whose micro-batches are sent to all ranks


class Verdict(NamedTuple):
    """ranks: the suspect; of a bad device among ranks that share, their whole group; (): none. layer: where it is not
    finite, "" if it was finite when computed again."""

    ranks: tuple[int, ...] = ()
    layer: str = ""
    repeats: bool = True  # False: a device is bad
    hosts: tuple[str, ...] = ()
    by: str = "another rank"  # the other one that computed it

    def __str__(self) -> str:
        if not self.ranks:
            return "no rank shows it when it computes its part again"
        where = " or ".join(f"rank {rank} on {host}" for rank, host in zip(self.ranks, self.hosts, strict=True))
        if self.repeats:
            return f"made in {self.layer} of {where}, and repeated by {self.by}: data or settings"
        if not self.layer:
            return f"made by {where}, which computes it again without: bad device"
        return f"made in {self.layer} of {where}, which {self.by} computes without: bad device or memory"


class Witness:
    """Sees whether the gradient at this rank's embedding is finite; costs one sum over it per micro-batch."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: Tensor | float = 0.0
        embedding = model.get_submodule("embedding")
        embedding.register_forward_hook(self._on_output)

    def take(self) -> bool:
        """Whether one was not finite since the last call. Waits for the device."""
        seen, self._seen = self._seen, 0.0
        return not torch.isfinite(torch.as_tensor(seen)).item()

    def _on_output(self, _: nn.Module, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._on_gradient)

    def _on_gradient(self, gradient: Tensor) -> None:
        self._seen = self._seen + gradient.detach().sum(dtype=torch.float32) * 0  # NaN and infinity give NaN


class Seen(NamedTuple):
    """What a rank saw: in the step itself, in its micro-batches computed again, and in those of another rank; None: it
    computed none."""

    then: bool
    own: str
    other: str | None


def attribute(step: Step, saw: bool, engine: Engine, world: World, sharing: int) -> Verdict:
    """Compute the micro-batches of the step again. Collective.

    saw: whether this rank saw a loss or gradient that was not finite. sharing: number of ranks that share each packed
    sequence, or experts; their micro-batches go to the next such ranks.
    """
    own = _examine(engine, step.micro_batches, step.weight)
    bad = [rank // sharing for rank, one in enumerate(world.gather_objects(saw or bool(own))) if one]
    groups = sorted(set(bad))[: max(1, MOST_SUSPECTS // sharing)]  # sharing ranks compute together
    suspects = [rank for rank in range(world.size) if rank // sharing in groups]
    told = world.gather_objects(step.micro_batches if world.rank in suspects else None)
    other = None
    if suspects:
        given = told[(world.rank - sharing) % world.size]
        found = _examine(engine, given or step.micro_batches, step.weight)
        other = found if given else None
    return decide(world.gather_objects(Seen(saw, own, other)), world.gather_objects(os.uname().nodename), sharing)


def decide(seen: Sequence[Seen], hosts: Sequence[str], sharing: int = 1) -> Verdict:
    """The verdict from what all ranks saw; a bad device goes before data."""
    verdicts, by = [], "another rank" if sharing % len(seen) else "the same rank"
    suspects = [rank for rank, (then, own, _) in enumerate(seen) if then or own]
    for rank in suspects:
        own, other = seen[rank].own, seen[(rank + sharing) % len(seen)].other
        if own and other is None:
            continue
        repeats = bool(own and other)
        of_group = suspects if repeats else range(len(seen))
        ranks = tuple(one for one in of_group if one // sharing == rank // sharing)
        verdicts.append(Verdict(ranks, own, repeats, tuple(hosts[one] for one in ranks), by))
    return min(verdicts, key=lambda one: (one.repeats, one.ranks), default=Verdict())


def _examine(engine: Engine, batches: Sequence[Any], weight: float) -> str:
    """Of the first micro-batch that is not finite; all are computed, because ZeRO 3 needs all ranks."""
    examine: Callable[[Any], str] = lambda batch: engine.examine(batch.to(engine.world.device), weight)  # noqa: E731
    return next(filter(None, [examine(batch) for batch in batches]), "")
