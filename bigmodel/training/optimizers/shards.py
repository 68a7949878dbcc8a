"""The engine's interface for optimizers that cross ranks: masters are flat and may hold parts of parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bigmodel.training.zero.layouts import ParameterShard

WholeMatrices = Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]


@dataclass(frozen=True)
class Part:
    """This rank's shard of one parameter of a master. Every rank has a Part of each parameter; shard None: no
    elements."""

    shape: tuple[int, ...]
    shard: ParameterShard | None
    vectors: tuple[Tensor, ...]  # states of rows and of columns, whole on every rank; may be empty

    def rows(self) -> slice:
        """The matrix rows that the shard touches; it may hold the first and the last in part."""
        assert self.shard is not None
        columns = self.shape[1]
        return slice(self.shard.start // columns, -(-(self.shard.start + self.shard.numel) // columns))

    def sums(self, master: Tensor, gradient: Tensor) -> Tensor:
        """Sums of squares over the shard: of the weights, and of the gradient by row and by column."""
        rows, columns = self.shape if self.vectors else (0, 0)
        sums = master.new_zeros(1 + rows + columns)
        if self.shard is not None:
            sums[0] = torch.linalg.vector_norm(self.shard.of(master)).square()
            if self.vectors:
                here, (first, after) = self.rows(), self._margins()
                squares = nn.functional.pad(self.shard.of(gradient).square(), (first, after)).view(-1, columns)
                sums[1 : 1 + rows][here] = squares.sum(1)
                sums[1 + rows :] = squares.sum(0)
        return sums

    def estimate(self, epsilon: float) -> Tensor:
        """Second moments of the shard's elements: row * column / mean of all rows."""
        assert self.shard is not None
        (row_var, col_var), (first, _) = self.vectors, self._margins()
        of_rows = row_var[self.rows()] / row_var.mean().clamp(min=epsilon)
        return torch.outer(of_rows, col_var).flatten().narrow(0, first, self.shard.numel)

    def _margins(self) -> tuple[int, int]:
        """The numbers of elements missing before the shard in its first row, and after it in its last."""
        assert self.shard is not None
        columns = self.shape[1]
        return self.shard.start % columns, -(self.shard.start + self.shard.numel) % columns


class Shards(NamedTuple):
    """Functions of the engine. All are collective: each rank calls them in the same order."""

    whole_matrices: WholeMatrices  # (master, flat, change): applies `change` to each matrix of which `flat` has a part
    parts: Callable[[Tensor], list[Part]]  # one Part for each parameter of a master
    sum_: Callable[[Tensor], Tensor]  # sum over ranks, if their masters are partitioned
