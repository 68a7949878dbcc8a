"""What an optimizer that crosses ranks gets from the engine: masters are flat and may hold parts of parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bigmodel.training.zero.layouts import ParameterShard

WholeMatrices = Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]


@dataclass(frozen=True)
class Part:
    """What of one parameter lies in a master on this rank, shard None: nothing; the parameter has a part on all."""

    shape: tuple[int, ...]
    shard: ParameterShard | None
    vectors: tuple[Tensor, ...]  # states of rows and of columns, whole on every rank; empty where there are none

    def rows(self) -> slice:
        """The rows of the matrix in which the shard lies; the first and the last may be there in part."""
        assert self.shard is not None
        columns = self.shape[1]
        return slice(self.shard.start // columns, -(-(self.shard.start + self.shard.numel) // columns))

    def sums(self, master: Tensor, gradient: Tensor) -> Tensor:
        """Squares of the shard, added up: of the weights, and of the gradient by row and by column."""
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
        """Second moments of the shard's elements: row times column over the mean of all rows."""
        assert self.shard is not None
        (row_var, col_var), (first, _) = self.vectors, self._margins()
        of_rows = row_var[self.rows()] / row_var.mean().clamp(min=epsilon)
        return torch.outer(of_rows, col_var).flatten().narrow(0, first, self.shard.numel)

    def _margins(self) -> tuple[int, int]:
        """Elements that the shard lacks of its first row and of its last."""
        assert self.shard is not None
        columns = self.shape[1]
        return self.shard.start % columns, -(self.shard.start + self.shard.numel) % columns


class Shards(NamedTuple):
    """The engine's answers. All are collective: each rank calls them in the same order."""

    whole_matrices: WholeMatrices  # (master, flat, change): `change` of each matrix of which `flat` holds a part
    parts: Callable[[Tensor], list[Part]]  # what lies in a master of each of its parameters
    sum_: Callable[[Tensor], Tensor]  # added up over the ranks, where these hold different elements
