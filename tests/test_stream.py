import json
import threading
import time

import numpy as np
import pytest

from bigmodel.config import DataSettings, UserError
from bigmodel.data import stream as stream_module
from bigmodel.data.batch import IGNORED
from bigmodel.data.order import Order
from bigmodel.data.stream import Stream, num_micro_batches, share, validation_batches
from tests.memory_store import MemoryStore, corpus_positions

LENGTHS = {
    "books": [[61, 2, 30], [45, 9], [20, 1, 0, 33, 8]],
    "web": [[5, 7, 3, 12, 9, 2, 4], [6, 6, 18, 2], [25], [3, 3, 11, 5]],
}
DATA = DataSettings(context_tokens=13, pack_tokens=16, pack_documents=4, lanes=2, window_packs=3)
PACKS_PER_STEP = 10
NUM_STEPS = 6


class Streams:
    """Makes streams and closes them at the end of a test."""

    def __init__(self):
        self._open = []

    def __call__(self, rank=0, world_size=1, packs_per_micro_batch=1, store=None, state=None, **changes):
        store = store or MemoryStore(LENGTHS)
        order = Order(store, DATA, PACKS_PER_STEP, seed=7)
        if state:
            order.restore(json.loads(json.dumps(state)))
        stream = Stream(store, order, DATA, packs_per_micro_batch, rank, world_size, seed=7, **changes)
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
    size, offsets = len(batch.tokens) // num_packs, batch.offsets.tolist()
    return [
        (
            *(
                getattr(batch, name)[place : place + size].tolist()
                for name in ("tokens", "targets", "positions", "keys")
            ),
            sorted({offset - place for offset in offsets if place <= offset <= place + size}),
        )
        for place in range(0, size * num_packs, size)
    ]


def is_empty(pack):
    return all(target == IGNORED for target in pack[1])


def test_shares_are_contiguous_and_cover_every_pack_once():
    assert [share(10, rank, 4) for rank in range(4)] == [range(3), range(3, 6), range(6, 9), range(9, 10)]
    assert [list(share(3, rank, 8)) for rank in range(8)] == [[0], [1], [2], [], [], [], [], []]
    for packs in range(1, 30):
        for world_size in range(1, 12):
            assert [n for rank in range(world_size) for n in share(packs, rank, world_size)] == list(range(packs))


def test_every_rank_has_the_micro_batches_of_the_fullest():
    assert num_micro_batches(10, world_size=4, packs_per_micro_batch=2) == 2
    assert num_micro_batches(10, world_size=1, packs_per_micro_batch=3) == 4
    assert num_micro_batches(1, world_size=8, packs_per_micro_batch=3) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_a_step_is_the_same_bytes_at_every_world_size_and_micro_batch_size(streams, world_size):
    reference = [[cut(batch, 1)[0] for batch in step.micro_batches] for step in take(streams(), NUM_STEPS)]
    assert [len(packs) for packs in reference] == [PACKS_PER_STEP] * NUM_STEPS
    assert not any(is_empty(pack) for packs in reference for pack in packs)
    for size in (1, 2, 3):
        ranks = [take(streams(rank, world_size, size), NUM_STEPS) for rank in range(world_size)]
        for number, packs in enumerate(reference):
            steps = [rank[number] for rank in ranks]
            merged = [pack for step in steps for batch in step.micro_batches for pack in cut(batch, size)]
            assert [pack for pack in merged if not is_empty(pack)] == packs
            batches = [batch for step in steps for batch in step.micro_batches]
            assert {len(step.micro_batches) for step in steps} == {num_micro_batches(PACKS_PER_STEP, world_size, size)}
            for step in steps:
                assert step.number == number
                assert step.num_targets == sum(batch.num_targets for batch in batches)
                assert step.num_positions == sum(batch.num_positions for batch in batches)
                assert step.num_documents == sum(batch.num_documents for batch in batches)
                assert step.num_padding == sum(int((batch.targets == IGNORED).sum()) for batch in batches)
                assert step.cursor == steps[0].cursor


def test_packs_of_an_order_are_those_of_its_stream(streams):
    store = MemoryStore(LENGTHS)
    order = Order(store, DATA, PACKS_PER_STEP, seed=7)
    for step in take(streams(), NUM_STEPS):
        packs = order.next_step()
        for pack, batch in zip(packs, step.micro_batches, strict=True):
            parts = [
                store.document(store.sources[f.source], f.shard, f.row)[f.start : f.start + f.length] for f in pack
            ]
            assert batch.tokens[: batch.num_positions].tolist() == np.concatenate(parts).tolist()
        assert step.progress == order.progress()
        assert step.num_document_limited == sum(len(p) == 4 and sum(f.length for f in p) < 16 for p in packs)


def test_the_cursor_of_a_step_continues_after_that_step_however_far_ahead_the_thread_is(streams):
    stream = streams(ahead=3)
    steps = take(stream, 12)
    for number in (0, 4, 10):
        again = streams(rank=1, world_size=3, state=steps[number].cursor)
        for expected, step in zip(steps[number + 1 :], again, strict=False):
            assert step.number == expected.number
            mine = [batch.fingerprint() for batch in step.micro_batches]
            theirs = [batch.fingerprint() for batch in expected.micro_batches]
            assert mine[:4] == theirs[4:8]
            assert step.cursor == expected.cursor


def test_the_thread_works_ahead_but_not_further_than_told(streams):
    stream = streams(ahead=2)
    patience = time.monotonic() + 30
    while stream._order.step < 3 and time.monotonic() < patience:
        time.sleep(0.01)
    time.sleep(0.2)
    assert stream._order.step == 3  # two ready, one in hand
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
        self.released.wait(30)
        return super().document(source, shard, row)


def test_close_returns_while_a_read_hangs(streams, monkeypatch):
    monkeypatch.setattr(stream_module, "CLOSE_SECONDS", 0.2)
    store = StuckStore()
    stream = streams(store=store)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 2
    store.released.set()


def test_close_ends_the_thread_while_its_steps_are_not_taken(streams):
    stream = streams(ahead=1)
    time.sleep(0.2)
    stream.close()
    stream.close()
    assert not stream._thread.is_alive()
    with pytest.raises(RuntimeError, match="the data stream is closed"):
        next(stream)


def test_waiting_is_measured(streams):
    store = StuckStore()
    stream = streams(store=store)
    threading.Timer(0.3, store.released.set).start()
    next(stream)
    waited = stream.wait_seconds
    assert 0.1 < waited < 30
    time.sleep(0.3)
    next(stream)
    assert stream.wait_seconds < waited


def validation_positions(batches):
    """The tokens read, which are one to one with (source, shard, row, position)."""
    return [
        token
        for batch in batches
        for token, target in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)
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
