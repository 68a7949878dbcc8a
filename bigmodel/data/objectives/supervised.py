"""Supervised documents: chats, and prompts with responses. Some of their tokens are trained, each with a weight.

In: a stored document and its spans, (first token, end, weight) each, in order. Out: a causal example whose labels are
the tokens inside the spans; all others are read and not predicted. A weight is a whole number of `UNITS`: sums of
weights are exact, so a step has the same divisor on any number of ranks. Example, tokens 1 11 12 2 21 22 2 with the
spans 2 to 4 and 6 to 7:

    inputs   1 11 12  2 21 22      labels  . 12  2  .  .  2

A document is never split, because a turn makes sense after the turns before it only. Of one longer than
`max_document_length` the spans that fit are kept; if none fits, the first one is cut. What comes after the last label
is left out. A document without a label within the limit is one token without a label, so that it is counted.

Guarantee: `measure`, which the plan uses, and `keep`, which makes the example, agree.
"""

from typing import NamedTuple

import numpy as np

from bigmodel.data.objectives.example import IGNORED, NO_TOKENS, Example

NAME = "supervised"
SUPERVISED = -2  # "objective" of a chunk that is a supervised document
UNITS = 1 << 16  # of a weight: 0.5 is 32,768


class Supervised(NamedTuple):
    """A stored document: (n,) tokens and (k, 3) spans: first token, end, weight in `UNITS`."""

    tokens: np.ndarray
    spans: np.ndarray


class Measured(NamedTuple):
    """Of documents, (n,) int64 each: tokens, labels, and the sum of the labels' weights in `UNITS`."""

    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


def keep(spans: np.ndarray, longest: int) -> tuple[int, np.ndarray]:
    """The kept tokens of a document, at most `longest`, and its kept spans.

    >>> keep(np.array([[2, 4, 65536], [6, 7, 65536]]), longest=5)
    (3, array([[    2,     4, 65536]]))
    >>> keep(np.array([[2, 9, 65536]]), longest=5)  # cut
    (5, array([[    2,     6, 65536]]))
    """
    fitting = spans[spans[:, 1] - 1 <= longest].astype(np.int64)
    if len(fitting):
        return int(fitting[-1, 1]) - 1, fitting
    if len(spans) and spans[0, 0] <= longest:
        first, _, weight = spans[0].tolist()
        return longest, np.array([[first, longest + 1, weight]])
    return 1, np.zeros((0, 3), np.int64)


def measure(spans: np.ndarray, num_documents: int, longest: int) -> Measured:
    """The same for all documents of a shard. `spans`: (k, 4), each after the number of its document, sorted."""
    rows, firsts, ends, weights = np.asarray(spans).astype(np.int64).reshape(-1, 4).T
    fits = ends - 1 <= longest
    tokens = np.ones(num_documents, np.int64)
    np.maximum.at(tokens, rows[fits], ends[fits] - 1)
    labels, units = (np.zeros(num_documents, np.int64) for _ in range(2))
    np.add.at(labels, rows[fits], (ends - firsts)[fits])
    np.add.at(units, rows[fits], ((ends - firsts) * weights)[fits])
    has_first, at = np.unique(rows, return_index=True)  # the first span of each document
    is_cut = ~fits[at] & (firsts[at] <= longest)
    cut, at = has_first[is_cut], at[is_cut]
    tokens[cut], labels[cut] = longest, longest + 1 - firsts[at]
    units[cut] = labels[cut] * weights[at]
    return Measured(tokens, labels, units)


def supervised(document: Supervised, longest: int) -> Example:
    """
    >>> document = Supervised(np.array([1, 11, 12, 2, 21, 22, 2]), np.array([[2, 4, 65536], [6, 7, 32768]]))
    >>> example = supervised(document, longest=8)
    >>> example.tokens.tolist(), example.labels.tolist()
    ([1, 11, 12, 2, 21, 22], [-100, 12, 2, -100, -100, 2])
    >>> example.weights.tolist()
    [0.0, 1.0, 1.0, 0.0, 0.0, 0.5]
    """
    num_tokens, spans = keep(document.spans, longest)
    labels, weights = np.full(num_tokens, IGNORED, dtype=np.int64), np.zeros(num_tokens, dtype=np.float32)
    for first, end, weight in spans.tolist():
        labels[first - 1 : end - 1] = document.tokens[first:end]
        weights[first - 1 : end - 1] = weight / UNITS
    return Example(NO_TOKENS, document.tokens[:num_tokens], labels, weights=weights)
