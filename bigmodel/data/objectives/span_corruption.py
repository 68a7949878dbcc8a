"""Span corruption (T5: Raffel et al. 2020): hidden spans are predicted; with a mode token, UL2's R and X."""

import numpy as np

from bigmodel.config.settings import ObjectiveSettings
from bigmodel.data.objectives.example import (
    ChunkText,
    Columns,
    Example,
    Rule,
    SpecialTokens,
    num_texts,
    teacher_forced,
)
from bigmodel.data.randomness import make_key, permutation


def noise_counts(texts: np.ndarray, density: float, mean_span: float) -> tuple[np.ndarray, np.ndarray]:
    """(hidden tokens, spans) of texts of these lengths: 0 and 0 below 2 tokens, else at least 1 token stays visible."""
    several = texts >= 2
    hidden = np.where(several, np.clip(np.rint(texts * density), 1, np.maximum(texts - 1, 1)), 0).astype(np.int64)
    spans = np.clip(np.rint(hidden / mean_span), 1, np.maximum(np.minimum(hidden, texts - hidden), 1))
    return hidden, np.where(several, spans, 0).astype(np.int64)


def span_corruption_lengths(
    texts: np.ndarray, density: float, mean_span: float, mode: str
) -> tuple[np.ndarray, np.ndarray]:
    """(source tokens, labels)."""
    hidden, spans = noise_counts(texts, density, mean_span)
    return texts - hidden + spans + 1 + bool(mode), hidden + spans + 2


def span_corruption(
    chunk: ChunkText, density: float, mean_span: float, mode: str, key: int, special_tokens: SpecialTokens
) -> Example:
    """Visible and hidden spans alternate; their lengths are drawn uniformly from all with the right sum, as in T5.

    >>> from bigmodel.data.objectives.example import chunk_text_of
    >>> document = np.array([1, 11, 12, 13, 14, 2])
    >>> example = span_corruption(chunk_text_of(document, 0, 5), 0.5, 1.0, "", 0, SpecialTokens(1, 2, 50, 10))
    >>> example.source.tolist(), example.labels.tolist()
    ([11, 66, 13, 65, 2], [66, 12, 65, 14, 64, 2])
    """
    text = chunk.text
    hidden, spans = (int(count) for count in noise_counts(np.array(len(text)), density, mean_span))
    visible_spans = _random_lengths(make_key("visible", key), len(text) - hidden, spans)
    hidden_spans = _random_lengths(make_key("hidden", key), hidden, spans)
    turns = np.stack([visible_spans, hidden_spans], axis=1).reshape(-1)
    is_hidden = np.repeat(np.arange(2 * spans) % 2 == 1, turns) if spans else np.zeros(len(text), dtype=bool)
    sentinels = special_tokens.sentinel(np.arange(spans + 1))
    source = np.insert(text[~is_hidden].astype(np.int64), np.cumsum(visible_spans), sentinels[:-1])
    targets = np.insert(text[is_hidden].astype(np.int64), np.cumsum(hidden_spans) - hidden_spans, sentinels[:-1])
    front = [special_tokens.mode(mode)] if mode else []
    return teacher_forced(
        np.concatenate([front, source, [special_tokens.eos]]).astype(np.int64),
        special_tokens.bos,
        np.concatenate([targets, sentinels[-1:], [special_tokens.eos]]),
    )


def restore(source: np.ndarray, targets: np.ndarray, special_tokens: SpecialTokens) -> np.ndarray:
    """The text that `span_corruption` turned into these, without a mode token.

    >>> restore(np.array([11, 66, 13, 65, 2]), np.array([66, 12, 65, 14, 64, 2]), SpecialTokens(1, 2, 50, 10)).tolist()
    [11, 12, 13, 14]
    """
    lowest, highest = (int(special_tokens.sentinel(number)) for number in (special_tokens.sentinels - 1, 0))
    source, targets = source[:-1], targets[:-1]
    if len(source) and special_tokens.vocabulary < source[0] <= special_tokens.vocabulary + 3:
        source = source[1:]
    visible, hidden = (
        np.split(side, np.flatnonzero((side >= lowest) & (side <= highest))) for side in (source, targets)
    )
    parts = [visible[0]]
    for hole, answer in zip(visible[1:], hidden[1:], strict=False):
        assert hole[0] == answer[0], f"the target has {answer[0]} where the source has sentinel {hole[0]}"
        parts += [answer[1:], hole[1:]]
    return np.concatenate(parts)


def _random_lengths(key: int, total: int, parts: int) -> np.ndarray:
    """`parts` random lengths of at least 1 with the sum `total`."""
    if parts == 0:
        return np.zeros(0, dtype=np.int64)
    cuts = np.sort(permutation(key, total - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _lengths(settings: ObjectiveSettings, mode: str, lengths: np.ndarray, remaining: np.ndarray) -> Columns:
    texts = num_texts(lengths, remaining)
    source, targets = span_corruption_lengths(texts, settings.density, settings.mean_span, mode)
    return source, targets, targets


def _make(settings: ObjectiveSettings, mode: str, chunk: ChunkText, key: int, special_tokens: SpecialTokens) -> Example:
    return span_corruption(chunk, settings.density, settings.mean_span, mode, key, special_tokens)


def _num_sentinels(settings: ObjectiveSettings, longest: int) -> int:
    """One per hidden span, and one for the end."""
    _, spans = noise_counts(np.array(longest), settings.density, settings.mean_span)
    return int(spans) + 1


SPAN_CORRUPTION = Rule(_lengths, _make, _num_sentinels)
