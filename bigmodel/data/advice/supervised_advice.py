"""Supervised advice: how much of chats and responses is trained, and what `data.max_document_length` takes from them.

In: a store's lengths and spans, data settings. Out: counts. Costs: a pass over all lengths and spans.
"""

from dataclasses import dataclass

import numpy as np

from bigmodel.config.settings import DataSettings
from bigmodel.data.objectives.supervised import UNITS, measure
from bigmodel.data.plan.shuffle import Lengths, is_supervised


@dataclass(frozen=True)
class Trained:
    """Of the supervised documents of a store: their number and tokens, trained tokens and the sum of their weights;
    documents that lose whole turns, whose only kept turn is cut, and that have no label within the limit."""

    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    weight: float = 0.0
    shortened: int = 0
    cut: int = 0
    left_out: int = 0


def count_trained(store: Lengths, data: DataSettings) -> Trained:
    places = [(name, shard) for name in store.sources if is_supervised(store, name)
              for shard in range(len(store.shard_sizes(name)))]  # fmt: skip
    total = np.zeros(7)
    for name, shard in places:
        lengths, spans = store.lengths(name, shard), store.spans(name, shard)  # type: ignore[attr-defined]
        total += _of_shard(np.asarray(spans).astype(np.int64), lengths, data.max_document_length)
    documents, tokens, trained, weight, shortened, cut, left_out = map(int, total)
    return Trained(documents, tokens, trained, weight / UNITS, shortened, cut, left_out)


def _of_shard(spans: np.ndarray, lengths: np.ndarray, longest: int) -> np.ndarray:
    """The numbers of `Trained`, the weight in `UNITS`."""
    whole, kept = measure(spans, len(lengths), int(lengths.max(initial=1))), measure(spans, len(lengths), longest)
    loses, has_labels = kept.labels < whole.labels, kept.labels > 0
    fitting = np.bincount(spans[spans[:, 2] - 1 <= longest, 0], minlength=len(lengths)) > 0
    return np.array([
        len(lengths), lengths.sum(dtype=np.int64), kept.labels.sum(), kept.weights.sum(),
        (loses & fitting).sum(), (loses & ~fitting & has_labels).sum(), (~has_labels).sum(),
    ], dtype=float)  # fmt: skip
