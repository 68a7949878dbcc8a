"""Stream: the steps that one rank trains on, read ahead by a background thread.

Takes an order of this node's lanes, a store and this rank's place in the world; gives `Step`s, each with the
position that continues after it. Guarantees: every rank has the same number of micro-batches of the same shape; the
counts of a step are those of all ranks: from the plan alone where one node plans all lanes, else added up over the
nodes by the thread, ahead of the step that needs them; an error of the thread is raised where the steps are taken,
never swallowed as an early end. Also deals out validation documents, each exactly once.
Costs: one thread, `ahead` + 1 steps of this rank's batches in memory.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

import numpy as np

from bigmodel.config import DataSettings, UserError, num_micro_batches
from bigmodel.data.batch import Batch, Reader, build_batch, make_keys
from bigmodel.data.objectives import num_positions
from bigmodel.data.order import Order, Position
from bigmodel.data.packing import best_fit_decreasing
from bigmodel.data.sharing import Place, Slots, attention_work, deal_contiguously, deal_evenly, imbalance
from bigmodel.data.shuffle import Block, Fragment, Lengths, Pack

NO_PACK = -1  # the number of an empty pack
CLOSE_SECONDS = 5.0  # how long close() waits for a read that is under way; the thread is a daemon


class Documents(Lengths, Protocol):
    """What reading needs of a store: see `ShardStore`."""

    def document(self, source: str, shard: int, row: int) -> np.ndarray: ...


class Nodes(Protocol):
    """How nodes tell each other what their packs hold: see `bigmodel.training.distributed.NodeSums`."""

    def add_up(self, step: int, values: Sequence[int], abandoned: Callable[[], bool]) -> list[int]: ...

    def fail(self, step: int, reason: str) -> None: ...


@dataclass(frozen=True, eq=False)
class Step:
    """One data step as one rank sees it. All counts are over all ranks."""

    number: int  # data step, from 0
    packs: list[Pack]  # of this rank's node, in canonical order
    micro_batches: list[Batch]  # this rank's
    num_targets: int  # the divisor of the loss
    num_positions: int
    num_documents: int  # a piece of a long document counts as one
    num_padding: int  # positions without a document, those of empty packs included
    num_document_limited: int  # packs with room left that are full by data.pack_documents
    num_pairs: int  # (query, key) pairs of causal attention: n (n + 1) / 2 for a document of n positions
    imbalance: float  # of attention work in this node: 1 is even; see `sharing.imbalance`
    imbalance_undealt: float  # what it would be in canonical order
    position: Position  # after this step: its cursor, of all nodes, belongs into the checkpoint of this step


def reader(store: Documents) -> Reader:
    """Reads the document that a fragment is of."""
    return lambda fragment: store.document(store.sources[fragment.source], fragment.shard, fragment.row)


class Stream:
    """Iterates over the steps of one rank, from the order's position on. From then on the order is the stream's."""

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
    ) -> None:
        """Starts the thread, which works at most `ahead` steps ahead: restore the order before.

        The order plans `place.lanes` or more. `nodes` is needed where there are several and it plans no more.
        """
        assert ahead >= 1, f"ahead = {ahead}; the thread works at least 1 step ahead"
        assert nodes or len(order.lanes) == data.lanes, "an order of some lanes knows the counts of its node only"
        self.wait_seconds = 0.0  # how long the last step was waited for
        self._read, self._order, self._data, self._seed = reader(store), order, data, seed
        self._packs_per_micro_batch, self._place, self._nodes = packs_per_micro_batch, place, nodes
        self._ready: queue.Queue[Step | BaseException] = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="bigmodel-data", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        """The next step. Raises what the thread raised, again on every further call; the stream has no end."""
        began = time.perf_counter()
        while self._failure is None:
            if self._closed.is_set():
                raise RuntimeError("the data stream is closed; make a new one to go on")
            try:
                item = self._ready.get(timeout=0.1)
            except queue.Empty:
                continue
            if isinstance(item, Step):
                self.wait_seconds = time.perf_counter() - began
                return item
            self._failure = item
        raise self._failure

    def close(self) -> None:
        """Stop the thread. Returns within `CLOSE_SECONDS`, also while a read hangs; harmless when called twice."""
        self._closed.set()
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSE_SECONDS)

    def _work(self) -> None:
        while not self._closed.is_set():
            number = self._order.step
            try:
                item: Step | BaseException = self._make_step()
            except BaseException as error:  # the thread's boundary: raised again by __next__
                item = error
                if self._nodes and not self._closed.is_set():
                    self._nodes.fail(number, str(error))
            self._hand_over(item)
            if not isinstance(item, Step):
                return

    def _hand_over(self, item: "Step | BaseException") -> None:
        while not self._closed.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _make_step(self) -> Step:
        number, data, place = self._order.step, self._data, self._place
        node = take_share(self._order, data.lanes, place, self._packs_per_micro_batch)
        work, num_rounds = node.work, len(node.slots[0])
        num_places = place.world_size * num_rounds * self._packs_per_micro_batch * data.pack_tokens
        undealt = deal_contiguously(len(work), place.node_size, num_rounds, self._packs_per_micro_batch)
        filled, documents, limited, pairs = self._count(number, node)
        return Step(
            number=number,
            packs=node.packs,
            micro_batches=[self._build(number, node, slot) for slot in node.slots[place.rank_in_node]],
            num_targets=filled,  # causal: every position has a target
            num_positions=filled,
            num_documents=documents,
            num_padding=num_places - filled,
            num_document_limited=limited,
            num_pairs=pairs,
            imbalance=imbalance(work, node.slots),
            imbalance_undealt=imbalance(work, undealt),
            position=self._order.position(),
        )

    def _count(self, number: int, node: "NodeShare") -> list[int]:
        """Positions filled, documents, packs limited by documents, and pairs of attention, over all nodes."""
        packs = node.packs if self._nodes else node.planned
        counts = [
            sum(fragment.length for pack in packs for fragment in pack),
            sum(len(pack) for pack in packs),
            sum(is_document_limited(pack, self._data) for pack in packs),
            sum(fragment.length * (fragment.length + 1) // 2 for pack in packs for fragment in pack),
        ]
        return self._nodes.add_up(number, counts, self._closed.is_set) if self._nodes else counts

    def _build(self, step: int, node: "NodeShare", slot: Sequence[int]) -> Batch:
        """A micro-batch of the packs at these places of the node's share, filled up with empty ones."""
        empty = self._packs_per_micro_batch - len(slot)
        numbers = [node.numbers[place] for place in slot] + [NO_PACK] * empty
        keys = make_keys(self._seed, step, numbers, self._data.pack_tokens)
        packs = [node.packs[place] for place in slot]
        return build_batch([*packs, *[()] * empty], self._read, self._data, keys)


@dataclass(frozen=True, eq=False)
class NodeShare:
    """What one node computes of a step."""

    planned: list[Pack]  # of the order's lanes, which may be more than the node's share
    numbers: range  # of the node's packs in the step
    packs: list[Pack]
    work: list[int]  # of attention, per pack
    slots: Slots  # who computes which of them


def take_share(order: Order, num_lanes: int, place: Place, packs_per_micro_batch: int) -> NodeShare:
    """Take the next step from an order that plans `place.lanes` or more, and deal the node's share of it."""
    num_packs = order.packs_at(order.step)
    planned = order.next_step()
    first = order.lanes[0] * (num_packs // num_lanes)  # the number of the first planned pack
    numbers = place.share(num_packs)
    packs = planned[numbers.start - first : numbers.stop - first]
    assert len(packs) == len(numbers), f"the order plans lanes {order.lanes}, packs {numbers} are wanted"
    num_rounds = num_micro_batches(num_packs, place.world_size, packs_per_micro_batch)
    work = [attention_work(pack) for pack in packs]
    return NodeShare(
        planned, numbers, packs, work, deal_evenly(work, place.node_size, num_rounds, packs_per_micro_batch)
    )


def is_document_limited(pack: Pack, data: DataSettings) -> bool:
    """Whether the pack has room left but is full by data.pack_documents."""
    return len(pack) == data.pack_documents and sum(fragment.length for fragment in pack) < data.pack_tokens


class ValidationBatches(Sequence[Batch]):
    """Validation packs in groups of one micro-batch each, built when asked for: deal the numbers to ranks."""

    def __init__(self, packs: list[Pack], read: Reader, data: DataSettings, packs_per_micro_batch: int) -> None:
        self._packs, self._read, self._data, self._size = packs, read, data, packs_per_micro_batch

    def __len__(self) -> int:
        return -(-len(self._packs) // self._size)

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
        keys = make_keys(0, 0, range(first, first + self._size), self._data.pack_tokens)
        return build_batch(packs, self._read, self._data, keys)


def validation_batches(
    store: Documents, data: DataSettings, packs_per_micro_batch: int, max_packs: int = 0
) -> ValidationBatches:
    """Every document of the store exactly once, in packs that follow from lengths and pack settings alone.

    One best-fit-decreasing plan over all sources (data.mix does not apply), in groups of `packs_per_micro_batch`
    packs, the same at every world size; empty packs fill the last group. `max_packs` > 0 takes that many packs at
    even distances in the plan, so of all lengths. Raises `UserError` if no document has 2 tokens.
    """
    table = np.concatenate(
        [
            _all_fragments(store, number, shard, data.context_tokens)
            for number, source in enumerate(store.sources)
            for shard in range(len(store.shard_sizes(source)))
        ]
        or [np.empty((0, len(Fragment._fields)), dtype=np.int64)]
    )
    if not len(table):
        raise UserError(
            f"{data.directory}: the validation split holds no document of at least 2 tokens; "
            "prepare again with a higher prepare.validation_share"
        )
    plan = best_fit_decreasing(table[:, 4], data.pack_tokens, data.pack_documents).packs
    if 0 < max_packs < len(plan):
        plan = [plan[number * len(plan) // max_packs] for number in range(max_packs)]
    packs = [tuple(Fragment._make(row) for row in table[sorted(pack)].tolist()) for pack in plan]
    return ValidationBatches(packs, reader(store), data, packs_per_micro_batch)


def _all_fragments(store: Documents, number: int, shard: int, context_tokens: int) -> np.ndarray:
    positions = num_positions(store.lengths(store.sources[number], shard))
    rows = np.flatnonzero(positions)
    block = Block(np.full(len(rows), shard), rows, positions[rows], context_tokens)
    return block.table(0, block.num_fragments, number, 0)
