"""Ulysses sequence parallelism: several ranks share a packed sequence too long for one (Jacobs et al. 2023).

In: the model and the number of consecutive ranks that share, s (`training.sequence_parallel_ranks`). In training each
of them computes one s-th of the positions of a micro-batch, across document boundaries. Only attention needs all
positions: one all-to-all exchange gives each rank all positions of one s-th of the heads, a second one reverses it.
Guarantee: the loss and gradient of one rank: a rank sums the losses of its positions, and the sum over ranks is divided
by the number of labels as always. Costs: 2 exchanges (q, k, v; the output) per layer and pass. Evaluation is not
shared: each rank scores its own packed sequences whole.

Example: s = 2, 8 positions, 4 heads of 64 channels: each rank computes q (4, 4, 64), exchanges it for (8, 2, 64),
attends over whole documents, and exchanges the output (8, 2, 64) back for (4, 4, 64).

The model does not know of this: `Sequence` replaces the functions that it calls for attention and tile metadata.
DeepSpeed's DistributedAttention is made for (batch, sequence, heads) and needs its own mesh; this is two functions."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bigmodel.config.settings import Settings
from bigmodel.data.load.batch import Batch
from bigmodel.distributed.world import World
from bigmodel.kernels.attention import attention, attention_and_largest, make_tile_metadata
from bigmodel.kernels.attention_dropout import AttentionDropout, make_dropout
from bigmodel.metrics.phases import Phases
from bigmodel.model import transformer

OF_DOCUMENTS = ("cu_seqlens", "prefixes")  # fields of a batch with one value per document, not per position


class Sequence:
    """The ranks that share this rank's packed sequences."""

    def __init__(self, settings: Settings, world: World, phases: Phases | None = None) -> None:
        """Collective. `phases` counts the exchanges as communication."""
        self.size = settings.training.sequence_parallel_ranks
        self.rank = world.rank % self.size
        groups = [dist.new_group(list(range(first, first + self.size))) for first in range(0, world.size, self.size)]
        self._ranks = Ranks(groups[world.rank // self.size], self.size, phases or Phases(world.device))
        self._dropout_rate = settings.model.attention_dropout
        self._dropout: AttentionDropout | None = None  # of all positions of the micro-batch that was shared last

    def share(self, batch: Batch) -> Batch:
        """The batch with this rank's positions only, but the cu_seqlens and prefixes of whole documents."""
        seeds_T, rate = batch.dropout_seeds, self._dropout_rate
        self._dropout = make_dropout(rate, seeds_T, seeds_T) if rate else None
        mine = self._rows(batch)
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        return replace(
            batch,
            **{
                name: value[mine]
                for name, value in values.items()
                if isinstance(value, Tensor) and name not in OF_DOCUMENTS
            },
        )

    def _rows(self, batch: Batch) -> slice | Tensor:
        """The positions of this rank."""
        count = len(batch.tokens) // self.size
        return slice(self.rank * count, (self.rank + 1) * count)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside, the model's attention covers the positions of all sharing ranks."""
        _let_the_model_call(self._attention, self._attention_and_largest, self._make_schedule)
        try:
            yield
        finally:
            _let_the_model_call(attention, attention_and_largest, make_tile_metadata)

    def _make_schedule(self, mask: Any, num_queries: int, num_keys: int) -> Any:
        return make_tile_metadata(mask, num_queries * self.size, num_keys * self.size)

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *rest: Any,
        dropout: AttentionDropout | None = None,
        kernel: str = "triton",
    ) -> Tensor:
        """q (T/s, H, K), k and v (T/s, G, K) to (T/s, H, K)."""
        rows, named = self._of_some_heads(q, k, v, dropout)
        return Exchange.apply(attention(*rows, *rest, **named | {"kernel": kernel}), self._ranks, False)

    def _attention_and_largest(
        self, q: Tensor, k: Tensor, v: Tensor, *rest: Any, dropout: AttentionDropout | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `_attention`, and the largest scores (H,): -inf for the heads of the other ranks."""
        rows, named = self._of_some_heads(q, k, v, dropout)
        out, of_mine = attention_and_largest(*rows, *rest, **named)
        largest = of_mine.new_full((self.size, len(of_mine)), -torch.inf)
        largest[self.rank] = of_mine
        return Exchange.apply(out, self._ranks, False), largest.flatten()

    def _of_some_heads(
        self, q: Tensor, k: Tensor, v: Tensor, dropout: AttentionDropout | None
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """q (T, H/s, K), k and v (T, G/s, K), and the dropout. Fewer key heads than ranks are repeated."""
        named: dict[str, Any] = {}
        if dropout is not None:
            assert self._dropout is not None, "dropout is of a shared batch"
            named["dropout"] = self._dropout.from_head(dropout.first_head + self.rank * (q.shape[1] // self.size))
        if k.shape[1] < self.size:
            k, v = (side.repeat_interleave(self.size // side.shape[1], dim=1) for side in (k, v))
        return [Exchange.apply(side, self._ranks, True) for side in (q, k, v)], named


class Ranks(NamedTuple):
    """The exchanging ranks, and the phases that count their time."""

    group: Any
    size: int
    phases: Phases


class Exchange(torch.autograd.Function):
    """`gather`: (T/s, H, K) to (T, H/s, K); otherwise back. Each is the other's gradient."""

    @staticmethod
    def forward(context: Any, x: Tensor, ranks: Ranks, gather: bool) -> Tensor:
        context.exchange = (ranks, gather)
        return _exchange(x, ranks, gather)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        ranks, gather = context.exchange
        return _exchange(gradients[0], ranks, not gather), None, None


def _exchange(x: Tensor, ranks: Ranks, gather: bool) -> Tensor:
    size = ranks.size
    sent = (x.unflatten(1, (size, -1)).transpose(0, 1) if gather else x.unflatten(0, (size, -1))).contiguous()
    received = torch.empty_like(sent)
    with ranks.phases("communication"):
        dist.all_to_all_single(received, sent, group=ranks.group)
    return received.flatten(0, 1) if gather else received.transpose(0, 1).flatten(1, 2)


def _let_the_model_call(attend: Any, attend_and_measure: Any, tile_metadata: Any) -> None:
    transformer.attention, transformer.attention_and_largest = attend, attend_and_measure
    transformer.make_tile_metadata = tile_metadata
