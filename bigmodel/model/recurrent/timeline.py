"""The order in which recurrent layers compute packed documents: all first tokens, then all second ones, and so on.

In: `cu_seqlens` of a batch. Out: a `Timeline`, the layout of torch's `PackedSequence`: the documents of a pack are the
batch dimension, the longest first, so that those with a token left are always the first ones. The order depends on
lengths only: other tokens in a document change no computation of another one. Costs one copy of cu_seqlens to the CPU.

Letters in tensor names: T rows, N documents that are not empty.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Timeline:
    """Documents of 2, 4 and 1 tokens, and an empty one:

    >>> line = timeline(torch.tensor([0, 2, 6, 6, 7]), 7)
    >>> line.sizes, line.starts  # documents with a token number 0, 1, 2, 3, and where these begin
    ([3, 2, 1, 1], [0, 3, 5, 6])
    >>> line.order_T.tolist()  # the row that is computed first, second ...
    [2, 0, 6, 3, 1, 4, 5]
    >>> line.place_T.tolist()  # the reverse: when each row is computed
    [1, 4, 0, 3, 5, 6, 2]
    >>> line.documents_N.tolist(), line.last_N.tolist()  # the longest first, and when their last rows are computed
    ([1, 0, 3], [6, 4, 2])
    """

    sizes: list[int]
    starts: list[int]
    order_T: Tensor
    place_T: Tensor
    documents_N: Tensor
    last_N: Tensor


def timeline(cu_seqlens: Tensor, rows: int) -> Timeline:
    """Of packed documents. Without values (torch's meta device) the rows are shared out evenly: memory depends on their
    number alone."""
    if cu_seqlens.is_meta:
        number = min(rows, len(cu_seqlens) - 1)
        lengths: np.ndarray = np.full(number, rows // number) + (np.arange(number) < rows % number)
    else:
        lengths = cu_seqlens.diff().cpu().numpy().astype(np.int64)
    documents = np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)]
    first: np.ndarray = (np.cumsum(lengths) - lengths)[documents]
    lengths = lengths[documents]
    sizes = np.searchsorted(-lengths, -np.arange(1, lengths[0] + 1), side="right")
    starts, step = np.cumsum(sizes) - sizes, np.repeat(np.arange(len(sizes)), sizes)
    rank = np.arange(len(step)) - starts[step]
    order = first[rank] + step
    tensors = (order, np.argsort(order), documents, starts[lengths - 1] + np.arange(len(lengths)))
    return Timeline(sizes.tolist(), starts.tolist(), *(torch.from_numpy(one).to(cu_seqlens.device) for one in tensors))


def one_step(count: int, device: torch.device) -> Timeline:
    """Of one token of each of `count` sequences."""
    numbers_N = torch.arange(count, device=device)
    return Timeline([count], [0], numbers_N, numbers_N, numbers_N, numbers_N)


def rows_before(sizes: Sequence[int]) -> Tensor:
    """For each row in the order of computation the one before it in its document, among (N first states, T rows).

    >>> rows_before([3, 2, 1, 1]).tolist()
    [0, 1, 2, 3, 4, 6, 8]
    """
    earlier = torch.tensor([sizes[0], *sizes[:-1]])
    return torch.arange(sum(sizes)) + sizes[0] - earlier.repeat_interleave(torch.tensor(sizes))
