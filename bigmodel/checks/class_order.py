"""Order check of resampled classes: each document of a class once in a pass of its class, before any a second time.

In: the packed sequences of a plan from its beginning on, and the plan after them. Out: a finding. The classes are read
from the documents themselves, not from the plan's index of labels.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bigmodel.checks.audit import Finding
from bigmodel.config.settings import DataSettings
from bigmodel.data.objectives.example import num_tokens
from bigmodel.data.plan.lanes import deal, mixed_shards
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.shuffle import Chunk, Pack
from bigmodel.data.store.shards import ShardStore

SHOWN = 8


class ClassWalk:
    """Collects what a plan gives. Without resampling it does nothing."""

    def __init__(self, store: ShardStore, data: DataSettings) -> None:
        self._store, self._data, self._is_on = store, data, data.resamples_classes
        self._passes: dict[tuple[int, int, int, int], list[int]] = defaultdict(list)  # lane, source, shard, row

    @property
    def of_its_class(self) -> str:
        return " of its class" if self._is_on else ""

    def add(self, packs: Sequence[Pack]) -> None:
        """The packed sequences of the next step, in canonical order."""
        if self._is_on:
            for number, pack in enumerate(packs):
                self._add(number * self._data.lanes // len(packs), pack)

    def findings(self, order: Order) -> list[Finding]:
        """`order`: after the steps added. What it has planned and not yet given counts, too."""
        if not self._is_on:
            return []
        for lane, at in order.position().lanes.items():
            for pack in at.buffer.packs[at.packs_given :]:
                self._add(lane, pack)
            self._add(lane, [Chunk(*row) for row in at.buffer.following.carried.tolist()])
        by_class: dict[tuple[int, str, str], list[int]] = defaultdict(list)  # lane, source, class: times of documents
        holds = True
        for lane, source, shard, row in self._documents():
            passes = self._passes.get((lane, self._store.sources.index(source), shard, row), [])
            holds &= sorted(passes) == list(range(len(passes)))
            by_class[lane, source, self._class_of(source, shard, row)].append(len(passes))
        holds &= all(max(times) - min(times) <= 1 for times in by_class.values())
        claim = "each document of a class occurs once in every pass of its class, and not again before all of them have"
        return [Finding(claim, holds, _in_words(by_class))]

    def _documents(self) -> Iterator[tuple[int, str, int, int]]:
        """Lane, source, shard and row of every document that the plan has to give."""
        for source, lanes in deal(mixed_shards(self._store, self._data), self._data.lanes).items():
            for lane, shards in enumerate(lanes):
                for number in (shard.number for shard in shards):
                    for row in np.flatnonzero(num_tokens(self._store.lengths(source, number))).tolist():
                        yield lane, source, number, row

    def _add(self, lane: int, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            self._passes[lane, chunk.source, chunk.shard, chunk.row].append(chunk.epoch)

    def _class_of(self, source: str, shard: int, row: int) -> str:
        document: Any = self._store.document(source, shard, row)
        return self._store.decode(document.target)


def _in_words(by_class: Mapping[tuple[int, str, str], list[int]]) -> str:
    """The passes of the classes, the most first."""
    times: dict[tuple[str, str], list[int]] = defaultdict(list)
    for (_, source, name), of_lane in by_class.items():
        times[source, name] += of_lane
    passes = {key: sum(counts) / len(counts) for key, counts in times.items()}
    most = sorted(passes, key=lambda key: -passes[key])
    shown = [f"{json.dumps(name, ensure_ascii=False)} {passes[source, name]:.1f}" for source, name in most[:SHOWN]]
    return "passes: " + ", ".join(shown) + (", ..." if len(most) > SHOWN else "")
