"""Dropout of attention weights, with the same keyed mask in the reference and in the kernels.

Formula: query row t and key row s have random words a_t and b_s, 32 bits each, from the batch's dropout seeds. The
weight of head h of the pair (t, s) is kept, and multiplied by 1 / (1 - rate), if

    mix(mix(a_t ^ (n * 0x9E3779B9)) + b_s) >> 1  >=  rate * 2^31          n = first_head + h, in 32-bit arithmetic

mix: the finalizer of MurmurHash3 (Appleby 2011). In a run each head of each layer has its own n.

In: words per row. Out: which weights are kept. Guarantees: the mask depends on the seeds of the two positions and on n
only: not on rank, place in the packed sequence, tile or backend; nothing is stored, the backward pass computes it
again. Costs in a kernel: about 12 integer instructions a pair.

Shape suffixes: T queries, S keys, H heads; M rows and C columns of a tile.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bigmodel.kernels.triton_import import tl, triton

WORD = 0xFFFFFFFF
OF_QUERIES, OF_KEYS = 0x2545F4914F6CDD1D, 0x5851F42D4C957F2D
MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # of splitmix64, as int64


@dataclass(frozen=True)
class AttentionDropout:
    """rate: share of weights that are dropped. The words: int32, one for each row of the queries and of the keys."""

    rate: float
    query_words_T: Tensor
    key_words_S: Tensor
    first_head: int = 0  # number of the first head

    @property
    def threshold(self) -> int:
        """Smallest 31-bit number that keeps a weight."""
        return int(self.rate * 2**31)

    def from_head(self, first_head: int) -> "AttentionDropout":
        return replace(self, first_head=first_head)


def row_words(seeds_R: Tensor, salt: int) -> Tensor:
    """(R,) int32 words of dropout seeds (R,) int64, by splitmix64's finalizer; `salt`: OF_QUERIES or OF_KEYS."""
    word = seeds_R ^ salt
    word = (word ^ (word >> 30 & 0x3FFFFFFFF)) * MULTIPLIERS[0]
    word = (word ^ (word >> 27 & 0x1FFFFFFFFF)) * MULTIPLIERS[1]
    return (word >> 32).to(torch.int32)


def make_dropout(rate: float, query_seeds_T: Tensor, key_seeds_S: Tensor) -> AttentionDropout:
    return AttentionDropout(rate, row_words(query_seeds_T, OF_QUERIES), row_words(key_seeds_S, OF_KEYS))


# Part 2: the reference.


def factors(dropout: AttentionDropout, queries: slice, keys: slice, num_heads: int, dtype: torch.dtype) -> Tensor:
    """(H, T, S) of some rows: 0 where a weight is dropped, else 1 / (1 - rate)."""
    number_H = torch.arange(num_heads, device=dropout.query_words_T.device) + dropout.first_head
    of_head_H = number_H * 0x9E3779B9 & WORD
    query_HT = _mixed((dropout.query_words_T[queries].long() & WORD) ^ of_head_H[:, None])
    word_HTS = _mixed(query_HT[..., None] + (dropout.key_words_S[keys].long() & WORD) & WORD)
    return (word_HTS >> 1 >= dropout.threshold).to(dtype) / (1.0 - dropout.rate)


def _mixed(word: Tensor) -> Tensor:
    """MurmurHash3's finalizer of 32-bit words, held in int64."""
    word = (word ^ word >> 16) * 0x85EBCA6B & WORD
    word = (word ^ word >> 13) * 0xC2B2AE35 & WORD
    return word ^ word >> 16


# Part 3: in Triton kernels.


@triton.jit
def mixed(word):
    word = (word ^ (word >> 16)) * 0x85EBCA6B
    word = (word ^ (word >> 13)) * 0xC2B2AE35
    return word ^ (word >> 16)


@triton.jit
def load_query_words(words, row, inside, number):
    """The words of query rows for head number `number`, mixed."""
    word = tl.load(words + row, mask=inside, other=0).to(tl.uint32, bitcast=True)
    return mixed(word ^ (number.to(tl.uint32) * 0x9E3779B9))


@triton.jit
def load_key_words(words, row, inside):
    return tl.load(words + row, mask=inside, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def keeps(query_word, key_word, threshold):
    return (mixed(query_word + key_word) >> 1).to(tl.int32) >= threshold
