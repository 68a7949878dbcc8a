"""Weights of a checkpoint with their adapters merged: W + scale * B A, in fp32 from a sum in fp64.

In: a reader of elements of a checkpoint with adapters (`bigmodel.model.lora`). Out: a reader of the same form without
them. Costs: a range of elements is read in whole rows; beside it one A and the same rows of B.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bigmodel.model.lora import base_of, first_row

Read = Callable[[str, str, int, int], Tensor]


class MergedReader:
    """Call it as the reader that it wraps: (name, key, start, numel) gives these elements of the flattened tensor."""

    def __init__(self, read: Read, shapes: Mapping[str, list[int]], scale: float) -> None:
        self._read, self._shapes, self._scale = read, shapes, scale
        self._adapters: dict[str, list[str]] = {}  # weight -> names of its adapters, without .a.weight
        for name in shapes:
            if name.endswith(".a.weight") and (base := base_of(name)):
                self._adapters.setdefault(base, []).append(name.removesuffix(".a.weight"))

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Of the weights that remain."""
        return {name: shape for name, shape in self._shapes.items() if base_of(name) is None}

    def __call__(self, name: str, key: str, start: int, numel: int) -> Tensor:
        if name not in self._adapters:
            return self._read(name, key, start, numel)
        total, columns = self._shapes[name]
        low, high = start // columns, -(-(start + numel) // columns)
        rows = self._read(name, key, low * columns, (high - low) * columns).view(-1, columns).double()
        for adapter in self._adapters[name]:
            height, rank = self._shapes[f"{adapter}.b.weight"]
            first = first_row(adapter, total, height)
            top, bottom = max(low, first), min(high, first + height)
            if top < bottom:
                a = self._read(f"{adapter}.a.weight", key, 0, rank * columns).view(rank, columns).double()
                b = self._read(f"{adapter}.b.weight", key, (top - first) * rank, (bottom - top) * rank)
                rows[top - low : bottom - low] += self._scale * (b.view(-1, rank).double() @ a)
        return rows.to(torch.float32).flatten()[start - low * columns :][:numel]
