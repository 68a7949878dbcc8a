"""What the decoder reads of an example: laid out on one side, of a fixed length, masked or sparse."""

import numpy as np

from bigmodel.data.objectives.example import IGNORED, NO_TOKENS, Example
from bigmodel.data.randomness import make_key, permutation


def one_side(example: Example) -> Example:
    """The same for a decoder alone: start token, source, targets, one after the other; only the targets are asked for.

    >>> one_side(Example(np.array([11, 2]), np.array([1, 21]), np.array([21, 2])))[1:3]
    (array([ 1, 11,  2, 21]), array([-100, -100,   21,    2]))
    """
    source, tokens, targets, _ = example
    if not len(source):
        return example
    return Example(
        NO_TOKENS,
        np.concatenate([tokens[:1], source, tokens[1:]]),
        np.concatenate([np.full(len(source), IGNORED), targets]),
    )


def fixed(example: Example, length: int) -> Example:
    """Targets cut or padded to `length`; padding is read as token 0 and not asked for."""
    missing = max(0, length - len(example.labels))
    tokens, targets = (
        np.concatenate([side[:length], np.full(missing, filling)])
        for side, filling in ((example.tokens, 0), (example.labels, IGNORED))
    )
    places = example.places
    if places is not None:
        places = np.concatenate([places[:length], places[-1] + 1 + np.arange(missing)])
    return example._replace(tokens=tokens, labels=targets, places=places)


def mask_inputs(example: Example, share: float, key: int, mask: int) -> Example:
    """Replace this share of the decoder inputs, but never the start token (word dropout: Bowman et al. 2016)."""
    others = len(example.tokens) - 1
    places = permutation(make_key("masked inputs", key), others)[: round(share * others)] + 1
    tokens = example.tokens.astype(np.int64)
    tokens[places] = mask
    return example._replace(tokens=tokens)


def num_kept(targets: np.ndarray, share: float) -> np.ndarray:
    """Positions left after `drop_positions`."""
    return targets - np.rint(share * (targets - 1)).astype(np.int64)


def drop_positions(example: Example, share: float, key: int) -> Example:
    """Leave this share of the decoder positions out, but never the first. The others keep their places."""
    count = len(example.tokens)
    kept = int(num_kept(np.array(count), share)) - 1
    places = np.sort(np.concatenate([[0], permutation(make_key("kept", key), count - 1)[:kept] + 1]))
    return Example(example.source, example.tokens[places], example.labels[places], places)
