"""Order check over the segments of a run: each token at most once in an epoch of its source, across all plans, and in
a complete epoch exactly once.

In: a run's newest checkpoint and its data. Out: a finding. Plans only, no tokens are read. Counting begins at the last
segment that could not follow the one before (`lost`, `forgotten`), as told when it began.
Costs about 2 microseconds a chunk. Memory: 16 bytes a chunk of at most MOST_CHUNKS; of a longer run, these are the
chunks of every 2nd, 4th, 8th ... document of each shard.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bigmodel.checks.audit import Finding
from bigmodel.config.settings import Settings
from bigmodel.data.plan.exclusion import Excluded
from bigmodel.data.plan.order import READ_BEFORE, Order
from bigmodel.data.plan.read_before import EarlierStore, Segment, keys_of, unpack_shards
from bigmodel.data.plan.segments import order_of_segment
from bigmodel.data.store.shards import ShardStore

MOST_CHUNKS = 20_000_000
PACKS = 50_000  # planned together


class Given:
    """Positions that plans gave, by source, shard and epoch."""

    def __init__(self) -> None:
        self.every = 1  # of a shard's rows each such one is counted
        self._numbers: dict[tuple[Any, ...], int] = {}  # (source, shard's key, epoch) -> number
        self._parts: list[np.ndarray] = []  # (n, 4) int32: number, row, first position, end

    @property
    def positions(self) -> int:
        return sum(int((part[:, 3] - part[:, 2]).sum(dtype=np.int64)) for part in self._parts)

    def add(self, chunks: np.ndarray, sources: Sequence[str], keys: Mapping[str, Sequence[Any]]) -> None:
        """Chunks of a plan whose shards have these keys: the same for the same shard in another plan."""
        chunks = chunks[(chunks[:, 2] + 1) % self.every == 0]
        places = chunks[:, 0] << 48 | chunks[:, 1] << 20 | chunks[:, 5]
        _, firsts, which = np.unique(places, return_index=True, return_inverse=True)
        named = [
            (sources[at], keys[sources[at]][shard], epoch) for at, shard, epoch in chunks[firsts][:, [0, 1, 5]].tolist()
        ]
        numbers = np.array([self._numbers.setdefault(place, len(self._numbers)) for place in named], dtype=np.int32)
        columns = numbers[which], chunks[:, 2], chunks[:, 3], chunks[:, 3] + chunks[:, 4]
        self._parts.append(np.column_stack(columns).astype(np.int32))
        while sum(map(len, self._parts)) > MOST_CHUNKS:
            self.every *= 2
            self._parts = [part[(part[:, 1] + 1) % self.every == 0] for part in self._parts]

    def repeated(self) -> int:
        """Positions given again."""
        table = np.concatenate(self._parts)
        number, row, first, end = table[np.lexsort(table.T[[2, 1, 0]])].T
        is_new = np.diff(number.astype(np.int64) << 32 | row, prepend=-1) != 0
        farthest = np.maximum.accumulate((np.cumsum(is_new) << 32) + end) & 0xFFFFFFFF  # the end so far in its document
        again = np.where(is_new[1:], 0, np.minimum(farthest[:-1], end[1:]) - first[1:])
        return int(np.maximum(again, 0).sum())

    def in_epoch(self, source: str, epoch: int) -> int:
        """Positions of an epoch of a source."""
        numbers = [number for place, number in self._numbers.items() if (place[0], place[2]) == (source, epoch)]
        mine = [part[np.isin(part[:, 0], numbers)] for part in self._parts]
        return sum(int((chunks[:, 3] - chunks[:, 2]).sum(dtype=np.int64)) for chunks in mine)


def check_segments(settings: Settings, store: ShardStore, state: Mapping[str, Any]) -> list[Finding]:
    """Of the plans of the segments up to the checkpoint. Nothing for a run of one segment.

    Raises `UserError` where shards of a segment are gone.
    """
    segments: Sequence[Segment] = state["segments"]
    first = max(number for number, one in enumerate(segments) if number == 0 or _begins_anew(one))
    if first == len(segments) - 1:
        return []
    given = Given()
    for number, end in _ends(segments, first, state["cursor"]["step"]):
        order = order_of_segment(EarlierStore(store, segments[number]), settings.data, segments, number)[1]
        keys = {name: keys_of(unpack_shards(text)[:, 3]) for name, text in segments[number]["shards"].items()}
        _walk(order, end, given, segments[number]["sources"], keys)
    whole, complete = _complete_epochs(order, segments, first, given, store)
    repeated, sample = given.repeated(), f"every {given.every}th document: " if given.every > 1 else ""
    return [
        Finding(
            f"over {len(segments) - first} segments each token is given at most once in an epoch of its source"
            + (f", and once in each of {complete} complete epochs" if complete else ""),
            not repeated and whole == complete,
            f"{sample}{given.positions:,} tokens, {repeated:,} of them again"
            + (f", {complete - whole} epochs not whole" if whole < complete else ""),
        )
    ]


def _begins_anew(segment: Segment) -> bool:
    return READ_BEFORE not in segment["identity"] or bool(segment.get("lost") or segment.get("forgotten"))


def _ends(segments: Sequence[Segment], first: int, reached: int) -> Iterator[tuple[int, int]]:
    """The numbers of the segments from `first` on, and the data step where each ends."""
    ends = [segment["first_step"] for segment in segments[1:]] + [reached]
    yield from list(enumerate(ends))[first:]


def _walk(order: Order, end: int, given: Given, sources: Sequence[str], keys: Mapping[str, Sequence[Any]]) -> None:
    while order.step < end:
        steps = min(end - order.step, max(1, PACKS // order.packs_at(order.step)))
        given.add(order.next_tables(steps).chunks, sources, keys)


def _complete_epochs(
    order: Order, segments: Sequence[Segment], first: int, given: Given, store: ShardStore
) -> tuple[int, int]:
    """How many of the complete epochs hold all positions of their source, and how many there are. Only sources whose
    shards and exclusions never changed, all of whose documents are counted."""
    if given.every > 1 or first or getattr(store, "passes", 0):
        return 0, 0
    excluded, found = [Excluded.unpack(segment.get("excluded", "")).rows for segment in segments], []
    for source, progress in order.progress().items():
        is_same = len({segment["shards"].get(source) for segment in segments} - {None}) == 1
        if is_same and all(rows.get(source) == excluded[0].get(source) for rows in excluded):
            wanted = order.plan.source_positions[source]
            found += [given.in_epoch(source, epoch) == wanted for epoch in range(progress.epochs_complete)]
    return sum(found), len(found)
