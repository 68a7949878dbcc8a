"""Id types: which type of integers the bytes of a column of token ids can be.

In: the bytes of samples and the size of the vocabulary. Out: the types by which every sample is a whole number of valid
ids. Read by a narrower type than they were written by, ids below 65,536 are valid too, with a 0 after each; so the
widest type that fits is the one they were written by. Example, two ids written as int32:

    07 00 00 00  2c 01 00 00    by uint16: 7, 0, 300, 0    by uint32: 7, 300    by uint64: 1,288,490,188,807

Costs: one pass over the bytes for each of 7 widths and byte orders.
"""

from collections.abc import Collection, Sequence

import numpy as np

from bigmodel.config.settings import UserError

UNSIGNED = ("<u1", "<u2", "<u4", "<u8", ">u2", ">u4", ">u8")
TYPES = frozenset(UNSIGNED) | {name.replace("u", "i") for name in UNSIGNED}
TELLING_BYTES = 256  # of ids show a type; a few may fit a wider one by chance


def fitting_types(samples: Sequence[bytes], vocabulary: int) -> set[str]:
    """Of `TYPES` those by which every sample is a whole number of ids below `vocabulary`, none of them negative."""
    content, sizes = b"".join(samples), {len(sample) for sample in samples}
    found = set()
    for name in UNSIGNED:
        kind = np.dtype(name)
        if any(size % kind.itemsize for size in sizes):
            continue
        largest = int(np.frombuffer(content, kind).max()) if content else 0
        if largest < vocabulary:
            found |= {name, *([name.replace("u", "i")] if largest < 2 ** (8 * kind.itemsize - 1) else [])}
    return found


def id_type(given: str) -> np.dtype:
    """The type that a user names. Raises `UserError` if it is no type of integers."""
    try:
        kind = np.dtype(given)
    except TypeError:
        kind = np.dtype(object)
    if kind.kind not in "iu":
        raise UserError(f"--dtype {given}: no type of integers; name one, as uint16, int32 or int64")
    return kind


def better_type(given: str, fitting: Collection[str], vocabulary: int) -> str:
    """The type that ids were written by, if it is not the given one: a wider one that fits, or another where the given
    one does not fit. Empty: the given one, or none is known."""
    mine, unsigned = _code(id_type(given)), _code(id_type(given)).replace("i", "u")
    if mine in fitting:
        better = [one for one in fitting if one[1] == mine[1] and one[2:] > mine[2:]]
    else:
        # Any bytes are ids of a type that has no more values than the vocabulary: that one fits proves nothing.
        better = [one for one in fitting if one == unsigned or (one[1] == "u" and 256 ** int(one[2:]) > vocabulary)]
    if not better or set(fitting) == TYPES:  # all of them fit where there are only zeros, or nothing
        return ""
    best = max(better, key=lambda one: (one[2:], one[0] == mine[0]))
    alike = best.replace("u", mine[1])
    best = alike if alike in fitting else best
    return best if best[0] == ">" else np.dtype(best).name


def check_type(given: str, fitting: Collection[str], vocabulary: int, where: str, asked: bool = True) -> None:
    """Raise `UserError` if the ids were not written by the given type. asked: by --dtype; else it is the format's."""
    if name := better_type(given, fitting, vocabulary):
        fits = "also fit" if _code(id_type(given)) in fitting else "do not fit it, but"
        raise UserError(
            f"{'--dtype' if asked else 'without --dtype read as'} {given}: the samples of {where} {fits} {name}, which "
            f"gives each a whole number of ids below {vocabulary:,}, the tokenizer's size; set --dtype {name}, or give "
            "the tokenizer that made these shards"
        )


def _code(kind: np.dtype) -> str:
    """
    >>> [_code(np.dtype(name)) for name in ("uint8", "int32", ">u2")]
    ['<u1', '<i4', '>u2']
    """
    return f"{'>' if kind.str[0] == '>' else '<'}{kind.kind}{kind.itemsize}"
