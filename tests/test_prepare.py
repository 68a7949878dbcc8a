"""From text to a prepared folder: the same bytes whoever does the work, whole or not there at all."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from bigmodel.baselines import xz_bits_per_byte
from bigmodel.config import UserError
from bigmodel.data import corpus
from bigmodel.data import prepare as preparing
from bigmodel.data.prepare import prepare, quiet, summary, verify
from bigmodel.data.shards import Manifest, ShardStore, ShardWriter
from bigmodel.data.tokenizer import Tokenizer
from tests.tiny_corpus import LETTERS, NEWS, prepared, tiny_settings


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepare")
    prepared(folder)
    return folder


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def documents(directory: Path, split: str, source: str) -> Iterator[str]:
    store = ShardStore(directory, split)
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    for shard in range(store.num_shards(source)):
        for row in range(len(store.lengths(source, shard))):
            yield tokenizer.decode(store.document(source, shard, row))


def test_every_document_is_stored_once_in_one_split_in_reading_order(home: Path) -> None:
    for source, texts in (("news", NEWS), ("letters", LETTERS)):
        train, validation = (list(documents(home / "data", split, source)) for split in ("train", "validation"))
        assert sorted(train + validation) == sorted(texts)
        assert train == [text for text in texts if text in set(train)]
        assert len(validation) > 3


def test_the_manifest_counts_what_is_there(home: Path) -> None:
    manifest = Manifest.read(home / "data")
    assert manifest.rows["news"] == {
        "read": 103,
        "kept": 100,
        "null": 1,
        "empty": 1,
        "invalid_unicode": 0,
        "duplicate": 1,
    }
    assert manifest.rows["letters"]["read"] == manifest.rows["letters"]["kept"] == 50
    assert manifest.total("train", "documents") + manifest.total("validation", "documents") == 150
    text_bytes = sum(len(text.encode()) for text in NEWS + LETTERS)
    assert manifest.total("train", "text_bytes") + manifest.total("validation", "text_bytes") == text_bytes
    assert (manifest.vocabulary, manifest.dtype, manifest.encoder) == (300, "uint16", "tiktoken")
    assert sum(manifest.statistics["histogram"].values()) == 150


def test_the_validation_text_is_the_validation_documents_end_to_end(home: Path) -> None:
    directory = home / "data"
    text = (directory / "text" / "validation.txt").read_bytes()
    stored = "".join([*documents(directory, "validation", "news"), *documents(directory, "validation", "letters")])
    assert text == stored.encode()
    assert len(text) == ShardStore(directory, "validation").text_bytes > 1000
    assert 0.1 < xz_bits_per_byte(directory / "text" / "validation.txt") < 8


def test_processes_and_repeats_change_no_byte(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = content(home / "data")
    settings = tiny_settings(home, workers=2)
    data = settings.data.model_copy(update={"directory": tmp_path / "again"})
    settings = settings.model_copy(update={"data": data})
    prepare(settings, quiet())
    assert content(tmp_path / "again") == expected
    shutil.rmtree(tmp_path / "again")
    started = []

    def start(number: int, **options: Any) -> ProcessPoolExecutor:
        started.append(number)
        return ProcessPoolExecutor(number, **options)

    monkeypatch.setattr(preparing, "INLINE_BYTES", 0)
    monkeypatch.setattr(preparing, "ProcessPoolExecutor", start)
    prepare(settings, quiet())
    assert started == [2]
    assert content(tmp_path / "again") == expected


def test_prepared_again_from_the_same_text_nothing_is_done_and_it_says_so(home: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (home / "data").rglob("*")}
    console = Console(record=True, quiet=False, file=open(os.devnull, "w"), width=200)  # noqa: SIM115
    settings = tiny_settings(home, workers=2)  # how many work on it is not part of the result
    assert prepare(settings, Progress(console=console, disable=True)) == home / "data"
    assert "already prepared" in console.export_text()
    assert {path: path.stat().st_mtime_ns for path in (home / "data").rglob("*")} == before


def test_a_folder_made_from_other_settings_or_text_is_refused_and_kept(home: Path, tmp_path: Path) -> None:
    expected = content(home / "data")
    with pytest.raises(UserError, match=r"prepare.vocabulary was 300, is 310.*another data.directory"):
        prepare(tiny_settings(home, vocabulary=310), quiet())
    settings = tiny_settings(home)
    shutil.copytree(home / "text", tmp_path / "kept")
    try:
        (home / "text" / "news.jsonl").write_text('{"body": "other"}\n')
        with pytest.raises(UserError, match="the source files have other content now"):
            prepare(settings, quiet())
    finally:
        shutil.copytree(tmp_path / "kept", home / "text", dirs_exist_ok=True)
    assert content(home / "data") == expected
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        prepared(tmp_path)
    assert content(tmp_path / "data") == {"thesis.txt": b"precious"}


def disk_is_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", [(ShardWriter, "write"), (ShardWriter, "close"), (preparing, "describe_files")])
def test_a_disk_that_becomes_full_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[object, str]
) -> None:
    monkeypatch.setattr(*place, disk_is_full)
    with pytest.raises(UserError, match="the disk became full; what was written is removed"):
        prepared(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]


def test_any_other_error_leaves_nothing_behind_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(preparing, "length_statistics", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        prepared(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]


def test_a_disk_without_room_is_refused_before_shards_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardWriter, "write", lambda *_: pytest.fail("wrote a shard"))
    monkeypatch.setattr(preparing.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(UserError, match=r"needs about 17 MB, 1 MB are free"):
        prepared(tmp_path)
    assert not (tmp_path / "data").exists()


KILLED = """
import sys, time
from pathlib import Path
from bigmodel.data import prepare as preparing
from tests.tiny_corpus import prepared
if __name__ == "__main__":
    preparing.INLINE_BYTES = 0
    def write_and_wait(output, source, encoded):
        (output._directory / "half").write_text(source)
        print("written", flush=True)
        time.sleep(600)
    preparing._Output.write = write_and_wait
    prepared(Path(sys.argv[1]), workers=2)
"""


def test_killed_in_the_middle_the_next_run_starts_over_and_no_process_stays(home: Path, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    folder = tmp_path / "home"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    victim = subprocess.Popen([sys.executable, script, folder], stdout=subprocess.PIPE, text=True, env=environment)
    assert victim.stdout is not None
    assert victim.stdout.readline() == "written\n"
    children = Path(f"/proc/{victim.pid}/task/{victim.pid}/children").read_text().split()
    assert len(children) >= 2
    victim.kill()
    victim.wait()
    assert not (folder / "data").exists()
    assert (folder / "data.partial" / "half").exists()
    wait_until(lambda: not any(is_alive(int(child)) for child in children))
    prepared(folder)
    ours, undisturbed = content(folder / "data"), content(home / "data")
    assert ours.pop("manifest.json") != undisturbed.pop("manifest.json")  # the sources' paths differ
    assert ours == {name: value for name, value in undisturbed.items() if name != "manifest.json"}
    assert not (folder / "data.partial").exists()


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    partial = tmp_path / "data.partial"
    partial.mkdir()
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process is preparing this data now"):
        prepared(tmp_path)
    os.close(descriptor)
    prepared(tmp_path)


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_an_error_and_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "INLINE_BYTES", 0)
    unit = corpus.Unit("a", (Path("a.txt"),), "text", None, 0, 0, 1)
    with (
        pytest.raises(UserError, match=r"a tokenizing process was killed.*lower prepare.workers"),
        preparing._workers(2, [unit, unit]) as workers,
    ):
        list(workers.map(die, [(1,), (2,)]))


def test_sources_without_documents_and_empty_splits_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": null}\n{"text": " "}\n')
    with pytest.raises(UserError, match=r"prepare.sources 'void': has no documents \(2 read, 1 null, 1 empty\)"):
        prepared(tmp_path, sources=[{"name": "void", "files": [str(empty)]}])
    empty.write_text("")
    with pytest.raises(UserError, match=r"has no documents \(0 read\)"):
        prepared(tmp_path, sources=[{"name": "void", "files": [str(empty)]}])
    with pytest.raises(UserError, match=r"none of the 150 documents fell to the validation split; raise it"):
        prepared(tmp_path, validation_share=1e-9)
    with pytest.raises(UserError, match=r"prepare.shard_tokens = 2000000000: a shard file is at most 4 GiB"):
        prepared(tmp_path, shard_tokens=2_000_000_000)


def test_a_given_tokenizer_is_used_as_it_is(home: Path, tmp_path: Path) -> None:
    given = home / "data" / "tokenizer.json"
    directory = prepared(tmp_path, tokenizer=str(given), vocabulary=5000)
    assert (directory / "tokenizer.json").read_bytes() == given.read_bytes()
    assert Manifest.read(directory).vocabulary == 300


def test_a_source_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n')
    unit = corpus.plan_units(corpus.Source("a", (file,), "text"))[0]
    tokenizer = prepared(tmp_path / "home") / "tokenizer.json"
    for kept in (np.ones(2, bool), np.zeros(0, bool)):
        with pytest.raises(UserError, match=r"a\.jsonl: changed while it was prepared"):
            preparing._encode_unit(unit, kept, ~kept, str(tokenizer), True)


def test_verify_finds_every_damage_and_nothing_in_a_whole_folder(home: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(home / "data", tmp_path / "data"))
    assert verify(folder) == []
    shard = folder / "train" / "news" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x07\x07")
    (folder / "text" / "validation.txt").unlink()
    (folder / "train" / "news" / "stray.mds").touch()
    problems = verify(folder)
    assert len(problems) == 3
    assert "validation.txt: missing" in problems[0]
    assert "shard.00000.mds: has" in problems[1]
    assert "stray.mds: not in the manifest" in problems[2]


def test_verify_compares_the_counts_of_index_lengths_and_manifest(home: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(home / "data", tmp_path / "data"))
    manifest = Manifest.read(folder)
    manifest.counts["news"]["train"]["tokens"] += 1
    manifest.counts["letters"]["train"]["documents"] += 1
    manifest.write(folder)
    problems = verify(folder)
    assert len(problems) == 2
    assert "train/letters: index, lengths and manifest differ in documents" in problems[0]
    assert "train/news" in problems[1]
    assert "the manifest says" in problems[1]


def test_the_summary_shows_sources_splits_and_lengths(home: Path) -> None:
    console = Console(record=True, width=160, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(summary(home / "data"))
    text = console.export_text()
    for expected in ("letters", "news", "validation", "3 of 103", "vocabulary 300", "longest", "up to"):
        assert expected in text


def test_the_embedded_corpus_is_prepared_without_any_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [(path, content) for path, content in corpus.standard_library() if len(content) < 20_000][:60]
    monkeypatch.setattr(corpus, "standard_library", lambda: modules)
    directory = prepared(tmp_path, sources=[], validation_share=0.2, shard_tokens=1_000_000)
    store = ShardStore(directory, "train")
    assert store.sources == ["code", "docs"]
    assert store.manifest.rows["code"]["read"] == store.manifest.rows["docs"]["read"] == 60
    assert {path.name for path in (directory / "corpus").iterdir()} == {"code.parquet", "docs.parquet"}
    assert verify(directory) == []
    prepared(tmp_path, sources=[], validation_share=0.2, shard_tokens=1_000_000)
    monkeypatch.setattr(corpus, "standard_library", lambda: modules[1:])
    with pytest.raises(UserError, match="Python's standard library has other content now"):
        prepared(tmp_path, sources=[], validation_share=0.2, shard_tokens=1_000_000)
