"""Decoder inputs of an example: source and target on one side, later, fixed, masked or dropped inputs."""

import numpy as np

from bigmodel.data.objectives.example import IGNORED, NO_TOKENS, Example
from bigmodel.data.randomness import make_key, permutation


def one_side(example: Example) -> Example:
    """The example for a decoder alone: start token, source, target in a row; labels on the target only.

    >>> one_side(Example(np.array([11, 2]), np.array([1, 21]), np.array([21, 2])))[1:3]
    (array([ 1, 11,  2, 21]), array([-100, -100,   21,    2]))
    """
    source, tokens, targets, *_ = example
    if not len(source):
        return example
    return Example(
        NO_TOKENS,
        np.concatenate([tokens[:1], source, tokens[1:]]),
        np.concatenate([np.full(len(source), IGNORED), targets]),
    )


def later(example: Example, ahead: int) -> Example:
    """Inputs that come `ahead` positions before their label: the first `ahead` are the start token, the others follow.

    As in semi-autoregressive models (Wang et al. 2018), every token of the target remains a label.

    >>> later(Example(np.array([11, 2]), np.array([1, 21, 22, 23]), np.array([21, 22, 23, 2])), 3)[1:3]
    (array([ 1,  1,  1, 21]), array([21, 22, 23,  2]))
    """
    starts = np.repeat(example.tokens[:1], ahead - 1)
    return example._replace(tokens=np.concatenate([starts, example.tokens])[: len(example.tokens)])


def fixed(example: Example, length: int) -> Example:
    """The target cut or padded to `length`; padding has token 0 and label IGNORED."""
    missing = max(0, length - len(example.labels))
    tokens, targets = (
        np.concatenate([side[:length], np.full(missing, filling)])
        for side, filling in ((example.tokens, 0), (example.labels, IGNORED))
    )
    places = example.places
    if places is not None:
        places = np.concatenate([places[:length], places[-1] + 1 + np.arange(missing)])
    return example._replace(tokens=tokens, labels=targets, places=places)


def mask_inputs(example: Example, share: float, key: int, mask: int, starts: int = 1) -> Example:
    """Mask this share of the decoder inputs, none of the first `starts` (word dropout: Bowman et al. 2016)."""
    others = max(0, len(example.tokens) - starts)
    places = permutation(make_key("masked inputs", key), others)[: round(share * others)] + starts
    tokens = example.tokens.astype(np.int64)
    tokens[places] = mask
    return example._replace(tokens=tokens)


def num_kept(targets: np.ndarray, share: float) -> np.ndarray:
    """Positions that `drop_positions` keeps."""
    return targets - np.rint(share * (targets - 1)).astype(np.int64)


def drop_positions(example: Example, share: float, key: int) -> Example:
    """Drop this share of the decoder positions, never the first. The others keep their position numbers."""
    count = len(example.tokens)
    kept = int(num_kept(np.array(count), share)) - 1
    places = np.sort(np.concatenate([[0], permutation(make_key("kept", key), count - 1)[:kept] + 1]))
    return Example(example.source, example.tokens[places], example.labels[places], places)
