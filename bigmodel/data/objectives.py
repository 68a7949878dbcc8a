"""Objectives: from a stored document to what the model reads and what it has to say.

Takes a document as stored (`[BOS] text [EOS]`, n tokens), gives inputs and targets of equal length.
Guarantees that the number of positions follows from n alone, so that packs can be planned on lengths before
any token is read. Costs nothing: inputs and targets are views of the document.
"""

import numpy as np


def num_positions(num_tokens: np.ndarray | int) -> np.ndarray:
    """Positions of a causal example of a document of `num_tokens` stored tokens: int64, of the shape given.

    Every token but the last is read and every token but the first is predicted. A document of 0 or 1 tokens
    gives nothing (0), so it is in no pack.
    """
    return np.maximum(np.asarray(num_tokens, dtype=np.int64) - 1, 0)


def causal(document: np.ndarray, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, (length,) each, of the positions [start, start + length) of a stored document.

    The target of a position is the token after it. Where a long document was cut, the last target of a piece
    is the first input of the next piece: nothing is lost and nothing comes from another document.

    >>> causal(np.array([1, 11, 12, 13, 2]), 0, 4)
    (array([ 1, 11, 12, 13]), array([11, 12, 13,  2]))
    """
    end = start + length
    assert 0 <= start < end, f"positions [{start}, {end}) are none of a document's"
    assert end < len(document), (
        f"the plan wants positions [{start}, {end}) of a document of {len(document)} stored tokens: "
        "the length index does not belong to these shards"
    )
    return document[start:end], document[start + 1 : end + 1]
