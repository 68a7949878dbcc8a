import json
import threading
import time

import numpy as np
import pytest

from bigmodel.config.settings import DataSettings, UserError
from bigmodel.data.load import stream as stream_module
from bigmodel.data.load.batch import IGNORED
from bigmodel.data.load.stream import Stream, num_micro_batches, validation_batches
from bigmodel.data.plan.order import Order, merge_cursors
from bigmodel.data.plan.planned import PackTable
from bigmodel.data.plan.sharing import Place, attention_work
from tests.support.memory_store import MemoryStore, corpus_positions

LENGTHS = {
    "books": [[61, 2, 30], [45, 9], [20, 1, 0, 33, 8]],
    "web": [[5, 7, 3, 12, 9, 2, 4], [6, 6, 18, 2], [25], [3, 3, 11, 5]],
}
DATA = DataSettings(max_document_length=13, sequence_length=16, max_documents=4, lanes=2, packing_buffer=3)
PACKS_PER_STEP = 10
RAMP = [(2, 4), (4, 12)]
PACKS = [10, 10, 4, 4, 12, 12]
NUM_STEPS = 6


class Sums:
    """`NodeSums` among threads; steps that were added up are remembered."""

    def __init__(self, num_nodes):
        self.num_nodes, self.told, self.news = num_nodes, {}, threading.Condition()

    def of(self, node):
        return NodeSumsInProcess(self, node)


class NodeSumsInProcess:
    def __init__(self, sums, node):
        self.sums, self.node, self.failure = sums, node, None

    def add_up(self, step, values, abandoned):
        sums = self.sums
        with sums.news:
            sums.told.setdefault(step, {})[self.node] = values
            sums.news.notify_all()
            while len(sums.told[step]) < sums.num_nodes:
                if abandoned():
                    raise TimeoutError
                sums.news.wait(0.05)
            return [sum(column) for column in zip(*sums.told[step].values(), strict=True)]

    def fail(self, step, reason):
        self.failure = (step, reason)


class Streams:
    """Makes streams and closes them at the end of a test."""

    def __init__(self):
        self._open = []

    def __call__(
        self, rank=0, world_size=1, packs_per_micro_batch=1, node_size=1, store=None, state=None, nodes=None, **changes
    ):
        store = store or MemoryStore(LENGTHS)
        place = Place(rank, world_size, node_size)
        order = Order(store, DATA, PACKS_PER_STEP, 7, RAMP, place.lanes(DATA.lanes) if nodes else None)
        if state:
            order.restore(json.loads(json.dumps(state)))
        stream = Stream(store, order, DATA, packs_per_micro_batch, place, 7, nodes, **changes)
        self._open.append(stream)
        return stream

    def close(self):
        for stream in self._open:
            stream.close()


@pytest.fixture
def streams():
    made = Streams()
    yield made
    made.close()


def take(stream, count):
    return [next(stream) for _ in range(count)]


def cut(batch, num_packs):
    """The batch's packs as bytes and document lengths, so that they compare whatever micro-batch they were in."""
    size, offsets = len(batch.tokens) // num_packs, batch.cu_seqlens.tolist()
    return [
        (
            *(
                getattr(batch, name)[place : place + size].tolist()
                for name in ("tokens", "labels", "positions", "dropout_seeds")
            ),
            sorted({offset - place for offset in offsets if place <= offset <= place + size}),
        )
        for place in range(0, size * num_packs, size)
    ]


def is_empty(pack):
    return all(target == IGNORED for target in pack[1])


def test_every_rank_has_the_micro_batches_of_the_fullest():
    assert num_micro_batches(10, world_size=4, packs_per_micro_batch=2) == 2
    assert num_micro_batches(10, world_size=1, packs_per_micro_batch=3) == 4
    assert num_micro_batches(1, world_size=8, packs_per_micro_batch=3) == 1


def all_ranks(streams, world_size, node_size, size, **changes):
    """The first steps of every rank; each node plans its own lanes."""
    sums = Sums(world_size // node_size)
    made = [
        streams(rank, world_size, size, node_size, nodes=sums.of(rank // node_size), **changes)
        for rank in range(world_size)
    ]
    steps = take_together(made)
    return list(zip(*steps, strict=True))


def take_together(streams):
    """Step by step, as ranks do: no node can run ahead of the others for long."""
    return [[next(stream) for stream in streams] for _ in range(NUM_STEPS)]


WORLDS = [(1, 1), (2, 1), (2, 2), (3, 1), (4, 1), (4, 2), (8, 4), (8, 8), (64, 8)]


@pytest.mark.parametrize(("world_size", "node_size"), WORLDS)
def test_a_step_is_the_same_packs_at_every_world_node_and_micro_batch_size(streams, world_size, node_size):
    reference = take(streams(), NUM_STEPS)
    packs_of = [sorted(cut(batch, 1)[0] for batch in step.micro_batches) for step in reference]
    assert [len(packs) for packs in packs_of] == PACKS
    assert not any(is_empty(pack) for packs in packs_of for pack in packs)
    for size in (1, 2, 3) if world_size < 64 else (1,):
        ranks = all_ranks(streams, world_size, node_size, size)
        for number, packs in enumerate(packs_of):
            steps = [rank[number] for rank in ranks]
            batches = [batch for step in steps for batch in step.micro_batches]
            merged = [pack for batch in batches for pack in cut(batch, size)]
            assert sorted(pack for pack in merged if not is_empty(pack)) == packs
            rounds = num_micro_batches(PACKS[number], world_size, size)
            assert {len(step.micro_batches) for step in steps} == {rounds}
            for step in steps:
                assert step.number == number
                assert step.num_labels == sum(batch.num_labels for batch in batches)
                assert step.num_tokens == sum(batch.num_tokens for batch in batches)
                assert step.num_documents == sum(batch.num_documents for batch in batches)
                assert step.num_padding == sum(int((batch.labels == IGNORED).sum()) for batch in batches)
                assert step.num_document_limited == reference[number].num_document_limited
                assert 1 <= step.imbalance <= world_size
            cursors = [step.position.cursor() for step in steps]
            assert json.dumps(merge_cursors(cursors)) == json.dumps(reference[number].position.cursor())


def test_steps_saved_on_one_world_go_on_on_another(streams):
    steps = take(streams(), 2 * NUM_STEPS)
    rest = [sorted(cut(batch, 1)[0] for batch in step.micro_batches) for step in steps]
    for number in range(NUM_STEPS):
        state = steps[number].position.cursor()
        for world_size, node_size in [(2, 1), (3, 3), (4, 2)]:
            ranks = all_ranks(streams, world_size, node_size, 2, state=state)
            for later in range(NUM_STEPS):
                batches = [batch for rank in ranks for batch in rank[later].micro_batches]
                packs = [pack for batch in batches for pack in cut(batch, 2) if not is_empty(pack)]
                assert sorted(packs) == rest[number + 1 + later]
        streams.close()


class CountingStore(MemoryStore):
    """Remembers the shards that documents were read from, and counts the reads."""

    def __init__(self):
        super().__init__(LENGTHS)
        self.read, self.reads = set(), 0

    def document(self, source, shard, row):
        self.read.add((source, shard))
        self.reads += 1
        return super().document(source, shard, row)


def test_a_node_reads_lengths_and_documents_of_its_own_lanes_only(streams):
    stores, sums = [CountingStore(), CountingStore()], Sums(2)
    nodes = [streams(node, 2, store=stores[node], nodes=sums.of(node)) for node in (0, 1)]
    take_together(nodes)
    streams.close()
    for store in stores:
        assert store.read
        assert store.read <= store.opened
    assert stores[0].opened.isdisjoint(stores[1].opened)
    assert len(stores[0].opened | stores[1].opened) == 7  # all shards of the store


def test_no_length_is_read_before_the_first_step():
    store = MemoryStore(LENGTHS)
    order = Order(store, DATA, PACKS_PER_STEP, seed=7)
    assert not store.opened
    order.next_step()
    assert store.opened


def test_work_is_dealt_more_evenly_than_in_canonical_order(streams):
    steps = [take(streams(rank, 4, 1, node_size=4), NUM_STEPS) for rank in (0, 1)]
    for mine, theirs in zip(*steps, strict=True):
        assert (mine.imbalance, mine.imbalance_undealt) == (theirs.imbalance, theirs.imbalance_undealt)
    undealt = sum(step.imbalance_undealt for step in steps[0])
    assert 1 <= sum(step.imbalance for step in steps[0]) / NUM_STEPS < undealt / NUM_STEPS - 0.05


def test_packs_of_an_order_are_those_of_its_stream(streams):
    store = MemoryStore(LENGTHS)
    order = Order(store, DATA, PACKS_PER_STEP, 7, RAMP)
    for step in take(streams(), NUM_STEPS):
        packs = order.next_step()
        assert step.packs == packs
        heaviest_first = sorted(
            packs, key=lambda pack: -attention_work(PackTable.of_packs([pack]))[0]
        )  # as one rank with one pack at a time
        for pack, batch in zip(heaviest_first, step.micro_batches, strict=True):
            parts = [
                store.document(store.sources[f.source], f.shard, f.row)[f.start : f.start + f.length] for f in pack
            ]
            assert batch.tokens[: batch.num_tokens].tolist() == np.concatenate(parts).tolist()
        assert step.position.cursor() == order.state()
        assert step.num_document_limited == sum(len(p) == 4 and sum(f.length for f in p) < 16 for p in packs)


def test_the_cursor_of_a_step_continues_after_that_step_however_far_ahead_the_thread_is(streams):
    steps = take(streams(rank=1, world_size=3, ahead=3), 12)
    for number in (0, 4, 10):
        again = streams(rank=1, world_size=3, state=steps[number].position.cursor())
        for expected, step in zip(steps[number + 1 :], again, strict=False):
            assert step.number == expected.number
            prints = [[batch.fingerprint() for batch in one.micro_batches] for one in (step, expected)]
            assert prints[0] == prints[1]
            assert step.position.cursor() == expected.position.cursor()


def test_the_thread_works_ahead_but_not_further_than_told(streams, monkeypatch):
    reads = sum(step.num_documents for step in take(streams(), 3))
    streams.close()
    store, planned, plan = CountingStore(), [], Order.next_packs
    monkeypatch.setattr(Order, "next_packs", lambda order: planned.append(order.step) or plan(order))
    stream = streams(store=store, ahead=2)
    patience = time.monotonic() + 30
    while store.reads < reads and time.monotonic() < patience:
        time.sleep(0.01)
    time.sleep(0.2)
    assert store.reads == reads  # of three steps: two ready, one in hand
    assert 3 <= len(planned) <= 3 + 2  # a window of 3 packs in each of 2 lanes, steps of 10 and 4 packs
    assert next(stream).number == 0


class FailingStore(MemoryStore):
    """Documents can be read until the count runs out."""

    def __init__(self, reads):
        super().__init__(LENGTHS)
        self.reads = reads

    def document(self, source, shard, row):
        self.reads -= 1
        if self.reads < 0:
            raise UserError("web/shard.00001.mds: sha256 differs from the manifest; prepare again")
        return super().document(source, shard, row)


def test_an_error_of_the_thread_is_raised_at_its_step_and_stays(streams):
    reads = sum(step.num_documents for step in take(streams(), 4))
    stream = streams(store=FailingStore(reads))
    assert [step.number for step in take(stream, 4)] == [0, 1, 2, 3]
    for _ in range(2):
        with pytest.raises(UserError, match="sha256 differs"):
            next(stream)


class StuckStore(MemoryStore):
    """The first read hangs until it is released."""

    def __init__(self):
        super().__init__(LENGTHS)
        self.released = threading.Event()

    def document(self, source, shard, row):
        self.released.wait(100)
        return super().document(source, shard, row)


def test_close_returns_while_a_read_hangs(streams, monkeypatch):
    monkeypatch.setattr(stream_module, "CLOSE_SECONDS", 0.2)
    store = StuckStore()
    stream = streams(store=store)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 50
    store.released.set()


def test_close_ends_the_thread_while_its_steps_are_not_taken(streams):
    before = set(threading.enumerate())
    stream = streams(ahead=1)
    time.sleep(0.2)
    assert "bigmodel-data" in {thread.name for thread in set(threading.enumerate()) - before}
    stream.close()
    stream.close()
    assert "bigmodel-data" not in {thread.name for thread in set(threading.enumerate()) - before}
    with pytest.raises(RuntimeError, match="the data stream is closed"):
        next(stream)


def test_waiting_is_measured(streams):
    store = StuckStore()
    stream = streams(store=store)
    threading.Timer(1.0, store.released.set).start()
    began = time.monotonic()
    next(stream)
    waited = stream.wait_seconds
    assert 0.1 < waited <= time.monotonic() - began
    time.sleep(0.3)
    next(stream)
    assert stream.wait_seconds < waited


def validation_positions(batches):
    """The tokens read, which are one to one with (source, shard, row, position)."""
    return [
        token
        for batch in batches
        for token, target in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True)
        if target != IGNORED
    ]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_validation_has_every_position_of_every_source_once_in_the_same_packs(size):
    store = MemoryStore(LENGTHS)
    batches = validation_batches(store, DATA, size)
    tokens = validation_positions(batches)
    assert len(tokens) == len(set(tokens)) == sum(len(corpus_positions(store, name)) for name in store.sources) > 0
    assert tokens == validation_positions(validation_batches(store, DATA.model_copy(update={"mix": {"web": 1.0}}), 1))
    assert {len(batch.tokens) for batch in batches} == {16 * size}
    dealt = [batch for rank in range(3) for batch in batches[rank::3]]
    assert sorted(batch.fingerprint() for batch in dealt) == sorted(batch.fingerprint() for batch in batches)


def test_a_few_validation_packs_are_a_fixed_part_of_all():
    store = MemoryStore(LENGTHS)
    everything = {tuple(validation_positions([batch])) for batch in validation_batches(store, DATA, 1)}
    few = [tuple(validation_positions([batch])) for batch in validation_batches(store, DATA, 1, max_packs=5)]
    assert len(few) == len(set(few)) == 5
    assert set(few) < everything
    assert len(validation_batches(store, DATA, 2, max_packs=5)) == 3
    assert len(validation_batches(store, DATA, 1, max_packs=10**6)) == len(everything)


def test_validation_without_documents_is_an_error():
    for lengths in ({}, {"web": [[1, 0]]}):
        with pytest.raises(UserError, match=r"no document of at least 2 tokens.*prepare\.validation_share"):
            validation_batches(MemoryStore(lengths), DATA, 1)
