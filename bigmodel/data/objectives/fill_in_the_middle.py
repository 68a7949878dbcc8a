"""Fill in the middle (Bavarian et al. 2022): [PRE] a [SUF] c [MID] b (PSM) or [PRE] [SUF] c [MID] a b (SPM), causal."""

import numpy as np

from bigmodel.config.settings import ObjectiveSettings
from bigmodel.data.objectives.example import (
    NO_TOKENS,
    ChunkText,
    Columns,
    Example,
    Rule,
    SpecialTokens,
    num_texts,
    teacher_forced,
)
from bigmodel.data.randomness import words


def fill_in_the_middle(chunk: ChunkText, spm_share: float, key: int, special_tokens: SpecialTokens) -> Example:
    """Two random cuts; text + 4 positions. In `spm_share` of the chunks the suffix comes first."""
    text, (pre, suf, mid) = chunk.text, special_tokens.fill
    first, second, order = words(key, 3).tolist()
    low, high = sorted((first % (len(text) + 1), second % (len(text) + 1)))
    a, b, c = text[:low], text[low:high], text[high:]
    if order < spm_share * 2**64:
        parts: list = [[pre, suf], c, [mid], a, b]
    else:
        parts = [[pre], a, [suf], c, [mid], b]
    return teacher_forced(
        NO_TOKENS, special_tokens.bos, np.concatenate([*parts, [special_tokens.eos]]).astype(np.int64)
    )


def _lengths(settings: ObjectiveSettings, mode: str, lengths: np.ndarray, remaining: np.ndarray) -> Columns:
    decoder = num_texts(lengths, remaining) + 4
    return np.zeros_like(lengths), decoder, decoder


def _make(settings: ObjectiveSettings, mode: str, chunk: ChunkText, key: int, special_tokens: SpecialTokens) -> Example:
    return fill_in_the_middle(chunk, settings.spm_share, key, special_tokens)


FILL_IN_THE_MIDDLE = Rule(_lengths, _make)
