"""Random segmentations and noise in training: lengths known before, each token once a pass, the same on any ranks."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bigmodel.config.settings import DataSettings, UserError
from bigmodel.data.load.stream import Stream, place_of, validation_batches
from bigmodel.data.objectives.examples import Pair
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.sharing import Place
from bigmodel.data.plan.shuffle import Chunk
from bigmodel.data.prepare.pipeline import prepare, quiet
from bigmodel.data.prepare.verify import verify
from bigmodel.data.store.manifest import Manifest
from bigmodel.data.store.shards import ShardStore
from tests.support.tiny_corpus import NEWS, prepared, tiny_settings, write_sources

DATA = DataSettings(
    max_document_length=40, sequence_length=64, source_sequence_length=96, max_documents=8, lanes=2, packing_buffer=4
)
NOISE = [{"kind": "drop_tokens", "share": 0.2}, {"kind": "mask_tokens", "share": 0.2}]
DATA = DATA.model_validate(DATA.model_dump() | {"objectives": [{"kind": "causal"}], "augmentation": NOISE})
DROPOUT = {"kind": "bpe_dropout", "dropout": 0.3, "passes": 2}


def sources(folder: Path) -> list[dict]:
    """Plain news, pairs, and labelled texts."""
    news = write_sources(folder)[0]
    rows = [{"text": f"{text} again", "target": f"{text[:200]}!", "class": text[9:10]} for text in NEWS[:40]]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"files": [str(folder / "pairs.jsonl")]}
    labelled = files | {"name": "labelled", "column": "target", "label_column": "class"}
    return [news, files | {"name": "pairs", "target_column": "target"}, labelled]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("segmented")
    return prepared(place, content="text", segmentation=DROPOUT, sources=sources(place / "text"), shard_tokens=1000)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("plain")
    return prepared(place, content="text", sources=sources(place / "text"), shard_tokens=1000)


def make(folder: Path, rank: int = 0, ranks: int = 1, state: dict | None = None) -> Stream:
    store = ShardStore(folder, "train")
    order = Order(store, DATA, 8, 5)
    if state:
        order.restore(state)
    return Stream(store, order, DATA, 1, Place(rank, ranks), 5)


def take(stream: Stream, steps: int) -> tuple[list[list[str]], list[dict]]:
    taken = [next(stream) for _ in range(steps)]
    stream.close()
    prints = [sorted(batch.fingerprint() for batch in step.micro_batches) for step in taken]
    return prints, [step.position.cursor() for step in taken]


def test_the_plan_knows_the_lengths_of_each_pass_and_the_text_stays(folder: Path) -> None:
    store, tokenizer = ShardStore(folder, "train"), ShardStore(folder, "train").decode
    assert (store.passes, store.sources) == (2, ["labelled", "news", "pairs"])
    grown = []
    for source in store.sources:
        for shard in range(store.num_shards(source)):
            for row, length in enumerate(store.lengths(source, shard).tolist()):
                given = store.document(source, shard, row)
                for number in (0, 1):
                    drawn = store.document(source, shard, row, number)
                    sides = [("", drawn, given)]
                    if isinstance(drawn, Pair):
                        sides = [("", drawn.source, given.source), ("target_", drawn.target, given.target)]
                    for side, ids, own in sides:
                        assert len(ids) == store.lengths_of_pass(source, shard, number, side)[row]
                        assert tokenizer(ids) == tokenizer(own)
                    if source == "labelled":
                        assert drawn.target.tolist() == given.target.tolist()
                    grown.append(len(sides[0][1]) / length)
                    again = store.document(source, shard, row, number + 2)
                    assert np.array_equal(again.source if isinstance(again, Pair) else again, sides[0][1])
    assert 1.1 < np.mean(grown) < 3


def test_each_token_of_each_pass_is_given_once(folder: Path) -> None:
    store = ShardStore(folder, "train")
    order, seen, ends = Order(store, DATA, 8, 5), Counter(), Counter()
    while min(source.epochs_complete for source in order.progress().values()) < 2:
        for chunk in (chunk for pack in order.next_step() for chunk in pack):
            seen[chunk.epoch, chunk.source, chunk.shard, chunk.row, chunk.start] += 1
            ends[chunk.epoch, chunk.source, chunk.shard, chunk.row] += chunk.length
    assert set(seen.values()) == {1}
    places = {place for place in ends if place[0] < 2}
    documents = sum(len(store.lengths(name, n)) for name in store.sources for n in range(store.num_shards(name)))
    assert len(places) == 2 * documents
    for epoch, source, shard, row in places:
        lengths = store.lengths_of_pass(store.sources[source], shard, epoch)
        assert ends[epoch, source, shard, row] == lengths[row] - 1
    chunk = Chunk(store.sources.index("news"), 0, 3, 0, 5, epoch=5)
    assert place_of(store, chunk) == ("news", 0, 3, 1)
    first, second = (store.document("news", 0, 3, number) for number in (0, 1))
    assert first.tolist() != second.tolist()


def test_batches_are_the_same_on_any_ranks_and_after_a_resume(folder: Path, plain: Path) -> None:
    steps = 12
    alone, cursors = take(make(folder), steps)
    halves = [take(make(folder, rank, 2), steps)[0] for rank in (0, 1)]
    assert [sorted(one + other) for one, other in zip(*halves, strict=True)] == alone
    assert take(make(folder, state=cursors[4]), steps - 5)[0] == alone[5:]
    assert take(make(plain), 2)[0] != alone[:2]
    with pytest.raises(UserError, match="prepared data"):
        make(plain, state=cursors[4])


def test_validation_has_the_tokenizers_own_ids(folder: Path, plain: Path) -> None:
    groups = [validation_batches(ShardStore(one, "validation"), DATA, 2) for one in (folder, plain)]
    assert [batch.fingerprint() for batch in groups[0]] == [batch.fingerprint() for batch in groups[1]]
    assert ShardStore(folder, "validation").passes == 0


def test_the_folder_is_whole_and_stays_with_its_settings(folder: Path, plain: Path) -> None:
    assert verify(str(folder), quiet()) == []
    assert "segmentation" not in Manifest.read(plain).recipe
    same = {"content": "text", "sources": sources(folder.parent / "text"), "shard_tokens": 1000}
    before = (folder / "manifest.json").stat().st_mtime_ns
    prepare(tiny_settings(folder.parent, segmentation=DROPOUT, **same), quiet())
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"prepare.segmentation was \{.*, is None"):
        prepare(tiny_settings(folder.parent, **same), quiet())


def test_lengths_of_another_tokenizer_version_are_noticed(folder: Path) -> None:
    store = ShardStore(folder, "train")
    store.manifest.recipe["segmentation"]["seed"] = 7  # as if the draws had changed
    with pytest.raises(UserError, match=r"document \d+ is \d+ tokens, its length file says \d+"):
        [store.document("news", 0, row, 0) for row in range(20)]


def test_a_tokenizer_that_cannot_be_segmented_so_is_refused_before_any_text_is_tokenized(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'kind = "unigram_sampling" needs a tokenizer whose model is Unigram'):
        prepared(tmp_path, content="text", segmentation={"kind": "unigram_sampling"})
    assert not (tmp_path / "data").exists()
