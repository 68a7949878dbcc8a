"""Denoising (BART: Lewis et al. 2020): the source is the text with noise, the target the text itself."""

import numpy as np

from bigmodel.config.augmentation_settings import NoiseSettings
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
from bigmodel.data.objectives.noise import noised, noised_lengths

BART = [NoiseSettings(kind="permute_sentences"), NoiseSettings(kind="infill", share=0.3, mean_span=3.0)]


def _lengths(settings: ObjectiveSettings, mode: str, lengths: np.ndarray, remaining: np.ndarray) -> Columns:
    texts = num_texts(lengths, remaining)
    return noised_lengths(settings.noise or BART, texts) + 1, texts + 1, texts + 1


def _make(settings: ObjectiveSettings, mode: str, chunk: ChunkText, key: int, special_tokens: SpecialTokens) -> Example:
    read = noised(settings.noise or BART, chunk.text, key, special_tokens.mask, special_tokens.kinds)
    end = [special_tokens.eos]
    return teacher_forced(
        np.concatenate([read, end]), special_tokens.bos, np.concatenate([chunk.text, end]).astype(np.int64)
    )


DENOISING = Rule(_lengths, _make)
