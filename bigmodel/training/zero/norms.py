"""L2 norms of trained weights and of their updates, by kind of layer; with an L1 penalty also L1 norms and zeros.

In: the engine. Out: norms every `every_steps` steps. Costs, at those steps only: a copy of this rank's share of the
weights, two passes over it and one small all-reduce.
"""

from collections import defaultdict

import torch
from torch import Tensor

from bigmodel.distributed.world import World
from bigmodel.training.zero.engine import WEIGHT, Engine

KINDS = ("embedding", "attention", "feed_forward", "norm", "head")  # everything else is "other"


class Norms:
    """Call `before_update` and `after_update` around each update, on every rank. every_steps 0: off."""

    def __init__(self, engine: Engine, world: World, every_steps: int, with_l1: bool = False) -> None:
        """`with_l1`: also l1_norm and zero_ratio."""
        self._engine, self._world, self._every_steps, self._with_l1 = engine, world, every_steps, with_l1
        self._before: dict[str, Tensor] | None = None

    def before_update(self, step: int) -> None:
        """`step` counts from 1. Copies the weights if this step is measured."""
        self._before = None
        if self._every_steps and step % self._every_steps == 0:
            self._before = {name: weights.clone() for name, weights in self._weights()}

    @torch.no_grad()
    def after_update(self) -> dict[str, dict[str, float]] | None:
        """kind of layer -> weight_norm, update_norm and so on, over all ranks; None at other steps. Collective."""
        if self._before is None:
            return None
        weights: defaultdict[str, float] = defaultdict(float)
        updates: defaultdict[str, float] = defaultdict(float)
        # Sums of magnitudes, zeros, elements.
        more: list[defaultdict[str, float]] = [defaultdict(float) for _ in range(3 * self._with_l1)]
        for name, now in self._weights():
            for sums, value in zip(more, _magnitudes(now) if more else (), strict=True):
                sums[kind_of(name)] += value
            weights[kind_of(name)] += _squares(now)
            updates[kind_of(name)] += _squares(now - self._before[name])
        self._before = None
        kinds = sorted({kind_of(name) for name in self._engine.trained()})  # a rank may own none of a kind
        columns = (weights, updates, *more)
        total = iter(self._world.sum_([column[kind] for kind in kinds for column in columns]))
        return {kind: _named([next(total) for _ in columns]) for kind in kinds}

    def _weights(self) -> list[tuple[str, Tensor]]:
        """The trained weights that this rank owns, by parameter, in fp32."""
        owned = ((name, self._engine.owned(name)) for name in self._engine.trained())
        return [(name, mine[WEIGHT][1]) for name, mine in owned if WEIGHT in mine]


def kind_of(name: str) -> str:
    """The kind of layer of a parameter, by its name: "blocks.0.attention.output.weight" is attention."""
    parts = name.split(".")
    if any(part.endswith("norm") for part in parts):
        return "norm"
    for kind in KINDS:
        if any(part == kind or part.endswith(f"_{kind}") for part in parts):
            return kind
    return "other"


def _named(sums: list[float]) -> dict[str, float]:
    norms = {"weight_norm": sums[0] ** 0.5, "update_norm": sums[1] ** 0.5}
    return norms | ({"l1_norm": sums[2], "zero_ratio": sums[3] / sums[4]} if sums[2:] else {})


def _magnitudes(chunk: Tensor) -> tuple[float, int, int]:
    """Sum of magnitudes, number of zeros, number of elements."""
    size = sum(float(part.double().abs().sum()) for part in chunk.flatten().split(1 << 24))
    return size, chunk.numel() - int(chunk.count_nonzero()), chunk.numel()


def _squares(chunk: Tensor) -> float:
    return sum(float(part.double().square().sum()) for part in chunk.flatten().split(1 << 24))  # bounds the fp64 copy
