"""Attended (query, key) pairs of documents, from their lengths alone. Imports no torch.

In: lengths of documents, the model's settings. Out: pairs by stack, from which FLOPs follow (`bigmodel.metrics.flops`).
Guarantee: equal to the masks that training uses (`bigmodel.model.attention_masks`), by a test.

Example: a decoder of 2 full layers and documents of 3 and 2 tokens: 2 * (6 + 3) = 18 pairs.
"""

from typing import NamedTuple

import numpy as np

from bigmodel.config.layer_kinds import LayerKind, layer_kind
from bigmodel.config.settings import ModelSettings


class VisiblePairs(NamedTuple):
    """Attended (query, key) pairs, summed over documents and over the layers of a stack."""

    stack: int  # of the decoder, or of the only stack; with "mixed", source keys included
    encoder: int
    cross: int


def visible_pairs(
    tokens_D: np.ndarray, source_tokens_D: np.ndarray, prefixes_D: np.ndarray, settings: ModelSettings
) -> VisiblePairs:
    """Pairs from the documents' lengths, (D,) int64 each: tokens (decoder or only stack), source tokens, prefix tokens.
    Closed forms: a few operations per document."""
    n, s, window = tokens_D, source_tokens_D, settings.sliding_window
    if settings.is_recurrent:
        return VisiblePairs(0, 0, int((n * s).sum()))  # one attention to the source; without a source s is 0
    if settings.kind == "encoder":
        return VisiblePairs(_both_ways_pairs(n, settings), 0, 0)
    is_mixed = settings.kind == "encoder_decoder" and settings.source_attention == "mixed"
    before = s if is_mixed else np.zeros_like(n)  # tokens before the document's first, attended to by all of it
    full = _triangle(before + n) - _triangle(before)
    if settings.kind == "decoder":
        full = full + _triangle(prefixes_D - 1)  # inside the prefix also the later keys
    cut = _triangle(before + n - window) - _triangle(before - window)  # keys too far back
    own = _over_layers(settings, {"full": full, "sliding": full - cut})
    if settings.kind != "encoder_decoder":
        return VisiblePairs(own, 0, 0)
    layers = settings.num_layers + settings.num_mtp_modules
    crossing = 0 if is_mixed else layers * int((n * s).sum())
    return VisiblePairs(own, _both_ways_pairs(s, settings.encoder), crossing)


def _both_ways_pairs(n: np.ndarray, settings: ModelSettings) -> int:
    cut = 2 * _triangle(n - 1 - settings.sliding_window // 2)
    return _over_layers(settings, {"full": n * n, "sliding": n * n - cut})


def _triangle(n: np.ndarray) -> np.ndarray:
    """1 + 2 + ... + n; 0 for n <= 0."""
    n = np.maximum(n, 0)
    return n * (n + 1) // 2


def _over_layers(settings: ModelSettings, pairs_by_kind: dict[LayerKind, np.ndarray]) -> int:
    layers = range(settings.num_layers + settings.num_mtp_modules)
    kinds = [layer_kind(settings, layer) for layer in layers]
    return sum(kinds.count(kind) * int(pairs.sum()) for kind, pairs in pairs_by_kind.items())
