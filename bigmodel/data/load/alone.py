"""One document of a batch as a batch of its own: the same tokens, labels and dropout, no padding.

Example: of cu_seqlens [0, 5, 7, 8], document 1 has two tokens and cu_seqlens [0, 2]. In float64 its loss and gradient
are those in the batch: `bigmodel.checks.leak` holds this on a user's settings.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bigmodel.data.load.batch import Batch, tensors_of
from bigmodel.data.objectives.example import IGNORED

REPLACED = ("replaced", "predicted_at", "choice_seeds")  # of scheduled sampling: row numbers and their seeds
BY_DOCUMENT = ("cu_seqlens", "prefixes", "loss_groups", *REPLACED)


class Place(NamedTuple):
    """A document's number in the batch and its slices on both sides."""

    number: int
    targets: slice
    source: slice


def alone(batch: Batch, place: Place) -> Batch:
    """The document at `place`, without loss groups."""
    number, targets, source = place
    own = {name: tensor[targets] for name, tensor in tensors_of(batch).items() if name not in BY_DOCUMENT}
    if batch.prefixes is not None:
        own["prefixes"] = batch.prefixes[number : number + 1]
    if batch.replaced is not None and batch.predicted_at is not None:
        mine = (batch.replaced >= targets.start) & (batch.replaced < targets.stop)
        own |= {name: getattr(batch, name)[mine] - targets.start for name in REPLACED[:2]}
        own |= {} if batch.choice_seeds is None else {"choice_seeds": batch.choice_seeds[mine]}
    side = batch.source
    if side:
        rows = {name: tensor[source] for name, tensor in tensors_of(side).items() if name != "cu_seqlens"}
        edges = _edges(source, side.cu_seqlens)
        side = replace(side, **rows, cu_seqlens=edges, num_tokens=source.stop - source.start)
    return replace(
        batch,
        **own,
        cu_seqlens=_edges(targets, batch.cu_seqlens),
        num_tokens=targets.stop - targets.start,
        num_labels=int((own["labels"] != IGNORED).sum()),
        num_documents=1,
        source=side,
        loss_groups=None,
        num_loss_groups=1,
    )


def _edges(taken: slice, like: Tensor) -> Tensor:
    return torch.tensor([0, taken.stop - taken.start], dtype=like.dtype, device=like.device)
