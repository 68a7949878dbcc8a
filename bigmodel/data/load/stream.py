"""Stream: the steps of one rank, built ahead by a background thread. Also the validation batches.

In: an order of this node's lanes, a store, this rank's place in the world. Out: `Step`s, each with the position that
continues after it.

Guarantees:
- Every rank has the same number of micro-batches of the same shape.
- The counts of a step are over all ranks: from the plan where one node plans all lanes, else summed over the nodes by
  the thread, ahead of the step that needs them.
- An error of the thread is raised by `next`, never swallowed as an early end. A step that is not ready in
  data.stall_seconds is an error that names the document being read.
- Each validation document occurs exactly once.

Costs: a thread, and data.workers threads that read ahead; `ahead` + 1 steps of this rank's batches in memory; the plan
of one packing buffer, because steps are planned that far ahead.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, overload

import numpy as np

from bigmodel.config.settings import DataSettings, ScheduledSamplingSettings, UserError, num_micro_batches
from bigmodel.config.user_error import MachineError
from bigmodel.data.load.batch import Batch, Reader, build_batch, document_seeds, make_dropout_seeds
from bigmodel.data.load.class_weights import ClassWeights
from bigmodel.data.load.own_inputs import with_own_inputs
from bigmodel.data.load.readahead import Place as Where
from bigmodel.data.load.readahead import ReadAhead
from bigmodel.data.objectives.classification import ClassNumbers
from bigmodel.data.objectives.example import Example, num_tokens
from bigmodel.data.objectives.examples import Document, Examples, nothing_asked
from bigmodel.data.objectives.sentences import kinds_of
from bigmodel.data.objectives.supervised import NAME, SUPERVISED, UNITS
from bigmodel.data.plan.attention_work import CountPairs, Work, count_work, no_pairs
from bigmodel.data.plan.order import Order, Position
from bigmodel.data.plan.packing import best_fit_decreasing, pack_two_sides
from bigmodel.data.plan.planned import PackTable
from bigmodel.data.plan.sharing import Place, Slots, attention_work, deal_contiguously, deal_evenly, imbalance
from bigmodel.data.plan.shuffle import (
    PLAIN,
    Block,
    Chunk,
    Lengths,
    Pack,
    chunk_table,
    has_pairs,
    has_wide,
    is_supervised,
    lengths_in,
    make_block,
    measure_shard,
    sizes,
)

VALIDATION_SEED = 0  # validation does not depend on run.seed
NO_PACK = -1  # the number of an empty pack
CLOSE_SECONDS = 5.0  # how long close() waits for a running read; the thread is a daemon


class Documents(Lengths, Protocol):
    """The part of `ShardStore` that the stream uses."""

    def document(self, source: str, shard: int, row: int) -> Document: ...


class Nodes(Protocol):
    """Sums counts over nodes: see `bigmodel.distributed.world.NodeSums`."""

    def add_up(self, step: int, values: Sequence[int], abandoned: Callable[[], bool]) -> list[int]: ...

    def fail(self, step: int, reason: str) -> None: ...


@dataclass(frozen=True, eq=False)
class Step:
    """One data step on one rank. All counts are over all ranks."""

    number: int  # data step, from 0
    packs: list[Pack]  # of this rank's node, in canonical order
    micro_batches: list[Batch]  # this rank's
    num_labels: int
    weight: float  # sum of the labels' weights, the divisor of the loss; num_labels where all are 1
    labels_by_group: list[int]  # per loss group: see `Stream.loss_groups`
    weights_by_group: list[float]
    num_tokens: int
    num_documents: int  # a chunk of a long document counts as one
    num_padding: int  # positions without a document, empty packs included
    num_document_limited: int  # packs with room left, closed by data.max_documents
    work: Work  # (query, key) pairs of attention, and tokens
    imbalance: float  # of attention work within this node: 1 is even; see `sharing.imbalance`
    imbalance_undealt: float  # the same without balancing: packs dealt in canonical order
    position: Position  # after this step; its cursor, merged over nodes, goes into this step's checkpoint


def reader(store: Documents) -> Reader:
    """A function that reads the document, or pair, of a chunk."""
    return lambda chunk: store.document(*place_of(store, chunk))


def place_of(store: Documents, chunk: Chunk) -> Where:
    """Source, shard and row of a chunk's document; with random segmentations also the number of the pass."""
    place = store.sources[chunk.source], chunk.shard, chunk.row
    return (*place, chunk.epoch % passes) if (passes := getattr(store, "passes", 0)) else place


class Builder:
    """Makes the batches of a run from planned packs."""

    def __init__(
        self,
        store: Documents,
        data: DataSettings,
        seed: int,
        read: Reader | None = None,
        seeds_by_document: bool = False,
        sampling: ScheduledSamplingSettings | None = None,
    ) -> None:
        """`read` None: from the store. `seeds_by_document`: of dropout, see `document_seeds`. `sampling`: of decoder
        inputs, in training."""
        self._sources, self._by_document = store.sources, seeds_by_document
        vocabulary = getattr(getattr(store, "manifest", None), "vocabulary", 0)
        self._examples, self._read = Examples(data, seed, vocabulary), read or reader(store)
        self._data, self._seed, self._sampling, examples = data, seed, sampling, self._examples
        if data.classes:
            examples.find_class = ClassNumbers(store, data.classes).number  # type: ignore[arg-type]
        if data.permutes_sentences:
            examples.kinds_of_tokens = kinds_of(store.pieces)  # type: ignore[attr-defined]
        plain = [not has_wide(store, name) for name in store.sources]
        examples.check_augmentation(any(plain), any(has_pairs(store, name) for name in store.sources))
        self._class_weights = ClassWeights(store, data) if data.class_weights else None
        if self._class_weights:
            examples.class_weights = self._class_weights.values
        numbered = []  # (objective number, source number, loss group)
        for source, name in enumerate(store.sources):
            if is_supervised(store, name):
                numbered.append((SUPERVISED, source, (NAME, name)))
                continue
            numbers = [examples.pairs] if has_pairs(store, name) else range(examples.pairs)
            numbered += [(number, source, (examples.names[number], name)) for number in numbers]
        self.has_weights = bool(data.class_weights) or getattr(store, "has_weights", False)
        self._weights_of_shard = lru_cache(maxsize=64)(
            lambda source, shard: measure_shard(store, store.sources[source], shard, data.max_document_length).weights
        )
        self.loss_groups = list(dict.fromkeys(part for _, _, part in numbered))  # (objective, source)
        self._places = {(number, source): self.loss_groups.index(part) for number, source, part in numbered}
        self._places |= {(PLAIN, source): place for (number, source), place in self._places.items() if number == 0}

    def build(self, packs: Sequence[Pack], step: int, numbers: Sequence[int]) -> Batch:
        """The micro-batch of these packs; `numbers`: theirs in the data step. An empty pack is all padding."""
        data = self._data
        source_seeds = None
        if data.source_sequence_length:
            source_seeds = self._seeds(packs, step, numbers, data.source_sequence_length, "source positions")
        keys = self._seeds(packs, step, numbers, data.sequence_length, "positions")
        several = len(self.loss_groups) > 1
        batch = build_batch(
            packs,
            self._read,
            data,
            keys,
            self._examples,
            source_seeds,
            self.loss_group_of if several else None,
            len(self.loss_groups),
            self.has_weights,
        )
        share = self._sampling.share_at(step) if self._sampling else 0.0
        if not (self._sampling and share):
            return batch
        return with_own_inputs(
            batch, packs, self._seed, share, data.target_ahead, drawn=self._sampling.choice == "drawn"
        )

    def example(self, chunk: Chunk) -> Example:
        """The example of a chunk that is not a plain one, or has become one by augmentation."""
        return self._examples.make(chunk, self._read(chunk))

    def objective_of(self, chunk: Chunk) -> str:
        """The name of the objective of a chunk's example."""
        return self.loss_groups[self.loss_group_of(chunk)][0]

    def _seeds(self, packs: Sequence[Pack], step: int, numbers: Sequence[int], tokens: int, side: str) -> np.ndarray:
        if self._by_document:
            return document_seeds(self._seed, packs, self._sources, tokens, side)
        return make_dropout_seeds(self._seed, step, numbers, tokens, side)

    def loss_group_of(self, chunk: Chunk) -> int:
        """Index into `loss_groups` of the chunk's (objective, source)."""
        return self._places[chunk.objective, chunk.source]

    def labels_by_group(self, packs: PackTable) -> list[int]:
        labels = packs.num_labels()
        if len(self.loss_groups) == 1:
            return [int(labels.sum())]
        counts = [0] * len(self.loss_groups)
        kinds = packs.objectives() * len(self._sources) + packs.chunks[:, 0]
        for kind in np.unique(kinds).tolist():
            counts[self._places[divmod(kind, len(self._sources))]] += int(labels[kinds == kind].sum())
        return counts

    def units_by_group(self, packs: Sequence[Pack]) -> list[int]:
        """The sums of the labels' weights, in `UNITS`, where they are not all 1."""
        sums = [0] * len(self.loss_groups)
        for chunk in (chunk for pack in packs for chunk in pack):
            units = chunk.num_labels * UNITS
            if self._class_weights:
                units = self._class_weights.units_of(chunk)
            elif chunk.objective == SUPERVISED:
                units = int(self._weights_of_shard(chunk.source, chunk.shard)[chunk.row])
            sums[self.loss_group_of(chunk)] += units
        return sums


class Stream:
    """Iterates over the steps of one rank from the order's position on. Nothing else may use the order afterwards."""

    def __init__(
        self,
        store: Documents,
        order: Order,
        data: DataSettings,
        packs_per_micro_batch: int,
        place: Place,
        seed: int,
        nodes: Nodes | None = None,
        ahead: int = 2,
        pin: bool = False,
        count_pairs: CountPairs = no_pairs,
        seeds_by_document: bool = False,
        sampling: ScheduledSamplingSettings | None = None,
    ) -> None:
        """Starts the thread, which builds at most `ahead` steps ahead; restore the order first.

        The order plans `place.lanes` or more. `nodes` is needed unless the order plans all lanes. `pin`: batches in
        page-locked memory, from which a GPU copies while it computes. `count_pairs`: of the model, for `Step.work`.
        `seeds_by_document`: of dropout. `sampling`: of decoder inputs.
        """
        assert ahead >= 1, f"ahead = {ahead}; the thread needs at least 1"
        assert nodes or len(order.lanes) == data.lanes, (
            "an order of some lanes needs `nodes`: it knows the counts of its own node only"
        )
        self.wait_seconds = 0.0  # wait for the last step
        self._order, self._data = order, data
        self._builder = Builder(store, data, seed, self._read, seeds_by_document, sampling)
        self.loss_groups = self._builder.loss_groups  # (objective, source), in the order of a step's loss_groups
        self._store = store
        self._packs_per_micro_batch, self._place, self._nodes = packs_per_micro_batch, place, nodes
        self._pin, self._count_pairs = pin, count_pairs
        self._planned: deque[_Planned | BaseException] = deque()
        self._read_ahead = ReadAhead(store, data.workers)
        self._making = order.step
        self._reading: Where | None = None  # the document being read, for the message of a stall
        self._ready: queue.Queue[Step | BaseException] = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="bigmodel-data", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        """The next step; the stream has no end. Raises an error of the thread, on every further call too.

        Raises `MachineError` if no step is ready in data.stall_seconds.
        """
        began = time.perf_counter()
        while self._failure is None:
            if self._closed.is_set():
                raise RuntimeError("the data stream is closed; make a new one to continue")
            try:
                item = self._ready.get(timeout=0.1)
            except queue.Empty:
                if not (self._closed.is_set() or self._thread.is_alive()) and self._ready.empty():
                    raise RuntimeError(
                        "the data thread ended without an error; this is a bug: please report it"
                    ) from None
                if time.perf_counter() - began > self._data.stall_seconds:
                    raise MachineError(self._describe_stall()) from None
                continue
            if isinstance(item, Step):
                self.wait_seconds = time.perf_counter() - began
                return item
            self._failure = item
        raise self._failure

    def close(self) -> None:
        """Stop the thread. Returns within `CLOSE_SECONDS` even if a read hangs; may be called twice."""
        self._closed.set()
        self._read_ahead.close()
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSE_SECONDS)

    def _describe_stall(self) -> str:
        what = "planning, or waiting for the counts of other nodes"
        if self._reading:
            what = "reading document {2} of shard {1} of source {0!r}".format(*self._reading)
        return (
            f"data.stall_seconds = {self._data.stall_seconds:g}: the next batch was not ready in time; the data thread "
            f"is {what}; check that the disk of data.directory and data.remote respond, or raise data.stall_seconds"
        )

    def _work(self) -> None:
        while not self._closed.is_set():
            try:
                item: Step | BaseException = self._make_step()
            except BaseException as error:  # the thread's boundary: raised again by __next__
                item = error
                if self._nodes and not self._closed.is_set():
                    self._nodes.fail(self._making, str(error))
            self._hand_over(item)
            if not isinstance(item, Step):
                return
            self._making += 1

    def _hand_over(self, item: "Step | BaseException") -> None:
        while not self._closed.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _plan_step(self) -> None:
        """Plan one more step and start reading its documents of this rank. An error is raised at that step."""
        number = self._order.step
        try:
            node = take_share(self._order, self._data.lanes, self._place, self._packs_per_micro_batch)
        except BaseException as error:  # raised after the steps before are built
            self._planned.append(error)
            return
        self._planned.append(_Planned(number, node, self._order.position()))
        slots, sources = node.slots[self._place.rank_in_node], self._store.sources
        chunks = [chunk for slot in slots for at in slot for chunk in node.packs[at]]
        shards = dict.fromkeys((chunk.source, chunk.shard) for chunk in chunks)
        self._read_ahead.expect(
            [(sources[source], shard) for source, shard in shards], (place_of(self._store, chunk) for chunk in chunks)
        )

    def _plan_ahead(self) -> None:
        """Plan two steps per built step until a packing buffer lies ahead; the first step waits for its plan only."""
        for _ in range(2):
            packs = self._order.packs_at(self._order.step)
            ended = self._planned and isinstance(self._planned[-1], BaseException)
            if not ended and len(self._planned) <= self._data.packing_buffer * self._data.lanes // packs:
                self._plan_step()

    def _make_step(self) -> Step:
        self._plan_ahead()
        planned = self._planned.popleft()
        if isinstance(planned, BaseException):
            raise planned
        number, node, data, place = planned.number, planned.node, self._data, self._place
        work, num_rounds = node.work, len(node.slots[0])
        num_packs = place.world_size * num_rounds * self._packs_per_micro_batch
        num_places = num_packs * (data.sequence_length + data.source_sequence_length)
        undealt = deal_contiguously(len(work), place.node_size, num_rounds, self._packs_per_micro_batch)
        filled, documents, limited, *counts = self._count(number, node)
        work_of_step, sums = Work(*counts[: len(Work._fields)]), counts[len(Work._fields) :]
        targets, units = sums[: len(self.loss_groups)], sums[len(self.loss_groups) :]
        if not sum(targets):
            raise UserError(nothing_asked(f"step {number + 1}", data))
        return Step(
            number=number,
            packs=node.packs,
            micro_batches=[self._build(number, node, slot) for slot in node.slots[place.rank_in_node]],
            num_labels=sum(targets),
            weight=sum(units) / UNITS,
            labels_by_group=targets,
            weights_by_group=[one / UNITS for one in units],
            num_tokens=filled,
            num_documents=documents,
            num_padding=num_places - filled,
            num_document_limited=limited,
            work=work_of_step,
            imbalance=imbalance(work, node.slots),
            imbalance_undealt=imbalance(work, undealt),
            position=planned.position,
        )

    def _count(self, number: int, node: "NodeShare") -> list[int]:
        """Positions, documents, packs limited by documents, `Work`, labels and weights per loss group, of all nodes."""
        packs, table = (node.packs, node.table) if self._nodes else (node.planned, node.planned_table)
        labels = self._builder.labels_by_group(table)
        counts = [
            int(table.num_tokens().sum() + table.source_positions().sum()),
            len(table.chunks),
            num_document_limited(table, self._data),
            *count_work(table, self._data, self._count_pairs),
            *labels,
            *(self._builder.units_by_group(packs) if self._builder.has_weights else (one * UNITS for one in labels)),
        ]
        return self._nodes.add_up(number, counts, self._closed.is_set) if self._nodes else counts

    def _build(self, step: int, node: "NodeShare", slot: Sequence[int]) -> Batch:
        """A micro-batch of these packs of the node, filled up with empty packs."""
        empty = self._packs_per_micro_batch - len(slot)
        numbers = [node.numbers[place] for place in slot] + [NO_PACK] * empty
        packs = [node.packs[place] for place in slot]
        batch = self._builder.build([*packs, *[()] * empty], step, numbers)
        return batch.pinned() if self._pin else batch

    def _read(self, chunk: Chunk) -> Document:
        self._reading = place_of(self._store, chunk)
        document = self._read_ahead.document(*self._reading)
        self._reading = None
        return document


@dataclass(frozen=True, eq=False)
class NodeShare:
    """One node's share of a step."""

    planned: list[Pack]  # of all lanes of the order; may be more than the node's share
    planned_table: PackTable  # the same
    numbers: range  # of the node's packs in the step
    packs: list[Pack]
    table: PackTable  # the same
    work: list[int]  # of attention, per pack
    slots: Slots  # which rank and micro-batch computes which of them


@dataclass(frozen=True, eq=False)
class _Planned:
    """A planned step: the node's share, and the position after it."""

    number: int
    node: NodeShare
    position: Position


def take_share(order: Order, num_lanes: int, place: Place, packs_per_micro_batch: int) -> NodeShare:
    """Take the next step from an order that plans `place.lanes` or more, and deal the node's share to its ranks."""
    num_packs = order.packs_at(order.step)
    planned, planned_table = order.next_packs()
    first = order.lanes[0] * (num_packs // num_lanes)  # the number of the first planned pack
    numbers = place.share(num_packs)
    packs = planned[numbers.start - first : numbers.stop - first]
    table = planned_table.part(numbers.start - first, numbers.stop - first)
    assert len(packs) == len(numbers), f"the order plans lanes {order.lanes}, which do not hold packs {numbers}"
    num_rounds = num_micro_batches(num_packs, place.world_size, packs_per_micro_batch)
    work = attention_work(table)
    slots = deal_evenly(work, place.node_size, num_rounds, packs_per_micro_batch)
    return NodeShare(planned, planned_table, numbers, packs, table, work, slots)


def num_document_limited(packs: PackTable, data: DataSettings) -> int:
    """The packs that data.max_documents closed although they have room left."""
    limited = packs.num_chunks >= data.max_documents
    if not limited.any():
        return 0
    limited &= packs.by_pack(packs.num_tokens()) != data.sequence_length
    if data.source_sequence_length:
        limited &= packs.by_pack(packs.source_positions()) < data.source_sequence_length
    return int(np.count_nonzero(limited))


class ValidationBatches(Sequence[Batch]):
    """Validation micro-batches, built on access; deal their indices to ranks."""

    def __init__(self, packs: list[Pack], builder: Builder, packs_per_micro_batch: int) -> None:
        self._packs, self._builder, self._size = packs, builder, packs_per_micro_batch

    def __len__(self) -> int:
        return -(-len(self._packs) // self._size)

    @property
    def loss_groups(self) -> list[tuple[str, str]]:
        """(objective, source) of each loss group; a batch without `loss_groups` has the first one alone."""
        return self._builder.loss_groups

    @overload
    def __getitem__(self, number: int) -> Batch: ...
    @overload
    def __getitem__(self, number: slice) -> list[Batch]: ...
    def __getitem__(self, number: int | slice) -> Batch | list[Batch]:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        first = range(len(self))[number] * self._size
        packs = self._packs[first : first + self._size]
        packs += [()] * (self._size - len(packs))
        return self._builder.build(packs, 0, range(first, first + self._size))


def validation_batches(
    store: Documents, data: DataSettings, packs_per_micro_batch: int, max_packs: int = 0
) -> ValidationBatches:
    """Every document of the store exactly once, in packs that depend on lengths and pack settings only.

    One plan over all sources (data.mix does not apply), in groups of `packs_per_micro_batch` packs, the same at every
    world size; empty packs fill the last group. Objectives are drawn as in training, but with a fixed seed. `max_packs`
    > 0 takes that many packs at even distances in the plan, so of all lengths. data.augmentation does not apply. Raises
    `UserError` if no document has 2 tokens.
    """
    data = data.without_augmentation()
    table = all_chunks(store, data, VALIDATION_SEED)
    if not len(table):
        raise UserError(
            f"{data.directory}: the validation split holds no document of at least 2 tokens; "
            "prepare again with a higher prepare.validation_share"
        )
    if data.source_sequence_length:
        budgets = data.sequence_length, data.source_sequence_length
        plan = pack_two_sides(sizes(table), budgets, data.max_documents).packs
    else:
        plan = best_fit_decreasing(sizes(table)[:, 0], data.sequence_length, data.max_documents).packs
    if 0 < max_packs < len(plan):
        plan = [plan[number * len(plan) // max_packs] for number in range(max_packs)]
    packs = [tuple(Chunk(*row) for row in table[sorted(pack)].tolist()) for pack in plan]
    return ValidationBatches(packs, Builder(store, data, VALIDATION_SEED), packs_per_micro_batch)


def all_chunks(store: Lengths, data: DataSettings, seed: int, only: Collection[str] = ()) -> np.ndarray:
    """A table of every chunk of a store in epoch 0, by source, shard and row. `only`: these sources; empty: all."""
    examples = Examples(data, seed)
    wide = not examples.is_plain or any(has_wide(store, name) for name in store.sources)
    tables = [chunk_table([], wide)]
    for number, source in enumerate(store.sources):
        for shard in range(len(store.shard_sizes(source)) if not only or source in only else 0):
            positions = num_tokens(lengths_in(store, source, shard, 0))
            rows = np.flatnonzero(positions)
            documents = np.full(len(rows), shard), rows, positions[rows]
            if wide:
                block = make_block(store, source, 0, *documents, examples)
            else:
                block = Block(*documents, data.max_document_length)
            tables.append(block.table(0, block.num_chunks, number, 0))
    return np.concatenate(tables)
