"""Unread: what of a shard a new plan still has to give, epoch by epoch.

In: what the plans before have read. Out: pieces of documents. A piece is a run of positions of one document: all of it,
or what is left of a long one whose other chunks were read. Example: a document of 30 positions in chunks of 13, of
which the second was read, leaves the pieces [0, 13) and [26, 30).

The rows of a block of the old plan's current epoch are listed; all other rows are ranges.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

Ranges = Sequence[tuple[int, int]]  # rows [first, end)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Unread positions of a shard in one epoch: whole rows, and parts of others."""

    rows: Ranges
    parts: np.ndarray  # (n, 3) int32: row, first position, end; sorted, none overlaps another or lies in `rows`

    @classmethod
    def of(cls, rows: Ranges, parts: Sequence[np.ndarray]) -> "Pieces":
        """`parts`: (n, 3) each, in any order; what overlaps or touches is joined."""
        rows = [(first, end) for first, end in rows if first < end]
        table = np.concatenate([np.empty((0, 3), np.int64), *parts])
        for first, end in rows:
            table = table[(table[:, 0] < first) | (table[:, 0] >= end)]
        return cls(rows, _joined(table).astype(np.int32))

    def within(self, first: int, end: int) -> "Pieces":
        """The rows [first, end) alone."""
        low, high = np.searchsorted(self.parts[:, 0], [first, max(first, end)])
        rows = [(max(first, start), min(end, stop)) for start, stop in self.rows]
        return Pieces([(start, stop) for start, stop in rows if start < stop], self.parts[low:high])


@dataclass(frozen=True, slots=True)
class ShardUnread:
    """`left`: by epoch before `whole_from`, where anything is left; every epoch from `whole_from` on is unread."""

    whole_from: int = 0
    left: Mapping[int, Pieces] = field(default_factory=dict)

    @property
    def first_epoch(self) -> int:
        return min([*self.left, self.whole_from])

    def in_epoch(self, epoch: int, documents: int) -> Pieces:
        """`documents`: of the shard."""
        if epoch >= self.whole_from:
            return Pieces([(0, documents)], np.empty((0, 3), np.int32))
        return self.left.get(epoch) or Pieces([], np.empty((0, 3), np.int32))

    def places(self, epoch: int, first: int, positions: np.ndarray) -> "Places":
        """Pieces of the rows from `first` on, which have these positions in the epoch."""
        if epoch >= self.whole_from:
            return Places.whole(np.arange(first, first + len(positions)), positions)
        pieces = self.in_epoch(epoch, 0).within(first, first + len(positions))
        rows = np.concatenate([np.arange(start, end) for start, end in pieces.rows] + [pieces.parts[:, 0]])
        rows = rows.astype(np.int64)
        of_rows = positions[rows - first]
        starts, ends = np.zeros_like(rows), of_rows.astype(np.int64)
        if len(pieces.parts):
            starts[-len(pieces.parts) :] = pieces.parts[:, 1]
            ends[-len(pieces.parts) :] = np.minimum(pieces.parts[:, 2], ends[-len(pieces.parts) :])
        return Places(rows, starts, np.maximum(ends - starts, 0), np.maximum(of_rows - ends, 0))


@dataclass(frozen=True, slots=True)
class Places:
    """Pieces of documents of a shard, (n,) each: row, first position, positions, positions after it."""

    rows: np.ndarray
    starts: np.ndarray
    positions: np.ndarray
    after: np.ndarray

    @classmethod
    def whole(cls, rows: np.ndarray, positions: np.ndarray) -> "Places":
        return cls(rows, np.zeros_like(rows), positions, np.zeros_like(rows))

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.rows, self.starts, self.positions, self.after


class ReadBefore(Protocol):
    """What earlier segments read."""

    digest: str  # equal for equal histories

    def unread(self, source: str, shard: int) -> ShardUnread: ...


def _joined(table: np.ndarray) -> np.ndarray:
    """Sorted (row, first, end), with what touches or overlaps in a row as one."""
    if not len(table):
        return table
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    farthest = np.maximum.accumulate(table[:, 0] * (1 << 32) + table[:, 2])  # the end of all before, of the same row
    is_new = np.ones(len(table), dtype=bool)
    is_new[1:] = table[1:, 0] * (1 << 32) + table[1:, 1] > farthest[:-1]
    firsts = np.flatnonzero(is_new)
    lasts = np.append(firsts[1:], len(table)) - 1
    return np.stack([table[firsts, 0], table[firsts, 1], farthest[lasts] & ((1 << 32) - 1)], axis=1)
