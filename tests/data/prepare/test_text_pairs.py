"""Pairs in shards of text beside plain text, on disk: what several stages make of them together."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bigmodel.config.settings import DataSettings, Settings, UserError
from bigmodel.data.advice.packing_advice import measure_packing
from bigmodel.data.advice.pair_advice import suggest_budgets
from bigmodel.data.load.stream import Step, Stream, validation_batches
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.sharing import Place
from bigmodel.data.prepare.adopt import Adoption, find_column
from bigmodel.data.prepare.pipeline import prepare, quiet
from bigmodel.data.prepare.verify import verify
from bigmodel.data.store.manifest import TOKENIZER_FILES, Manifest
from bigmodel.data.store.remote import Remote
from bigmodel.data.store.shards import ShardStore
from bigmodel.inspect.show import sources_table
from bigmodel.training.summary import xz_of_validation_text
from tests.data.prepare.test_verify import flip_a_bit
from tests.support.tiny_corpus import text

STEPS, PACKS_PER_STEP = 24, 4
ONE_SIDE: dict[str, Any] = {
    "max_document_length": 60, "sequence_length": 128, "max_documents": 8, "lanes": 2, "packing_buffer": 6,
}  # fmt: skip
TWO_SIDES = ONE_SIDE | {"source_sequence_length": 256, "max_source_length": 100}
CASES = {
    "decoder": ONE_SIDE | {"mix": {"pairs": 0.7, "web": 0.3}},
    "encoder_decoder": TWO_SIDES,
    "objectives_and_stages": TWO_SIDES
    | {
        "objectives": [{"kind": "ul2"}, {"kind": "causal", "ahead": 2}],
        "curriculum": [{"from_tokens": 3000, "mix": {"pairs": 0.2, "web": 0.8}}],
    },
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokens, texts: 120 pairs and 80 plain documents, as shards of either. named: plain text in shards of text, by a
    tokenizer beside which a file says what begins a document."""
    folder = tmp_path_factory.mktemp("pairs")
    pairs = [{"a": text(n), "b": text(1000 + 3 * n)[: 60 + n % 90]} for n in range(120)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "web.jsonl").write_text("".join(json.dumps({"text": text(500 + n)}) + "\n" for n in range(80)))
    of_pairs = {"name": "pairs", "files": [str(folder / "pairs.jsonl")], "column": "a", "target_column": "b"}
    web = {"name": "web", "files": [str(folder / "web.jsonl")]}
    make(folder / "tokens", sources=[of_pairs, web], vocabulary=300)
    make(folder / "texts", sources=[of_pairs, web], vocabulary=300, content="text")
    (folder / "given").mkdir()
    shutil.copy(folder / "texts" / "tokenizer.json", folder / "given")
    (folder / "given" / "tokenizer_config.json").write_text('{"bos_token": "<|eos|>", "eos_token": "<|eos|>"}')
    make(folder / "named", sources=[web], tokenizer=str(folder / "given"), content="text")
    return folder


def make(folder: Path, **section: Any) -> None:
    section |= {"validation_share": 0.2, "shard_tokens": 3000, "workers": 1}
    prepare(Settings.model_validate({"prepare": section, "data": {"directory": str(folder)}}), quiet())


def steps_of(store: ShardStore, data: DataSettings, place: Place, stop_at: int = 0) -> list[Step]:
    """Real steps of a rank; `stop_at`: those after are of a stream that goes on from the cursor."""
    order, taken = Order(store, data, PACKS_PER_STEP, 5), []
    for first, end in ((0, stop_at), (stop_at, STEPS)):
        if first == end:
            continue
        if taken:
            cursor = taken[-1].position.cursor()
            order = Order(store, data, PACKS_PER_STEP, 5)
            order.restore(json.loads(json.dumps(cursor)))
        stream = Stream(store, order, data, 1, place, 5)
        taken += [next(stream) for _ in range(first, end)]
        stream.close()
    return taken


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_steps_of_text_pairs_are_those_of_token_pairs_at_any_world_size_past_an_epoch(
    home: Path, settings: dict[str, Any]
) -> None:
    data, seen = DataSettings(**settings), {}
    for folder, size, node_size, stop_at in (
        ("tokens", 1, 1, 0), ("texts", 1, 1, 0), ("texts", 2, 1, 9), ("texts", 4, 2, 13),
    ):  # fmt: skip
        prints: dict[int, list[str]] = {}
        for rank in range(size):
            store = ShardStore(home / folder, "train")
            assert store.is_text("pairs") == store.is_text("web") == (folder == "texts")
            for step in steps_of(store, data, Place(rank, size, node_size), stop_at):
                batches = [batch.fingerprint() for batch in step.micro_batches if batch.num_documents]
                prints.setdefault(step.number, []).extend(batches)
        seen[folder, size] = json.dumps({number: sorted(found) for number, found in prints.items()})
    assert len(set(seen.values())) == 1
    given: Counter = Counter()
    for step in steps_of(store, data, Place(0, 1)):
        given.update((*piece[:4], piece.epoch) for pack in step.packs for piece in pack)
    assert set(given.values()) == {1}
    whole = [
        name
        for source, name in enumerate(store.sources)
        if len({piece[:3] for piece in given if piece[0] == source and piece[4] == 0})
        == store.manifest.counts[name]["train"]["documents"]
        and any(piece[0] == source and piece[4] > 0 for piece in given)
    ]
    assert whole, "no source came past its first epoch"
    groups = [validation_batches(ShardStore(home / name, "validation"), data, 2) for name in ("tokens", "texts")]
    assert [batch.fingerprint() for batch in groups[0]] == [batch.fingerprint() for batch in groups[1]]


# ---- verify, and what begins a document -----------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_verify_names_a_damaged_tokenizer_once_and_counts_no_tokens_by_it(
    home: Path, tmp_path: Path, damage: str
) -> None:
    assert verify(str(home / "texts"), quiet()) == []
    folder = Path(shutil.copytree(home / "texts", tmp_path / "data"))
    path = folder / "tokenizer.json"
    if damage == "flip":
        flip_a_bit(path, path.stat().st_size // 2)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    (problem,) = verify(str(folder), quiet())
    assert problem.startswith(f"{path}: ")


def test_what_begins_a_document_cannot_be_lost_or_changed_unseen(home: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(home / "named", tmp_path / "data"))
    document = ShardStore(folder, "train").document("web", 0, 0)
    assert document[0] == document[-1] == 1
    path = folder / TOKENIZER_FILES[1]
    path.write_text(path.read_text().replace('"bos_token": "<|eos|>"', '"bos_token": "<|bos|>"'))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: its content differs from the manifest"):
        ShardStore(folder, "train")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][path.name]["sha256"] = "0" * 64
    changed = Manifest.parse(json.dumps(manifest).encode(), "changed")
    one, other = (ShardStore(home / "named", "train") for _ in range(2))
    other.manifest = changed
    assert one.fingerprint != other.fingerprint
    path.unlink()
    with pytest.raises(UserError, match=r"tokenizer_config\.json: missing"):
        ShardStore(folder, "train")


# ---- a node that fetches them ----------------------------------------------------------------------------------


def test_a_node_with_a_small_cache_fetches_pairs_with_both_lengths_and_gives_the_same_steps(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = DataSettings(**TWO_SIDES)
    url, sizes = f"file://{home / 'texts'}", [path.stat().st_size for path in (home / "texts").rglob("*.mds")]
    node = ShardStore(tmp_path / "node", "train", url, cache_bytes=2 * max(sizes))
    here = ShardStore(home / "texts", "train")
    expected, found = (
        [[batch.fingerprint() for batch in step.micro_batches] for step in steps_of(store, data, Place(0, 1))]
        for store in (here, node)
    )
    assert found == expected
    assert node.remote
    assert 0 < node.remote.num_deleted < node.remote.num_files
    assert (tmp_path / "node" / "train" / "pairs" / "target_lengths.00000.npy").exists()
    assert "raise it" in caplog.text


def test_a_shard_that_another_thread_deleted_first_is_not_counted(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, sizes = f"file://{home / 'texts'}", [path.stat().st_size for path in (home / "texts").rglob("*.mds")]
    store = ShardStore(tmp_path / "node", "train", url, cache_bytes=max(sizes))
    monkeypatch.setattr(Remote, "has", lambda self, name: (self.directory / name).unlink() is None)
    store.open_shard("pairs", 0)
    store.open_shard("pairs", 1)
    assert not (tmp_path / "node" / "train" / "pairs" / "shard.00000.mds").exists()
    assert store.remote
    assert store.remote.num_deleted == 0


# ---- what is told of pairs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["tokens", "texts"])
def test_pairs_are_not_adopted_by_one_side_unasked(home: Path, content: str) -> None:
    folder = str(home / content / "train" / "pairs")
    column = "text" if content == "texts" else "tokens"
    with pytest.raises(
        UserError, match=f"holds pairs, '{column}' with 'target_{column}', but only one column can be adopted"
    ):
        find_column(Adoption(folder, home / "into", home / "given"))
    assert find_column(Adoption(folder, home / "into", home / "given", column=column))[0] == column


def test_the_table_of_sources_counts_both_sides_of_pairs_and_the_passes_of_the_plan(home: Path) -> None:
    store, data = ShardStore(home / "texts", "train"), DataSettings(**TWO_SIDES)
    table = {"data": data.model_dump(), "model": {"kind": "encoder_decoder"}, "schedule": {"warmup_steps": 0}}
    table |= {"training": {"steps": 24, "global_batch_size": 4, "batch_ramp": [[20, 8]]}}
    drawn = sources_table(Settings.model_validate(table), store.manifest, measure_packing(store, data))
    cells = {column.header: list(column.cells)[0] for column in drawn.columns}  # noqa: RUF015
    counts = store.manifest.counts["pairs"]["train"]
    assert (cells["source"], cells["split"]) == ("pairs", "train")
    assert cells["tokens"] == f"{counts['tokens'] + counts['target_tokens']:,}"
    order = Order(store, data, 4, 1, [(20, 8)])
    for _ in range(24):
        order.next_step()
    assert abs(float(cells["passes"]) - order.progress()["pairs"].passes) < 0.1 < 0.5 < float(cells["passes"])


def test_an_encoder_that_would_read_nothing_is_said(home: Path) -> None:
    for name, mix in (("named", {}), ("texts", {"web": 1.0})):
        data = DataSettings(**TWO_SIDES, objectives=[{"kind": "causal"}], mix=mix)
        with pytest.raises(UserError, match=r"data\.objectives = causal: none gives the encoder a source"):
            suggest_budgets(ShardStore(home / name, "train"), data)


def test_xz_is_a_mark_of_models_that_are_asked_for_the_whole_text(home: Path) -> None:
    def mark(name: str, **data: Any) -> float | None:
        return xz_of_validation_text(Settings.model_validate({"data": {"directory": str(home / name)} | data}))

    assert 0.1 < (mark("named") or 0) < 8
    assert mark("named", objectives=[{"kind": "span_corruption"}]) is None
    assert mark("tokens") is None  # pairs


def test_shards_of_a_version_that_knew_no_shards_of_text_are_still_what_is_asked_for(
    home: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(home / "tokens", tmp_path / "tokens"))
    manifest = Manifest.read(folder)
    assert manifest.recipe.pop("content") == "tokens"
    manifest.write(folder)
    sources = manifest.recipe["sources"]
    made = (folder / "manifest.json").read_bytes()
    make(folder, sources=sources, vocabulary=300)
    assert (folder / "manifest.json").read_bytes() == made
    with pytest.raises(
        UserError, match=r"already prepared from other text or settings \(prepare.content was 'tokens', is 'text'\)"
    ):
        make(folder, sources=sources, vocabulary=300, content="text")
