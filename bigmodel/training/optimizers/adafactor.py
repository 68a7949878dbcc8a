"""Adafactor (Shazeer & Stern 2018)."""

import math
from typing import Any

import torch
from torch import Tensor

from bigmodel.config.settings import OptimizerSettings
from bigmodel.training.optimizers.shards import Part, Shards


class Adafactor(torch.optim.Optimizer):
    """The second moments of a matrix as rows times columns, by the rules of torch's Adafactor.

    beta2 = 1 - t^beta2_decay; R, C = means of g^2 over each row and column, averaged by beta2; V = R C / mean(R) for a
    matrix, averaged g^2 for a vector; u = g / max(sqrt(V), epsilon); w = (1 - rate * decay) * w - min(rate, 1/sqrt(t))
    * max(least_scale, rms(w)) * u / max(1, rms(u) / clip).

    State: rows + columns floats per matrix, on every rank. Masters are flat and may hold parts of matrices; `shards`,
    set by the engine, describes the parts and sums over ranks: two sums per step of a group (ZeRO 1 and 2) or sub-group
    (ZeRO 3). The update overwrites the gradient.
    """

    shards: Shards

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerSettings) -> None:
        super().__init__(groups, {"lr": settings.learning_rate})
        self._epsilon, self._least_scale = settings.epsilon, settings.least_scale
        self._beta2_decay, self._clip = settings.beta2_decay, settings.update_clipping

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        masters = [(group, m) for group in self.param_groups for m in group["params"] if m.grad is not None]
        work = [(group, master, part) for group, master in masters for part in self.shards.parts(master)]
        for _, master in masters:
            self.state[master]["step"] += 1
        sums = [part.sums(master, master.grad) for _, master, part in work]
        sums = list(self.shards.sum_(torch.cat(sums)).split([len(one) for one in sums]))
        moves = [self._move(master, part, one[1:]) for (_, master, part), one in zip(work, sums, strict=True)]
        for (group, master, part), (weights, *_), moved in zip(
            work, sums, self.shards.sum_(torch.stack(moves)), strict=True
        ):
            if part.shard is not None:
                roots = [(squares / math.prod(part.shape)).sqrt() for squares in (weights, moved)]
                rate = min(group["lr"], float(self.state[master]["step"]) ** -0.5)
                size = -rate * roots[0].clamp(min=self._least_scale) / (roots[1] / self._clip).clamp(min=1)
                here = part.shard.of(master).mul_(1 - group["lr"] * group["weight_decay"])
                here.addcmul_(part.shard.of(master.grad), size)

    def _move(self, master: Tensor, part: Part, squares: Tensor) -> Tensor:
        """Update the second moments and replace the shard's gradient by its update; gives the update's sum of squares.

        squares: sums of squares of the gradient, by row and by column, over all ranks.
        """
        share = float(self.state[master]["step"]) ** self._beta2_decay
        if part.vectors:
            for vector, total, numel in zip(part.vectors, squares.split(part.shape), reversed(part.shape), strict=True):
                vector.lerp_(total / numel, share)
        if part.shard is None:
            return master.new_zeros(())
        gradient = part.shard.of(master.grad)
        if part.vectors:
            moments = part.estimate(self._epsilon)
        else:
            moments = part.shard.of(self.state[master]["variance"]).lerp_(gradient.square(), share).clone()
        gradient.mul_(moments.clamp_(min=self._epsilon**2).rsqrt_())
        return torch.linalg.vector_norm(gradient).square()


def build(groups: list[dict[str, Any]], settings: OptimizerSettings) -> Adafactor:
    return Adafactor(groups, settings)
