"""Keyed random words: the same key gives the same words on every machine, rank, process and library version.

In: a key, made from names and numbers that identify the draw. Out: 64-bit words and permutations.
The generator is splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"):
word i of a key is a hash of `key + (i + 1) * GOLDEN`, so each word is computed alone. numpy's generators are not used,
because numpy does not guarantee that their streams stay the same.
Costs about 5 ns a word on one core.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio, odd: the step of splitmix64
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of splitmix64's finisher
WORD_MASK = 2**64 - 1
KEPT_STEPS = 1 << 15  # 256 KB


def make_key(*parts: int | str) -> int:
    """A 64-bit key from the name and numbers of a draw, e.g. `make_key("packs", seed, lane, window)`.

    The order of the parts matters. Integers are taken modulo 2**64, texts by their BLAKE2 hash.
    """
    key = 0
    for part in parts:
        key = extend_key(key, part)
    return key


def extend_key(key: int, part: int | str) -> int:
    """The key of the parts of `key` and one more: `make_key("a", 5)` is `extend_key(make_key("a"), 5)`."""
    number = _hash_text(part) if isinstance(part, str) else part
    return _mix_number((key + GOLDEN) ^ _mix_number(number & WORD_MASK))


def words(key: int, count: int) -> np.ndarray:
    """Words 0 to count - 1 of a key: uint64, (count,)."""
    return words_of_keys([key], count)[0]


def words_of_keys(keys: Sequence[int], count: int) -> np.ndarray:
    """Words 0 to count - 1 of each key: uint64, (keys, count). Half the time of a call for each key."""
    word = np.array(keys, np.uint64)[:, None] + _steps(count)
    shifted = np.empty_like(word)
    for shift, multiplier in ((30, MULTIPLIERS[0]), (27, MULTIPLIERS[1]), (31, 1)):
        word ^= np.right_shift(word, np.uint64(shift), out=shifted)
        if multiplier > 1:
            word *= np.uint64(multiplier)
    return word


def _steps(count: int) -> np.ndarray:
    """(count,) uint64: GOLDEN, 2 GOLDEN, 3 GOLDEN ..."""
    return _kept_steps()[:count] if count <= KEPT_STEPS else _make_steps(count)


@lru_cache(maxsize=1)
def _kept_steps() -> np.ndarray:
    return _make_steps(KEPT_STEPS)


def _make_steps(count: int) -> np.ndarray:
    return np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)


def permutation(key: int, count: int) -> np.ndarray:
    """The numbers 0 to count - 1 in the order of the key's words: int64, (count,). Of equal words the earlier first."""
    drawn = words(key, count)
    order = np.argsort(drawn)  # a third of the time of a stable sort, with AVX-512
    ordered = drawn[order]
    return order if (ordered[1:] > ordered[:-1]).all() else np.argsort(drawn, kind="stable")


def _mix_number(number: int) -> int:
    number &= WORD_MASK
    number = ((number ^ (number >> 30)) * MULTIPLIERS[0]) & WORD_MASK
    number = ((number ^ (number >> 27)) * MULTIPLIERS[1]) & WORD_MASK
    return number ^ (number >> 31)


def _hash_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
