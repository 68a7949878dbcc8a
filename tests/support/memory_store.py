"""A store in memory with the interface of `ShardStore`; a token encodes its place in the store."""

import hashlib
from collections import Counter
from collections.abc import Iterable

import numpy as np

from bigmodel.data.plan.shuffle import Pack
from bigmodel.data.store.shards import measure_shard

Lengths = dict[str, list[list[int]]]  # source -> shard -> stored tokens of each document


class MemoryStore:
    def __init__(self, lengths: Lengths) -> None:
        self._lengths = lengths
        self.sources = sorted(name for name, shards in lengths.items() if any(shards))
        self.opened: set[tuple[str, int]] = set()  # shards whose lengths were read
        self.fingerprint = hashlib.sha256(repr(sorted(lengths.items())).encode()).hexdigest()

    def num_shards(self, source: str) -> int:
        return len(self._lengths[source])

    def shard_sizes(self, source: str) -> np.ndarray:
        sizes = [measure_shard(np.array(lengths, dtype=np.uint32)) for lengths in self._lengths[source]]
        return np.array(sizes, dtype=np.int64)

    def shard_digests(self, source: str) -> np.ndarray:
        texts = [hashlib.sha256(repr(lengths).encode()).digest() for lengths in self._lengths[source]]
        return np.array([int.from_bytes(text[:8], "little", signed=True) for text in texts], dtype=np.int64)

    def lengths(self, source: str, shard: int) -> np.ndarray:
        self.opened.add((source, shard))
        return np.array(self._lengths[source][shard], dtype=np.uint32)

    def document(self, source: str, shard: int, row: int) -> np.ndarray:
        """Tokens that are unique in the store; decimal digits: source, shard (2), row (3), position (3)."""
        length = self._lengths[source][shard][row]
        tokens = token(self.sources.index(source), shard, row, np.arange(length))
        return tokens.astype(np.uint32)


def token(source: int, shard: int, row: int, place: np.ndarray) -> np.ndarray:
    return ((source + 1) * 10**8) + shard * 10**6 + row * 10**3 + place


def corpus_positions(store: MemoryStore, source: str) -> set[tuple[int, int, int, int]]:
    """All (source, shard, row, position) of a source; an epoch has each once."""
    number = store.sources.index(source)
    return {
        (number, shard, row, position)
        for shard in range(store.num_shards(source))
        for row, length in enumerate(store.lengths(source, shard).tolist())
        for position in range(length - 1)
    }


def given_positions(packs: Iterable[Pack]) -> Counter[tuple[int, int, int, int, int]]:
    """Count of each (source, shard, row, position, epoch) in the packs."""
    return Counter(
        (chunk.source, chunk.shard, chunk.row, chunk.start + offset, chunk.epoch)
        for pack in packs
        for chunk in pack
        for offset in range(chunk.length)
    )


def lognormal_lengths(seed: int, count: int) -> list[int]:
    """Stored tokens of web-like documents: lognormal, mean 740, median 403, by inverse transform of random words."""
    from statistics import NormalDist

    from bigmodel.data.randomness import words

    normal = NormalDist(6.0, 1.1)
    uniform = (words(seed, count) >> np.uint64(11)).astype(float) / 2**53
    return [int(np.exp(normal.inv_cdf(min(max(value, 1e-9), 1 - 1e-9)))) + 2 for value in uniform.tolist()]
