"""Work: what attention has to look at in packs, counted from their plan alone.

Takes packs and the settings of the data, gives sums that the model's operations follow from
(`bigmodel.metrics.flops`). Guarantees: the pairs are those that the masks of `bigmodel.kernels.mask` let through.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bigmodel.config.settings import DataSettings
from bigmodel.data.objectives.examples import objectives_of
from bigmodel.data.objectives.table import OBJECTIVES
from bigmodel.data.plan.shuffle import PLAIN, Chunk, Pack


class Work(NamedTuple):
    """Sums over the documents of packs, each of n positions and, of an encoder-decoder, s positions of source."""

    positions: int = 0  # n
    source_positions: int = 0  # s
    pairs: int = 0  # (query, key) pairs on the decoder's side: n (n + 1) / 2, more where a prefix sees itself
    squares: int = 0  # n^2: if all positions see each other
    source_pairs: int = 0  # s^2
    cross_pairs: int = 0  # n s


def count_work(packs: Iterable[Pack], data: DataSettings) -> Work:
    """Over all chunks of the packs."""
    have_source = [OBJECTIVES[objective.settings.kind].has_source for objective in objectives_of(data)]
    total = [0] * len(Work._fields)
    for chunk in (chunk for pack in packs for chunk in pack):
        n, s, p = chunk.num_tokens, chunk.source_positions, _prefix(chunk, data, have_source)
        for place, amount in enumerate((n, s, (n * (n + 1) + p * (p - 1)) // 2, n * n, s * s, n * s)):
            total[place] += amount
    return Work(*total)


def _prefix(chunk: Chunk, data: DataSettings, have_source: Sequence[bool]) -> int:
    """First positions that all of the document sees: a source before its targets, and the first of these."""
    if not data.bidirectional_prefix or chunk.objective == PLAIN or chunk.source_positions:
        return 0
    laid = chunk.objective >= len(have_source) or have_source[chunk.objective]  # beyond the objectives: pairs
    return chunk.num_tokens - chunk.num_labels + 1 if laid and chunk.num_tokens > chunk.num_labels else 0
