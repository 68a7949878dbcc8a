"""Planned steps as arrays: the chunks of many data steps together, without an object per chunk.

In: the next packs of each lane. Out: `PlannedSteps`, in canonical order. Example: 2 lanes, 2 packs a step, so one of
each lane; lane 0 gives packs a and c, lane 1 gives b and d: step 0 is a and b, step 1 is c and d.
Costs 0.1 microseconds a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bigmodel.data.plan.shuffle import PLAIN, WIDE, Pack


@dataclass(frozen=True, slots=True)
class PlannedSteps:
    """The chunks of consecutive data steps: n rows, by step, then pack, then place in the pack."""

    steps: np.ndarray  # (n,) int64: data step, from 0
    packs: np.ndarray  # (n,) int64: place of the pack in its step
    chunks: np.ndarray  # (n, 6) or (n, 10): `bigmodel.data.plan.shuffle`


@dataclass(frozen=True, eq=False, slots=True)
class PackTable:
    """The chunks of p packs as arrays: what is counted of a step costs some array operations, not a loop."""

    chunks: np.ndarray  # (n, 6) or (n, 10): `bigmodel.data.plan.shuffle`
    num_chunks: np.ndarray  # (p,) int64: of each pack, at least 1

    @classmethod
    def of_packs(cls, packs: Sequence[Pack]) -> "PackTable":
        chunks = np.array([chunk for pack in packs for chunk in pack], dtype=np.int64).reshape(-1, WIDE)
        num_chunks = np.array([len(pack) for pack in packs], dtype=np.int64)
        assert num_chunks.all(), "an empty pack has no row in a table"
        return cls(chunks, num_chunks)

    def part(self, first: int, end: int) -> "PackTable":
        """Packs [first, end)."""
        if (first, end) == (0, len(self.num_chunks)):
            return self
        start = int(self.num_chunks[:first].sum())
        mine = self.num_chunks[first:end]
        return PackTable(self.chunks[start : start + int(mine.sum())], mine)

    def num_tokens(self) -> np.ndarray:
        """(n,) of the decoder, of each chunk's example."""
        return self._planned(7)

    def num_labels(self) -> np.ndarray:
        """(n,)"""
        return self._planned(8)

    def source_positions(self) -> np.ndarray:
        """(n,) of the encoder."""
        return self.chunks[:, 9] if self.chunks.shape[1] == WIDE else np.zeros(len(self.chunks), dtype=np.int64)

    def objectives(self) -> np.ndarray:
        """(n,)"""
        return self.chunks[:, 6] if self.chunks.shape[1] == WIDE else np.full(len(self.chunks), PLAIN)

    def by_pack(self, values: np.ndarray) -> np.ndarray:
        """(p,) sums of (n,) values."""
        starts = np.cumsum(self.num_chunks) - self.num_chunks
        return np.add.reduceat(values, starts) if len(starts) else np.empty(0, dtype=np.int64)

    def _planned(self, column: int) -> np.ndarray:
        lengths = self.chunks[:, 4]
        if self.chunks.shape[1] < WIDE:
            return lengths
        return np.where(self.chunks[:, 6] == PLAIN, lengths, self.chunks[:, column])


def in_canonical_order(
    first_step: int, shares: Sequence[int], lanes: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]]
) -> PlannedSteps:
    """`shares`: packs of one lane in each step. `lanes`: of each, its packs of these steps: tables of chunks, with the
    number of chunks of each pack."""
    steps = np.repeat(np.arange(len(shares)), shares)
    places = np.concatenate([np.arange(share) for share in shares])
    in_step = np.array(shares)[steps]
    sizes = [np.concatenate([size for _, size in parts]) for parts in lanes]
    numbers = [number * in_step + places for number in range(len(lanes))]
    chunks = np.concatenate([table for parts in lanes for table, _ in parts])
    step_of_chunk = np.concatenate([np.repeat(steps, size) for size in sizes])
    pack_of_chunk = np.concatenate([np.repeat(number, size) for number, size in zip(numbers, sizes, strict=True)])
    if len(lanes) > 1:
        most = max(shares) * len(lanes)
        order = np.argsort(step_of_chunk * most + pack_of_chunk, kind="stable")
        chunks, step_of_chunk, pack_of_chunk = chunks[order], step_of_chunk[order], pack_of_chunk[order]
    return PlannedSteps(first_step + step_of_chunk, pack_of_chunk, chunks)
