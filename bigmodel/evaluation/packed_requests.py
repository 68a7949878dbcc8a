"""Packed requests: log-likelihoods of continuations and greedy continuations, many requests in one packed micro-batch.

In: a forward function, requests (token ids). Out: for each request, in its place, the log-likelihood of its labels and
whether they are the model's greedy choice; or the ids it continues with. Guarantees: a request's result does not depend
on the others, because documents of a packed sequence do not influence one another. The micro-batches depend on the
requests' lengths only and are dealt to the ranks, so results are bitwise equal on 1, 2 or 64 ranks. Every micro-batch
has the same shape. Collective: every rank passes the same requests.

Costs: no padding but at the end of each packed sequence. `continue_greedily` runs whole forward passes, one a token:
it works under every ZeRO stage, where `bigmodel generate` has a key-value cache.

Example: two requests with inputs [1, 5, 6] and [1, 7], of which the last 2 and 1 positions are asked for:

    tokens 1 5 6 1 7 0 ...   labels -100 6 8 -100 9 -100 ...   cu_seqlens 0 3 5 T
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from bigmodel.config.settings import DataSettings
from bigmodel.data.load.batch import IGNORED, Batch, SourceSide
from bigmodel.data.plan.packing import best_fit_decreasing, pack_two_sides
from bigmodel.distributed.world import World

Forward = Callable[[Batch, str], Tensor]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Continuation:
    """Input ids of a document and the labels of its last positions; for an encoder-decoder also source ids."""

    inputs: list[int]
    labels: list[int]
    source: list[int] | None = None


@dataclass(frozen=True)
class TextRequest:
    """What a text continues (no labels), its most tokens, the texts that end it, sampling settings; none: greedy."""

    start: Continuation
    max_tokens: int
    stop: tuple[str, ...]
    sampling: dict[str, float]


class Score(NamedTuple):
    """The log-probability of a request's labels, summed, and whether each label is the likeliest token."""

    log_likelihood: float
    is_greedy: bool


def score(
    forward: Forward,
    world: World,
    requests: Sequence[Continuation],
    data: DataSettings,
    packs_per_micro_batch: int = 1,
    advance: Callable[[int], None] = lambda requests: None,
) -> list[Score]:
    """Scores of all requests, on every rank. `advance` is told how many more requests this rank has done.

    A request has 1 to data.max_document_length inputs, at least one label, and at most data.longest_source source ids.
    """

    def read(request: Continuation, found_3N: np.ndarray) -> Score:
        losses, _, likeliest = found_3N[:, -len(request.labels) :]
        return Score(-math.fsum(losses), likeliest.astype(np.int64).tolist() == request.labels)

    return _each(forward, world, requests, data, packs_per_micro_batch, read, advance)


def continue_greedily(
    forward: Forward,
    world: World,
    requests: Sequence[Continuation],
    data: DataSettings,
    is_done: Callable[[int, list[int]], bool],
    packs_per_micro_batch: int = 1,
) -> list[list[int]]:
    """The likeliest ids after each request's inputs, until `is_done(number of the request, its new ids)`, which is
    asked after every id. Requests have no labels."""
    found: list[list[int]] = [[] for _ in requests]
    open_ = list(range(len(requests)))
    while open_:
        grown = [replace(requests[number], inputs=requests[number].inputs + found[number]) for number in open_]
        following = _each(
            forward, world, grown, data, packs_per_micro_batch, lambda request, found_3N: int(found_3N[2][-1])
        )
        for number, token in zip(open_, following, strict=True):
            found[number].append(token)
        open_ = [number for number in open_ if not is_done(number, found[number])]
    return found


def _each(
    forward: Forward,
    world: World,
    requests: Sequence[Continuation],
    data: DataSettings,
    packs_per_micro_batch: int,
    read: Callable[[Continuation, np.ndarray], Value],
    advance: Callable[[int], None] = lambda requests: None,
) -> list[Value]:
    """`read(request, predictions of its positions)` of every request, in its place, on every rank."""
    packs = _pack(requests, data, packs_per_micro_batch)
    mine: dict[int, Value] = {}
    for first in range(0, len(packs), world.size):
        number = first + world.rank  # a rank without a pack repeats the last one: a forward pass is collective
        members = packs[min(number, len(packs) - 1)]
        batch = make_batch([requests[member] for member in members], data, packs_per_micro_batch)
        found_3T = forward(batch.to(world.device), "predictions").cpu().numpy()
        if number >= len(packs):
            continue
        ends = batch.cu_seqlens.tolist()
        for place, member in enumerate(members):
            mine[member] = read(requests[member], found_3T[:, ends[place] : ends[place + 1]])
        advance(len(members))
    merged = {number: value for part in world.gather_objects(mine) for number, value in part.items()}
    return [merged[number] for number in range(len(requests))]


def _pack(requests: Sequence[Continuation], data: DataSettings, packs_per_micro_batch: int) -> list[list[int]]:
    """The requests of each micro-batch."""
    room, most = data.sequence_length * packs_per_micro_batch, data.max_documents * packs_per_micro_batch
    lengths = np.array([len(request.inputs) for request in requests], np.int64)
    if not data.source_sequence_length:
        return best_fit_decreasing(lengths, room, most).packs
    sources = np.array([len(request.source or ()) for request in requests], np.int64)
    rooms = room, data.source_sequence_length * packs_per_micro_batch
    return pack_two_sides(np.stack([lengths, sources], 1), rooms, most).packs


def make_batch(requests: Sequence[Continuation], data: DataSettings, packs_per_micro_batch: int = 1) -> Batch:
    """Requests as the documents of one micro-batch of the run's shape."""
    size, most = data.sequence_length * packs_per_micro_batch, (data.max_documents + 1) * packs_per_micro_batch
    labels = np.full(size, IGNORED, np.int64)
    tokens, positions, cu_seqlens = _lay_out([request.inputs for request in requests], size, most)
    for end, request in zip(cu_seqlens[1:].tolist(), requests, strict=False):
        labels[end - len(request.labels) : end] = request.labels
    source = None
    if data.source_sequence_length:
        source_size = data.source_sequence_length * packs_per_micro_batch
        read, places, ends = _lay_out([request.source or [] for request in requests], source_size, most)
        source = SourceSide(
            tokens=torch.from_numpy(read),
            positions=torch.from_numpy(places),
            cu_seqlens=torch.from_numpy(ends),
            dropout_seeds=torch.zeros(source_size, dtype=torch.int64),
            num_tokens=sum(len(request.source or ()) for request in requests),
        )
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        dropout_seeds=torch.zeros(size, dtype=torch.int64),
        num_tokens=sum(len(request.inputs) for request in requests),
        num_labels=sum(len(request.labels) for request in requests),
        num_documents=len(requests),
        source=source,
    )


def _lay_out(rows: Sequence[list[int]], size: int, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens (size,), positions (size,) and cu_seqlens (most + 1,) of rows end to end; the rest is padding, a document
    of its own, and unused documents are empty."""
    tokens, positions = np.zeros((2, size), np.int64)
    cu_seqlens = np.full(most + 1, size, np.int32)
    cu_seqlens[0] = end = 0
    for number, row in enumerate(rows, 1):
        start, end = end, end + len(row)
        tokens[start:end], positions[start:end] = row, np.arange(len(row))
        cu_seqlens[number] = end
    return tokens, positions, cu_seqlens
