"""Class weights: the weight of each document's class in the loss (`classification.weights`).

In: a store, data settings with weights. Out: the weight of each class, and of a planned chunk in `UNITS`. A weight is
rounded to a whole number of units, so that a step's sum of weights, the divisor of its loss, is exact and equal on any
number of ranks. "balanced": documents / (classes * documents of the class), counted in the training split over all
sources, as scikit-learn's compute_class_weight. Example, 6 documents of a and 2 of b: 8 / (2 * 6) and 8 / (2 * 2).

Costs: the labels of the planned shards are read and kept (`ShardStore.labels`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bigmodel.config.settings import DataSettings, UserError
from bigmodel.data.objectives.supervised import UNITS
from bigmodel.data.plan.classes import ClassNumbering, counts_by_class
from bigmodel.data.plan.lanes import mixed_shards
from bigmodel.data.plan.shuffle import Chunk


class ClassWeights:
    def __init__(self, store: Any, data: DataSettings) -> None:
        """Raises `UserError` for balanced weights where a class has no training document."""
        self._store, self._numbering = store, ClassNumbering(store, data.classes)
        self._numbers: dict[tuple[int, int], np.ndarray] = {}
        if isinstance(data.class_weights, str):
            weights = balanced([_summed(store, data)[number] for number in range(len(data.classes))], data.classes)
        else:
            weights = [data.class_weights.get(name, 1.0) for name in data.classes]
        self._units = [max(1, round(weight * UNITS)) for weight in weights]
        self.values = np.array(self._units, np.float64).astype(np.float32) / np.float32(UNITS)

    def units_of(self, chunk: Chunk) -> int:
        """The weight of a document, in `UNITS`."""
        place = chunk.source, chunk.shard
        if place not in self._numbers:
            numbers = self._numbering.of_shard(self._store.sources[chunk.source], chunk.shard)
            self._numbers[place] = numbers.astype(np.uint16)
        return self._units[self._numbers[place][chunk.row]]


def balanced(counts: Sequence[int], classes: Sequence[str]) -> list[float]:
    """
    >>> balanced([6, 2], ["a", "b"])
    [0.6666666666666666, 2.0]
    """
    for name, count in zip(classes, counts, strict=True):
        if not count:
            raise UserError(
                f'classification.weights = "balanced": class {name!r} has no training document, so its weight is '
                "infinite; leave it out of classification.classes, add documents, or give the weights as a table"
            )
    return [sum(counts) / (len(counts) * count) for count in counts]


def _summed(store: Any, data: DataSettings) -> list[int]:
    """Documents of each class over the sources of the mix and the curriculum."""
    counts = [counts_by_class(store, name, data.classes) for name in mixed_shards(store, data)]
    return [sum(column) for column in zip(*counts, strict=True)]
