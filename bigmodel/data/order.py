"""Order: which documents are trained on, in which pack of which step.

Takes the lengths of all documents, the settings and a seed; gives packs, step by step, without end. Shards are
dealt to lanes; each lane is an endless stream in which documents are shuffled in blocks, sources are mixed by
tokens, long documents are split, and windows of the stream are packed:

    shards of a source --deal--> lanes --shuffle--> blocks --split--> fragments --mix--> windows --pack--> packs

Guarantees: a pure function of (seed, lengths, settings): neither world size, rank nor process occurs in it.
In an epoch of a source every position of every document of at least 2 stored tokens is in exactly one pack. The
cursor is small plain JSON, and restoring it plans one window per lane again, whatever the step.
Costs about 2 microseconds a document; memory: one window and at most two blocks per lane and source.

A table of fragments is an int64 array of shape (n, 6) whose columns are the fields of `Fragment`.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from bigmodel.config import DataSettings, UserError
from bigmodel.data.objectives import num_positions
from bigmodel.data.packing import best_fit_decreasing
from bigmodel.data.randomness import make_key, permutation

ORDER_VERSION = 1  # raised by every change that gives another order from the same input
BLOCK_DOCUMENTS = 65_536  # documents shuffled together: about one or two shards, so that reading stays local
NO_EPOCH = 2**62  # later than any


class Fragment(NamedTuple):
    """Consecutive positions of one document: [start, start + length) of its positions.

    `source` counts in `store.sources`, `shard` in the source, `row` in the shard; `epoch` is the source's.
    """

    source: int
    shard: int
    row: int
    start: int
    length: int
    epoch: int


Pack = tuple[Fragment, ...]


class Lengths(Protocol):
    """What the plan needs of a store: see `ShardStore`."""

    @property
    def sources(self) -> list[str]: ...

    @property
    def fingerprint(self) -> str: ...

    def num_shards(self, source: str) -> int: ...

    def lengths(self, source: str, shard: int) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class Shard:
    number: int  # in its source
    documents: int
    skipped: int  # documents of 0 or 1 stored tokens
    positions: int


@dataclass(frozen=True, slots=True)
class SourceCursor:
    """The next fragment of one source in one lane, and the positions taken so far."""

    epoch: int = 0
    block: int = 0
    fragment: int = 0
    positions: int = 0


@dataclass(frozen=True, slots=True)
class LaneCursor:
    """Where a window starts: its number, each mixed source's cursor, the fragments carried in."""

    window: int
    sources: tuple[SourceCursor, ...]
    carried: np.ndarray  # table of fragments


@dataclass(frozen=True, slots=True)
class Window:
    """One planned window of a lane: its P packs in training order, and where the next window starts.

    What is pending once p packs are given, per mixed source, fragments carried on included:
    """

    packs: list[Pack]
    following: LaneCursor
    pending_positions: np.ndarray  # (P + 1, sources) int64
    pending_epochs: np.ndarray  # (P + 1, sources) int64: the oldest epoch, NO_EPOCH where nothing is pending


@dataclass(frozen=True, slots=True)
class SourceProgress:
    """How far the packs given so far are through a source."""

    epochs_complete: int  # epochs of which every lane has given every position
    positions: int  # given so far, all epochs
    passes: float  # positions given / positions in one epoch


class Order:
    """The endless sequence of steps. `next_step` gives the packs of a step, `state` the cursor after it."""

    def __init__(self, store: Lengths, settings: DataSettings, packs_per_step: int, seed: int) -> None:
        """Reads the lengths of every shard once. Raises `UserError` where mix, sources or lanes do not fit."""
        assert packs_per_step % settings.lanes == 0, (
            f"packs_per_step = {packs_per_step} is not a multiple of lanes = {settings.lanes}"
        )
        names = _mixed_sources(store.sources, settings.mix)
        shards = {name: measure_shards(store, name) for name in names}
        names = [name for name in names if _has_positions(name, shards[name], settings.mix)]
        if not names:
            raise UserError(
                f"{settings.directory}: no source holds a document of at least 2 tokens; prepare data with text in it"
            )
        self._settings, self._packs_per_step = settings, packs_per_step
        self._positions = {name: sum(shard.positions for shard in shards[name]) for name in names}
        self._lanes = _make_lanes(store, settings, seed, {name: shards[name] for name in names})
        self._starts = [lane.beginning() for lane in self._lanes]
        self._windows = [lane.plan(start) for lane, start in zip(self._lanes, self._starts, strict=True)]
        self._packs_given = [0] * settings.lanes  # of each lane's window
        self._identity = _identity(store, settings, packs_per_step, seed)
        self.fingerprint = hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()
        self.step = 0  # data steps given
        self.num_skipped_documents = sum(shard.skipped for name in names for shard in shards[name])  # 0 or 1 tokens

    def next_step(self) -> list[Pack]:
        """The packs of the next data step in canonical order: lane 0's share, lane 1's share, and so on."""
        share = self._packs_per_step // len(self._lanes)
        packs = [self._next_pack(lane) for lane in range(len(self._lanes)) for _ in range(share)]
        self.step += 1
        return packs

    def state(self) -> dict[str, Any]:
        """The cursor after the last step given: plain JSON, a few hundred bytes a lane plus its carried fragments."""
        lanes = [
            {
                "window": start.window,
                "packs_given": given,
                "sources": {name: asdict(cursor) for name, cursor in zip(self._positions, start.sources, strict=True)},
                "carried": start.carried.tolist(),
            }
            for start, given in zip(self._starts, self._packs_given, strict=True)
        ]
        return {"fingerprint": self.fingerprint, "identity": self._identity, "step": self.step, "lanes": lanes}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue after the step whose `state` this is. Plans one window per lane.

        Raises `UserError` naming what differs, if the state was made from other data or settings.
        """
        if state["fingerprint"] != self.fingerprint:
            raise UserError(_describe_difference(state["identity"], self._identity))
        for number, lane in enumerate(state["lanes"]):
            cursors = tuple(SourceCursor(**lane["sources"][name]) for name in self._positions)
            start = LaneCursor(lane["window"], cursors, _table(lane["carried"]))
            self._starts[number], self._windows[number] = start, self._lanes[number].plan(start)
            self._packs_given[number] = lane["packs_given"]
        self.step = state["step"]

    def progress(self) -> dict[str, SourceProgress]:
        """Per mixed source: epochs complete over all lanes, positions given, passes over the source."""
        given, complete = dict.fromkeys(self._positions, 0), dict.fromkeys(self._positions, NO_EPOCH)
        for window, num_given in zip(self._windows, self._packs_given, strict=True):
            for column, name in enumerate(self._positions):
                cursor = window.following.sources[column]
                given[name] += cursor.positions - int(window.pending_positions[num_given, column])
                complete[name] = min(complete[name], cursor.epoch, int(window.pending_epochs[num_given, column]))
        return {
            name: SourceProgress(complete[name], given[name], given[name] / positions)
            for name, positions in self._positions.items()
        }

    def _next_pack(self, lane: int) -> Pack:
        if self._packs_given[lane] == len(self._windows[lane].packs):
            self._starts[lane] = self._windows[lane].following
            self._windows[lane] = self._lanes[lane].plan(self._starts[lane])
            self._packs_given[lane] = 0
        pack = self._windows[lane].packs[self._packs_given[lane]]
        self._packs_given[lane] += 1
        return pack


class Block:
    """Documents of one source that are shuffled together, in shuffled order; split into fragments on demand."""

    def __init__(self, shards: np.ndarray, rows: np.ndarray, positions: np.ndarray, context_tokens: int) -> None:
        """Arrays of shape (documents,): where each document is, and its positions (at least 1)."""
        self._shards, self._rows, self._positions = shards, rows, positions
        self._context_tokens = context_tokens
        self._first_fragments = _starts_of(-(-positions // context_tokens))
        self._first_positions = _starts_of(positions)
        self.num_fragments = int(self._first_fragments[-1])

    def fragments_covering(self, first: int, positions: int) -> int:
        """The end of a range of fragments from `first` on that holds `positions` positions, or the block's end."""
        document = np.searchsorted(self._first_fragments, first, side="right") - 1
        offset = (first - self._first_fragments[document]) * self._context_tokens
        target = self._first_positions[document] + offset + positions
        end = min(int(np.searchsorted(self._first_positions, target)), len(self._positions))
        return int(self._first_fragments[end])

    def table(self, first: int, end: int, source: int, epoch: int) -> np.ndarray:
        """Fragments [first, end) as a table."""
        fragments = np.arange(first, end)
        documents = np.searchsorted(self._first_fragments, fragments, side="right") - 1
        starts = (fragments - self._first_fragments[documents]) * self._context_tokens
        lengths = np.minimum(self._positions[documents] - starts, self._context_tokens)
        table = np.empty((end - first, len(Fragment._fields)), dtype=np.int64)
        for column, values in enumerate(
            (source, self._shards[documents], self._rows[documents], starts, lengths, epoch)
        ):
            table[:, column] = values
        return table


class SourceStream:
    """One source in one lane: epoch after epoch of its shards, blocks of documents shuffled anew in each."""

    def __init__(self, store: Lengths, name: str, shards: Sequence[Shard], context_tokens: int, key: int) -> None:
        self.name, self.source = name, store.sources.index(name)
        self.positions = sum(shard.positions for shard in shards)
        self._store, self._shards, self._context_tokens, self._key = store, shards, context_tokens, key
        self._num_blocks = -(-sum(shard.documents for shard in shards) // BLOCK_DOCUMENTS)
        self._block = lru_cache(maxsize=2)(self._read_block)  # a window may end before the block that it looked into

    def ahead(self, cursor: SourceCursor, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """At least `positions` positions from the cursor on: a table, and the (epoch, block, fragment) of each row."""
        tables, places = [], []
        epoch, number, first = cursor.epoch, cursor.block, cursor.fragment
        while positions > 0:
            block = self._block(epoch, number)
            end = block.fragments_covering(first, positions)
            if end > first:
                tables.append(block.table(first, end, self.source, epoch))
                places.append(np.stack(np.broadcast_arrays(epoch, number, np.arange(first, end)), axis=1))
                positions -= int(tables[-1][:, 4].sum())
            first = end
            if first == block.num_fragments:
                epoch, number, first = self._after(epoch, number)
        return np.concatenate(tables or [_table([])]), np.concatenate(places or [np.empty((0, 3), np.int64)])

    def advance(self, cursor: SourceCursor, taken: np.ndarray, places: np.ndarray) -> SourceCursor:
        """The cursor after the fragments `taken`, a table whose rows stand at `places`."""
        if not len(taken):
            return cursor
        epoch, number, fragment = (int(value) for value in places[len(taken) - 1])
        fragment += 1
        while fragment == self._block(epoch, number).num_fragments:
            epoch, number, fragment = self._after(epoch, number)
        return SourceCursor(epoch, number, fragment, cursor.positions + int(taken[:, 4].sum()))

    def _after(self, epoch: int, number: int) -> tuple[int, int, int]:
        return (epoch, number + 1, 0) if number + 1 < self._num_blocks else (epoch + 1, 0, 0)

    def _read_block(self, epoch: int, number: int) -> Block:
        """The documents [number, number + 1) * BLOCK_DOCUMENTS of the epoch's shards laid end to end, shuffled."""
        first, end = number * BLOCK_DOCUMENTS, (number + 1) * BLOCK_DOCUMENTS
        shards, rows, positions = [], [], []
        for index in permutation(make_key("shards", self._key, epoch), len(self._shards)).tolist():
            shard = self._shards[index]
            low, high = max(first, 0), min(end, shard.documents)
            if low < high:
                positions.append(num_positions(self._store.lengths(self.name, shard.number)[low:high]))
                rows.append(np.arange(low, high))
                shards.append(np.full(high - low, shard.number))
            first, end = first - shard.documents, end - shard.documents
            if end <= 0:
                break
        shard_D, row_D, position_D = np.concatenate(shards), np.concatenate(rows), np.concatenate(positions)
        shuffled = permutation(make_key("documents", self._key, epoch, number), len(row_D))
        shuffled = shuffled[position_D[shuffled] > 0]
        return Block(shard_D[shuffled], row_D[shuffled], position_D[shuffled], self._context_tokens)


class Lane:
    """One endless stream of windows: the lane's part of every mixed source."""

    def __init__(self, number: int, streams: list[SourceStream], settings: DataSettings, seed: int) -> None:
        self.streams = streams
        self._number, self._settings, self._seed = number, settings, seed
        weights = [settings.mix.get(stream.name, 0.0) or float(stream.positions) for stream in streams]
        self._shares = [weight / sum(weights) for weight in weights]

    def beginning(self) -> LaneCursor:
        return LaneCursor(0, tuple(SourceCursor() for _ in self.streams), _table([]))

    def plan(self, start: LaneCursor) -> Window:
        """Pack one window: about window_packs * pack_tokens positions, those carried in among them.

        Given are the fullest packs, as many as the fragments could fill at best, and every pack with a
        fragment that was carried in: so nothing is carried twice. The fragments of the others are carried on.
        """
        settings = self._settings
        wanted = settings.window_packs * settings.pack_tokens - int(start.carried[:, 4].sum())
        fresh, cursors = mix(self.streams, self._shares, start.sources, wanted)
        table = np.concatenate([start.carried, fresh])
        packing = best_fit_decreasing(
            table[:, 4], settings.pack_tokens, settings.pack_documents, num_first=len(start.carried)
        )
        at_best = max(
            int(table[:, 4].sum()) // settings.pack_tokens,  # at least 1: a window holds a pack's positions
            len(table) // settings.pack_documents,
        )
        fill = np.maximum(packing.num_positions * settings.pack_documents, packing.num_documents * settings.pack_tokens)
        given = np.zeros(len(fill), dtype=bool)
        given[np.argsort(-fill, kind="stable")[:at_best]] = True
        given |= np.fromiter(map(min, packing.packs), dtype=np.int64, count=len(fill)) < len(start.carried)
        chosen = np.flatnonzero(given)
        chosen = chosen[permutation(make_key("packs", self._seed, self._number, start.window), len(chosen))]
        members = [sorted(packing.packs[number]) for number in chosen.tolist()]
        left = sorted(index for number in np.flatnonzero(~given).tolist() for index in packing.packs[number])
        fragments = list(map(Fragment, *table.T.tolist()))
        return Window(
            [tuple([fragments[index] for index in pack]) for pack in members],
            LaneCursor(start.window + 1, cursors, table[left]),
            *self._pending(table, members),
        )

    def _pending(self, table: np.ndarray, members: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Positions and oldest epochs of `Window`, of packs made of these rows of the table."""
        turns = np.full(len(table), len(members))  # what is in no pack stays pending after the last
        for turn, pack in enumerate(members):
            turns[pack] = turn
        columns = np.searchsorted([stream.source for stream in self.streams], table[:, 0])
        positions = np.zeros((len(members) + 1, len(self.streams)), dtype=np.int64)
        epochs = np.full_like(positions, NO_EPOCH)
        np.add.at(positions, (turns, columns), table[:, 4])
        np.minimum.at(epochs, (turns, columns), table[:, 5])
        return np.cumsum(positions[::-1], axis=0)[::-1], np.minimum.accumulate(epochs[::-1], axis=0)[::-1]


def mix(
    streams: Sequence[SourceStream], shares: Sequence[float], cursors: Sequence[SourceCursor], wanted: int
) -> tuple[np.ndarray, tuple[SourceCursor, ...]]:
    """The next fragments of a lane, at least `wanted` positions in all: a table, and the cursors after them.

    The next fragment always comes from the source that is furthest behind its share: the smallest (positions
    taken) / share, the first of equals. With C = the longest fragment and k sources, a source of share s has had
    between s * N - s * k * C and s * N + C of the first N positions of a lane, for every N.
    """
    if wanted <= 0:
        return _table([]), tuple(cursors)
    total = sum(cursor.positions for cursor in cursors) + wanted
    tables, places, clocks = [], [], []
    for stream, share, cursor in zip(streams, shares, cursors, strict=True):
        table, place = stream.ahead(cursor, int(share * total) + 1 - cursor.positions)
        tables.append(table)
        places.append(place)
        clocks.append((cursor.positions + _starts_of(table[:, 4])[:-1]) / share)
    joined = np.concatenate(tables)
    turns = np.argsort(np.concatenate(clocks), kind="stable")
    turns = turns[: int(np.searchsorted(np.cumsum(joined[turns, 4]), wanted)) + 1]
    numbers = np.repeat(np.arange(len(tables)), [len(table) for table in tables])[turns]
    taken = np.bincount(numbers, minlength=len(tables)).tolist()
    after = tuple(
        stream.advance(cursor, table[:count], place)
        for stream, cursor, table, place, count in zip(streams, cursors, tables, places, taken, strict=True)
    )
    return joined[turns], after


def measure_shards(store: Lengths, source: str) -> list[Shard]:
    """Documents and positions of every shard of a source, in the order of the shards."""
    shards = []
    for number in range(store.num_shards(source)):
        positions = num_positions(store.lengths(source, number))
        skipped = len(positions) - int(np.count_nonzero(positions))
        shards.append(Shard(number, len(positions), skipped, int(positions.sum())))
    return shards


def deal_shards(source: str, shards: Sequence[Shard], loads: list[int]) -> list[list[Shard]]:
    """The shards of a source for each lane: the largest first, each to the lane with the fewest of its positions.

    `loads` are the positions that the lanes hold of the sources dealt before; they break ties, and are raised by
    what is dealt. Raises `UserError` if there are fewer shards with positions than lanes.
    """
    lanes = len(loads)
    filled = [shard for shard in shards if shard.positions]
    if len(filled) < lanes:
        raise UserError(
            f"data.lanes = {lanes} but source {source!r} has {len(filled)} shards with text, and every lane needs one: "
            f"lower data.lanes to {len(filled)}, or prepare again with smaller prepare.shard_tokens"
        )
    dealt: list[list[Shard]] = [[] for _ in range(lanes)]
    held = [0] * lanes
    for shard in sorted(filled, key=lambda shard: (-shard.positions, shard.number)):
        lane = min(range(lanes), key=lambda lane: (held[lane], loads[lane], lane))
        dealt[lane].append(shard)
        held[lane] += shard.positions
    loads[:] = [load + more for load, more in zip(loads, held, strict=True)]
    return dealt


def _make_lanes(store: Lengths, settings: DataSettings, seed: int, shards: dict[str, list[Shard]]) -> list[Lane]:
    loads = [0] * settings.lanes
    dealt = {name: deal_shards(name, shards[name], loads) for name in shards}
    return [
        Lane(
            number,
            [
                SourceStream(store, name, dealt[name][number], settings.context_tokens, make_key(seed, name, number))
                for name in dealt
            ],
            settings,
            seed,
        )
        for number in range(settings.lanes)
    ]


def _mixed_sources(known: Sequence[str], shares: Mapping[str, float]) -> list[str]:
    for name in shares:
        if name not in known:
            raise UserError(
                f"data.mix.{name} = {shares[name]}: no such source; the prepared data has {', '.join(known) or 'none'}"
            )
    return [name for name in known if name in shares or not shares]


def _has_positions(name: str, shards: Sequence[Shard], shares: Mapping[str, float]) -> bool:
    """Whether a source can be trained on; a source that is asked for by name has to be."""
    if any(shard.positions for shard in shards):
        return True
    if name in shares:
        raise UserError(
            f"data.mix.{name} = {shares[name]}: the source has no document of at least 2 tokens; leave it out"
        )
    return False


def _identity(store: Lengths, settings: DataSettings, packs_per_step: int, seed: int) -> dict[str, Any]:
    """What the order follows from, by the names under which the user knows it."""
    names = ("context_tokens", "pack_tokens", "pack_documents", "lanes", "window_packs", "mix")
    return {
        "version of the order": ORDER_VERSION,
        "documents shuffled together": BLOCK_DOCUMENTS,
        "prepared data": store.fingerprint,
        "run.seed": seed,
        "training.packs_per_step": packs_per_step,
        **{f"data.{name}": getattr(settings, name) for name in names},
    }


def _describe_difference(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    lines = [
        f"  {name}: {saved.get(name)!r} when saved, {current.get(name)!r} now"
        for name in sorted({*saved, *current})
        if saved.get(name) != current.get(name)
    ]
    return (
        "the saved position belongs to another order of the data, in which going on would repeat and skip documents:\n"
        + "\n".join(lines or ["  the saved position itself was altered"])
        + "\nset these back, or start a new run in another run.directory"
    )


def _starts_of(sizes: np.ndarray) -> np.ndarray:
    """Where runs of these sizes start when laid end to end, and where the last one ends: (n + 1,)."""
    return np.concatenate([[0], np.cumsum(sizes)])


def _table(rows: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(-1, len(Fragment._fields))
