"""Ranks that share positions: gathers of a tensor's rows, and sums that leave each rank its rows.

In: (P, ...) of each rank, or (T, ...) terms of a sum on each rank; P is T / N, rounded up. Out: the other. Each is the
other's gradient. Sums are in fp32 at least, in the order of ranks, rounded once: bitwise equal in every run.

Letters: T positions, P positions of a rank, N ranks; the last rank's rows from T on are zeros.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from bigmodel.metrics.phases import Phases


@dataclass
class SharingRanks:
    """The sharing ranks, in their order. phases: count their exchanges as communication. num_positions: T, of the
    micro-batch now."""

    group: Any
    size: int
    rank: int
    phases: Phases
    num_positions: int = 0

    @property
    def num_own(self) -> int:
        return -(-self.num_positions // self.size)

    def own(self, x_T: Tensor) -> Tensor:
        """(P, ...): this rank's positions of (T, ...), with zeros behind the last one."""
        mine = x_T[self.rank * self.num_own : (self.rank + 1) * self.num_own]
        return mine if len(mine) == self.num_own else _filled(mine, self.num_own)

    def each(self, x: Tensor) -> Tensor:
        """(N, ...): the tensors of all ranks, of one shape."""
        found = x.new_empty(self.size, *x.shape)
        with self.phases("communication"):
            dist.all_gather_into_tensor(found.flatten(0, 1), x.contiguous(), group=self.group)
        return found

    def gather(self, x_P: Tensor) -> Tensor:
        return self.each(x_P).flatten(0, 1)[: self.num_positions]

    def scatter(self, x_T: Tensor) -> Tensor:
        sent = _filled(x_T, self.size * self.num_own).contiguous()
        received = torch.empty_like(sent)
        with self.phases("communication"):
            dist.all_to_all_single(received, sent, group=self.group)
        terms = received.unflatten(0, (self.size, self.num_own))
        return terms.sum(0, dtype=torch.promote_types(x_T.dtype, torch.float32)).to(x_T.dtype)


def _filled(x: Tensor, rows: int) -> Tensor:
    return x if len(x) == rows else F.pad(x, (0, 0) * (x.dim() - 1) + (0, rows - len(x)))


class Gather(torch.autograd.Function):
    """(P, ...) to (T, ...)."""

    @staticmethod
    def forward(context: Any, x_P: Tensor, ranks: SharingRanks) -> Tensor:
        context.ranks = ranks
        return ranks.gather(x_P)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        return context.ranks.scatter(gradients[0]), None


class Scatter(torch.autograd.Function):
    """(T, ...), one term on each rank, to this rank's rows (P, ...) of the sum."""

    @staticmethod
    def forward(context: Any, x_T: Tensor, ranks: SharingRanks) -> Tensor:
        context.ranks = ranks
        return ranks.scatter(x_T)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        return context.ranks.gather(gradients[0]), None
