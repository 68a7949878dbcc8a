"""Shuffle: the documents of one source in one lane, reshuffled in every epoch.

In: a lane's shards of a source. Out: chunks, endlessly or for a number of epochs. Each epoch lays the shards end to end
in a new order, cuts them into blocks and shuffles the documents of each block. Long documents are split into chunks of
at most `max_document_length` positions. A position is an input token with its label: a document of 10 stored tokens has
9, and gives chunks of 8 and 1 where `max_document_length` = 8.

Guarantees: a pure function of (key, lengths, max_document_length); a cursor of four small numbers is enough to
continue. Costs: a block's lengths are read when the stream reaches it; one block is in memory (1 MB), two where a
packing buffer crosses its end.

A table of chunks is an int64 array of shape (n, 10); its columns are the fields of `Chunk`. For plain text in causal
order the last four follow from the others and are left out: (n, 6).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from bigmodel.data.objectives.example import num_tokens
from bigmodel.data.objectives.examples import Examples
from bigmodel.data.objectives.supervised import Measured, measure
from bigmodel.data.plan.unread import Places, ReadBefore
from bigmodel.data.randomness import make_key, permutation

PLAIN = -1  # "objective" of a chunk that is its own example: causal
NARROW, WIDE = 6, 10  # columns of a table
BLOCK_DOCUMENTS = 65_536  # shuffled together; about one or two shards, so reads stay local


class Chunk(NamedTuple):
    """Positions [start, start + length) of one document.

    `source` is an index into `store.sources`, `shard` into the source, `row` into the shard; `epoch` is the source's.
    A pair is one chunk; its positions are those of its source text. A supervised document is one chunk.

    Its example (`bigmodel.data.objectives.examples`): the number of its `objective`, `planned_tokens` and
    `planned_labels` of the decoder, `source_positions` of the encoder. PLAIN: causal, one token and one label per
    position.
    """

    source: int
    shard: int
    row: int
    start: int
    length: int
    epoch: int
    objective: int = PLAIN
    planned_tokens: int = 0
    planned_labels: int = 0
    source_positions: int = 0

    @property
    def num_tokens(self) -> int:
        return self.length if self.objective == PLAIN else self.planned_tokens

    @property
    def num_labels(self) -> int:
        return self.length if self.objective == PLAIN else self.planned_labels


Pack = tuple[Chunk, ...]


def sizes(table: np.ndarray) -> np.ndarray:
    """(n, 2): tokens and source positions of each chunk's example; (n, 1) for a narrow table."""
    return table[:, [7, 9]] if table.shape[1] == WIDE else table[:, 4:5]


class Lengths(Protocol):
    """The part of `ShardStore` that the plan uses."""

    @property
    def sources(self) -> list[str]: ...

    @property
    def fingerprint(self) -> str: ...

    def shard_sizes(self, source: str) -> np.ndarray: ...

    def lengths(self, source: str, shard: int) -> np.ndarray: ...


def has_pairs(store: Lengths, source: str) -> bool:
    """Whether a source holds pairs; `store.target_lengths` then has the lengths of their targets."""
    return source in getattr(store, "pair_sources", ())


def is_supervised(store: Lengths, source: str) -> bool:
    """Whether a source holds supervised documents; `store.spans` then has what they train."""
    return source in getattr(store, "supervised_sources", ())


def lengths_in(store: Lengths, source: str, shard: int, epoch: int, side: str = "") -> np.ndarray:
    """Stored tokens of a shard's documents in an epoch, which differ where texts are segmented at random. `side`
    "target_": of the targets of pairs."""
    if getattr(store, "passes", 0):
        return store.lengths_of_pass(source, shard, epoch, side)  # type: ignore[attr-defined]
    return store.target_lengths(source, shard) if side else store.lengths(source, shard)  # type: ignore[attr-defined]


def has_wide(store: Lengths, source: str) -> bool:
    """Whether the chunks of a source need the columns of examples, whatever the objectives."""
    return has_pairs(store, source) or is_supervised(store, source)


def measure_shard(store: Lengths, source: str, shard: int, longest: int) -> Measured:
    """Of the supervised documents of a shard."""
    num_documents = int(store.shard_sizes(source)[shard][0])
    return measure(store.spans(source, shard), num_documents, longest)  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Shard:
    number: int  # in its source
    documents: int
    positions: int
    skipped: int  # documents of 0 or 1 stored tokens


@dataclass(frozen=True, slots=True)
class SourceCursor:
    """The next chunk of one source in one lane, and the positions taken so far."""

    epoch: int = 0
    block: int = 0
    fragment: int = 0  # the chunk in the block; the stored name
    positions: int = 0


# (documents of a block, positions of their chunks, positions after the chunks), (n,) each -> (n, 4)
Measure = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def make_block(
    store: Lengths,
    source: str,
    epoch: int,
    shards: np.ndarray,
    rows: np.ndarray,
    positions: np.ndarray,
    examples: Examples,
    starts: np.ndarray | int = 0,
    after: np.ndarray | int = 0,
) -> "Block":
    """A block of documents of a source, (n,) each as in `Block`, with the lengths of their examples. Pairs and
    supervised documents are whole."""
    if has_pairs(store, source):
        targets = np.empty(len(rows), dtype=np.int64)
        for shard in () if examples.data.classes else np.unique(shards).tolist():  # the length of a label is not used
            mine = shards == shard
            targets[mine] = num_tokens(lengths_in(store, source, shard, epoch, "target_")[rows[mine]])
        return Block(
            shards,
            rows,
            positions,
            positions,
            lambda documents, lengths, _remaining: examples.measure_pairs(lengths, targets[documents]),
        )
    if is_supervised(store, source):
        columns = np.empty((len(rows), 4), dtype=np.int64)
        for shard in np.unique(shards).tolist():
            measured = measure_shard(store, source, shard, examples.data.max_document_length)
            columns[shards == shard] = examples.measure_supervised(source, measured)[rows[shards == shard]]
        return Block(shards, rows, positions, positions, lambda documents, _lengths, _remaining: columns[documents])
    chosen = examples.choose(store.sources.index(source), epoch, shards, rows)
    return Block(
        shards,
        rows,
        positions,
        examples.longest[chosen],
        lambda documents, lengths, remaining: examples.measure(chosen[documents], lengths, remaining),
        starts,
        after,
    )


class Block:
    """Documents of one source in shuffled order; split into chunks on demand."""

    def __init__(
        self,
        shards: np.ndarray,
        rows: np.ndarray,
        positions: np.ndarray,
        max_document_length: np.ndarray | int,
        measure: Measure | None = None,
        starts: np.ndarray | int = 0,
        after: np.ndarray | int = 0,
    ) -> None:
        """Arrays (documents,): place of each document, its positions (at least 1), the most positions of its chunks.

        `measure` gives the last four columns of a wide table. Of a document partly read by an earlier plan, `starts` is
        the first position here, and `after` the positions that follow.
        """
        self._shards, self._rows, self._positions = (part.astype(np.int32) for part in (shards, rows, positions))
        self._max_document_length = np.broadcast_to(np.asarray(max_document_length), positions.shape)
        self._starts, self._after = (np.broadcast_to(np.asarray(part), positions.shape) for part in (starts, after))
        self._measure = measure
        self._first_chunks = starts_of(-(-positions // max_document_length)).astype(np.int32)
        self.num_chunks = int(self._first_chunks[-1])

    def fragments_covering(self, first: int, positions: int) -> int:
        """The end of the chunks from `first` on that hold `positions` positions, or the block's end."""
        if first == self.num_chunks:
            return first
        document = int(np.searchsorted(self._first_chunks, np.int32(first), side="right")) - 1
        offset = (first - int(self._first_chunks[document])) * int(self._max_document_length[document])
        ahead, wanted, counted = self._positions[document:], offset + positions, 128
        while counted < len(ahead) and ahead[:counted].sum() < wanted:
            counted *= 2
        ends = np.cumsum(ahead[:counted], dtype=np.int64)  # recomputed: stored, a third of the block
        end = min(document + 1 + int(np.searchsorted(ends, wanted)), len(self._positions))
        return int(self._first_chunks[end])

    def table(self, first: int, end: int, source: int, epoch: int) -> np.ndarray:
        """Chunks [first, end) as a table."""
        chunks = np.arange(first, end, dtype=np.int32)  # as the array that is searched: no copy of it
        documents = np.searchsorted(self._first_chunks, chunks, side="right") - 1
        longest = self._max_document_length[documents]
        offsets = (chunks - self._first_chunks[documents]) * longest
        lengths = np.minimum(self._positions[documents] - offsets, longest)
        starts = offsets + self._starts[documents]
        table = np.empty((end - first, WIDE if self._measure else NARROW), dtype=np.int64)
        for column, values in enumerate(
            (source, self._shards[documents], self._rows[documents], starts, lengths, epoch)
        ):
            table[:, column] = values
        if self._measure:
            remaining = self._positions[documents] - offsets - lengths + self._after[documents]
            table[:, NARROW:] = self._measure(documents, lengths, remaining)
        return table


class SourceStream:
    """The chunks of one source in one lane, epoch after epoch. A subclass may hold some documents of it only."""

    def __init__(
        self,
        store: Lengths,
        name: str,
        shards: Sequence[Shard],
        max_document_length: int,
        key: int,
        max_epochs: int = 0,
        examples: Examples | None = None,
        read: ReadBefore | None = None,
    ) -> None:
        """`max_epochs`: the stream ends after them; 0: never. `examples` None: plain text in causal order. `read`: by
        earlier plans; the stream begins in the oldest epoch with anything left, and gives what is left of each."""
        self.name, self.source = name, store.sources.index(name)
        self.positions = sum(shard.positions for shard in shards)
        self._store, self.shards, self._max_document_length, self._key = store, shards, max_document_length, key
        self._examples, self.wide = examples, examples is not None
        self._max_epochs, self.read = max_epochs, read
        self.num_documents = sum(shard.documents for shard in shards)
        self._num_blocks = -(-self.num_documents // BLOCK_DOCUMENTS)
        self._blocks: dict[tuple[int, int], Block] = {}  # in use by the current packing buffer, two at most

    def beginning(self) -> SourceCursor:
        if not self.read:
            return SourceCursor()
        return SourceCursor(min(self.read.unread(self.name, shard.number).first_epoch for shard in self.shards))

    def block_of(self, cursor: SourceCursor) -> "Block":
        """The block of the cursor's chunk."""
        return self._block(cursor.epoch, cursor.block)

    def block_rows(self, epoch: int, number: int) -> dict[int, tuple[int, int]]:
        """The first row and the end, of each shard, of a block of an epoch; of shards before it (documents, documents),
        after it (0, 0)."""
        first, end, found = number * BLOCK_DOCUMENTS, (number + 1) * BLOCK_DOCUMENTS, {}
        for index in self._laid_out(epoch):
            shard = self.shards[index]
            low, high = (min(max(place, 0), shard.documents) for place in (first, end))
            found[shard.number] = low, high
            first, end = first - shard.documents, end - shard.documents
        return found

    def ahead(self, cursor: SourceCursor, positions: int, counts_chunks: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """A table of at least `positions` positions from the cursor on, and the (epoch, block, chunk) of each row.

        Fewer only at the stream's end. `counts_chunks`: of as many chunks instead.
        """
        tables, places = [], []
        epoch, number, first = cursor.epoch, cursor.block, cursor.fragment
        for place in [place for place in self._blocks if place < (epoch, number)]:
            del self._blocks[place]
        while positions > 0 and not self._ended(epoch):
            block = self._block(epoch, number)
            end = (
                min(first + positions, block.num_chunks)
                if counts_chunks
                else block.fragments_covering(first, positions)
            )
            if end > first:
                tables.append(block.table(first, end, self.source, epoch))
                places.append(np.stack(np.broadcast_arrays(epoch, number, np.arange(first, end)), axis=1))
                positions -= end - first if counts_chunks else int(tables[-1][:, 4].sum())
            first = end
            if first == block.num_chunks:
                epoch, number, first = self._after(epoch, number)
        if not tables:
            return chunk_table([], self.wide), np.empty((0, 3), np.int64)
        return np.concatenate(tables), np.concatenate(places)

    def advance(self, cursor: SourceCursor, taken: np.ndarray, places: np.ndarray) -> SourceCursor:
        """The cursor after the chunks `taken`; `places`: (epoch, block, chunk) of its rows."""
        if not len(taken):
            return cursor
        epoch, number, chunk = (int(value) for value in places[len(taken) - 1])
        chunk += 1
        while not self._ended(epoch) and chunk == self._block(epoch, number).num_chunks:
            epoch, number, chunk = self._after(epoch, number)
        return SourceCursor(epoch, number, chunk, cursor.positions + int(taken[:, 4].sum()))

    def _ended(self, epoch: int) -> bool:
        return 0 < self._max_epochs <= epoch

    def _after(self, epoch: int, number: int) -> tuple[int, int, int]:
        return (epoch, number + 1, 0) if number + 1 < self._num_blocks else (epoch + 1, 0, 0)

    def _block(self, epoch: int, number: int) -> Block:
        if (epoch, number) not in self._blocks:
            while len(self._blocks) > 1:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[epoch, number] = self._read_block(epoch, number)
        return self._blocks[epoch, number]

    def _read_block(self, epoch: int, number: int) -> Block:
        """Documents [number, number + 1) * BLOCK_DOCUMENTS of the epoch's shards laid end to end, shuffled."""
        first, end = number * BLOCK_DOCUMENTS, (number + 1) * BLOCK_DOCUMENTS
        shards, columns = [], []
        for index in self._laid_out(epoch):
            shard = self.shards[index]
            low, high = max(first, 0), min(end, shard.documents)
            if low < high:
                places = self._places(shard.number, low, high, epoch)
                columns.append(places.columns())
                shards.append(np.full(len(places.rows), shard.number))
            first, end = first - shard.documents, end - shard.documents
            if end <= 0:
                break
        shard_D = np.concatenate(shards)
        row_D, start_D, position_D, after_D = map(np.concatenate, zip(*columns, strict=True))
        shuffled = permutation(make_key("documents", self._key, epoch, number), len(row_D))
        shuffled = shuffled[position_D[shuffled] > 0]
        documents = shard_D[shuffled], row_D[shuffled], position_D[shuffled]
        pieces = (start_D[shuffled], after_D[shuffled]) if self.read else (0, 0)
        if self._examples is None:
            return Block(*documents, self._max_document_length, None, *pieces)
        return make_block(self._store, self.name, epoch, *documents, self._examples, *pieces)

    def _laid_out(self, epoch: int) -> list[int]:
        """The places of the shards in the order of an epoch."""
        return permutation(make_key("shards", self._key, epoch), len(self.shards)).tolist()

    def _places(self, shard: int, first: int, end: int, epoch: int) -> Places:
        """What this stream gives of the documents [first, end) of a shard in an epoch."""
        rows, positions = self._documents(shard, first, end, epoch)
        if not self.read:
            return Places.whole(rows, positions)
        return self.read.unread(self.name, shard).places(epoch, first, positions)

    def _documents(self, shard: int, first: int, end: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of this stream's documents [first, end) of a shard, and their positions in an epoch."""
        return np.arange(first, end), num_tokens(lengths_in(self._store, self.name, shard, epoch)[first:end])


def read_shards(store: Lengths, source: str) -> list[Shard]:
    """All shards of a source, in order. Opens no length file."""
    return [Shard(number, *sizes) for number, sizes in enumerate(store.shard_sizes(source).tolist())]


def neighbour_distance(chunks: Sequence[Chunk]) -> float:
    """Quality of the shuffle of some chunks: 1 is random, near 0 means that neighbours stay neighbours.

    The median distance between documents that lie side by side in a shard, over that of a random order:
    (1 - sqrt(1/2)) times the number of documents. 1 where no two are neighbours.
    """
    places: dict[tuple[int, int, int, int], int] = {}
    for chunk in chunks:
        places.setdefault((chunk.source, chunk.epoch, chunk.shard, chunk.row), len(places))
    distances = [
        abs(place - places[source, epoch, shard, row + 1])
        for (source, epoch, shard, row), place in places.items()
        if (source, epoch, shard, row + 1) in places
    ]
    return float(np.median(distances)) / ((1 - 0.5**0.5) * len(places)) if distances else 1.0


def starts_of(sizes: np.ndarray) -> np.ndarray:
    """Starts of runs of these sizes laid end to end, and the last end: (n + 1,)."""
    return np.concatenate([[0], np.cumsum(sizes)])


def chunk_table(rows: Sequence[Sequence[int]], wide: bool = False) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(-1, WIDE if wide else NARROW)
