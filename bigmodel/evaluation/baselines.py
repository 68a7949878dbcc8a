"""Two baselines that a language model must beat: a smoothed bigram model and `xz -9`.

The bigram model counts pairs of neighbouring tokens and predicts with interpolated modified Kneser-Ney smoothing
(Chen & Goodman 1998): with c(v, w) the count of w after v,

    P(w | v) = (c(v, w) - D(c(v, w))) / c(v)  +  G(v) * P1(w)
    P1(w)    = (k(w) - d(k(w))) / K           +  g * 1 / V

where k(w) is the number of different contexts of w and K the sum of all k. The discounts D and d for counts of 1, 2
and more follow in closed form from the numbers of counts of 1, 2, 3 and 4. G and g pass on exactly the discounted
mass. Nothing is tuned, and nothing is taken from the scored tokens.

Costs: 16 bytes per distinct pair, binary search; V x V is never allocated. About 3 M pairs/s.
"""

import lzma
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bigmodel.config.settings import UserError
from bigmodel.data.objectives.supervised import Supervised

if TYPE_CHECKING:
    from bigmodel.data.store.shards import ShardStore

Pair = tuple[np.ndarray, np.ndarray]  # (n,) tokens and (n,) their next tokens
CHUNK_PAIRS = 1 << 22  # pairs sorted together


class Bigram:
    """Predicts a token from its predecessor. `vocabulary`: ids are 0 to vocabulary - 1."""

    def __init__(self, vocabulary: int) -> None:
        if not 0 < vocabulary <= 2**31:
            raise UserError(f"a bigram model of {vocabulary} tokens: needs 1 to 2**31")
        self._vocabulary = vocabulary
        self._keys = np.zeros(0, np.int64)  # context * vocabulary + label, sorted, distinct
        self._counts = np.zeros(0, np.int64)

    def fit(self, pairs: Iterable[Pair]) -> "Bigram":
        """Count (inputs, labels); further calls add counts."""
        for keys in self._chunks(pairs):
            found, counts = np.unique(keys, return_counts=True)
            self._keys, self._counts = _add_counts(self._keys, self._counts, found, counts)
        if not len(self._keys):
            raise UserError("a bigram model needs at least one pair of tokens; use more text")
        self._prepare()
        return self

    def score(self, pairs: Iterable[Pair]) -> tuple[float, int]:
        """(nats, count): the sum of -ln P(label | input) over all pairs, and their number."""
        nats, count = 0.0, 0
        for keys in self._chunks(pairs):
            nats -= float(np.log(self._probabilities(keys)).sum())
            count += len(keys)
        return nats, count

    def bits(self, pairs: Iterable[Pair]) -> float:
        """The sum of -log2 P(label | input) over all pairs."""
        return self.score(pairs)[0] / math.log(2)

    def probabilities(self, context: int) -> np.ndarray:
        """(V,) P(w | context) of every token w; sums to 1."""
        return self._probabilities(context * self._vocabulary + np.arange(self._vocabulary, dtype=np.int64))

    def _chunks(self, pairs: Iterable[Pair]) -> Iterator[np.ndarray]:
        """Pairs as keys, in arrays of about CHUNK_PAIRS."""
        waiting: list[np.ndarray] = []
        size = 0
        for inputs, targets in pairs:
            if len(inputs) != len(targets):
                raise ValueError(f"a bigram needs as many inputs as labels, got {len(inputs)} and {len(targets)}")
            waiting.append(np.asarray(inputs, np.int64) * self._vocabulary + np.asarray(targets, np.int64))
            size += len(inputs)
            if size >= CHUNK_PAIRS:
                yield np.concatenate(waiting)
                waiting, size = [], 0
        if size:
            yield np.concatenate(waiting)

    def _prepare(self) -> None:
        vocabulary = self._vocabulary
        contexts, targets = np.divmod(self._keys, vocabulary)
        removed = _discounts(self._counts)[np.minimum(self._counts, 3)]
        self._context_counts = np.bincount(contexts, self._counts, vocabulary)
        self._kept = (self._counts - removed) / self._context_counts[contexts]
        # An unseen context passes on all its mass.
        handed_on = np.bincount(contexts, removed, vocabulary)
        seen = self._context_counts > 0
        self._handed_on = np.where(seen, handed_on / np.where(seen, self._context_counts, 1), 1.0)
        variety = np.bincount(targets, minlength=vocabulary)
        removed = _discounts(variety[variety > 0])[np.minimum(variety, 3)]
        self._lower = (variety - removed + removed.sum() / vocabulary) / variety.sum()

    def _probabilities(self, keys: np.ndarray) -> np.ndarray:
        contexts, targets = np.divmod(keys, self._vocabulary)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        kept = np.where(self._keys[places] == keys, self._kept[places], 0.0)
        return kept + self._handed_on[contexts] * self._lower[targets]


def _discounts(counts: np.ndarray) -> np.ndarray:
    """(4,) discounts of counts 0, 1, 2 and 3 or more: Chen & Goodman's estimate from the counts of counts, or half a
    count if the text is too small for it."""
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == size)) for size in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return np.array([0.0, 0.5, 0.5, 0.5])
    share = n1 / (n1 + 2 * n2)
    estimates = [1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3]
    return np.array([0.0, *(float(np.clip(value, 0.05, size - 0.05)) for size, value in enumerate(estimates, 1))])


def _add_counts(keys: np.ndarray, counts: np.ndarray, more: np.ndarray, more_counts: np.ndarray) -> Pair:
    """Merge two sorted arrays of distinct keys; counts of keys in both are added."""
    merged, places = np.unique(np.concatenate([keys, more]), return_inverse=True)
    return merged, np.bincount(places, np.concatenate([counts, more_counts])).astype(np.int64)


def token_pairs(store: "ShardStore") -> Iterator[Pair]:
    """(inputs, labels) of every whole document of a split, for pairs of every target text: one epoch."""
    for source in store.sources:
        for shard in range(store.num_shards(source)):
            for row in range(len(store.lengths(source, shard))):
                document = store.document(source, shard, row)
                assert not isinstance(document, Supervised), "a supervised document is not predicted as a whole"
                text = document if isinstance(document, np.ndarray) else document.target
                yield text[:-1], text[1:]


def xz_bits_per_byte(path: Path) -> float:
    """Bits per byte of a file under `xz -9`, which reads the whole file but no training text.

    Raises `UserError` if the file is missing or empty. About 2 MB/s and 700 MB of memory.
    """
    compressor = lzma.LZMACompressor(preset=9)
    size = compressed = 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                size += len(block)
                compressed += len(compressor.compress(block))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; prepare the data again") from None
    if not size:
        raise UserError(f"{path}: is empty; prepare the data again")
    return 8 * (compressed + len(compressor.flush())) / size
