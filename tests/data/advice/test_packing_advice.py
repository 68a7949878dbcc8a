"""What settings make of data, and which would suit it better: measured, not guessed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigmodel.config.settings import DataSettings
from bigmodel.data.advice import packing_advice as planned
from bigmodel.data.advice.packing_advice import measure_packing, mix_shares, suggest, suggest_context, suggest_shard
from bigmodel.data.prepare.lengths import draw_lengths, share_by_length
from bigmodel.data.store.manifest import Manifest
from tests.data.store.test_remote import run
from tests.support.memory_store import MemoryStore, lognormal_lengths
from tests.support.tiny_corpus import prepared


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("planned"))


def settings(**changes: Any) -> DataSettings:
    section = {"max_document_length": 8, "sequence_length": 8, "max_documents": 4, "packing_buffer": 10} | changes
    return DataSettings.model_validate(section)


def test_packing_is_that_of_the_plan() -> None:
    store = MemoryStore({"web": [[6] * 40]})  # 5 positions each: one fits into a pack of 8, two into one of 10
    one = measure_packing(store, settings())
    assert (one.filled, one.documents, one.document_limited) == (5 / 8, 1.0, 0.0)
    two = measure_packing(store, settings(sequence_length=10))
    assert (two.filled, two.documents) == (1.0, 2.0)
    limited = measure_packing(store, settings(sequence_length=12, max_documents=2))
    assert (limited.filled, limited.document_limited) == (10 / 12, 1.0)
    assert one.num_packs >= 1000
    capped = measure_packing(store, settings(max_epochs={"web": 1}))  # 40 packs, far fewer than are looked at
    assert capped == one


def test_the_suggested_context_leaves_nine_tenths_of_the_tokens_whole() -> None:
    positions = np.array([100] * 890 + [1000] * 10)  # 89,000 and 10,000 tokens
    found = suggest_context(positions, settings(max_document_length=64, sequence_length=64))
    assert (found.now, found.suggested) == (64, 1024)
    assert found.reason == "100.0% of the tokens are in documents that are not split, now 0.0%"
    assert suggest_context(np.array([100] * 910 + [1000] * 9), settings()).suggested == 128
    books = suggest_context(np.array([100_000]), settings())
    assert books.suggested == 8192
    assert "0% of the tokens" in books.reason
    assert "the longest suggestion" in books.reason


def test_the_suggested_pack_and_window_are_the_smallest_that_fill_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "MEASURED_PACKS", 100)
    monkeypatch.setattr(planned, "WINDOWS", (5, 20, 60, 100))
    lengths = lognormal_lengths(1, 4000)
    store = MemoryStore({"web": [lengths[:2000], lengths[2000:]]})
    manifest = type("Counts", (), {"sources": ["web"], "counts": {"web": {"train": {"tokens": sum(lengths)}}}})
    manifest.recipe = {"shard_tokens": 1_000_000}
    data = settings(max_document_length=512, sequence_length=512, max_documents=256, packing_buffer=5)
    context, pack, window, shard = suggest(store, manifest, data)
    assert (context.setting, context.suggested) == ("data.max_document_length", 8192)
    best = data.model_copy(update={"max_document_length": 8192, "sequence_length": pack.suggested})
    filled = {
        number: measure_packing(store, best.model_copy(update={"packing_buffer": number})).filled
        for number in planned.WINDOWS
    }
    assert filled[window.suggested] >= max(filled.values()) - 0.001
    assert all(filled[number] < max(filled.values()) - 0.001 for number in filled if number < window.suggested)
    assert pack.suggested % 8192 == 0
    assert f"{filled[window.suggested]:.2%} filled" in window.reason
    assert shard.suggested == sum(lengths) // 4 // 100_000 * 100_000
    assert sum(lengths) > 1_000_000


def test_the_suggested_shard_gives_every_lane_four_of_the_smallest_source(whole: Path) -> None:
    manifest = Manifest.read(whole)
    found = suggest_shard(manifest, lanes=1)
    assert (found.now, found.suggested) == (3000, 1000)  # letters: 3,681 tokens, but no shard below 1,000
    assert "the smallest source, letters, has 3,681 tokens" in found.reason
    manifest.counts["letters"]["train"]["tokens"] = 999_000
    manifest.counts["news"]["train"]["tokens"] = 10**9
    assert suggest_shard(manifest, lanes=3).suggested == 80_000
    manifest.counts["letters"]["train"]["tokens"] = 10**9
    assert suggest_shard(manifest, lanes=2).suggested == 32_000_000


def test_shares_of_a_mix() -> None:
    assert mix_shares({"a": 30, "b": 10}, {}) == {"a": 0.75, "b": 0.25}
    assert mix_shares({"a": 30, "b": 10, "c": 5}, {"b": 3.0, "c": 1.0}) == {"a": 0.0, "b": 0.75, "c": 0.25}


def test_shares_by_length_of_known_lengths() -> None:
    edges, shares = share_by_length(np.array([2, 2, 4, 8], np.uint32))
    assert (edges[0], edges[4], edges[8], edges[-1]) == (2.0, 4.0, 8.0, 16.0)
    assert shares["documents"][[0, 4, 8]].tolist() == [0.5, 0.25, 0.25]
    assert shares["tokens"][[0, 4, 8]].tolist() == [0.25, 0.25, 0.5]
    assert shares["documents"].sum() == shares["tokens"].sum() == 1.0


def test_the_picture_is_the_same_bytes_again_and_one_length_can_be_drawn(whole: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        draw_lengths([np.array([5, 9, 300], np.uint32)], tmp_path / name, 128)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert (tmp_path / "one").read_bytes().startswith(b"\x89PNG")
    draw_lengths([np.array([7], np.uint32)], tmp_path / "single", 128)
    assert not (whole / "lengths.png").exists()  # drawing it takes longer than preparing a small corpus


def write_run(folder: Path, data: Path, **changes: str) -> str:
    lines = {"max_document_length": "64", "sequence_length": "64", "directory": f'"{data}"'} | changes
    run_file = folder / "run.toml"
    run_file.write_text("[data]\n" + "".join(f"{name} = {value}\n" for name, value in lines.items()))
    return str(run_file)


def test_show_data_prints_sources_mix_packing_and_suggestions(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    few = {"lanes": "2", "max_epochs": "{ news = 1, letters = 1 }"}
    run_file = write_run(tmp_path, whole, mix="{ news = 3.0, letters = 1.0 }", **few)
    code, printed = run(monkeypatch, capsys, "show", "data", run_file, "--png", str(tmp_path / "lengths.png"))
    assert code == 0, printed
    for expected in (
        "vocabulary 300",
        "75.0%",
        "25.0%",
        "3 of 103",
        "dropped from news: 1 duplicate, 1 empty, 1 null",
        "longest 236",
        "up to       256",
        "packed sequences of 64 tokens",
        "data.max_document_length",
        "data.sequence_length",
        "data.packing_buffer",
        "prepare.shard_tokens",
        "of the data cannot be reached: data.max_epochs ends the run with the lane that holds least",
    ):
        assert expected in printed, (expected, printed)
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "lengths.png").unlink()
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, whole)
    for kind in ("data", "batch"):
        code, printed = run(monkeypatch, capsys, "show", kind, run_file)
        assert code == 0, printed
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"], "no picture that nobody asked for"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mix": "{ web = 1.0 }"}, ["data.mix.web = 1.0: no such source", "letters, news"]),
        ({"lanes": "8"}, ["data.lanes = 8", "shards with text"]),
        ({"directory": '"/nowhere"'}, ["/nowhere: no such folder", "bigmodel prepare"]),
    ],
)
def test_show_data_of_wrong_settings_is_one_message(
    changes: dict[str, str],
    words: list[str],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, printed = run(monkeypatch, capsys, "show", "data", write_run(tmp_path, whole, **changes))
    assert code == 2, printed
    assert "Traceback" not in printed
    for word in words:
        assert word in printed
