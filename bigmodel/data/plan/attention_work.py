"""Attention work of packs, counted from their plan alone: (query, key) pairs under the model's masks.

In: packs, data settings, and the function that counts the pairs of a model's masks
(`bigmodel.data.plan.visible_pairs`). Out: `Work`, from which `bigmodel.metrics.flops` computes FLOPs.
These are sums, so the work of several nodes can be added.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from bigmodel.config.settings import DataSettings
from bigmodel.data.objectives.examples import objectives_of
from bigmodel.data.objectives.table import OBJECTIVES
from bigmodel.data.plan.planned import PackTable
from bigmodel.data.plan.shuffle import WIDE

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


def count_work(packs: PackTable, data: DataSettings, count_pairs: CountPairs) -> Work:
    """The work of all chunks of the packs."""
    tokens_D, source_tokens_D = packs.num_tokens(), packs.source_positions()
    pairs = count_pairs(tokens_D, source_tokens_D, _prefixes(packs, data))
    return Work(int(tokens_D.sum()), int(source_tokens_D.sum()), *pairs)


def _prefixes(packs: PackTable, data: DataSettings) -> np.ndarray:
    """(D,) length of the prefix that the whole document attends to: a source and the first input with a label."""
    tokens_D, labels_D = packs.num_tokens(), packs.num_labels()
    is_plain = packs.chunks.shape[1] < WIDE  # then every input has a label
    if is_plain or not data.bidirectional_prefix or data.classes:
        return np.zeros_like(tokens_D)
    have_source = np.array([OBJECTIVES[objective.settings.kind].has_source for objective in objectives_of(data)])
    objectives_D = packs.objectives()
    laid_D = objectives_D >= len(have_source)  # numbers past the objectives are pairs
    own_D = (objectives_D >= 0) & ~laid_D  # neither plain nor supervised
    laid_D[own_D] = have_source[objectives_D[own_D]]
    laid_D &= (packs.source_positions() == 0) & (tokens_D > labels_D)
    return np.where(laid_D, tokens_D - labels_D + 1, 0)
