"""Pairs: a source text and its target, as they are stored."""

import numpy as np

from bigmodel.data.objectives.example import Example, teacher_forced


def pair_lengths(
    sources: np.ndarray, targets: np.ndarray, longest_source: int, longest_target: int
) -> tuple[np.ndarray, np.ndarray]:
    """Kept lengths (source, target) of pairs whose texts, with EOS, have `sources` and `targets` tokens.

    longest_source = 0: both share `longest_target` positions. The target gets half of them, or more if its source
    leaves more; the source gets the rest.
    """
    if longest_source:
        return np.minimum(sources, longest_source), np.minimum(targets, longest_target)
    kept = np.minimum(targets, np.maximum(longest_target // 2, longest_target - sources))
    return np.minimum(sources, longest_target - kept), kept


def pair(source: np.ndarray, target: np.ndarray, source_length: int, target_length: int, bos: int) -> Example:
    """A stored pair cut to these lengths: a source keeps its beginning and EOS, a target its beginning only.

    >>> pair(np.array([1, 11, 12, 13, 2]), np.array([1, 21, 22, 2]), 3, 2, bos=1)[:3]
    (array([11, 12,  2]), array([ 1, 21]), array([21, 22]))
    """
    read = np.concatenate([source[1:source_length], source[-1:]])
    return teacher_forced(read, bos, target[1 : target_length + 1])
