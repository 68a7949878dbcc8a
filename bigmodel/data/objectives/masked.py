"""Masked tokens (BERT: Devlin et al. 2019): some tokens are hidden, each is predicted in its place."""

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
    num_texts,
)
from bigmodel.data.randomness import make_key, permutation, words


def masked_targets(texts: np.ndarray, density: float) -> np.ndarray:
    return np.where(texts >= 1, np.clip(np.rint(texts * density), 1, np.maximum(texts, 1)), 0).astype(np.int64)


def masked(chunk: ChunkText, density: float, key: int, special_tokens: SpecialTokens) -> Example:
    """BOS and the chunk with some text tokens to predict: 80% are masked, 10% any token, 10% unchanged."""
    tokens = np.concatenate([[special_tokens.bos], chunk.tokens]).astype(np.int64)
    count = int(masked_targets(np.array(len(chunk.text)), density))
    places = permutation(make_key("places", key), len(chunk.text))[:count] + 1
    targets = np.full(len(tokens), IGNORED, dtype=np.int64)
    targets[places] = tokens[places]
    how = words(make_key("how", key), count) % np.uint64(10)
    any_token = (words(make_key("token", key), count) % np.uint64(special_tokens.vocabulary)).astype(np.int64)
    tokens[places] = np.where(how < 8, special_tokens.mask, np.where(how == 8, any_token, tokens[places]))
    return Example(NO_TOKENS, tokens, targets)


def _lengths(settings: ObjectiveSettings, mode: str, lengths: np.ndarray, remaining: np.ndarray) -> Columns:
    targets = masked_targets(num_texts(lengths, remaining), settings.density)
    return np.zeros_like(lengths), lengths + 1, targets


def _make(settings: ObjectiveSettings, mode: str, chunk: ChunkText, key: int, special_tokens: SpecialTokens) -> Example:
    return masked(chunk, settings.density, key, special_tokens)


MASKED = Rule(_lengths, _make)
