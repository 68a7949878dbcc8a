"""Prefix-LM (Raffel et al. 2020): the first part of the chunk is the source, the rest is predicted."""

import numpy as np

from bigmodel.config.settings import ObjectiveSettings
from bigmodel.data.objectives.example import ChunkText, Columns, Example, Rule, SpecialTokens, teacher_forced


def prefix_lengths(lengths: np.ndarray, prefix_share: float, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """(source tokens, labels); at least one label."""
    source = np.minimum((lengths * prefix_share).astype(np.int64), lengths - 1)
    return source + bool(mode), lengths - source


def prefix(chunk: ChunkText, prefix_share: float, mode: str, special_tokens: SpecialTokens) -> Example:
    """
    >>> from bigmodel.data.objectives.example import chunk_text_of
    >>> prefix(chunk_text_of(np.array([1, 11, 12, 13, 2]), 0, 4), 0.5, "", SpecialTokens(1, 2, 50, 10))[:3]
    (array([11, 12]), array([ 1, 13]), array([13,  2]))
    """
    split = int(prefix_lengths(np.array(len(chunk.tokens)), prefix_share, "")[0])
    source = chunk.tokens[:split]
    if mode:
        source = np.concatenate([[special_tokens.mode(mode)], source])
    return teacher_forced(source, special_tokens.bos, chunk.tokens[split:])


def _lengths(settings: ObjectiveSettings, mode: str, lengths: np.ndarray, remaining: np.ndarray) -> Columns:
    source, targets = prefix_lengths(lengths, settings.prefix_share, mode)
    return source, targets, targets


def _make(settings: ObjectiveSettings, mode: str, chunk: ChunkText, key: int, special_tokens: SpecialTokens) -> Example:
    return prefix(chunk, settings.prefix_share, mode, special_tokens)


PREFIX = Rule(_lengths, _make)
