"""Linear choices: the next token of hidden states under an output matrix, without the whole logits in memory.

Formula, for row r with logits as in `bigmodel.kernels.linear_cross_entropy`, soft-capped:

    likeliest   argmax_v logit[r, v]; the first one of equals
    drawn       argmax_v logit[r, v] - log(-log(u[r, v])), a draw from softmax(logit[r]) (Gumbel-max; Maddison et al.
                2014); u[r, v] is a hash of the row's seed and v, so a draw depends on neither device, rank nor chunk

In: hidden (R, H), weight (V, H), seeds (R,) int64 to draw, or None. Out: tokens (R,) int64. No gradients. Costs: one
matrix product (V H operations a row); memory of one chunk of logits, at most CHUNK_BYTES, with draws about three times
that.

Shape suffixes: R rows, H hidden_size, V vocabulary, C rows of one chunk.
"""

import torch
from torch import Tensor

from bigmodel.kernels.linear_cross_entropy import chunk_slices, multiplied, product

BITS = 23  # of u: (n + 1/2) / 2**23 is exact in fp32 and below 1


@torch.no_grad()
def linear_choices(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    seeds_R: Tensor | None = None,
    logit_softcap: float = 0.0,
    chunk_positions: int = 0,
) -> Tensor:
    """(R,) int64. `chunk_positions` 0: as many rows as fit into CHUNK_BYTES of logits."""
    matrix_VH = multiplied(weight_VH)
    chosen_R = torch.empty(len(hidden_RH), dtype=torch.int64, device=hidden_RH.device)
    wide = torch.promote_types(weight_VH.dtype, torch.float32)
    for chunk in chunk_slices(len(hidden_RH), len(weight_VH), wide, chunk_positions):
        logits_CV = product(multiplied(hidden_RH[chunk]), matrix_VH.T)
        if seeds_R is not None:
            capped_CV = logit_softcap * torch.tanh(logits_CV / logit_softcap) if logit_softcap else logits_CV
            logits_CV = capped_CV - waiting_times(seeds_R[chunk], len(weight_VH)).log_()
        chosen_R[chunk] = logits_CV.argmax(-1)
        del logits_CV
    return chosen_R


def waiting_times(seeds_C: Tensor, columns: int) -> Tensor:
    """(C, V) fp32, exponentially distributed: -log u, with u from the finalizer of splitmix64 (Steele et al. 2014)."""
    column_V = torch.arange(1, columns + 1, device=seeds_C.device, dtype=torch.int64)
    word_CV = seeds_C[:, None] + column_V * -0x61C8864680B583EB
    word_CV = (word_CV ^ (word_CV >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    word_CV = (word_CV ^ (word_CV >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    word_CV = word_CV ^ (word_CV >> 31 & 0x1FFFFFFFF)
    number_CV = (word_CV >> (64 - BITS) & (2**BITS - 1)).to(torch.float32)
    return number_CV.add_(0.5).mul_(2.0**-BITS).log_().neg_()
