"""Noise: the tokens of a text, changed before a model reads them.

In: a text without BOS and EOS, a list of noises, a random key. Out: the text after each noise in turn.

    mask_tokens        11 12 13 14  ->  11 [M] 13 14     word dropout (Bowman et al. 2016), token masking
    drop_tokens        11 12 13 14  ->  11 13 14         token deletion (BART: Lewis et al. 2020)
    permute_tokens     11 12 13 14  ->  12 11 13 14      no token moves more than `window` places (Lample et al. 2018)
    permute_sentences  A. B. C.     ->  B. C. A.         BART
    infill             11 12 13 14  ->  11 [M] 14 [M]    BART: one mask for a span, also for one of length 0

Guarantees: the length after a noise depends on the length before it only, so packs are planned exactly. Shares are
therefore numbers of tokens, share * length rounded, and not draws per token. Spans of infilling are Poisson under the
condition that their lengths have this sum: the multinomial distribution with equal shares. Between two spans lies a
token, so a mask stands for one span. A text of at least one token keeps at least one.
"""

from collections.abc import Sequence

import numpy as np

from bigmodel.config.augmentation_settings import NoiseSettings
from bigmodel.data.objectives.sentences import sentence_ends
from bigmodel.data.randomness import make_key, permutation, words


def noised_lengths(noises: Sequence[NoiseSettings], texts: np.ndarray) -> np.ndarray:
    """Tokens after these noises of texts of `texts` tokens."""
    for noise in noises:
        if noise.kind == "drop_tokens":
            texts = texts - num_dropped(texts, noise.share)
        elif noise.kind == "infill":
            hidden, spans = infill_counts(texts, noise.share, noise.mean_span)
            texts = texts - hidden + spans
    return texts


def noised(
    noises: Sequence[NoiseSettings], text: np.ndarray, key: int, mask: int, kinds_of_tokens: np.ndarray | None = None
) -> np.ndarray:
    """A text after these noises. `kinds_of_tokens`: see `sentences.kinds_of`; needed to permute sentences."""
    text = text.astype(np.int64)
    for number, noise in enumerate(noises):
        own = make_key("noise", key, number)
        if noise.kind == "mask_tokens":
            text = mask_tokens(text, noise.share, own, mask)
        elif noise.kind == "drop_tokens":
            text = drop_tokens(text, noise.share, own)
        elif noise.kind == "permute_tokens":
            text = text[window_order(len(text), noise.window, own)]
        elif noise.kind == "permute_sentences":
            assert kinds_of_tokens is not None, "permuting sentences needs the tokens that end one"
            text = permute_sentences(text, sentence_ends(text, kinds_of_tokens), own)
        else:
            text = infill(text, noise.share, noise.mean_span, own, mask)
    return text


def num_masked(texts: np.ndarray, share: float) -> np.ndarray:
    return np.rint(texts * share).astype(np.int64)


def mask_tokens(text: np.ndarray, share: float, key: int, mask: int) -> np.ndarray:
    """
    >>> mask_tokens(np.array([11, 12, 13, 14]), 0.5, key=0, mask=60)
    array([11, 60, 60, 14])
    """
    text = text.copy()
    text[permutation(key, len(text))[: int(num_masked(np.array(len(text)), share))]] = mask
    return text


def num_dropped(texts: np.ndarray, share: float) -> np.ndarray:
    return np.minimum(num_masked(texts, share), np.maximum(texts - 1, 0))


def drop_tokens(text: np.ndarray, share: float, key: int) -> np.ndarray:
    """
    >>> drop_tokens(np.array([11, 12, 13, 14]), 0.5, key=0)
    array([11, 14])
    """
    dropped = int(num_dropped(np.array(len(text)), share))
    return np.delete(text, permutation(key, len(text))[:dropped])


def window_order(count: int, window: int, key: int) -> np.ndarray:
    """The places 0 to count - 1 in the order of place + a random number in [0, window + 1)."""
    offsets = words(key, count) / 2.0**64 * (window + 1)
    return np.argsort(np.arange(count) + offsets, kind="stable")


def permute_sentences(text: np.ndarray, ends: np.ndarray, key: int) -> np.ndarray:
    """`ends`: the end of each sentence, the last one len(text).

    >>> permute_sentences(np.array([11, 12, 13, 14]), np.array([2, 3, 4]), key=0)
    array([14, 13, 11, 12])
    """
    sentences = np.split(text, ends[:-1])
    return np.concatenate([text[:0], *(sentences[one] for one in permutation(key, len(sentences)))])


def infill_counts(texts: np.ndarray, share: float, mean_span: float) -> tuple[np.ndarray, np.ndarray]:
    """(hidden tokens, spans): a text keeps a token at least, and has a token between two spans."""
    hidden = num_dropped(texts, share)
    spans = np.where(hidden > 0, np.clip(np.rint(hidden / mean_span), 1, texts - hidden + 1), 0)
    return hidden, spans.astype(np.int64)


def infill(text: np.ndarray, share: float, mean_span: float, key: int, mask: int) -> np.ndarray:
    """
    >>> infill(np.array([11, 12, 13, 14, 15, 16]), 0.5, 1.5, key=1, mask=60)
    array([60, 12, 13, 60, 16])
    """
    hidden, spans = (int(count) for count in infill_counts(np.array(len(text)), share, mean_span))
    if not spans:
        return text
    gaps = np.sort(permutation(make_key("gaps", key), len(text) - hidden + 1)[:spans])  # before this visible token
    owners = (words(make_key("lengths", key), hidden) % np.uint64(spans)).astype(np.int64)
    lengths = np.bincount(owners, minlength=spans)  # multinomial
    starts = gaps + np.cumsum(lengths) - lengths
    is_hidden = np.zeros(len(text) + 1, dtype=np.int64)
    np.add.at(is_hidden, starts, 1)
    np.add.at(is_hidden, starts + lengths, -1)
    return np.insert(text[np.cumsum(is_hidden[:-1]) == 0], gaps, mask)
