"""Packing buffers: the packs of one lane, buffer after buffer.

In: a lane's shards of every mixed source. Out: per buffer its packs and the cursor of the next buffer.

    shards of a source --shuffle--> blocks --split--> chunks --mix--> packing buffers --pack--> packs

Example: `packing_buffer` = 2, `sequence_length` = 8, chunks of 5, 2, 8, 1, 6 and 3 positions in this order. The first
buffer takes 5, 2, 8 and 1, at least 16 positions, and gives two full packs: 8, and 5 + 2 + 1. The next begins at 6.

Guarantees: a pure function of a buffer's cursor; every chunk is in one pack or carried into the next buffer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bigmodel.config.settings import DataSettings
from bigmodel.data.objectives.examples import Examples
from bigmodel.data.plan.classes import Cursor, Stream, resampled
from bigmodel.data.plan.mixing import mix, stages
from bigmodel.data.plan.packing import best_fit_decreasing, fullest, pack_two_sides
from bigmodel.data.plan.shuffle import Chunk, Lengths, Pack, Shard, SourceStream, chunk_table, sizes
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


@dataclass(frozen=True, slots=True)
class PackingBuffer:
    """A planned packing buffer: its P packs in training order, and the start of the next buffer.

    `pending_*[p]`: the chunks not yet given after p packs, per mixed source, carried ones included.
    """

    packs: list[Pack]
    following: LaneCursor
    pending_positions: np.ndarray  # (P + 1, sources) int64
    pending_epochs: np.ndarray  # (P + 1, sources) int64: the oldest epoch; NO_EPOCH: nothing pending


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
        while at.buffer.packs and left + len(at.buffer.packs) < at_most:
            left += len(at.buffer.packs)
            at = self.enter(at.buffer.following)
        return min(at_most, left + len(at.buffer.packs))

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
        given = np.full(len(packing.packs), int(fresh[:, 4].sum()) < wanted)
        given[fullest(packing, lengths, settings)] = True
        given |= np.fromiter(map(min, packing.packs), dtype=np.int64, count=len(given)) < num_carried
        chosen = np.flatnonzero(given)
        chosen = chosen[permutation(make_key("packs", self._seed, self._number, start.buffer), len(chosen))]
        members = [sorted(packing.packs[number]) for number in chosen.tolist()]
        left = sorted(index for number in np.flatnonzero(~given).tolist() for index in packing.packs[number])
        chunks = list(map(Chunk, *table.T.tolist())) if len(table) else []
        return PackingBuffer(
            [tuple([chunks[index] for index in pack]) for pack in members],
            LaneCursor(start.buffer + 1, cursors, table[left], stage, since),
            *self._pending(table, members),
        )

    def _stage(self, start: LaneCursor) -> tuple[int, tuple[int, ...]]:
        """The curriculum stage of a packing buffer, and the positions that each source had given when it began."""
        given = sum(cursor.positions for cursor in start.sources) - int(start.carried[:, 4].sum())
        stage = max(number for number, stage in enumerate(self._stages) if stage.from_positions <= given)
        if stage == start.stage:
            return stage, start.since
        return stage, tuple(cursor.positions for cursor in start.sources)

    def _pending(self, table: np.ndarray, members: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """`PackingBuffer.pending_*` of packs whose chunks are these rows of the table."""
        turns = np.full(len(table), len(members))  # a chunk in no pack stays pending after the last
        for turn, pack in enumerate(members):
            turns[pack] = turn
        columns = np.searchsorted([stream.source for stream in self.streams], table[:, 0])
        positions = np.zeros((len(members) + 1, len(self.streams)), dtype=np.int64)
        epochs = np.full_like(positions, NO_EPOCH)
        np.add.at(positions, (turns, columns), table[:, 4])
        np.minimum.at(epochs, (turns, columns), table[:, 5])
        return np.cumsum(positions[::-1], axis=0)[::-1], np.minimum.accumulate(epochs[::-1], axis=0)[::-1]


def make_lane(
    number: int,
    store: Lengths,
    dealt: Mapping[str, list[list[Shard]]],
    settings: DataSettings,
    seed: int,
    examples: Examples | None,
) -> Lane:
    make = resampled if settings.resamples_classes else _plain_stream
    streams: list[Stream] = [
        make(store, name, dealt[name][number], settings, make_key(seed, name, number), examples) for name in dealt
    ]
    return Lane(number, streams, settings, seed)


def _plain_stream(
    store: Lengths, name: str, shards: Sequence[Shard], settings: DataSettings, key: int, examples: Examples | None
) -> SourceStream:
    limit = settings.max_epochs.get(name, 0)
    return SourceStream(store, name, shards, settings.max_document_length, key, limit, examples)
