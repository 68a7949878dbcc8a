"""Id types: which type of integers the bytes of a column of token ids can be.

In: the bytes of samples and the size of the vocabulary. Out: the types by which every sample is a whole number of valid
ids. Read by a narrower type than they were written by, ids below 65,536 are valid too, with a 0 after each; so the
widest type that fits is the one they were written by. Example, two ids written as int32:

    07 00 00 00  2c 01 00 00    by uint16: 7, 0, 300, 0    by uint32: 7, 300    by uint64: 1,288,490,188,807

Costs: one pass over the bytes for each of 7 types.
"""

from collections.abc import Collection, Sequence

import numpy as np

from bigmodel.config.settings import UserError

CANDIDATES = ("<u1", "<u2", "<u4", "<u8", ">u2", ">u4", ">u8")  # a signed type has the same valid ids


def fitting_types(samples: Sequence[bytes], vocabulary: int) -> set[str]:
    """Of `CANDIDATES` those by which every sample is a whole number of ids below `vocabulary`."""
    content, sizes = b"".join(samples), {len(sample) for sample in samples}
    return {
        candidate
        for candidate in CANDIDATES
        if all(size % np.dtype(candidate).itemsize == 0 for size in sizes)
        and (not content or int(np.frombuffer(content, candidate).max()) < vocabulary)
    }


def id_type(given: str) -> np.dtype:
    """The type that a user names. Raises `UserError` if it is no type of integers."""
    try:
        kind = np.dtype(given)
    except TypeError:
        kind = np.dtype(object)
    if kind.kind not in "iu":
        raise UserError(f"--dtype {given}: no type of integers; name one, as uint16, int32 or int64")
    return kind


def check_type(given: str, fitting: Collection[str], vocabulary: int, where: str) -> None:
    """Raise `UserError` if the ids were not written by the given type: a wider one fits, or another and it does not."""
    kind = id_type(given)
    order = ">" if kind.str[0] == ">" else "<"
    fits = f"{order if kind.itemsize > 1 else '<'}u{kind.itemsize}" in fitting
    # Any bytes are ids of a type that has no more values than the vocabulary: that one fits proves nothing.
    telling = [one for one in fitting if 256 ** np.dtype(one).itemsize > vocabulary]
    better = [one for one in fitting if np.dtype(one).itemsize > kind.itemsize] if fits else telling
    if better and set(fitting) != set(CANDIDATES):  # all of them fit where there are only zeros, or nothing
        best = max(better, key=lambda one: (np.dtype(one).itemsize, one[0] == order))
        name = best.replace("u", kind.kind) if best[0] == ">" else np.dtype(best.replace("u", kind.kind)).name
        raise UserError(
            f"--dtype {given}: the samples of {where} {'also' if fits else 'do not'} fit {'' if fits else 'it, but '}"
            f"{name}, which gives each a whole number of ids below {vocabulary:,}, the tokenizer's size; set "
            f"--dtype {name}, or give the tokenizer that made these shards"
        )
