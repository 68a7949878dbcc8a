"""The key-value cache: keys and values of previous tokens, and of sources, in one slot for each sequence.

In: keys and values of new tokens. Out: attention of one new token of each sequence to the cached ones. Sequences fill
the first slots, so that a step reads views of the cache, never copies. Costs: 2 * layers * G * K numbers per position;
reserved once; on Linux a page of memory is used from its first writing on.

Letters in tensor names: B sequences, T tokens, P positions read in a step, Q query heads, G key heads, R query heads of
a key head (Q / G), K channels of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from bigmodel.config.settings import ModelSettings


class Store:
    """Keys and values in all layers of a stack: (layers, 2, slots, G, positions, K)."""

    def __init__(self, settings: ModelSettings, slots: int, positions: int, like: Tensor) -> None:
        shape = settings.num_layers, 2, slots, settings.num_kv_heads, positions, settings.resolved_head_dim
        self.rows = torch.zeros(shape, dtype=like.dtype, device=like.device)  # what is masked must be a number
        self.layers = [(layer[0], layer[1]) for layer in self.rows]  # keys and values, (slots, G, positions, K) each
        self._flat = [[side.flatten(0, 2) for side in layer] for layer in self.layers]
        self._first_row_BG1 = torch.arange(slots * shape[3], device=like.device).view(slots, -1, 1) * positions

    def fill(self, layer: int, slot: int, k_TGK: Tensor, v_TGK: Tensor) -> None:
        """Write the first T positions of a slot."""
        for side, new_TGK in zip(self.layers[layer], (k_TGK, v_TGK), strict=True):
            side[slot, :, : len(new_TGK)] = new_TGK.transpose(0, 1)

    def places(self, positions_B: Tensor) -> Tensor:
        """Where `append` writes: one position in each of the first B slots."""
        return (self._first_row_BG1[: len(positions_B), :, 0] + positions_B[:, None]).flatten()

    def append(self, layer: int, places: Tensor, k_BGK: Tensor, v_BGK: Tensor) -> None:
        """Write one position of each of the first B slots."""
        for side, new_BGK in zip(self._flat[layer], (k_BGK, v_BGK), strict=True):
            side.index_copy_(0, places, new_BGK.flatten(0, 1))

    def copy(self, to: Sequence[int], of: Sequence[int], positions: int) -> None:
        """Copy the first positions of slots; a slot may be copied several times, and be written too."""
        self.rows[:, :, list(to), :, :positions] = self.rows[:, :, list(of), :, :positions]


@dataclass(frozen=True)
class Span:
    """The positions [first, last) that a step reads in the slots in use.

    mask: (B, 1, 1, P), 0 where the token attends to the position, else -inf; None: to all of them. bias: (B, G, R, P).
    is_empty: (B, 1, 1) bool, sequences without any position; None: there are none.
    """

    first: int
    last: int
    mask: Tensor | None = None
    bias: Tensor | None = None
    is_empty: Tensor | None = None

    @cached_property
    def added(self) -> Tensor | None:
        """Mask and bias together."""
        parts = [part for part in (self.mask, self.bias) if part is not None]
        return sum(parts[1:], parts[0]) if parts else None


def span(first: Sequence[int], last: Sequence[int], like: Tensor) -> Span:
    """Of sequences that attend to [first, last) each."""
    start, end = min(first), max(last)
    is_empty = None
    if any(low >= high for low, high in zip(first, last, strict=True)):
        is_empty = (torch.tensor(first) >= torch.tensor(last)).to(like.device)[:, None, None]
    if min(last) == end and max(first) == start:
        return Span(start, end, is_empty=is_empty)
    place_P = torch.arange(start, end)
    seen_BP = (place_P >= torch.tensor(first)[:, None]) & (place_P < torch.tensor(last)[:, None])
    mask_BP = torch.zeros(seen_BP.shape, dtype=like.dtype).masked_fill_(~seen_BP, -torch.inf)
    return Span(start, end, mask_BP[:, None, None].to(like.device), is_empty=is_empty)


def attend(q_BQK: Tensor, k: Tensor, v: Tensor, seen: Span, scale: float | None, softcap: float | None) -> Tensor:
    """Attention of one token of each sequence, (B, Q, K), to the first B slots of k and v, (slots, G, positions, K)."""
    if seen.last <= seen.first:
        return torch.zeros_like(q_BQK)
    k_BGPK, v_BGPK = (side[: len(q_BQK), :, seen.first : seen.last] for side in (k, v))
    q_BGRK = q_BQK.unflatten(1, (k.shape[1], -1))
    if softcap is None:
        out_BGRK = F.scaled_dot_product_attention(q_BGRK, k_BGPK, v_BGPK, seen.added, scale=scale)
    else:
        out_BGRK = _capped(q_BGRK, k_BGPK, v_BGPK, seen, scale, softcap)
    out_BQK = out_BGRK.flatten(1, 2)
    return out_BQK if seen.is_empty is None else out_BQK.masked_fill(seen.is_empty, 0.0)


def _capped(q_BGRK: Tensor, k_BGPK: Tensor, v_BGPK: Tensor, seen: Span, scale: float | None, softcap: float) -> Tensor:
    scores_BGRP = (q_BGRK @ k_BGPK.mT).float() * (q_BGRK.shape[-1] ** -0.5 if scale is None else scale)
    if seen.bias is not None:
        scores_BGRP = scores_BGRP + seen.bias
    scores_BGRP = softcap * torch.tanh(scores_BGRP / softcap)
    if seen.mask is not None:
        scores_BGRP = scores_BGRP + seen.mask
    return scores_BGRP.softmax(-1).to(v_BGPK.dtype) @ v_BGPK
