"""Context parallelism: several ranks share a packed sequence, each with its own queries and the keys of all.

In: the model, the number of consecutive ranks that share, s (`training.sequence_parallel_ranks`), and
`training.sequence_parallel_method = "all_gather"`. In training each rank computes one s-th of the positions of a
micro-batch, dealt by attention work (`bigmodel.data.plan.position_sharing`). In each layer the keys and values of all
ranks are gathered, and a rank attends with its queries to them, one call for each run of its positions, as in Llama 3
(2024, section 3.3.2). Their gradients go back to the rank of the position and are added there in fp32, in rank order.
Guarantee: the loss and gradient of one rank; s does not depend on the number of heads. Evaluation is not shared. Costs:
keys and values of all positions in each layer, sent once forward and, in fp32, once backward, and kept for the backward
pass; on a GPU one wait per micro-batch, for the lengths of documents.

A run of positions [a, b) attends to keys before b, and its first document may begin before a, so that its n-th query is
not aligned with its n-th key. All rows are therefore taken last first (`last_first` of `kernels/mask.py`).

Example: s = 2, one document of 16 positions: rank 0 computes 0, 1, 6, 7, 8, 9, 14 and 15, in three calls of 2, 4 and 2
queries over 16, 10 and 2 keys.

Shape suffixes: T positions of all ranks, R of one rank, H heads, G key heads, K channels of a head.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bigmodel.config.parallel_settings import LATER, PREFIXED
from bigmodel.config.settings import Settings, UserError
from bigmodel.data.load.batch import Batch
from bigmodel.data.plan.position_sharing import share_positions
from bigmodel.distributed.world import World
from bigmodel.kernels.attention import attention, attention_and_largest, make_tile_metadata
from bigmodel.kernels.attention_dropout import AttentionDropout
from bigmodel.kernels.mask import AttentionMask, last_first
from bigmodel.kernels.tiles import TileMetadata
from bigmodel.metrics.phases import Phases
from bigmodel.training.zero.ulysses import Ranks, Sequence


def sequence_of(settings: Settings, world: World, phases: Phases) -> Sequence | None:
    """How this rank shares packed sequences; None: not at all. Collective."""
    if settings.training.sequence_parallel_ranks == 1:
        return None
    method = {"ulysses": Sequence, "all_gather": GatheredSequence}[settings.training.sequence_parallel_method]
    return method(settings, world, phases)


class Run(NamedTuple):
    """A run of a rank's positions, and the keys that it attends to: both last first."""

    num_queries: int
    keys: slice  # of the keys of all ranks, last first
    mask: AttentionMask
    tile_metadata: TileMetadata


@dataclass(frozen=True)
class Runs:
    """What attention needs of a micro-batch for one kind of layer: in the place of the model's tile metadata."""

    runs: list[Run]  # last first
    order_T: Tensor  # (T,) int64: where position T - 1 - n is, rank after rank
    key_words_T: Tensor | None  # of dropout, last first


class GatheredSequence(Sequence):
    """The ranks that share this rank's packed sequences by their keys."""

    def __init__(self, settings: Settings, world: World, phases: Phases | None = None) -> None:
        super().__init__(settings, world, phases)
        self._model = settings.model
        # Of the micro-batch that was shared last: this rank's runs, last first; edges of documents; the rest of `Runs`.
        self._runs: list[range] = []
        self._edges = np.zeros(1, dtype=np.int32)
        self._order_T: Tensor | None = None
        self._key_words_T: Tensor | None = None

    def _rows(self, batch: Batch) -> Tensor:
        """The positions of this rank; also notes what the layers need of the whole micro-batch."""
        require_causal(batch)
        edges = batch.cu_seqlens.cpu().numpy()
        shares = share_positions(edges, self._model, self.size)
        rows = torch.from_numpy(np.concatenate([np.arange(run.start, run.stop) for runs in shares for run in runs]))
        rows, self._order_T = torch.stack([rows, rows.argsort().flip(0)]).to(batch.tokens.device)
        self._runs, self._edges = shares[self.rank][::-1], edges
        self._key_words_T = None if self._dropout is None else self._dropout.key_words_S.flip(0)
        return rows.chunk(self.size)[self.rank]

    def _make_schedule(self, mask: AttentionMask, num_queries: int, num_keys: int) -> Any:
        assert self._order_T is not None, "attention inputs are made of a shared batch"
        total, runs = num_keys * self.size, []
        for run in self._runs:
            first = self._first_key(run.start, mask.left)
            part = last_first(mask, run, first)
            tiles = make_tile_metadata(part, len(run), run.stop - first)
            runs.append(Run(len(run), slice(total - run.stop, total - first), part, tiles))
        return Runs(runs, self._order_T, self._key_words_T)

    def _first_key(self, position: int, left: int | None) -> int:
        """The first key that a position attends to: none after it attends to an earlier one."""
        begin = int(self._edges[np.searchsorted(self._edges, position, side="right") - 1])
        return begin if left is None else max(begin, position - left)

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *rest: Any,
        dropout: AttentionDropout | None = None,
        kernel: str = "triton",
    ) -> Tensor:
        """q (R, H, K), k and v (R, G, K) to (R, H, K)."""
        _mask, runs, *scores = rest
        calls = self._calls(q, k, v, runs, dropout)
        return torch.cat([attention(*rows, *scores, **named | {"kernel": kernel}) for rows, named in calls]).flip(0)

    def _attention_and_largest(
        self, q: Tensor, k: Tensor, v: Tensor, *rest: Any, dropout: AttentionDropout | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `_attention`, and the largest scores (H,) of this rank's queries."""
        _mask, runs, *scores = rest
        calls = self._calls(q, k, v, runs, dropout)
        outs, largest = zip(*(attention_and_largest(*rows, *scores, **named) for rows, named in calls), strict=True)
        return torch.cat(outs).flip(0), torch.stack(largest).amax(0)

    def _calls(
        self, q: Tensor, k: Tensor, v: Tensor, runs: Runs, dropout: AttentionDropout | None
    ) -> list[tuple[list[Any], dict[str, Any]]]:
        """Arguments of `attention`, run after run."""
        counts = [run.num_queries for run in runs.runs]
        sides = Gather.apply(k, v, self._ranks, runs)
        calls = []
        words = None if dropout is None else dropout.query_words_T.flip(0).split(counts)
        for number, (run, rows) in enumerate(zip(runs.runs, q.flip(0).split(counts), strict=True)):
            named = {}
            if dropout is not None and words is not None and runs.key_words_T is not None:
                keys = runs.key_words_T[run.keys]
                named["dropout"] = AttentionDropout(dropout.rate, words[number], keys, dropout.first_head)
            calls.append(([rows, *sides[2 * number : 2 * number + 2], run.mask, run.tile_metadata], named))
        return calls


def require_causal(batch: Batch) -> None:
    """Raises `UserError` for a prefix-LM of pairs, of which the run file does not speak."""
    if batch.prefixes is not None:
        raise UserError(f"{PREFIXED} and pairs of texts in the data: {LATER}, or set data.bidirectional_prefix = false")


class Gather(torch.autograd.Function):
    """k and v (R, G, K) of this rank to those that each run attends to, last first: k, v of the first run, k, v of the
    second and so on, views of one tensor."""

    @staticmethod
    def forward(context: Any, k: Tensor, v: Tensor, ranks: Ranks, runs: Runs) -> tuple[Tensor, ...]:
        context.ranks, context.runs, context.dtype = ranks, runs, k.dtype
        sent = torch.stack([k, v], 1)
        gathered = sent.new_empty(len(sent) * ranks.size, *sent.shape[1:])
        with ranks.phases("communication"):
            dist.all_gather_into_tensor(gathered, sent, group=ranks.group)
        k_TGK, v_TGK = gathered[runs.order_T].unbind(1)
        return tuple(side[run.keys] for run in runs.runs for side in (k_TGK, v_TGK))

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        ranks, runs = context.ranks, context.runs
        wide, (_, *shape) = torch.promote_types(context.dtype, torch.float32), gradients[0].shape
        total = gradients[0].new_zeros(len(runs.order_T), 2, *shape, dtype=wide)  # last first
        for number, run in enumerate(runs.runs):
            for side in (0, 1):
                total[run.keys, side] += gradients[2 * number + side]
        sent = torch.empty_like(total)
        sent[runs.order_T] = total
        received = torch.empty_like(sent)
        with ranks.phases("communication"):
            dist.all_to_all_single(received, sent, group=ranks.group)
        d_k, d_v = received.unflatten(0, (ranks.size, -1)).sum(0).to(context.dtype).unbind(1)
        return d_k, d_v, None, None
