"""Classes: the documents of a source in a lane, each class with a share of its own (class_mix, class_exponent).

In: a lane's shards of a labelled source. Out: chunks, in the place of `SourceStream`. Each class is a stream of its
own: it gives each of its documents once, reshuffled, before any a second time; the epoch of a chunk is the pass of its
class. The next document comes from the class furthest behind its share of documents. Example: 6 documents of a, 2 of
b, equal shares: a b a b a b ...; after 12 documents a has had one pass and b three.

Guarantees: those of `bigmodel.data.plan.shuffle`. Of the first N documents of a source in a lane, a class of share s
has given between s * N - s * k and s * N + 1, with k classes, until a class ends (`data.max_epochs`).
Costs: the labels of the lane's shards are read when the order is made (`ShardStore.labels`), and 6 bytes a document.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from bigmodel.config.settings import DataSettings, UserError
from bigmodel.data.objectives.classification import ClassNumbers, Labelled
from bigmodel.data.objectives.example import num_tokens
from bigmodel.data.objectives.examples import Examples
from bigmodel.data.plan.shuffle import Lengths, Shard, SourceCursor, SourceStream, chunk_table, has_pairs, lengths_in
from bigmodel.data.randomness import make_key


class LabelledLengths(Lengths, Labelled, Protocol):
    """The part of `ShardStore` that finds classes for the plan."""

    @property
    def sources(self) -> list[str]: ...
    def labels(self, source: str, shard: int) -> tuple[np.ndarray, list[np.ndarray]]: ...
    def label_counts(self, source: str) -> dict[str, int]: ...


@dataclass(frozen=True, slots=True)
class ClassesCursor:
    """The next chunk of each class of one source in one lane, and the documents given of each."""

    classes: tuple[SourceCursor, ...]
    documents: tuple[int, ...]

    @property
    def epoch(self) -> int:
        """The fewest passes of a class."""
        return min(cursor.epoch for cursor in self.classes)

    @property
    def positions(self) -> int:
        return sum(cursor.positions for cursor in self.classes)


Cursor = SourceCursor | ClassesCursor


def cursor_of(saved: Mapping[str, Any]) -> Cursor:
    """Inverse of `dataclasses.asdict`."""
    if "classes" not in saved:
        return SourceCursor(**saved)
    return ClassesCursor(tuple(SourceCursor(**one) for one in saved["classes"]), tuple(saved["documents"]))


class Stream(Protocol):
    """What a lane mixes: `SourceStream` or `ClassesStream`."""

    name: str
    source: int
    positions: int
    wide: bool

    def beginning(self) -> Any: ...
    def ahead(self, cursor: Any, positions: int) -> tuple[np.ndarray, np.ndarray]: ...
    def advance(self, cursor: Any, taken: np.ndarray, places: np.ndarray) -> Any: ...


class ClassNumbering:
    """The number of the class of every document; each shard's labels are read once by the store."""

    def __init__(self, store: LabelledLengths, classes: Sequence[str]) -> None:
        self._store, self._numbers = store, ClassNumbers(store, classes)

    def of_shard(self, source: str, shard: int) -> np.ndarray:
        """(documents,) int64. Raises `UserError` for a label that is no class, and a source without labels."""
        if not has_pairs(self._store, source):
            raise UserError(
                f"{self._store.directory}: source {source!r} has no labels, so that its classes have no shares and "
                "weights; prepare with label_column, or leave the source out of the data"
            )
        labels, found = self._store.labels(source, shard)
        place = self._store.sources.index(source)
        firsts = [int(np.argmax(labels == number)) for number in range(len(found))]
        numbers = [self._numbers.number(label, place, shard, row) for label, row in zip(found, firsts, strict=True)]
        return np.array(numbers, dtype=np.int64)[labels]


class ClassStream(SourceStream):
    """The documents of one class of a source in one lane."""

    def __init__(self, rows: Mapping[int, np.ndarray], *arguments: Any) -> None:
        """`rows`: of the class, by shard; `arguments`: of `SourceStream`."""
        super().__init__(*arguments)
        self._rows = rows
        self._lengths = lru_cache(maxsize=64)(
            lambda shard, number: np.array(lengths_in(self._store, self.name, shard, number))
        )

    def _documents(self, shard: int, first: int, end: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        rows, passes = self._rows[shard][first:end], getattr(self._store, "passes", 0)
        return rows.astype(np.int64), num_tokens(self._lengths(shard, epoch % passes if passes else 0)[rows])


class ClassesStream:
    """The streams of the classes of one source in one lane, mixed by documents."""

    def __init__(self, streams: Sequence[ClassStream], shares: Sequence[float]) -> None:
        first = streams[0]
        self.name, self.source, self.wide = first.name, first.source, first.wide
        self.positions = sum(stream.positions for stream in streams)
        self._streams, self._shares = streams, shares
        documents = sum(stream.num_documents for stream in streams)
        self._mean_positions = self.positions / documents

    def beginning(self) -> ClassesCursor:
        return ClassesCursor(tuple(stream.beginning() for stream in self._streams), (0,) * len(self._streams))

    def ahead(self, cursor: ClassesCursor, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """As `SourceStream.ahead`, with the (class, epoch, block, chunk) of each row.

        The clock of a document is the number of documents of its class given before it, over the class's share. The
        documents before a clock are the same however far this looks ahead.
        """
        if positions <= 0:
            return chunk_table([], self.wide), np.empty((0, 4), np.int64)
        clock, step = float(sum(cursor.documents)), positions / self._mean_positions + len(self._streams)
        while True:
            clock += step
            asked = [
                max(0, int(clock * share) + 2 - given)
                for given, share in zip(cursor.documents, self._shares, strict=True)
            ]
            found = [
                stream.ahead(at, count, counts_chunks=True)
                for stream, at, count in zip(self._streams, cursor.classes, asked, strict=True)
            ]
            table, places = self._before(clock, cursor, found)
            has_ended = all(len(part) < count for (part, _), count in zip(found, asked, strict=True))
            if has_ended or int(table[:, 4].sum()) >= positions:
                return table, places
            step *= 2

    def _before(
        self, clock: float, cursor: ClassesCursor, found: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The documents of all classes before a clock, in order; of equal clocks the first class."""
        clocks = np.concatenate(
            [
                (given + np.arange(len(table))) / share
                for given, share, (table, _) in zip(cursor.documents, self._shares, found, strict=True)
            ]
        )
        numbers = np.repeat(np.arange(len(found)), [len(table) for table, _ in found])
        places = np.column_stack([numbers, np.concatenate([part for _, part in found])])
        turns = np.argsort(clocks, kind="stable")
        turns = turns[clocks[turns] < clock]
        return np.concatenate([table for table, _ in found])[turns], places[turns]

    def advance(self, cursor: ClassesCursor, taken: np.ndarray, places: np.ndarray) -> ClassesCursor:
        """As `SourceStream.advance`."""
        places = places[: len(taken)]
        mine = [places[:, 0] == number for number in range(len(self._streams))]
        after = [
            stream.advance(at, taken[rows], places[rows][:, 1:])
            for stream, at, rows in zip(self._streams, cursor.classes, mine, strict=True)
        ]
        counts = [given + int(rows.sum()) for given, rows in zip(cursor.documents, mine, strict=True)]
        return ClassesCursor(tuple(after), tuple(counts))


def resampled(
    store: Any, name: str, shards: Sequence[Shard], settings: DataSettings, key: int, examples: Examples | None
) -> ClassesStream:
    """The stream of a source in a lane that holds these shards. Raises `UserError` where a class has no document in
    the lane, or no share."""
    numbering = ClassNumbering(store, settings.classes)
    shares = class_shares(settings, counts_by_class(store, name, settings.classes), name)
    rows: dict[int, dict[int, np.ndarray]] = {number: {} for number in shares}
    held: dict[int, list[Shard]] = {number: [] for number in shares}
    for shard in shards:
        numbers, positions = numbering.of_shard(name, shard.number), num_tokens(store.lengths(name, shard.number))
        for number in np.unique(numbers[positions > 0]).tolist():
            mine = np.flatnonzero((numbers == number) & (positions > 0))
            rows[number][shard.number] = mine.astype(np.uint32)
            held[number].append(Shard(shard.number, len(mine), int(positions[mine].sum()), 0))
    if lacking := [number for number in shares if not held[number]]:
        raise UserError(
            f"{settings.resampling} with data.lanes = {settings.lanes}: a lane holds no document of class "
            f"{settings.classes[lacking[0]]!r} of source {name!r}, and every lane gives each class its share; lower "
            "data.lanes, or prepare again from files that mix the classes, with smaller prepare.shard_tokens"
        )
    limit = settings.max_epochs.get(name, 0)
    streams = [
        ClassStream(
            rows[number],
            store,
            name,
            held[number],
            settings.max_document_length,
            make_key("class", key, settings.classes[number]),
            limit,
            examples,
        )
        for number in shares
    ]
    return ClassesStream(streams, list(shares.values()))


def counts_by_class(store: LabelledLengths, source: str, classes: Sequence[str]) -> list[int]:
    """Documents of each class: as `prepare` counted them, else counted here, which reads all labels."""
    told = store.label_counts(source)
    if told:
        return [told.get(name, 0) for name in classes]
    numbering = ClassNumbering(store, classes)
    shards = range(len(store.shard_sizes(source)))
    return sum(
        (np.bincount(numbering.of_shard(source, shard), minlength=len(classes)) for shard in shards),
        np.zeros(len(classes), np.int64),
    ).tolist()


def class_shares(settings: DataSettings, counts: Sequence[int], source: str) -> dict[int, float]:
    """The share of documents of each class that a source has, by the class's number; they add up to 1."""
    mix, exponent = settings.class_mix, settings.class_exponent
    for name, count in zip(settings.classes, counts, strict=True):
        if mix and count and name not in mix:
            raise UserError(
                f"data.class_mix = {mix}: lacks class {name!r}, of which source {source!r} has {count:,} documents; "
                "give it a share, or drop these documents and prepare again"
            )
        if name in mix and not count:
            raise UserError(
                f"data.class_mix.{name} = {mix[name]}: source {source!r} has no training document of this class; add "
                "documents, leave it out if no source has any, or use class_exponent, by the classes of each source"
            )
    weights = {number: mix[settings.classes[number]] if mix else count**exponent for number, count in _some(counts)}
    total = math.fsum(weights.values())
    return {number: weight / total for number, weight in weights.items()}


def _some(counts: Sequence[int]) -> list[tuple[int, int]]:
    return [(number, count) for number, count in enumerate(counts) if count]
