"""The plan says what a run reads: as the run's own order counts it, and as it is read on this machine."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from bigmodel.config.settings import Settings, UserError
from bigmodel.data.advice.packing_advice import measure_packing
from bigmodel.data.plan.mixing import stages
from bigmodel.data.plan.order import Order
from bigmodel.data.prepare.pipeline import prepare, quiet
from bigmodel.data.store.shards import ShardStore
from bigmodel.launcher.cluster import Cluster
from bigmodel.planning.context import context_of
from bigmodel.planning.data_needs import (
    LOADED_TEXT_TOKENS_PER_CORE_SECOND,
    LOADED_TOKENS_PER_CORE_SECOND,
    PREPARED_BYTES_PER_CORE_SECOND,
    data_part,
    given_by_source,
    read_tokens_per_pack,
)
from bigmodel.planning.part import Part
from tests.support.tiny_corpus import text

REPOSITORY = Path(__file__).parents[2]
KINDS = ("even", "odd")
CLUSTER = Cluster(nodes=2, gpus_per_node=1)


def is_odd(number: int) -> bool:
    return number % 10 == 1


class Speed(NamedTuple):
    seconds: float


def settings_of(shards: Path, steps: int = 40, **data: Any) -> Settings:
    sizes = {"max_document_length": 48, "sequence_length": 96, "max_documents": 8, "packing_buffer": 20, "lanes": 2}
    training = {"steps": steps, "global_batch_size": 4}
    return Settings.model_validate({"data": sizes | {"directory": str(shards)} | data, "training": training})


def plan(settings: Settings, seconds: float = 1.0) -> Part:
    return data_part(context_of(settings, CLUSTER), Speed(seconds))


def given(data: dict[str, Any], tokens: list[int], wanted: float, passes: list[float]) -> list[float]:
    names = ["a", "b", "c"][: len(tokens)]
    settings = Settings.model_validate({"data": data}).data
    held = [one * number for one, number in zip(passes, tokens, strict=True)]
    return given_by_source(stages(settings, names, tokens), held, wanted)


def test_sources_give_their_shares_until_they_end() -> None:
    mix, endless = {"mix": {"a": 0.5, "b": 0.5}}, [math.inf, math.inf]
    assert given(mix, [30, 10], 40, endless) == [20, 20]
    assert given(mix, [30, 10], 40, [math.inf, 1]) == [30, 10], "b ends after its 10, a gives the rest"
    assert given(mix, [30, 10], 100, [1, 1]) == [30, 10], "both have ended"
    assert given({}, [30, 10], 20, endless) == [15, 5], "by their sizes"
    later = {"mix": {"a": 1}, "curriculum": [{"from_tokens": 10, "mix": {"a": 1, "b": 3}}]}
    assert given(later, [30, 10], 18, endless) == [12, 6]
    three = {"mix": {"a": 0.6, "b": 0.3, "c": 0.1}}
    assert given(three, [60, 3, 10], 60, [math.inf, 1, math.inf]) == pytest.approx([57 * 6 / 7, 3, 57 / 7])


@pytest.mark.parametrize("data", [{}, {"mix": {"news": 0.7, "code": 0.3}}, {"mix_exponent": 0.3}])
def test_passes_are_those_of_the_run_s_order(shards: Path, data: dict[str, Any]) -> None:
    names = ShardStore(shards, "train").sources
    if "mix" in data:
        data = {"mix": dict(zip(names, (0.7, 0.3), strict=True))}
    settings = settings_of(shards, **data)
    part = plan(settings)
    order = Order.of_run(ShardStore(shards, "train"), settings)
    for _ in range(settings.training.steps):
        order.next_step()
    passes = {name: progress.passes for name, progress in order.progress().items()}
    assert part.numbers["sources"].keys() == passes.keys()
    for name, expected in passes.items():
        assert part.numbers["sources"][name]["passes"] == pytest.approx(expected, rel=0.05)
    assert min(passes.values()) > 0.5


def test_excluded_documents_are_not_counted(shards: Path, tmp_path: Path) -> None:
    store = ShardStore(shards, "train")
    first, *_ = store.sources
    rows = range(0, len(store.lengths(first, 0)), 2)
    lines = [json.dumps({"source": first, "shard": 0, "row": row}) for row in rows]
    (tmp_path / "excluded").write_text("\n".join(lines))
    whole, part = plan(settings_of(shards)), plan(settings_of(shards, exclude=str(tmp_path / "excluded")))
    gone = int((store.lengths(first, 0)[list(rows)].astype(int) - 1).sum())
    assert whole.numbers["available_tokens"] - part.numbers["available_tokens"] == gone > 0
    assert part.numbers["sources"][first]["tokens"] == whole.numbers["sources"][first]["tokens"] - gone


def test_classes_have_passes_of_their_own(tmp_path: Path) -> None:
    """12 short odd documents get three quarters of the draws beside 108 even ones; the order counts the passes."""
    lines = [
        {"text": text(number)[: 60 if is_odd(number) else 200], "kind": KINDS[is_odd(number)]} for number in range(120)
    ]
    (tmp_path / "mail.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = {"name": "mail", "files": [str(tmp_path / "mail.jsonl")], "label_column": "kind"}
    table = {
        "prepare": {"sources": [source], "vocabulary": 300, "workers": 1},
        "data": {"directory": str(tmp_path / "data"), "max_document_length": 64, "sequence_length": 128, "lanes": 1},
        "model": {"kind": "encoder"},
        "classification": {"classes": [*KINDS]},
        "training": {"steps": 30, "global_batch_size": 2},
    }
    table["data"] |= {"class_mix": {"even": 1.0, "odd": 3.0}, "packing_buffer": 4}
    settings = Settings.model_validate(table)
    prepare(settings, quiet())
    rows = {row.name: row for row in plan(settings).rows}
    store = ShardStore.of_run(settings.data, "train")
    order = Order.of_run(store, settings)
    drawn = [chunk.row for _ in range(settings.training.steps) for pack in order.next_step() for chunk in pack]
    labels, found = store.labels("mail", 0)
    for number, label in enumerate(found):
        name, documents = store.decode(label), int((labels == number).sum())
        passes = float((labels[drawn] == number).sum() / documents)
        assert float(rows[f"class {name}"].value.removesuffix(" passes")) == pytest.approx(passes, rel=0.1)
        assert (
            rows[f"class {name}"].note
            == f"{'75' if name == 'odd' else '25'}.0% of its documents; {documents} in a pass"
        )


def test_packing_is_that_of_the_run(shards: Path) -> None:
    settings = settings_of(shards)
    store = ShardStore(shards, "train")
    part, packed = plan(settings), measure_packing(store, settings.data)
    assert part.numbers["filled_share"] == pytest.approx(packed.filled, abs=0.01)
    lengths = [store.lengths(name, shard) for name in store.sources for shard in range(store.num_shards(name))]
    positions = np.concatenate(lengths).astype(int) - 1
    assert part.numbers["whole_share"] == positions[positions <= 48].sum() / positions.sum()


def test_the_end_of_the_data_is_the_step_where_the_order_ends(shards: Path) -> None:
    names = ShardStore(shards, "train").sources
    settings = settings_of(shards, steps=10_000, max_epochs=dict.fromkeys(names, 2))
    [row] = [row for row in plan(settings).rows if row.name == "data end"]
    order = Order.of_run(ShardStore(shards, "train"), settings)
    with contextlib.suppress(UserError):  # data.max_epochs ends it
        while order.step < settings.training.steps:
            order.next_step()
    steps = order.step
    assert 10 < steps < settings.training.steps
    assert int(row.value.removeprefix("step ").replace(",", "")) == pytest.approx(steps, rel=0.1)


def test_many_passes_are_named(shards: Path) -> None:
    notes = [row.note for row in plan(settings_of(shards, steps=4000)).rows if row.name.startswith("source")]
    assert all("worth little" in note for note in notes)


def test_a_node_loads_its_part(shards: Path) -> None:
    numbers = plan(settings_of(shards), 4 * 96 / 1e6).numbers  # a million tokens a second
    stored = numbers["stored_bytes_per_token"]
    assert 2 < stored < 3, "two bytes an id, and the shards' own"
    filled = numbers["read_tokens"] / (40 * 4 * 96)
    assert 0.9 < filled <= 1
    assert numbers["node_loading_bytes_per_second"] == pytest.approx(1e6 / 2 * filled * stored)
    assert numbers["loading_bytes_per_second"] == pytest.approx(1e6 * filled * stored)
    assert numbers["node_loading_cores"] == pytest.approx(5e5 * filled / LOADED_TOKENS_PER_CORE_SECOND)


def test_pairs_are_loaded_with_both_texts(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text(number), "summary": text(number)[:60]}) for number in range(80)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    source = {"name": "pairs", "files": [str(tmp_path / "pairs.jsonl")], "target_column": "summary"}
    data = {"directory": str(tmp_path / "data"), "max_document_length": 60, "sequence_length": 300}
    data |= {"source_sequence_length": 1500, "max_source_length": 500, "packing_buffer": 4}
    table = {
        "prepare": {"sources": [source], "vocabulary": 300, "workers": 1},
        "data": data,
        "model": {"kind": "encoder_decoder"},
        "training": {"steps": 20, "global_batch_size": 2},
    }
    settings = Settings.model_validate(table)
    prepare(settings, quiet())
    part = plan(settings, 1.0)
    manifest = ShardStore(tmp_path / "data", "train").manifest
    stored = sum(one["bytes"] for name, one in manifest.files.items() if name.startswith("train") and ".mds" in name)
    read = part.numbers["sources"]["pairs"]["passes"] * stored
    assert part.numbers["loading_bytes_per_second"] * settings.training.steps == pytest.approx(read, rel=0.05)
    assert part.numbers["source_filled_share"] > 0.7
    assert "documents not split" not in [row.name for row in part.rows], "pairs are whole"


def test_shards_of_text_cost_cores(tmp_path: Path) -> None:
    data = {"directory": str(tmp_path / "none"), "sequence_length": 4096}
    table = {"data": data, "prepare": {"content": "text"}, "training": {"global_batch_size": 512}}
    part = plan(Settings.model_validate(table))
    assert part.numbers["node_loading_cores"] == 512 * 4096 / 2 / LOADED_TEXT_TOKENS_PER_CORE_SECOND
    [row] = [row for row in part.rows if row.name == "loading, a node"]
    assert "69.9% of a core (tokenized while loading" in row.note


def test_before_data_exist_the_files_and_the_budget_speak(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    for number in range(3):
        (tmp_path / "web" / f"{number}.jsonl").write_bytes(b"x" * 1000)
    sources = [
        {"name": "web", "files": [f"{tmp_path}/web/*.jsonl"]},
        {"name": "code", "files": ["/nowhere/*.parquet"]},
    ]
    data = {"directory": str(tmp_path / "none"), "mix": {"web": 3, "code": 1}, "max_epochs": {"code": 4}}
    table = {"prepare": {"sources": sources}, "data": data, "training": {"steps": 1000, "global_batch_size": 8}}
    part = plan(Settings.model_validate(table))
    tokens = 1000 * 8 * 2048
    assert part.numbers["read_tokens"] == tokens
    assert part.numbers["file_bytes"] == {"web": 3000, "code": 0}
    assert part.numbers["text_bytes"] == tokens * 3.17
    assert part.numbers["tokenization_core_seconds"] == tokens * 3.17 / PREPARED_BYTES_PER_CORE_SECOND
    rows = {row.name: row for row in part.rows}
    assert rows["source web"].value == "12.3 million"
    assert "946" in rows["source web"].note, "tokens of 3.17 bytes"
    assert "not on this machine" in rows["source code"].note
    assert "1.0 million of them different" in rows["source code"].note


def test_a_document_of_two_sides_is_counted_once() -> None:
    data = {"max_document_length": 115, "max_source_length": 512}
    data |= {"sequence_length": 3840, "source_sequence_length": 16_384}
    settings = Settings.model_validate({"data": data, "model": {"kind": "encoder_decoder"}})
    assert read_tokens_per_pack(settings.data) == 32 * 568, "568 tokens give a source of 512"


def test_the_speeds_are_those_of_the_benchmarks() -> None:
    stream = json.loads((REPOSITORY / "benchmarks/stream_speed.json").read_text())
    assert pytest.approx(stream["tokens_per_core_second"]["ours"], rel=0.05) == LOADED_TOKENS_PER_CORE_SECOND
    text = json.loads((REPOSITORY / "benchmarks/stream_text.json").read_text())["text, 1 worker(s)"]
    assert pytest.approx(text["tokens_per_core_second"], rel=0.05) == LOADED_TEXT_TOKENS_PER_CORE_SECOND
    prepare = json.loads((REPOSITORY / "benchmarks/prepare.json").read_text())
    speed = prepare["bytes"] / prepare["median_seconds"]["prepare"]["cpu"]
    assert pytest.approx(speed, rel=0.05) == PREPARED_BYTES_PER_CORE_SECOND
