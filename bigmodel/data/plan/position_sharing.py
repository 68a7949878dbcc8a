"""Position sharing: which positions of a micro-batch each of several ranks computes, if they share it by keys.

In: cu_seqlens of a micro-batch, the model's settings, the number of ranks. Out: of each rank its positions, as runs.
The positions are cut into chunks of one size, of which each rank gets the same number. The work of a chunk is what its
queries attend to: the (query, key) pairs of all layers. Padding counts too: in the masks it is a document as any other.
Heaviest chunk first, each to the rank with the least work that has room.

Guarantees: a pure function, the same on every rank; each position has exactly one rank; all ranks have equally many.
Costs about 10 ns a position.

Example: one document of 16 positions, 2 ranks: 8 chunks of 2, and each rank has 68 of the 136 pairs of a full layer. Of
a document of 8 and eight of one position each has 22 of 44; zigzag, which gives a rank chunk r of 2n and chunk
2n - 1 - r, has 14 and 30.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from bigmodel.config.layer_kinds import layer_kind
from bigmodel.config.settings import ModelSettings

CHUNKS_PER_RANK = 4  # at most; each run is a call of attention. On real packs the most work is 1.10 of the mean or less


def share_positions(cu_seqlens: np.ndarray, settings: ModelSettings, num_ranks: int) -> list[list[range]]:
    """[rank] -> its positions: runs in ascending order, of whole chunks; neighbours are one run.

    cu_seqlens (D+1,) from 0 to the number of positions, which num_ranks divides.
    """
    work = work_of_positions(cu_seqlens, settings)
    assert len(work) % num_ranks == 0, f"{num_ranks} ranks do not share {len(work)} positions evenly"
    count = num_ranks * chunks_per_rank(len(work) // num_ranks)
    size = len(work) // count
    ranks = deal_chunks(work.reshape(count, size).sum(1).tolist(), num_ranks)
    return [_joined([range(chunk * size, (chunk + 1) * size) for chunk in chunks]) for chunks in ranks]


def chunks_per_rank(positions: int) -> int:
    """The largest power of two, CHUNKS_PER_RANK at most, that divides the positions of a rank."""
    count = CHUNKS_PER_RANK
    while positions % count:
        count //= 2
    return count


def work_of_positions(cu_seqlens: np.ndarray, settings: ModelSettings) -> np.ndarray:
    """(T,) int64: keys that a position attends to in a causal model, summed over layers."""
    layers = [layer_kind(settings, layer) for layer in range(settings.num_layers)]
    starts_D, lengths_D = cu_seqlens[:-1].astype(np.int64), np.diff(cu_seqlens)
    keys_T = np.arange(1, int(cu_seqlens[-1]) + 1) - np.repeat(starts_D, lengths_D)
    return layers.count("full") * keys_T + layers.count("sliding") * np.minimum(keys_T, settings.sliding_window)


def deal_chunks(work: Sequence[int], num_ranks: int) -> list[list[int]]:
    """[rank] -> its chunks, ascending; equally many of each rank."""
    each = len(work) // num_ranks
    assert each * num_ranks == len(work), f"{len(work)} chunks for {num_ranks} ranks"
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for chunk in sorted(range(len(work)), key=lambda chunk: (-work[chunk], chunk)):
        rank = min((one for one in range(num_ranks) if len(ranks[one]) < each), key=lambda one: (loads[one], one))
        ranks[rank].append(chunk)
        loads[rank] += work[chunk]
    return [sorted(chunks) for chunks in ranks]


def _joined(chunks: list[range]) -> list[range]:
    """Neighbours as one run."""
    starts = [0, *(place for place, (one, two) in enumerate(pairwise(chunks), 1) if one.stop != two.start)]
    return [range(chunks[a].start, chunks[b - 1].stop) for a, b in pairwise([*starts, len(chunks)])]
