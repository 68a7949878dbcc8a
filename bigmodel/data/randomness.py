"""Keyed random words: the same key gives the same words on every machine, rank, process and library version.

In: a key, made from names and numbers that identify the draw. Out: 64-bit words and permutations.
The generator is splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"):
word i of a key is a hash of `key + (i + 1) * GOLDEN`, so each word is computed alone. numpy's generators are not used,
because numpy does not guarantee that their streams stay the same.
Costs about 5 ns a word on one core.
"""

import hashlib

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio, odd: the step of splitmix64
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of splitmix64's finisher
WORD_MASK = 2**64 - 1


def make_key(*parts: int | str) -> int:
    """A 64-bit key from the name and numbers of a draw, e.g. `make_key("packs", seed, lane, window)`.

    The order of the parts matters. Integers are taken modulo 2**64, texts by their BLAKE2 hash.
    """
    key = 0
    for part in parts:
        number = _hash_text(part) if isinstance(part, str) else part
        key = _mix_number((key + GOLDEN) ^ _mix_number(number & WORD_MASK))
    return key


def words(key: int, count: int) -> np.ndarray:
    """Words 0 to count - 1 of a key: uint64, (count,)."""
    word = np.arange(1, count + 1, dtype=np.uint64)
    word *= np.uint64(GOLDEN)
    word += np.uint64(key)
    word ^= word >> np.uint64(30)
    word *= np.uint64(MULTIPLIERS[0])
    word ^= word >> np.uint64(27)
    word *= np.uint64(MULTIPLIERS[1])
    word ^= word >> np.uint64(31)
    return word


def permutation(key: int, count: int) -> np.ndarray:
    """The numbers 0 to count - 1 in the order of the key's words: int64, (count,)."""
    return np.argsort(words(key, count), kind="stable")


def _mix_number(number: int) -> int:
    number &= WORD_MASK
    number = ((number ^ (number >> 30)) * MULTIPLIERS[0]) & WORD_MASK
    number = ((number ^ (number >> 27)) * MULTIPLIERS[1]) & WORD_MASK
    return number ^ (number >> 31)


def _hash_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
