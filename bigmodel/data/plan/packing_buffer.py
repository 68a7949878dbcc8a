"""Packing buffers: the packs of one lane, buffer after buffer.

In: a lane's shards of every mixed source. Out: per buffer its packs and the cursor of the next buffer.

    shards of a source --shuffle--> blocks --split--> chunks --mix--> packing buffers --pack--> packs

Example: `packing_buffer` = 2, `sequence_length` = 8, chunks of 5, 2, 8, 1, 6 and 3 positions in this order. The first
buffer takes 5, 2, 8 and 1, at least 16 positions, and gives two full packs: 8, and 5 + 2 + 1. The next begins at 6.

Guarantees: a pure function of a buffer's cursor; every chunk is in one pack or carried into the next buffer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from bigmodel.config.settings import DataSettings
from bigmodel.data.objectives.examples import Examples
from bigmodel.data.plan.classes import Cursor, Stream, resampled
from bigmodel.data.plan.mixing import mix, stages
from bigmodel.data.plan.packing import best_fit_decreasing, fullest, pack_two_sides
from bigmodel.data.plan.shuffle import Chunk, Lengths, Pack, Shard, SourceStream, chunk_table, sizes, starts_of
from bigmodel.data.plan.unread import ReadBefore
from bigmodel.data.randomness import make_key, permutation

NO_EPOCH = 2**62  # later than any epoch


@dataclass(frozen=True, slots=True)
class LaneCursor:
    """The start of a packing buffer: its number, the cursor of each mixed source, the chunks carried in.

    `stage`: the curriculum stage of the buffer before; `since`: the positions that each source had given when that
    stage began, empty for stage 0.
    """

    buffer: int
    sources: tuple[Cursor, ...]
    carried: np.ndarray  # table of chunks
    stage: int = 0
    since: tuple[int, ...] = ()


@dataclass(frozen=True)
class PackingBuffer:
    """A planned packing buffer: its P packs in training order, and the start of the next buffer."""

    table: np.ndarray  # the chunks of pack 0, then of pack 1, and so on
    starts: np.ndarray  # (P + 1,) int64: the row where each pack begins, and the end
    following: LaneCursor
    sources: list[int]  # the mixed ones, ascending

    @property
    def num_packs(self) -> int:
        return len(self.starts) - 1

    def tables(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Chunks of packs [first, end), and the number of chunks of each pack."""
        starts = self.starts[first : end + 1]
        return self.table[starts[0] : starts[-1]], np.diff(starts)

    @cached_property
    def packs(self) -> list[Pack]:
        chunks, starts = list(map(Chunk, *self.table.T.tolist())) if len(self.table) else [], self.starts.tolist()
        return [tuple(chunks[start:end]) for start, end in pairwise(starts)]

    @property
    def pending_positions(self) -> np.ndarray:
        """(P + 1, sources) int64: positions of the chunks not yet given after p packs, carried ones included."""
        return self._pending[0]

    @property
    def pending_epochs(self) -> np.ndarray:
        """(P + 1, sources) int64: the oldest epoch of these chunks; NO_EPOCH: none."""
        return self._pending[1]

    @cached_property
    def _pending(self) -> tuple[np.ndarray, np.ndarray]:
        sizes = np.diff(self.starts)
        table = np.concatenate([self.table, self.following.carried])
        turns = np.repeat(np.arange(len(sizes) + 1), [*sizes, len(self.following.carried)])  # carried ones: to the end
        columns = np.searchsorted(self.sources, table[:, 0])
        positions = np.zeros((len(sizes) + 1, len(self.sources)), dtype=np.int64)
        epochs = np.full_like(positions, NO_EPOCH)
        np.add.at(positions, (turns, columns), table[:, 4])
        np.minimum.at(epochs, (turns, columns), table[:, 5])
        return np.cumsum(positions[::-1], axis=0)[::-1], np.minimum.accumulate(epochs[::-1], axis=0)[::-1]


@dataclass(frozen=True, slots=True)
class LanePosition:
    """A lane's place in the plan: a packing buffer, and how many of its packs were given."""

    start: LaneCursor
    buffer: PackingBuffer
    packs_given: int = 0


class Lane:
    """An endless stream of packing buffers over the lane's shards of every mixed source."""

    def __init__(self, number: int, streams: Sequence[Stream], settings: DataSettings, seed: int) -> None:
        self.streams, self.wide = streams, streams[0].wide
        self._number, self._settings, self._seed = number, settings, seed
        self._stages = stages(settings, [stream.name for stream in streams], [s.positions for s in streams])

    def beginning(self) -> LaneCursor:
        return LaneCursor(0, tuple(stream.beginning() for stream in self.streams), chunk_table([], self.wide))

    def enter(self, start: LaneCursor) -> LanePosition:
        """Plan the packing buffer of this cursor; none of its packs is given."""
        return LanePosition(start, self.plan(start))

    def packs_left(self, at: LanePosition, at_most: int) -> int:
        """Packs from `at` to the lane's end, at most `at_most`. Plans them, one packing buffer at a time."""
        left = -at.packs_given
        while at.buffer.num_packs and left + at.buffer.num_packs < at_most:
            left += at.buffer.num_packs
            at = self.enter(at.buffer.following)
        return min(at_most, left + at.buffer.num_packs)

    def plan(self, start: LaneCursor) -> PackingBuffer:
        """Pack one buffer: about packing_buffer * sequence_length positions, chunks carried in included.

        Gives the fullest packs, as many as the chunks could fill at best, and every pack with a chunk that was carried
        in: no chunk is carried twice. The chunks of the other packs are carried over. Where the sources end, all packs
        are given. With two sides the buffer holds as many document positions as both sides of its packs; pairs count
        only positions of the source text, so their buffer holds more packs.
        """
        settings = self._settings
        stage, since = self._stage(start)
        num_carried, carried_positions = len(start.carried), int(start.carried[:, 4].sum())
        wanted = (
            settings.packing_buffer * (settings.sequence_length + settings.source_sequence_length) - carried_positions
        )
        fresh, cursors = mix(self.streams, self._stages[stage].shares, start.sources, wanted, since)
        table = np.concatenate([start.carried, fresh])
        lengths = sizes(table)[:, : 2 if settings.source_sequence_length else 1]
        if settings.source_sequence_length:
            budgets = settings.sequence_length, settings.source_sequence_length
            packing = pack_two_sides(lengths, budgets, settings.max_documents, num_first=num_carried)
        else:
            packing = best_fit_decreasing(
                lengths[:, 0], settings.sequence_length, settings.max_documents, num_first=num_carried
            )
        starts = starts_of(packing.num_documents)[:-1]
        given = np.full(len(starts), int(fresh[:, 4].sum()) < wanted)
        given[fullest(packing, lengths, settings)] = True
        if len(starts):
            given |= np.minimum.reduceat(packing.members, starts) < num_carried
        chosen = np.flatnonzero(given)
        chosen = chosen[permutation(make_key("packs", self._seed, self._number, start.buffer), len(chosen))]
        few = np.min_scalar_type(len(chosen))  # 16 bits are sorted by radix
        turns = np.full(len(starts), len(chosen), few)  # of each pack; one that is not given comes after all
        turns[chosen] = np.arange(len(chosen), dtype=few)
        turn_of_chunk = np.empty(len(table), few)
        turn_of_chunk[packing.members] = np.repeat(turns, packing.num_documents)
        in_turn = table[np.argsort(turn_of_chunk, kind="stable")]
        ends = starts_of(packing.num_documents[chosen])
        following = LaneCursor(start.buffer + 1, cursors, in_turn[ends[-1] :].copy(), stage, since)
        return PackingBuffer(in_turn[: ends[-1]], ends, following, [stream.source for stream in self.streams])

    def _stage(self, start: LaneCursor) -> tuple[int, tuple[int, ...]]:
        """The curriculum stage of a packing buffer, and the positions that each source had given when it began."""
        given = sum(cursor.positions for cursor in start.sources) - int(start.carried[:, 4].sum())
        stage = max(number for number, stage in enumerate(self._stages) if stage.from_positions <= given)
        if stage == start.stage:
            return stage, start.since
        return stage, tuple(cursor.positions for cursor in start.sources)


def make_lane(
    number: int,
    store: Lengths,
    dealt: Mapping[str, list[list[Shard]]],
    settings: DataSettings,
    seed: int,
    examples: Examples | None,
    read: ReadBefore | None = None,
) -> Lane:
    def make(name: str) -> Stream:
        held, key = dealt[name][number], make_key(seed, name, number)
        if settings.resamples_classes:
            return resampled(store, name, held, settings, key, examples)
        limit = settings.max_epochs.get(name, 0)
        return SourceStream(store, name, held, settings.max_document_length, key, limit, examples, read)

    return Lane(number, [make(name) for name in dealt], settings, seed)
