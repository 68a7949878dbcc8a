"""Evaluation: loss of the model on the validation split.

In: a forward function, the validation split. Out: a sum of nats and a number of labels.
Guarantees: every document is scored once. Packed sequences form the same groups at any world size; the losses of a
group are summed in fp64 and the groups are added in order, so sum and count are bitwise equal on 1, 2 or 64 ranks.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bigmodel.config.settings import DataSettings, UserError
from bigmodel.data.load.batch import IGNORED, Batch, exchange_sources, real_documents
from bigmodel.data.load.stream import validation_batches
from bigmodel.data.objectives.examples import nothing_asked, objectives_of
from bigmodel.data.store.shards import ShardStore
from bigmodel.distributed.world import World
from bigmodel.evaluation.text_bytes import bytes_by_token, count_bytes

Forward = Callable[[Batch, str], Tensor]
NOT_COUNTED = "bits per byte not counted: the tokens of this tokenizer do not tell the bytes of their text"


@dataclass(frozen=True)
class Evaluation:
    """`nats` summed over `num_labels` predicted tokens, which encode `text_bytes` bytes of text; None: unknown.
    `weight`: sum of the labels' weights; None: all are 1."""

    nats: float
    num_labels: int
    text_bytes: int | None
    seconds: float
    weight: float | None = None

    def __str__(self) -> str:
        bits = NOT_COUNTED if self.bits_per_byte is None else f"{self.bits_per_byte:.3f} bits per byte"
        return f"{self.nats_per_token:.3f} nats per token, {bits}"

    @property
    def nats_per_token(self) -> float:
        return self.nats / (self.weight or self.num_labels)

    @property
    def bits_per_byte(self) -> float | None:
        """nats / ln 2 / bytes; independent of the tokenizer. None where the bytes are not known.

        The nats are those of all labels, ends, sentinels and marks included; the bytes are of the predicted text alone.
        """
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else None


class Validation:
    """The validation split in canonical groups of packed sequences. `packs`: the most that are used; 0: all."""

    def __init__(self, data: DataSettings, packs_per_micro_batch: int) -> None:
        self._store = ShardStore.of_run(data, "validation")
        self._data = data
        self._packs_per_micro_batch = packs_per_micro_batch
        self._bytes_by_token: list[np.ndarray | None] = []  # filled by the first evaluation

    def run(self, forward: Forward, world: World, packs: int = 0) -> Evaluation:
        """Score the split; collective over all ranks. `forward(batch, "loss_per_position")` must not train.

        Raises `UserError` if the split has no labels.
        """
        found = self._score(forward, world, packs, lambda batch: batch)
        if not found.num_labels:
            raise UserError(nothing_asked("the validation split", self._data))
        return found

    def run_with_wrong_sources(self, forward: Forward, world: World) -> Evaluation | None:
        """Like `run`, with the sources exchanged between documents of a micro-batch (`exchange_sources`).

        A document alone in its micro-batch is left out. None: all documents are alone.
        """
        found = self._score(forward, world, 0, _exchanged)
        return found if found.num_labels else None

    def _score(self, forward: Forward, world: World, packs: int, change: Callable[[Batch], Batch]) -> Evaluation:
        started = time.perf_counter()
        mine: dict[int, tuple[float, int, int, float]] = {}
        table_V = self._table(world)
        groups = validation_batches(self._store, self._data, self._packs_per_micro_batch, packs)
        for first in range(0, len(groups), world.size):
            # A forward pass is collective under ZeRO-3: a rank without a group repeats the last one, uncounted.
            number = first + world.rank
            batch = change(groups[min(number, len(groups) - 1)])
            nats = float(forward(batch.to(world.device), "loss_per_position").double().sum())
            if number < len(groups):
                size = 0 if table_V is None else count_bytes(batch.labels.numpy(), table_V)
                weight = batch.num_labels if batch.weights is None else float(batch.weights.double().sum())
                mine[number] = (nats, batch.num_labels, size, weight)
        merged = {number: sums for part in world.gather_objects(mine) for number, sums in part.items()}
        sums = [merged[number] for number in range(len(groups))]
        nats, weight = (math.fsum(one[place] for one in sums) for place in (0, 3))
        num_labels = sum(count for _, count, _, _ in sums)
        text_bytes = sum(size for _, _, size, _ in sums) if table_V is not None else self._bytes_of_split(num_labels)
        if weight == num_labels:
            return Evaluation(nats, num_labels, text_bytes, time.perf_counter() - started)
        return Evaluation(nats, num_labels, None, time.perf_counter() - started, weight)

    def first_batch(self) -> Batch:
        """The first micro-batch, for examples."""
        return validation_batches(self._store, self._data, self._packs_per_micro_batch)[0]

    def _table(self, world: World) -> np.ndarray | None:
        """`bytes_by_token` of the split, read once, on rank 0. Collective."""
        if not self._bytes_by_token:
            self._bytes_by_token.append(world.on_rank_zero(lambda: bytes_by_token(self._store)))
        return self._bytes_by_token[0]

    def _bytes_of_split(self, num_labels: int) -> int | None:
        """Bytes of the split's text if `num_labels` labels are all of it, in causal order; else None."""
        plain = all(one.rule.is_plain(one.settings) for one in objectives_of(self._data))
        only_pairs = len(self._store.pair_sources) == len(self._store.sources)
        whole = num_labels == self._store.num_labels and (plain or only_pairs) and not self._store.supervised_sources
        return self._store.text_bytes if whole else None


def _exchanged(batch: Batch) -> Batch:
    if sum(real_documents(batch)) < 2:
        return replace(batch, labels=torch.full_like(batch.labels, IGNORED), num_labels=0)
    return exchange_sources(batch)
