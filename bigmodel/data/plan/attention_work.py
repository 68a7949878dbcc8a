"""Work: how much attention has to look at in packs, counted from their plan alone.

Takes packs, the settings of the data, and the function that counts the pairs that the model's masks let through
(`bigmodel.model.attention_masks.visible_pairs`); gives sums that the model's operations follow from
(`bigmodel.metrics.flops`). Being sums, those of several nodes can be added up.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from bigmodel.config.settings import DataSettings
from bigmodel.data.objectives.examples import objectives_of
from bigmodel.data.objectives.table import OBJECTIVES
from bigmodel.data.plan.shuffle import PLAIN, Chunk, Pack

# (tokens, tokens of the source, tokens of the prefix) of documents, (D,) int64 each -> the last three of `Work`
CountPairs = Callable[[np.ndarray, np.ndarray, np.ndarray], Sequence[int]]


class Work(NamedTuple):
    """Sums over the documents of packs. Pairs, (query, key), are summed over the layers too."""

    positions: int = 0  # on the decoder's side, or the only one
    source_positions: int = 0  # of an encoder-decoder
    pairs: int = 0  # in the decoder, or the only stack
    source_pairs: int = 0  # in the encoder of an encoder-decoder
    cross_pairs: int = 0  # in cross-attention


def no_pairs(*_lengths: np.ndarray) -> Sequence[int]:
    """Of no model at all."""
    return 0, 0, 0


def count_work(packs: Iterable[Pack], data: DataSettings, count_pairs: CountPairs) -> Work:
    """Over all chunks of the packs."""
    have_source = [OBJECTIVES[objective.settings.kind].has_source for objective in objectives_of(data)]
    chunks = [chunk for pack in packs for chunk in pack]
    lengths = [(chunk.num_tokens, chunk.source_positions, _prefix(chunk, data, have_source)) for chunk in chunks]
    tokens_D, source_tokens_D, prefixes_D = np.array(lengths, dtype=np.int64).reshape(-1, 3).T
    pairs = count_pairs(tokens_D, source_tokens_D, prefixes_D)
    return Work(int(tokens_D.sum()), int(source_tokens_D.sum()), *pairs)


def _prefix(chunk: Chunk, data: DataSettings, have_source: Sequence[bool]) -> int:
    """First positions that all of the document sees: a source before its targets, and the first of these."""
    if not data.bidirectional_prefix or chunk.objective == PLAIN or chunk.source_positions:
        return 0
    laid = chunk.objective >= len(have_source) or have_source[chunk.objective]  # beyond the objectives: pairs
    return chunk.num_tokens - chunk.num_labels + 1 if laid and chunk.num_tokens > chunk.num_labels else 0
