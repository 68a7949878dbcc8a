"""Sums of an evaluation over the labels of a batch: loss, right predictions, bytes, calibration.

In: a batch on the CPU and the model's predictions for it (`linear_predictions`). Out: a `Tally`, which is small and can
be sent to other ranks; `add_up` adds tallies in the order given. Example: two labels, predicted with probabilities 0.9
(right) and 0.3 (wrong): accuracy 0.5; one label in the bin from 0.87 to 0.93, one in that from 0.27 to 0.33;
calibration error (0.1 + 0.3) / 2 = 0.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bigmodel.data.load.batch import IGNORED, Batch
from bigmodel.evaluation.text_bytes import count_bytes

NUM_BINS = 15  # of Guo et al. 2017, "On Calibration of Modern Neural Networks"


@dataclass(frozen=True)
class Part:
    """The labels of one objective on one source. nats: each with its weight; weight: the sum of these. text_bytes None:
    the tokens do not tell them."""

    objective: str
    source: str
    nats: float
    num_labels: int
    num_right: int
    text_bytes: int | None
    weight: float

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.weight

    @property
    def bits_per_byte(self) -> float | None:
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else None

    @property
    def accuracy(self) -> float:
        return self.num_right / self.num_labels


@dataclass(frozen=True)
class Bin:
    """The labels at positions whose likeliest token has a probability above `low`, up to `high`."""

    low: float
    high: float
    num_labels: int
    num_right: int  # how often that token was the label
    confidence_sum: float  # of these probabilities


@dataclass(frozen=True, eq=False)
class Tally:
    """Sums of a micro-batch in fp64: nats of all labels; (groups, 5) nats, labels, right ones, bytes and weight;
    (bins, 3) labels, right ones and confidence."""

    nats: float
    by_group: np.ndarray
    by_bin: np.ndarray


def tally(batch: Batch, predictions_3T: Tensor, table_V: np.ndarray | None) -> Tally:
    """`table_V`: bytes by token (`bytes_by_token`), or None."""
    labels_T = batch.labels.numpy()
    asked = np.flatnonzero(labels_T != IGNORED)
    losses_T, surprise_T, likeliest_T = predictions_3T.cpu().numpy()
    groups = np.zeros(len(asked), np.int64) if batch.loss_groups is None else batch.loss_groups.numpy()[asked]
    weights_T = np.ones(len(labels_T)) if batch.weights is None else batch.weights.double().numpy()
    right = likeliest_T[asked] == labels_T[asked]
    confidence = np.nan_to_num(np.exp(-surprise_T[asked]))  # nan: of a model that diverged
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)

    def by(places: np.ndarray, number: int, values: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(places, values, number).astype(np.float64)

    number = batch.num_loss_groups
    sizes = [0 if table_V is None else count_bytes(labels_T[asked[groups == one]], table_V) for one in range(number)]
    by_group = [by(groups, number, (losses_T * weights_T)[asked]), by(groups, number), by(groups, number, right)]
    by_group += [np.array(sizes), by(groups, number, weights_T[asked])]
    by_bin = [by(bins, NUM_BINS), by(bins, NUM_BINS, right), by(bins, NUM_BINS, confidence)]
    nats = predictions_3T[0] if batch.weights is None else predictions_3T[0].cpu() * batch.weights
    return Tally(float(nats.sum()), np.stack(by_group, 1), np.stack(by_bin, 1))


def add_up(
    tallies: Sequence[Tally], loss_groups: Sequence[tuple[str, str]]
) -> tuple[float, tuple[Part, ...], tuple[Bin, ...]]:
    """Nats of all labels, the parts with labels, all bins; each sum is rounded once."""
    nats = math.fsum(one.nats for one in tallies)
    parts = []
    for number, (objective, source) in enumerate(loss_groups):
        rows = [one.by_group[number] for one in tallies]
        labels, right, text_bytes = (int(sum(row[place] for row in rows)) for place in (1, 2, 3))
        if labels:
            nats_of_part, weight = (math.fsum(row[place] for row in rows) for place in (0, 4))
            parts.append(Part(objective, source, nats_of_part, labels, right, text_bytes, weight))
    bins = []
    for number in range(NUM_BINS):
        rows = [one.by_bin[number] for one in tallies]
        labels, right = (int(sum(row[place] for row in rows)) for place in (0, 1))
        confidence = math.fsum(row[2] for row in rows)
        bins.append(Bin(number / NUM_BINS, (number + 1) / NUM_BINS, labels, right, confidence))
    return nats, tuple(parts), tuple(bins)


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: the mean over labels of |accuracy - confidence| of their bin."""
    return sum(abs(one.num_right - one.confidence_sum) for one in bins) / sum(one.num_labels for one in bins)
