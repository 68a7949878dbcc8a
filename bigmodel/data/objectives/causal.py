"""Causal: each token from those before it; `ahead` = k: the one k further on."""

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
    check_piece,
    teacher_forced,
)


def causal(document: np.ndarray, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, (length,) each, of the positions [start, start + length) of a stored document. Views.

    The target of a position is the token after it. Where a long document was cut, the last target of a piece
    is the first input of the next piece: nothing is lost and nothing comes from another document.

    >>> causal(np.array([1, 11, 12, 13, 2]), 0, 4)
    (array([ 1, 11, 12, 13]), array([11, 12, 13,  2]))
    """
    end = check_piece(document, start, length)
    return document[start:end], document[start + 1 : end + 1]


def ahead_targets(lengths: np.ndarray, remaining: np.ndarray, ahead: int) -> np.ndarray:
    """How many positions of a piece have a token `ahead` of them in the document; `remaining`: positions after it."""
    return np.clip(lengths + remaining - (ahead - 1), 0, lengths)


def causal_ahead(piece: ChunkText, ahead: int) -> Example:
    """Each position's target is the token `ahead` of it; IGNORED where the document has none.

    >>> from bigmodel.data.objectives.example import piece_of
    >>> causal_ahead(piece_of(np.array([1, 11, 12, 13, 2]), 0, 4), 2)[1:3]
    (array([ 1, 11, 12, 13]), array([  12,   13,    2, -100]))
    """
    length = len(piece.tokens)
    targets = np.full(length, IGNORED, dtype=np.int64)
    found = np.concatenate([piece.tokens, piece.after[: ahead - 1]])[ahead - 1 :]
    targets[: len(found)] = found
    return teacher_forced(NO_TOKENS, piece.before, piece.tokens)._replace(labels=targets)


def _lengths(settings: ObjectiveSettings, mode: str, lengths: np.ndarray, remaining: np.ndarray) -> Columns:
    return np.zeros_like(lengths), lengths, ahead_targets(lengths, remaining, settings.ahead)


def _make(settings: ObjectiveSettings, mode: str, piece: ChunkText, key: int, special_tokens: SpecialTokens) -> Example:
    return causal_ahead(piece, settings.ahead)


CAUSAL = Rule(_lengths, _make, is_plain=lambda settings: settings.ahead == 1)
