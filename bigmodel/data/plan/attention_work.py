"""Attention work of packs, counted from their plan alone: (query, key) pairs under the model's masks.

In: packs, data settings, and the function that counts the pairs of a model's masks
(`bigmodel.model.attention_masks.visible_pairs`). Out: `Work`, from which `bigmodel.metrics.flops` computes FLOPs.
These are sums, so the work of several nodes can be added.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from bigmodel.config.settings import DataSettings
from bigmodel.data.objectives.examples import objectives_of
from bigmodel.data.objectives.supervised import SUPERVISED
from bigmodel.data.objectives.table import OBJECTIVES
from bigmodel.data.plan.shuffle import PLAIN, Chunk, Pack

# (tokens, source tokens, prefix tokens) of documents, (D,) int64 each -> the last three fields of `Work`
CountPairs = Callable[[np.ndarray, np.ndarray, np.ndarray], Sequence[int]]


class Work(NamedTuple):
    """Sums over the documents of packs; (query, key) pairs are summed over layers too."""

    positions: int = 0  # of the decoder, or of the only stack
    source_positions: int = 0  # of the encoder in an encoder-decoder
    pairs: int = 0  # in the decoder, or the only stack
    source_pairs: int = 0  # in the encoder of an encoder-decoder
    cross_pairs: int = 0  # in cross-attention


def no_pairs(*_lengths: np.ndarray) -> Sequence[int]:
    """No model: no pairs."""
    return 0, 0, 0


def count_work(packs: Iterable[Pack], data: DataSettings, count_pairs: CountPairs) -> Work:
    """The work of all chunks of the packs."""
    have_source = [OBJECTIVES[objective.settings.kind].has_source for objective in objectives_of(data)]
    chunks = [chunk for pack in packs for chunk in pack]
    tokens_D = np.array([chunk.num_tokens for chunk in chunks], dtype=np.int64)
    source_tokens_D = np.array([chunk.source_positions for chunk in chunks], dtype=np.int64)
    prefixes_D = np.zeros_like(tokens_D)
    if data.bidirectional_prefix and not data.classes:
        prefixes_D[:] = [_prefix(chunk, have_source) for chunk in chunks]
    pairs = count_pairs(tokens_D, source_tokens_D, prefixes_D)
    return Work(int(tokens_D.sum()), int(source_tokens_D.sum()), *pairs)


def _prefix(chunk: Chunk, have_source: Sequence[bool]) -> int:
    """Length of the prefix that the whole document attends to: a source and the first input with a label."""
    if chunk.source_positions or chunk.objective in (PLAIN, SUPERVISED):
        return 0
    laid = chunk.objective >= len(have_source) or have_source[chunk.objective]  # numbers past the objectives are pairs
    return chunk.num_tokens - chunk.num_labels + 1 if laid and chunk.num_tokens > chunk.num_labels else 0
