"""Causal: predict the next token; with `ahead` = k the token k positions ahead."""

import numpy as np

from bigmodel.config.settings import ObjectiveSettings
from bigmodel.data.objectives.example import (
    IGNORED,
    NO_TOKENS,
    ChunkText,
    Columns,
    Example,
    Rule,
    SpecialTokens,
    check_chunk,
    teacher_forced,
)


def causal(document: np.ndarray, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels, (length,) each, of positions [start, start + length) of a stored document; views, no copy.

    The label of a position is the next token. The last label of a chunk is the first input of the next chunk of the
    document: no token is lost, none comes from another document.

    >>> causal(np.array([1, 11, 12, 13, 2]), 0, 4)
    (array([ 1, 11, 12, 13]), array([11, 12, 13,  2]))
    """
    end = check_chunk(document, start, length)
    return document[start:end], document[start + 1 : end + 1]


def ahead_targets(lengths: np.ndarray, remaining: np.ndarray, ahead: int) -> np.ndarray:
    """The number of a chunk's positions with a token `ahead` of them; `remaining`: document positions after it."""
    return np.clip(lengths + remaining - (ahead - 1), 0, lengths)


def causal_ahead(chunk: ChunkText, ahead: int) -> Example:
    """The label of a position is the token `ahead` of it; IGNORED where the document has none.

    >>> from bigmodel.data.objectives.example import chunk_text_of
    >>> causal_ahead(chunk_text_of(np.array([1, 11, 12, 13, 2]), 0, 4), 2)[1:3]
    (array([ 1, 11, 12, 13]), array([  12,   13,    2, -100]))
    """
    length = len(chunk.tokens)
    targets = np.full(length, IGNORED, dtype=np.int64)
    found = np.concatenate([chunk.tokens, chunk.after[: ahead - 1]])[ahead - 1 :]
    targets[: len(found)] = found
    return teacher_forced(NO_TOKENS, chunk.before, chunk.tokens)._replace(labels=targets)


def _lengths(settings: ObjectiveSettings, mode: str, lengths: np.ndarray, remaining: np.ndarray) -> Columns:
    return np.zeros_like(lengths), lengths, ahead_targets(lengths, remaining, settings.ahead)


def _make(settings: ObjectiveSettings, mode: str, chunk: ChunkText, key: int, special_tokens: SpecialTokens) -> Example:
    return causal_ahead(chunk, settings.ahead)


CAUSAL = Rule(_lengths, _make, is_plain=lambda settings: settings.ahead == 1)
