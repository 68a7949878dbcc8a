"""Evaluation: loss, accuracy and calibration of the model on the validation split.

In: a forward function, the validation split. Out: sums over the labels, in all, by objective and source, and by
confidence. Guarantees: every document is scored once. Packed sequences form the same groups at any world size; a group
is summed in fp64 in the order of its positions and the groups are added in order, so all sums are bitwise equal on 1, 2
or 64 ranks. Costs: one forward pass; the logits of a chunk of positions, never all.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigmodel.config.settings import DataSettings, UserError
from bigmodel.data.load.batch import IGNORED, Batch, exchange_sources, real_documents
from bigmodel.data.load.stream import validation_batches
from bigmodel.data.objectives.examples import nothing_asked, objectives_of
from bigmodel.data.store.shards import ShardStore
from bigmodel.distributed.world import World
from bigmodel.evaluation.class_scores import ClassScores, in_words
from bigmodel.evaluation.tally import Bin, Part, Tally, add_up, calibration_error, tally
from bigmodel.evaluation.text_bytes import bytes_by_token

Forward = Callable[[Batch, str], Tensor]
MOST_UNKNOWN = 1e-3  # share of unknown tokens with which bits per byte are still counted
NOT_COUNTED = "bits per byte not counted: the tokens of this tokenizer do not tell the bytes of their text"


@dataclass(frozen=True)
class Evaluation:
    """`nats` summed over `num_labels` predicted tokens, which encode `text_bytes` bytes of text; None: unknown.
    `weight`: sum of the labels' weights; None: all are 1.

    parts: by objective and source, those with labels. bins: by the probability of the likeliest token. scores: of a
    classification, whose labels are documents; it has no parts and bins.
    """

    nats: float
    num_labels: int
    text_bytes: int | None
    seconds: float
    weight: float | None = None
    parts: tuple[Part, ...] = ()
    bins: tuple[Bin, ...] = ()
    scores: ClassScores | None = None

    def __str__(self) -> str:
        if self.scores:
            return f"{self.nats_per_token:.3f} nats per document, {in_words(self.scores)}"
        bits = NOT_COUNTED if self.bits_per_byte is None else f"{self.bits_per_byte:.3f} bits per byte"
        return f"{self.nats_per_token:.3f} nats per label, {bits}"

    @property
    def nats_per_token(self) -> float:
        return self.nats / (self.weight or self.num_labels)

    @property
    def bits_per_byte(self) -> float | None:
        """nats / ln 2 / bytes; independent of the tokenizer. None where the bytes are not known.

        The nats are those of all labels, ends, sentinels and marks included; the bytes are of the predicted text alone.
        """
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else None

    @property
    def accuracy(self) -> float:
        """Share of the labels that are the model's likeliest token, or class."""
        if self.scores:
            return self.scores.accuracy
        return sum(part.num_right for part in self.parts) / self.num_labels

    @property
    def macro_f1(self) -> float | None:
        """Of a classification."""
        return self.scores.macro_f1 if self.scores else None

    @property
    def calibration_error(self) -> float:
        return calibration_error(self.bins)

    def recorded(self) -> dict[str, Any]:
        """The arguments of `Metrics.record_evaluation`."""
        parts = [
            {"objective": one.objective, "source": one.source, "nats": one.nats, "targets": one.num_labels}
            | ({"weight": one.weight} if one.weight != one.num_labels else {})
            for one in self.parts
        ]
        more = {"calibration_error": self.calibration_error, "parts": parts} if self.bins else {}
        return {
            "nats_per_token": self.nats_per_token,
            "bits_per_byte": self.bits_per_byte,
            "seconds": self.seconds,
            "accuracy": self.accuracy,
            **more,
            **({"scores": self.scores.numbers()} if self.scores else {}),
        }


class Validation:
    """The validation split in canonical groups of packed sequences. `packs`: the most that are used; 0: all."""

    def __init__(self, data: DataSettings, packs_per_micro_batch: int) -> None:
        self._store = ShardStore.of_run(data, "validation")
        self._data = data
        self._packs_per_micro_batch = packs_per_micro_batch
        self._bytes_by_token: list[np.ndarray | None] = []  # filled by the first evaluation

    def run(self, forward: Forward, world: World, packs: int = 0) -> Evaluation:
        """Score the split; collective over all ranks. `forward(batch, "predictions")` must not train.

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
        mine: dict[int, Tally] = {}
        table_V = self._table(world)
        groups = validation_batches(self._store, self._data, self._packs_per_micro_batch, packs)
        for first in range(0, len(groups), world.size):
            # A forward pass is collective under ZeRO-3: a rank without a group repeats the last one, uncounted.
            number = first + world.rank
            batch = change(groups[min(number, len(groups) - 1)])
            predictions_3T = forward(batch.to(world.device), "predictions")
            if number < len(groups):
                mine[number] = tally(batch, predictions_3T, table_V)
        merged = {number: sums for part in world.gather_objects(mine) for number, sums in part.items()}
        nats, parts, bins = add_up([merged[number] for number in range(len(groups))], groups.loss_groups)
        num_labels = sum(part.num_labels for part in parts)
        weight = math.fsum(part.weight for part in parts)
        is_weighted = weight != num_labels
        if table_V is None or is_weighted:
            text_bytes = None if is_weighted else self._bytes_of_split(num_labels)
            parts = tuple(replace(part, text_bytes=text_bytes if len(parts) == 1 else None) for part in parts)
        else:
            text_bytes = sum(part.text_bytes or 0 for part in parts)
        seconds = time.perf_counter() - started
        return Evaluation(nats, num_labels, text_bytes, seconds, weight if is_weighted else None, parts, bins)

    def first_batch(self) -> Batch:
        """The first micro-batch, for examples."""
        return validation_batches(self._store, self._data, self._packs_per_micro_batch)[0]

    def _table(self, world: World) -> np.ndarray | None:
        """`bytes_by_token` of the split, read once, on rank 0. Collective."""
        if not self._bytes_by_token:
            self._bytes_by_token.append(world.on_rank_zero(lambda: bytes_by_token(self._store)))
        return self._bytes_by_token[0]

    def _bytes_of_split(self, num_labels: int) -> int | None:
        """Bytes of the split's text if `num_labels` labels are all of it, in causal order; else None. An unknown token
        is cheaper to predict than the word that it stands for."""
        plain = all(one.rule.is_plain(one.settings) for one in objectives_of(self._data))
        only_pairs = len(self._store.pair_sources) == len(self._store.sources)
        whole = num_labels == self._store.num_labels and (plain or only_pairs) and not self._store.supervised_sources
        known = self._store.manifest.unknown_share < MOST_UNKNOWN
        return self._store.text_bytes if whole and known else None


def _exchanged(batch: Batch) -> Batch:
    if sum(real_documents(batch)) < 2:
        return replace(batch, labels=torch.full_like(batch.labels, IGNORED), num_labels=0)
    return exchange_sources(batch)
