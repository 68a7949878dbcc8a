"""Stream: the steps that one rank trains on, read ahead by a background thread.

Takes an order, a store and this rank's place in the world; gives `Step`s, each with the cursor that continues
after it. Guarantees: every rank has the same number of micro-batches of the same shape; the counts of a step are
those of all ranks, from the plan alone, so no collective is needed; an error of the thread is raised where the
steps are taken, never swallowed as an early end. Also deals out validation documents, each exactly once.
Costs: one thread, `ahead` + 1 steps of this rank's batches in memory.
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

import numpy as np

from bigmodel.config import DataSettings, UserError, num_micro_batches
from bigmodel.data.batch import Batch, Reader, build_batch, make_keys
from bigmodel.data.objectives import num_positions
from bigmodel.data.order import Block, Fragment, Lengths, Order, Pack, SourceProgress
from bigmodel.data.packing import best_fit_decreasing

CLOSE_SECONDS = 5.0  # how long close() waits for a read that is under way; the thread is a daemon


class Documents(Lengths, Protocol):
    """What reading needs of a store: see `ShardStore`."""

    def document(self, source: str, shard: int, row: int) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Step:
    """One data step as one rank sees it. All counts are over all ranks."""

    number: int  # data step, from 0
    packs: list[Pack]  # of all ranks, from the plan
    micro_batches: list[Batch]  # this rank's
    num_targets: int  # the divisor of the loss
    num_positions: int
    num_documents: int  # a piece of a long document counts as one
    num_padding: int  # positions without a document, those of empty packs included
    num_document_limited: int  # packs with room left that are full by data.pack_documents
    cursor: dict[str, Any]  # the order's state after this step: belongs into the checkpoint of this step
    progress: dict[str, SourceProgress]  # per source, after this step


def share(packs_per_step: int, rank: int, world_size: int) -> range:
    """The pack numbers that a rank computes: contiguous, ceil(packs / ranks) each, fewer or none on the last ranks."""
    assert 0 <= rank < world_size, f"rank {rank} is not one of {world_size} ranks"
    size = -(-packs_per_step // world_size)
    return range(min(rank * size, packs_per_step), min((rank + 1) * size, packs_per_step))


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
        rank: int,
        world_size: int,
        seed: int,
        ahead: int = 2,
    ) -> None:
        """Starts the thread, which works at most `ahead` steps ahead: restore the order before."""
        assert ahead >= 1, f"ahead = {ahead}; the thread works at least 1 step ahead"
        self.wait_seconds = 0.0  # how long the last step was waited for
        self._read, self._order, self._data, self._seed = reader(store), order, data, seed
        self._packs_per_micro_batch, self._rank, self._world_size = packs_per_micro_batch, rank, world_size
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
            try:
                item: Step | BaseException = self._make_step()
            except BaseException as error:  # the thread's boundary: raised again by __next__
                item = error
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
        number, packs, data = self._order.step, self._order.next_step(), self._data
        num_filled = sum(fragment.length for pack in packs for fragment in pack)
        count = num_micro_batches(len(packs), self._world_size, self._packs_per_micro_batch)
        num_places = self._world_size * count * self._packs_per_micro_batch * data.pack_tokens
        return Step(
            number=number,
            packs=packs,
            micro_batches=self._build(packs, number, count),
            num_targets=num_filled,  # causal: every position has a target
            num_positions=num_filled,
            num_documents=sum(len(pack) for pack in packs),
            num_padding=num_places - num_filled,
            num_document_limited=sum(is_document_limited(pack, data) for pack in packs),
            cursor=self._order.state(),
            progress=self._order.progress(),
        )

    def _build(self, packs: list[Pack], step: int, count: int) -> list[Batch]:
        """This rank's share in `count` micro-batches, filled up with empty packs."""
        mine = share(len(packs), self._rank, self._world_size)
        size = self._packs_per_micro_batch
        batches = []
        for first in range(mine.start, mine.start + count * size, size):
            chosen = [packs[number] if number in mine else () for number in range(first, first + size)]
            keys = make_keys(self._seed, step, first, size, self._data.pack_tokens)
            batches.append(build_batch(chosen, self._read, self._data, keys))
        return batches


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
        keys = make_keys(0, 0, first, self._size, self._data.pack_tokens)
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
            for shard in range(store.num_shards(source))
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
