"""Weights that are 0 and stay 0 (pruning), under any ZeRO stage.

In: a layout, the optimizer of its masters, the pruned matrices. Guarantee: of these, a master's element that
is exactly 0 before an update is exactly 0 after it, whatever moments and weight decay say; so is the weight of the
forward pass, which DeepSpeed copies from the master afterwards. No mask is kept: it is where the weights are 0.
Therefore a checkpoint has it, at any stage and number of ranks. A weight that an update makes exactly 0 by chance
counts as pruned. Costs: per update two passes over the pruned weights and one byte for each; no communication.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bigmodel.training.zero.layouts import Layout, ParameterShard, RunsInBf16

Piece = tuple[int, int, int, int]  # chunk of the gradient, first element in it, first element in the master, elements


class HeldZeros:
    def __init__(self, layout: Layout, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        self._layout, self._parameters = layout, parameters
        self._shards: dict[int, list[ParameterShard]] = {}  # by number of the master
        for shard in (layout.shard(parameter) for parameter in parameters):
            if shard is not None:
                self._shards.setdefault(shard.master, []).append(shard)
        self._pieces: dict[int, list[Piece]] = {}
        self._zeros: list[tuple[Tensor, Tensor]] = []  # elements and where they are 0, during an update
        optimizer.register_step_pre_hook(self._note)
        optimizer.register_step_post_hook(self._restore)

    @torch.no_grad()
    def drop_gradients(self) -> None:
        """Zero the gradient of pruned weights, so that norm, clipping and moments do not see it. Call it before the
        norm is computed."""
        if isinstance(self._layout, RunsInBf16):
            for parameter in self._parameters:
                self._layout.whole_gradient(parameter).masked_fill_(parameter == 0, 0)
            return
        masters = self._layout.masters()
        for number, chunks in enumerate(self._layout.gradients()):
            flat = masters[number].view(-1)
            if number not in self._pieces:
                self._pieces[number] = _overlaps(self._shards.get(number, []), [chunk.numel() for chunk in chunks])
            for chunk, low, first, numel in self._pieces[number]:
                zeros = flat[first : first + numel] == 0
                chunks[chunk].view(-1)[low : low + numel].masked_fill_(zeros, 0)

    @torch.no_grad()
    def _note(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """DeepSpeed updates one master after the other: only those in the optimizer's groups now."""
        updated = {id(master) for group in optimizer.param_groups for master in group["params"]}
        masters = self._layout.masters()
        elements = [
            shard.of(masters[number]) for number in self._shards if id(masters[number]) in updated
            for shard in self._shards[number]
        ]  # fmt: skip
        self._zeros = [(one, one == 0) for one in elements]

    @torch.no_grad()
    def _restore(self, *_: Any) -> None:
        for elements, zeros in self._zeros:
            elements.masked_fill_(zeros, 0)
        self._zeros = []


def _overlaps(shards: list[ParameterShard], sizes: list[int]) -> list[Piece]:
    """Where the shards lie in a gradient of chunks of these sizes, end to end."""
    pieces, begin = [], 0
    for chunk, size in enumerate(sizes):
        for shard in shards:
            low, high = max(shard.offset, begin), min(shard.offset + shard.numel, begin + size)
            if low < high:
                pieces.append((chunk, low - begin, low, high - low))
        begin += size
    return pieces
