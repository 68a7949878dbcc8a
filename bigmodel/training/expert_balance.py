"""The balance of experts over whole steps: loads added up over micro-batches and ranks, moved into the model's state.

In: a model that counts its loads (`bigmodel.model.experts`). Out: the model's loads and biases, equal on all ranks,
which a checkpoint keeps; numbers for the step's record. Guarantees: loads are those of all tokens of the step, so that
they depend on neither ranks nor micro-batches; a skipped step moves nothing. Costs: layers * experts numbers more in
the sum that ends each step.
"""

import math
from collections.abc import Sequence

import torch

from bigmodel.metrics.recorder import ExpertLoads
from bigmodel.model.experts import balance, mixtures
from bigmodel.model.transformer import Transformer


class ExpertBalance:
    """Call `begin` before a step's micro-batches, `take` after them, and `move` after the update. Does nothing for a
    model without experts."""

    def __init__(self, model: Transformer, every_steps: int = 0) -> None:
        """every_steps: between measurements of the load of each expert; 0: never."""
        layers = mixtures(model)
        self._model, self._shape = model, (len(layers), layers[0].settings.count if layers else 0)
        self._first_layer = layers[0].settings.first_dense_layers if layers else 0
        self._every_steps = every_steps
        self._has_capacity = bool(layers and layers[0].settings.capacity_factor)
        self._loads_LE: list[list[float]] = []

    def begin(self) -> None:
        """Forget the step before."""
        self._model.loads_LE = self._model.dropped_L = self._model.router_z_sum = 0.0

    def take(self) -> list[float]:
        """This rank's sums, to be added up over the ranks. Waits for the device."""
        loads_LE, dropped_L = self._model.loads_LE, self._model.dropped_L
        if isinstance(loads_LE, float) or isinstance(dropped_L, float):  # a model without experts
            return []
        counts = torch.cat([dropped_L, loads_LE.flatten()]).tolist()
        return [float(self._model.router_z_sum), *map(float, counts)]

    def move(self, sums: Sequence[float], weight: float, skip: bool) -> ExpertLoads | None:
        """Move the state by the sums over all ranks; `skip`: only describe them. weight: of the step's labels."""
        if not sums:
            return None
        z_sum, *counts = sums
        dropped, loads = counts[: self._shape[0]], counts[self._shape[0] :]
        loads_LE = torch.tensor(loads, dtype=torch.float64).view(self._shape)
        if not skip:
            balance(self._model, loads_LE.to(self._model.embedding.weight.device))
        self._loads_LE = loads_LE.tolist()
        described = describe(self._loads_LE, z_sum / weight, self._first_layer)
        if not self._has_capacity:
            return described
        share = math.fsum(dropped) / (math.fsum(loads) or 1.0)
        return described._replace(dropped=tuple(map(int, dropped)), dropped_share=round(share, 6))

    def by_expert(self, step: int) -> dict[str, list[int]] | None:
        """Of the loads last moved: layer of the model, as in blocks.N -> the load of each expert, in percent of the
        layer's mean; None at steps that are not measured. `step` counts from 1."""
        if not self._loads_LE or not self._every_steps or step % self._every_steps:
            return None
        return {str(layer): percents(loads) for layer, loads in enumerate(self._loads_LE, start=self._first_layer)}


def percents(loads: Sequence[float]) -> list[int]:
    """Example: loads 3, 1, 0, 0: 300, 100, 0, 0."""
    mean = math.fsum(loads) / len(loads) or 1.0
    return [round(100 * load / mean) for load in loads]


def describe(loads_LE: Sequence[Sequence[float]], z_mean: float, first_layer: int = 0) -> ExpertLoads:
    """z_mean: of the labels, added up over the layers. Four decimals: a step's line has two numbers per layer.

    Example: loads 3, 1, 0, 0 of one layer: largest 3, entropy 0.406 (0.811 of 2 bits).
    """
    largest, entropy = [], []
    for loads in loads_LE:
        total = math.fsum(loads) or 1.0
        shares = [load / total for load in loads]
        largest.append(round(max(shares) * len(shares), 4))
        bits = -math.fsum(share * math.log(share) for share in shares if share)
        entropy.append(round(bits / math.log(len(shares)), 4) if len(shares) > 1 else 1.0)
    return ExpertLoads(tuple(largest), tuple(entropy), z_mean / len(loads_LE), first_layer)
