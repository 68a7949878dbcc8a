"""Pairs with synthetic sources, as of back-translation: tagged, with a share of their own, no target in both splits."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bigmodel.config.settings import DataSettings, Settings
from bigmodel.data.objectives.examples import Pair
from bigmodel.data.plan.order import Order
from bigmodel.data.prepare.pipeline import prepare, quiet
from bigmodel.data.store.manifest import Manifest
from bigmodel.data.store.shards import ShardStore
from tests.support.tiny_corpus import text

TAG = "<BT> "


def write_pairs(folder: Path) -> dict[str, dict]:
    """200 targets with a source each; 150 of them also with a synthetic source, and one with an empty one."""
    rows = [{"mine": text(n), "theirs": text(400 + n) if n < 150 else "", "to": text(800 + n)[:80]} for n in range(200)]
    lines = {"human": rows, "synthetic": rows[:151]}
    for name, mine in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mine))
    files = {name: {"name": name, "files": [str(folder / f"{name}.jsonl")], "target_column": "to"} for name in lines}
    return {
        "human": files["human"] | {"column": "mine", "split_by": "target"},
        "synthetic": files["synthetic"] | {"column": "theirs", "tag": TAG, "split_by": "target"},
    }


def make(folder: Path, sources: list[dict]) -> Path:
    section = {"validation_share": 0.3, "vocabulary": 300, "workers": 1, "shard_tokens": 3000, "sources": sources}
    return prepare(Settings.model_validate({"prepare": section, "data": {"directory": str(folder / "data")}}), quiet())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tagged")
    return make(place, list(write_pairs(place).values()))


def pairs_of(folder: Path, split: str, source: str) -> list[tuple[str, str]]:
    store, found = ShardStore(folder, split), []
    for shard in range(store.num_shards(source)):
        for row in range(len(store.lengths(source, shard))):
            pair = store.document(source, shard, row)
            assert isinstance(pair, Pair)
            found.append((store.decode(pair.source), store.decode(pair.target)))
    return found


def test_each_source_text_of_a_tagged_source_begins_with_the_tag(folder: Path) -> None:
    for split in ("train", "validation"):
        synthetic, human = (pairs_of(folder, split, name) for name in ("synthetic", "human"))
        assert all(read.startswith((f"{TAG}Document 4", f"{TAG}Document 5")) for read, _ in synthetic)
        assert all(read.startswith("Document ") for read, _ in human)
        assert all(not said.startswith(TAG) for _, said in synthetic + human)
        assert len(synthetic) > 30
    assert Manifest.read(folder).rows["synthetic"]["empty"] == 1  # a tag alone is no source


def test_no_target_is_in_both_splits(folder: Path) -> None:
    targets = {
        split: {said for name in ("human", "synthetic") for _, said in pairs_of(folder, split, name)}
        for split in ("train", "validation")
    }
    assert not targets["train"] & targets["validation"]
    assert len(targets["train"] | targets["validation"]) == 200


def test_by_default_the_pair_decides_and_targets_may_be_in_both(tmp_path: Path) -> None:
    sources = write_pairs(tmp_path)
    made = make(tmp_path, [one | {"split_by": "pair"} for one in sources.values()])
    train, validation = (
        {said for name in sources for _, said in pairs_of(made, split, name)} for split in ("train", "validation")
    )
    assert train & validation
    assert "split_by" not in Manifest.read(made).recipe["sources"][0]


def test_the_synthetic_source_has_its_own_share(folder: Path) -> None:
    data = DataSettings(
        max_document_length=80,
        sequence_length=128,
        source_sequence_length=256,
        packing_buffer=20,
        mix={"human": 0.75, "synthetic": 0.25},
    )
    store, given = ShardStore(folder, "train"), Counter()
    order = Order(store, data, 4, 1)
    for _ in range(60):
        for chunk in (chunk for pack in order.next_step() for chunk in pack):
            given[store.sources[chunk.source]] += chunk.length
    assert np.isclose(given["synthetic"] / given.total(), 0.25, atol=0.03)
