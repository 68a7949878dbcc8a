"""Shards and texts are ready before they are read: texts give the bytes of tokens, faults keep their place."""

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigmodel.config.settings import DataSettings, UserError
from bigmodel.config.user_error import MachineError
from bigmodel.data.load import stream as stream_module
from bigmodel.data.load.readahead import ReadAhead
from bigmodel.data.load.stream import Stream, validation_batches
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.sharing import Place
from bigmodel.data.prepare.pipeline import quiet
from bigmodel.data.prepare.verify import verify
from bigmodel.data.store.shards import ShardStore
from bigmodel.data.store.tokenizer import Tokenizer
from tests.support.tiny_corpus import prepared

DATA = DataSettings(max_document_length=40, sequence_length=64, max_documents=8, lanes=2, packing_buffer=12)
PACKS_PER_STEP, STEPS = 8, 12


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("texts"), content="text")


def make(
    folder: Path, rank: int = 0, ranks: int = 1, state=None, workers: int = 2, data: DataSettings = DATA
) -> Stream:
    store = ShardStore(folder, "train")
    order = Order(store, data, PACKS_PER_STEP, 5)
    if state:
        order.restore({**state, "fingerprint": order.fingerprint, "identity": order.plan.identity})
    return Stream(store, order, data.model_copy(update={"workers": workers}), 1, Place(rank, ranks), 5)


def take(stream: Stream, steps: int) -> tuple[list[list[str]], list[dict]]:
    """The fingerprints of each step's batches, and the cursors."""
    taken = [next(stream) for _ in range(steps)]
    stream.close()
    return [[batch.fingerprint() for batch in step.micro_batches] for step in taken], [
        s.position.cursor() for s in taken
    ]


# ---- text -----------------------------------------------------------------------------------------------------


def test_text_shards_hold_the_same_documents_cut_at_the_same_places(tokens: Path, texts: Path) -> None:
    for split in ("train", "validation"):
        ours, theirs = ShardStore(texts, split), ShardStore(tokens, split)
        for source in theirs.sources:
            assert ours.is_text(source)
            assert not theirs.is_text(source)
            assert ours.shard_sizes(source).tolist() == theirs.shard_sizes(source).tolist()
            for shard in range(theirs.num_shards(source)):
                lengths = theirs.lengths(source, shard)
                assert ours.lengths(source, shard).tolist() == lengths.tolist()
                for row in range(len(lengths)):
                    mine, other = ours.document(source, shard, row), theirs.document(source, shard, row)
                    assert mine.tolist() == other.tolist()
                    assert mine.dtype == other.dtype
    assert sum(path.stat().st_size for path in texts.rglob("*.mds")) > 10_000
    assert b"Document 7:" in b"".join(path.read_bytes() for path in texts.rglob("*.mds"))


def test_batches_of_text_shards_are_those_of_token_shards_at_any_number_of_workers_and_ranks(
    tokens: Path, texts: Path
) -> None:
    expected, cursors = take(make(tokens), STEPS)
    for workers in (1, 3):
        assert take(make(texts, workers=workers), STEPS)[0] == expected
    of_ranks = [take(make(texts, rank, 3, workers=1), STEPS)[0] for rank in range(3)]
    empty = {print_ for rank in of_ranks for step in rank for print_ in step} - {p for step in expected for p in step}
    together = [sorted({p for rank in of_ranks for p in rank[number]} - empty) for number in range(STEPS)]
    assert together == [sorted(step) for step in expected]
    for at in (0, 4, STEPS - 2):  # the cursor of one goes on in the other: the plan is the same
        assert take(make(texts, state=cursors[at]), STEPS - at - 1)[0] == expected[at + 1 :]
    groups = [validation_batches(ShardStore(folder, "validation"), DATA, 2) for folder in (tokens, texts)]
    assert [b.fingerprint() for b in groups[0]] == [b.fingerprint() for b in groups[1]]


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that is tokenized from here on."""
    seen: list[str] = []
    encode = Tokenizer.encode_document
    monkeypatch.setattr(Tokenizer, "encode_document", lambda self, text: seen.append(text) or encode(self, text))
    return seen


def documents_of(folder: Path, first: int, end: int) -> list[tuple[int, int, int]]:
    """The documents in these steps, each as often as chunks of it are there."""
    order = Order(ShardStore(folder, "train"), DATA, PACKS_PER_STEP, 5)
    steps = [order.next_step() for _ in range(end)][first:]
    return [chunk[:3] for step in steps for pack in step for chunk in pack]


def test_going_on_tokenizes_a_window_at_most_and_each_document_once(texts: Path, tokenized: list[str]) -> None:
    _, cursors = take(make(texts), 9)
    window = DATA.packing_buffer * DATA.lanes // PACKS_PER_STEP
    tokenized.clear()
    stream = make(texts, state=cursors[8])
    next(stream)
    time.sleep(0.5)  # the threads work on
    stream.close()
    made = 1 + 2 + 1  # taken, ready, in hand
    wanted = documents_of(texts, 9, 9 + made + window + 1)
    assert len(set(documents_of(texts, 9, 10))) <= len(tokenized) <= len(set(wanted))
    assert len(set(wanted)) < len(wanted)  # some are in several packs
    assert len(tokenized) == len(set(tokenized))


class CountingStore(ShardStore):
    """Remembers which documents it was asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "train")
        self.asked: list[tuple[str, int, int]] = []

    def document(self, source: str, shard: int, row: int) -> Any:
        self.asked.append((source, shard, row))
        return super().document(source, shard, row)


def test_documents_are_tokenized_ahead_and_forgotten_after_their_last_piece(texts: Path) -> None:
    store = CountingStore(texts)
    ahead = ReadAhead(store, workers=1)
    first, second = ("news", 0, 3), ("news", 1, 4)
    ahead.expect([first[:2]], [first, second, first])
    deadline = time.monotonic() + 30
    while len(store.asked) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert store.asked == [first, second]
    documents = [ahead.document(*one) for one in (first, second, first)]
    assert store.asked == [first, second]
    assert documents[0].tolist() == documents[2].tolist() != documents[1].tolist()
    ahead.document(*second)  # forgotten, so unexpected: read all the same
    assert store.asked == [first, second, second]
    ahead.close()


def test_pieces_read_without_warning_are_tokenized_once(texts: Path, tokenized: list[str]) -> None:
    store = ShardStore(texts, "validation")
    groups = validation_batches(store, DATA, 2)
    assert [batch.num_tokens > 0 for batch in groups]
    assert len(tokenized) == store.num_documents


def test_another_tokenizer_library_is_an_error_and_never_other_tokens(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: np.append(encode(self, text), np.uint32(5)))
    with pytest.raises(
        UserError, match=r"shard\.0000\d\.mds: document \d+ is \d+ tokens, its length file says \d+: this"
    ):
        next(make(texts))


def test_verify_counts_the_tokens_of_texts(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify(str(texts), quiet()) == []
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: np.append(encode(self, text), np.uint32(5)))
    problems = verify(str(texts), quiet())
    assert any("lengths in tokens are not those of lengths.00000.npy" in problem for problem in problems)


# ---- faults ---------------------------------------------------------------------------------------------------


class FailingStore(ShardStore):
    """One shard cannot be opened, one document cannot be read."""

    def __init__(self, folder: Path, broken: tuple[int, int]) -> None:
        super().__init__(folder, "train")
        self.broken = broken

    def document(self, source: str, shard: int, row: int) -> np.ndarray:
        if source == "news" and (shard, row) == self.broken:
            raise UserError(f"{source} {shard} {row}: broken")
        return super().document(source, shard, row)


@pytest.mark.parametrize("kind", ["tokens", "texts"])
def test_an_error_met_ahead_is_raised_at_the_step_that_needs_the_document(
    kind: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    order = Order(ShardStore(folder, "train"), DATA, PACKS_PER_STEP, 5)
    first_seen: dict[tuple[int, int], int] = {}
    news = order.plan and ShardStore(folder, "train").sources.index("news")
    for number in range(STEPS):
        for chunk in (chunk for pack in order.next_step() for chunk in pack):
            if chunk.source == news:
                first_seen.setdefault((chunk.shard, chunk.row), number)
    broken, step = next((key, number) for key, number in first_seen.items() if number == 5)
    store = FailingStore(folder, broken)
    stream = Stream(store, Order(store, DATA, PACKS_PER_STEP, 5), DATA, 1, Place(0, 1), 5)
    assert [next(stream).number for _ in range(step)] == list(range(5))
    for _ in range(2):
        with pytest.raises(UserError, match="broken"):
            next(stream)
    stream.close()


@pytest.mark.parametrize("name", ["shard.00001.mds", "lengths.00001.npy", "index.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
@pytest.mark.parametrize("kind", ["tokens", "texts"])
def test_a_damaged_file_ends_the_stream_with_its_name_and_never_early(
    kind: str, damage: str, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "data"))
    path = folder / "train" / "news" / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes(bytes(content) if damage == "flipped" else bytes(content[:-7]))
    expected, _ = take(make(request.getfixturevalue(kind)), STEPS)
    stream, taken = make(folder), []
    with pytest.raises(UserError, match=rf"train/news/{name}: .*(copy the file again|prepare)"):
        taken.extend(stream)
    stream.close()
    assert len(taken) < STEPS
    assert [[batch.fingerprint() for batch in step.micro_batches] for step in taken] == expected[: len(taken)]


def test_the_end_of_the_data_is_an_error_at_its_step_and_every_step_before_it_is_given(tokens: Path) -> None:
    data = DATA.model_copy(update={"max_epochs": {"news": 1, "letters": 1}})
    order = Order(ShardStore(tokens, "train"), data, PACKS_PER_STEP, 5)
    with pytest.raises(UserError, match="has no packed sequence left"):
        list(iter(order.next_step, []))
    steps = order.step
    assert steps > 12
    stream, taken = make(tokens, data=data), []
    with pytest.raises(UserError, match=f"has no packed sequence left for step {steps + 1}"):
        taken.extend(stream)
    assert len(taken) == steps
    stream.close()


class StalledStore(ShardStore):
    """A read that never returns, as of a file system that does not answer; from the n-th document on."""

    def __init__(self, folder: Path, reads: int) -> None:
        super().__init__(folder, "train")
        self.reads, self.released = reads, threading.Event()

    def document(self, source: str, shard: int, row: int) -> np.ndarray:
        self.reads -= 1
        if self.reads < 0:
            self.released.wait(60)
        return super().document(source, shard, row)


@pytest.mark.parametrize("kind", ["tokens", "texts"])
def test_a_stalled_worker_is_an_error_in_time_that_says_what_it_reads(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "CLOSE_SECONDS", 0.1)
    store = StalledStore(request.getfixturevalue(kind), 40)
    data = DATA.model_copy(update={"stall_seconds": 1.0})
    stream = Stream(store, Order(store, data, PACKS_PER_STEP, 5), data, 1, Place(0, 1), 5)
    began, taken = time.monotonic(), []
    with pytest.raises(MachineError, match=r"stall_seconds = 1: .*reading document \d+ of shard \d+ of source '\w+'"):
        taken.extend(stream)
    assert len(taken) < STEPS
    assert time.monotonic() - began < 20
    stream.close()
    assert time.monotonic() - began < 25
    store.released.set()


def test_a_dead_data_thread_is_an_error_and_no_hang(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "run", lambda self: None)
    with pytest.raises(RuntimeError, match="the data thread ended"):
        next(make(tokens))
