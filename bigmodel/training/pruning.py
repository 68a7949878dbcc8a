"""Pruning: which weights become 0, and when.

In: [pruning] and a step. Out: the share of zeros by the cubic schedule of Zhu & Gupta 2017, and the weights that are
pruned next. Guarantees: a pure function of settings, step and weights, equal on all ranks; ties go by position; what is
0 stays 0 (bigmodel/training/zero/held_zeros.py), also after a resume. Costs: at a jump of the schedule, one matrix at a
time whole on every rank.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from bigmodel.config.settings import PruningSettings, UserError
from bigmodel.training.trained import is_hidden, matching, near
from bigmodel.training.zero.engine import WEIGHT, Engine


def sparsity_at(step: int, pruning: PruningSettings) -> float:
    """The wanted share of zeros after `step` steps: s + (i - s) * (1 - t)^3, where t rises from 0 to 1 between
    begin_step and end_step, in jumps of every_steps; 0 before, s afterwards.

    Example: i = 0, s = 0.8, steps 0 to 40, every 10: 0, 0.4625, 0.7, 0.7875, 0.8.
    """
    begin, end, final = pruning.begin_step, pruning.last_step, pruning.final_sparsity
    if step < begin:
        return 0.0
    if step >= end:
        return final
    passed = (step - begin) // pruning.every_steps * pruning.every_steps
    return final + (pruning.initial_sparsity - final) * (1 - passed / (end - begin)) ** 3


def pruned_next(weight: Tensor, sparsity: float, kind: str) -> Tensor:
    """Where weights become 0 so that a share `sparsity` of the matrix is: a flat mask, without those that are 0 now.

    weight: (outputs, inputs). magnitude: the smallest. 2:4: the smallest of those that are not among the 2 largest of
    their 4; from a half on, all of these.
    """
    sizes = weight.abs().flatten()
    if kind == "2:4":
        order = sizes.view(-1, 4).argsort(dim=1, stable=True)
        free = torch.zeros_like(sizes, dtype=torch.bool).view(-1, 4).scatter_(1, order[:, :2], True).flatten()
    else:
        free = torch.ones_like(sizes, dtype=torch.bool)
    free &= sizes > 0
    if kind == "2:4" and sparsity >= 0.5:
        return free
    wanted = min(round(sparsity * sizes.numel()) - int((sizes == 0).sum()), int(free.sum()))
    if wanted <= 0:
        return torch.zeros_like(free)
    limit = sizes[free].kthvalue(wanted).values
    chosen = free & (sizes < limit)
    ties = (free & (sizes == limit)).nonzero().flatten()
    chosen[ties[: wanted - int(chosen.sum())]] = True
    return chosen


def targets_of(pruning: PruningSettings, shapes: Mapping[str, Sequence[int]], trained: Collection[str]) -> list[str]:
    """Names of the matrices that are pruned. shapes: of all parameters. Raises `UserError` for patterns and matrices
    that do not fit."""
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    chosen = [name for name in matrices if name in trained and is_hidden(name)]
    if pruning.targets:
        hits = {pattern: matching(pattern, matrices) for pattern in pruning.targets}
        for pattern, found in hits.items():
            if not found:
                raise UserError(f'pruning.targets: "{pattern}" matches no matrix; {near(pattern, matrices)}')
        wanted = {name for found in hits.values() for name in found}
        chosen = [name for name in matrices if name in wanted]
    if frozen := [name for name in chosen if name not in trained]:
        raise UserError(
            f"pruning.targets = {pruning.targets}: {frozen[0]} is frozen (training.freeze) and could not make up for "
            "what it loses; leave it out of one of them"
        )
    if not chosen:
        raise UserError("pruning.targets: all hidden matrices are frozen; shorten training.freeze, or name a matrix")
    odd = [name for name in chosen if shapes[name][1] % 4]
    if pruning.kind == "2:4" and odd:
        raise UserError(
            f'pruning.kind = "2:4": {odd[0]} has {shapes[odd[0]][1]} inputs, no multiple of 4; choose other '
            'pruning.targets, model.hidden_size or model.intermediate_size, or kind = "magnitude"'
        )
    return chosen


class Pruner:
    """Call `step` after each update, on every rank.

    share: of zeros in the pruned matrices, at the last jump; None: nothing is pruned yet, or ever.
    """

    def __init__(self, pruning: PruningSettings, engine: Engine, done: int) -> None:
        """done: steps before this start. Weights less sparse than the schedule says are pruned now. Collective."""
        self.share: float | None = None
        self._pruning, self._engine, self._sparsity = pruning, engine, 0.0
        if pruning.kind != "none":
            shapes = {name: engine.shape(name) for name in engine.names()}
            self._targets = targets_of(pruning, shapes, engine.trained())
            self.step(done)

    def step(self, done: int) -> None:
        """Prune, if the schedule says so after `done` steps. Collective."""
        if self._pruning.kind == "none":
            return
        sparsity = sparsity_at(done, self._pruning)
        if sparsity <= self._sparsity:
            return
        if not self._sparsity:
            self._engine.hold_zeros(self._targets)
        self._sparsity = sparsity
        zeros = total = 0
        for name in self._targets:
            weight = self._engine.whole(name, WEIGHT)
            pruned = pruned_next(weight, sparsity, self._pruning.kind)
            zeros += int((weight == 0).sum()) + int(pruned.sum())
            total += weight.numel()
            self._engine.set_to_zero(name, pruned)
        self._engine.publish()
        self.share = zeros / total
