"""From text to a prepared folder: the same bytes whoever does the work and however often it is killed."""

import errno
import fcntl
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console
from rich.progress import Progress

from bigmodel.__main__ import app, main
from bigmodel.config.settings import Settings, UserError
from bigmodel.data.prepare import cleaning, corpus, embedded, encoding, scanning
from bigmodel.data.prepare import pipeline as preparing
from bigmodel.data.prepare import work_items as units
from bigmodel.data.prepare.pipeline import prepare, quiet
from bigmodel.data.prepare.rows import Format
from bigmodel.data.prepare.verify import verify
from bigmodel.data.store import mds
from bigmodel.data.store.manifest import MANIFEST, Manifest
from bigmodel.data.store.shards import ShardStore
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.evaluation.baselines import xz_bits_per_byte
from tests.support.tiny_corpus import LETTERS, NEWS, prepared, tiny_settings, write_sources


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepare")
    prepared(folder)
    return folder


@pytest.fixture(autouse=True)
def _small_units(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The news are cut into 4 units and the letters into 3, of one part each; `home` was not: no byte may differ."""
    monkeypatch.setattr(corpus, "UNIT_BYTES", 9000)


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
        "malformed": 0,
        "too_short": 0,
        "too_long": 0,
        "contaminated": 0,
        "duplicate": 1,
    }
    assert manifest.rows["letters"]["read"] == manifest.rows["letters"]["kept"] == 50
    assert manifest.total("train", "documents") + manifest.total("validation", "documents") == 150
    text_bytes = sum(len(text.encode()) for text in NEWS + LETTERS)
    assert manifest.total("train", "text_bytes") + manifest.total("validation", "text_bytes") == text_bytes
    for name, counts in manifest.row_bytes.items():
        assert counts["kept"] == sum(manifest.counts[name][split]["text_bytes"] for split in ("train", "validation"))
        assert counts["read"] == sum(number for reason, number in counts.items() if reason != "read")
    assert manifest.row_bytes["news"]["duplicate"] == len(NEWS[3].encode())
    assert (manifest.vocabulary, manifest.dtype, manifest.encoder) == (300, "uint16", "tiktoken+tokenizers")
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
    monkeypatch.setattr(units, "ProcessPoolExecutor", start)
    monkeypatch.setattr(corpus, "UNIT_BYTES", 5000)  # nor does it matter how the sources are cut
    prepare(settings, quiet())
    assert started == [2]
    assert content(tmp_path / "again") == expected
    assert not (tmp_path / "again.partial").exists()


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


def partial_files(folder: Path) -> list[str]:
    """Files of finished units, without the fingerprint before them."""
    found = [file.relative_to(folder / "data.partial") for file in (folder / "data.partial").rglob("*.npz")]
    return sorted(file.relative_to(file.parts[0]).as_posix() for file in found)


def disk_is_full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("place", "kept"),
    [
        ((cleaning, "write_arrays"), 0),
        ((scanning, "save_array"), 7),
        ((mds, "encode_shard"), 14),
        ((preparing, "describe_files"), 14),
    ],
)
def test_a_disk_that_becomes_full_keeps_finished_units_and_says_how_to_go_on(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[object, str], kept: int
) -> None:
    settings = elsewhere(tiny_settings(home), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(*place, disk_is_full)
        with pytest.raises(UserError, match=rf"the disk became full; {kept} finished work items kept. Free space and"):
            prepare(settings, quiet())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.partial"]
    assert len(partial_files(tmp_path)) == kept
    prepare(settings, quiet())
    assert content(tmp_path / "data") == content(home / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def interrupt(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare up to the manifest, and stop."""
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "describe_files", disk_is_full)
        with pytest.raises(UserError, match="the disk became full"):
            prepare(settings, quiet())


def elsewhere(settings: Settings, folder: Path) -> Settings:
    """The same preparation into `folder`/data."""
    data = settings.data.model_copy(update={"directory": folder / "data"})
    return settings.model_copy(update={"data": data})


def test_any_other_error_keeps_them_too(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(preparing, "all_statistics", fail)
        with pytest.raises(RuntimeError, match="a bug"):
            prepare(elsewhere(tiny_settings(home), tmp_path), quiet())
    assert len(partial_files(tmp_path)) == 14
    monkeypatch.setattr(cleaning, "scan_unit", lambda *_: pytest.fail("scanned again"))
    monkeypatch.setattr(Tokenizer, "encode_documents", lambda *_: pytest.fail("tokenized again"))
    monkeypatch.setattr(mds, "encode_shard", lambda *_: pytest.fail("wrote a shard again"))
    prepare(elsewhere(tiny_settings(home), tmp_path), quiet())
    assert content(tmp_path / "data") == content(home / "data")


def test_a_disk_without_room_is_refused_before_tokens_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "encode_documents", lambda *_: pytest.fail("tokenized"))
    monkeypatch.setattr(preparing.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(UserError, match=r"needs about 16.9 MB, 1 MB are free.*\n7 finished work items kept"):
        prepared(tmp_path)
    assert not (tmp_path / "data").exists()


def test_no_room_is_asked_for_what_is_written_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "UNIT_BYTES", 1 << 20)
    file = tmp_path / "long.jsonl"  # 350 kB of words that become one token each
    texts = [f"{number} " + "Donaudampfschifffahrtsgesellschaft " * 50 for number in range(200)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = tiny_settings(tmp_path, vocabulary=280, sources=[{"name": "long", "files": [str(file)]}])
    interrupt(settings, monkeypatch)
    room = preparing.SPARE_BYTES + 100_000
    monkeypatch.setattr(preparing.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, room))
    prepare(settings, quiet())
    assert Manifest.read(tmp_path / "data").total("train", "documents") > 100


def test_only_what_the_same_command_can_mend_says_that_it_goes_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prepare.vocabulary = 5000") as error:
        prepared(tmp_path, vocabulary=5000)
    assert "the same command" not in str(error.value)
    assert len(partial_files(tmp_path)) == 7


def test_a_path_that_looks_like_markup_is_printed_as_it_is(home: Path, tmp_path: Path) -> None:
    console = Console(record=True, file=open(os.devnull, "w"), width=400)  # noqa: SIM115
    folder = tmp_path / "[" / "quote]"
    prepare(elsewhere(tiny_settings(home), folder), Progress(console=console, disable=True))
    assert f"{folder}/data: 150 documents" in console.export_text()


def test_the_last_room_on_the_disk_is_left(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = iter([10**9, 10**9, 10**6])  # before tokenizing, and after the first and the second unit
    with monkeypatch.context() as patch:
        patch.setattr(preparing.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, next(room)))
        with pytest.raises(UserError, match="the disk became full; 9 finished work items kept"):
            prepare(elsewhere(tiny_settings(home), tmp_path), quiet())
    prepare(elsewhere(tiny_settings(home), tmp_path), quiet())
    assert content(tmp_path / "data") == content(home / "data")


def prepare_and_die(home: Path, folder: Path, last: int) -> None:
    """In a process of its own: prepare; killed when file `last` takes its place, before it or after it in turn."""
    replace, files = os.replace, count(1)

    def counted(*arguments: Any) -> None:
        number = next(files)
        if number < last or last % 2:
            replace(*arguments)
        if number == last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted
    corpus.UNIT_BYTES = 5000
    prepare(elsewhere(tiny_settings(home), folder), quiet())


def test_killed_at_any_moments_the_result_is_that_of_an_undisturbed_run(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.data.prepare.test_pipeline"])
    settings = elsewhere(tiny_settings(home), tmp_path)
    random, grown, kills, code = Random(5), [0], 0, None
    while code != 0:
        victim = context.Process(target=prepare_and_die, args=(home, tmp_path, random.randint(2, 9 + kills)))
        victim.start()
        victim.join()
        code = victim.exitcode
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        if (tmp_path / "data").exists():
            assert content(tmp_path / "data") == content(home / "data")
        elif code:
            grown.append(len(partial_files(tmp_path)))
    assert kills >= 3
    assert len(set(grown)) >= 3  # they hit different stages
    assert grown == sorted(grown)  # and nothing that was finished was lost
    monkeypatch.setattr(corpus, "UNIT_BYTES", 5000)
    prepare(settings, quiet())
    assert content(tmp_path / "data") == content(home / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_a_damaged_file_of_a_finished_unit_is_made_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = elsewhere(tiny_settings(home), tmp_path)
    interrupt(settings, monkeypatch)
    work = next((tmp_path / "data.partial").iterdir())
    for file in (
        work / "scan" / "00000.npz",
        work / "encoded" / "00001-0000.npz",
        work / "result/train/news/shard.00001.mds",
    ):
        file.write_bytes(file.read_bytes()[:-40])
    encoded = work / "encoded" / "00002-0000.npz"
    whole = encoded.read_bytes()
    place = whole.index(b"PK", 4) - 1  # the last byte of the first array
    encoded.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    shutil.rmtree(work / "result" / "train" / "letters")  # so that its shards are made from the units again
    prepare(settings, quiet())
    assert content(tmp_path / "data") == content(home / "data")


def test_what_other_settings_or_other_text_left_is_not_taken(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for changes in ({"validation_share": 0.4}, {"vocabulary": 301}, {"deduplicate": False}):
        interrupt(elsewhere(tiny_settings(home, **changes), tmp_path), monkeypatch)
    console = Console(record=True, file=open(os.devnull, "w"), width=200)  # noqa: SIM115
    prepare(elsewhere(tiny_settings(home), tmp_path), Progress(console=console, disable=True))
    assert "made from other text, settings or versions; deleted, starting over" in console.export_text()
    assert content(tmp_path / "data") == content(home / "data")


def test_units_of_a_file_that_was_changed_since_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    settings = tiny_settings(tmp_path, sources=[{"name": "a", "files": [str(file)], "column": "body"}])

    def write(word: str) -> None:
        file.write_text("".join(json.dumps({"body": text.replace("year", word)}) + "\n" for text in NEWS))

    write("week")  # as long as the other: only the content differs
    interrupt(settings, monkeypatch)
    write("year")
    stored = set(documents(prepare(settings, quiet()), "train", "a"))
    assert stored < set(NEWS)
    assert sum("year" in text for text in stored) > 10


def test_where_no_record_can_be_read_no_share_is_offered(home: Path, tmp_path: Path) -> None:
    """Allowed, they would leave a source without documents."""
    sources = tiny_settings(home).prepare.model_dump()["sources"]
    (tmp_path / "wide.jsonl").write_bytes('{"body": "x"}\n'.encode("utf-16"))
    sources[0]["files"] = [str(tmp_path / "wide.jsonl")]
    with pytest.raises(
        UserError, match=r"\(100%\)(.|\n)*Correct or drop these records; \S*malformed.jsonl lists them$"
    ):
        prepared(tmp_path, sources=sources)


def test_workers_and_the_malformed_share_do_not_make_it_start_over(home: Path, tmp_path: Path) -> None:
    sources = tiny_settings(home).prepare.model_dump()["sources"]
    news = tmp_path / "in" / "news.jsonl"
    news.parent.mkdir()
    (news.parent / "loop").symlink_to(news.parent)
    news.write_bytes(b'{"body": 3}\n' + (home / "text" / "news.jsonl").read_bytes() + b'\xff\n{"body": "last"}\n[]\n')
    sources[0]["files"] = [f"{news.parent}/**/*.jsonl"]
    for allowed in (0, 0.02):
        with pytest.raises(UserError) as stop:
            prepared(tmp_path, sources=sources, malformed_share=allowed)
        assert str(stop.value).splitlines()[:-1] == [
            "prepare.sources 'news': 3 of 107 records malformed (2.8%)",
            f"  {news}: line 1: 'body' is a number, not text",
            f"  {news}: line 105: not UTF-8: invalid start byte",
            f"  {news}: line 107: an array, not an object",
        ]
        assert (
            str(stop.value)
            .splitlines()[-1]
            .startswith(
                f"This is above prepare.malformed_share = {allowed}. Correct or drop these records, or set "
                "prepare.malformed_share = 0.029; "
            )
        )
    lists = [file.read_text() for file in (tmp_path / "data.partial").rglob("malformed.jsonl")]
    assert [len(text.splitlines()) for text in lists] == [3]
    assert str(news) in lists[0]
    console = Console(record=True, file=open(os.devnull, "w"), width=200)  # noqa: SIM115
    settings = tiny_settings(tmp_path, sources=sources, malformed_share=0.03)
    prepare(settings, Progress(console=console, disable=True))
    printed = console.export_text()
    assert "going on from 7 finished work items" in printed
    assert "in/loop: read under another name" in printed.replace("\n", "")
    manifest = Manifest.read(tmp_path / "data")
    assert (manifest.rows["news"]["malformed"], manifest.rows["news"]["kept"]) == (3, 101)
    assert manifest.row_bytes["news"]["malformed"] == len(b'{"body": 3}\n\xff\n[]\n')
    listed = [json.loads(line) for line in (tmp_path / "data" / "malformed.jsonl").read_text().splitlines()]
    assert [(record["source"], record["file"], record["place"]) for record in listed] == [
        ("news", "news.jsonl", "line 1"),  # the same wherever it lies
        ("news", "news.jsonl", "line 105"),
        ("news", "news.jsonl", "line 107"),
    ]
    assert "malformed.jsonl" in manifest.files
    assert "format" not in manifest.recipe["sources"][0]  # as in folders of earlier versions
    assert verify(str(tmp_path / "data"), quiet()) == []


KILLED = """
import sys, threading
from pathlib import Path
from bigmodel.data.prepare import corpus, pipeline as preparing, work_items
from tests.data.prepare.test_pipeline import elsewhere
from tests.support.tiny_corpus import tiny_settings
if __name__ == "__main__":
    run = work_items.Team.run
    def stand_still(self, title, function, tasks, weights, look=lambda result: None):
        results = []
        def looks(result):
            look(result)
            results.append(result)
            if len(results) == 2:
                threading.Event().wait()
        return run(self, title, function, tasks, weights, looks)
    work_items.Team.run = stand_still
    preparing.INLINE_BYTES = 0
    corpus.UNIT_BYTES = 5000
    preparing.prepare(elsewhere(tiny_settings(Path(sys.argv[1]), workers=2), Path(sys.argv[2])), preparing.quiet())
"""


def test_killed_with_its_processes_at_work_none_stays_and_another_number_of_them_goes_on(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    folder = tmp_path / "home"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    victim = subprocess.Popen([sys.executable, script, home, folder], env=environment)
    wait_until(lambda: len(partial_files(folder)) >= 2)
    children = Path(f"/proc/{victim.pid}/task/{victim.pid}/children").read_text().split()
    assert len(children) >= 2
    victim.kill()
    victim.wait()
    assert not (folder / "data").exists()
    wait_until(lambda: not any(is_alive(int(child)) for child in children))
    monkeypatch.setattr(corpus, "UNIT_BYTES", 5000)
    assert 2 <= len(partial_files(folder)) < 2 * 13
    prepare(elsewhere(tiny_settings(home, workers=1), folder), quiet())
    assert content(folder / "data") == content(home / "data")
    assert not (folder / "data.partial").exists()


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with open(tmp_path / "data.partial.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is preparing this data now"):
            prepared(tmp_path)
        assert not (tmp_path / "data.partial").exists()
    prepared(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "text"]


def test_a_folder_called_partial_that_is_not_ours_is_kept(tmp_path: Path) -> None:
    prepared(tmp_path)
    theirs = tmp_path / "data.partial"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("precious")
    prepared(tmp_path)  # made already: nothing to do, there neither
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(UserError, match=r"data\.partial: holds files that no preparation made \(thesis\.txt\)"):
        prepared(tmp_path)
    assert content(theirs) == {"thesis.txt": b"precious"}


def test_a_link_is_followed_and_a_mount_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "scratch")
    prepared(tmp_path)
    assert (tmp_path / "data").is_symlink()
    assert (tmp_path / "scratch" / "manifest.json").exists()
    (tmp_path / "mount" / "data").mkdir(parents=True)
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path / "mount" / "data")
    with pytest.raises(UserError, match=r"is a mount point.*choose a folder inside it"):
        prepare(elsewhere(tiny_settings(tmp_path), tmp_path / "mount"), quiet())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    settings = tiny_settings(tmp_path)
    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(UserError, match=r"data\.partial: cannot be written: Permission denied; choose another"):
        prepare(settings, quiet())


@pytest.mark.parametrize("stage", [(cleaning, "scan_unit"), (preparing, "describe_files")])
def test_a_source_that_changes_and_keeps_its_size_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: tuple[Any, str]
) -> None:
    settings = tiny_settings(tmp_path)
    file = tmp_path / "text" / "news.jsonl"
    before, original = file.read_text(), getattr(*stage)

    def change(*arguments: Any) -> Any:
        file.write_text(before.replace("year", "week"))
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(*stage, change)
        with pytest.raises(UserError, match=r"news\.jsonl: changed while it was prepared"):
            prepare(settings, quiet())
    assert not (tmp_path / "data").exists()
    file.write_text(before)
    stored = {
        text for split in ("train", "validation") for text in documents(prepare(settings, quiet()), split, "news")
    }
    assert stored == set(NEWS)


def test_killed_while_the_manifest_is_written_nothing_of_it_stays(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(part: Path, path: Path) -> None:
        if path.name == MANIFEST:
            assert part.stat().st_size
            raise KeyboardInterrupt
        os.rename(part, path)

    settings = elsewhere(tiny_settings(home), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(settings, quiet())
    result = next((tmp_path / "data.partial").iterdir()) / "result"
    assert not list(result.glob(".*"))
    (result / ".lengths.png.part.png").write_bytes(b"of an older version")
    prepare(settings, quiet())
    assert content(tmp_path / "data") == content(home / "data")


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=r"its file system has no locks \(No locks available\)"):
        prepared(tmp_path)


STOPPED = """
import sys, time
from bigmodel.__main__ import main
from bigmodel.data.prepare import corpus, encoding
corpus.UNIT_BYTES = 9000
encode = encoding.encode_parts
def encode_and_wait(*arguments):
    encode(*arguments)
    print("encoded", flush=True)
    time.sleep(600)
encoding.encode_parts = encode_and_wait
main()
"""


def test_a_signal_stops_it_with_one_message_and_keeps_what_is_finished(tmp_path: Path) -> None:
    table = tiny_settings(tmp_path).prepare.model_dump(include={"vocabulary", "validation_share"})
    run_file = tmp_path / "run.toml"
    run_file.write_text(
        "[prepare]\n"
        + "".join(f"{name} = {value}\n" for name, value in table.items())
        + f'[[prepare.sources]]\nname = "letters"\nfiles = ["{tmp_path}/text/letters.parquet"]\n'
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    victims = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        arguments = ["prepare", str(run_file), "--set", f"data.directory={tmp_path}/{number.name}"]
        victims[number] = subprocess.Popen(
            [sys.executable, "-c", STOPPED, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
    for number, victim in victims.items():
        assert victim.stdout is not None
        assert victim.stdout.readline() == "encoded\n"
        victim.send_signal(number)
        _, printed = victim.communicate(timeout=120)
        assert victim.returncode == 3
        assert printed == "bigmodel: stopped; finished work items are kept, the same command resumes from them\n"
        files = list((tmp_path / f"{number.name}.partial").rglob("*.npz"))
        assert len(files) == 3 + 1  # three row groups read, one tokenized


def test_sources_without_documents_and_empty_splits_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": null}\n{"text": " "}\n')
    with pytest.raises(UserError, match=r"prepare.sources 'void': has no documents \(2 read, 1 null, 1 empty\)"):
        prepared(tmp_path, sources=[{"name": "void", "files": [str(empty)]}])
    empty.write_text("")
    with pytest.raises(UserError, match=r"has no documents \(0 read\)"):
        prepared(tmp_path, sources=[{"name": "void", "files": [str(empty)]}])
    remedy = r"none of the 150 documents fell into the validation split; set prepare.validation_share = 0.03, or add"
    with pytest.raises(UserError, match=remedy):
        prepared(tmp_path, validation_share=1e-9)
    with pytest.raises(UserError, match=r"prepare.shard_tokens = 2000000000: a shard file is at most 4 GiB"):
        prepared(tmp_path, shard_tokens=2_000_000_000)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('name = "a"\nfiles = ["{0}/a.jsonl"]\ncolumn = "body"', ["has no column 'body'", "it has 'text', 'id'"]),
        ('name = "a"\nfiles = ["{0}/cut.parquet"]', ["cut.parquet", "cannot be read"]),
        ('name = "a"\nfiles = ["{0}/void.jsonl"]', ["'a': has no documents", "1 read, 1 null"]),
        ('name = "a"\nfiles = ["{0}/bad.jsonl"]', ["bad.jsonl: line 2: not valid JSON", "prepare.malformed_share"]),
        ('name = "a"\nfiles = ["{0}/a.jsonl"]', ["prepare.vocabulary = 32000", "set prepare.vocabulary to"]),
        (
            'name = "a"\nfiles = ["{0}/a.jsonl"]\n[[prepare.sources]]\nname = "a"\nfiles = ["{0}/a.jsonl"]',
            ["two sources are named 'a'"],
        ),
    ],
)
def test_sources_that_cannot_be_prepared_are_one_message_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: str, words: list[str]
) -> None:
    texts = [json.dumps({"text": f"text number {n}", "id": n}) for n in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(texts))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "void.jsonl").write_text('{"text": null}')
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{"text":\n')
    run_file = tmp_path / "run.toml"
    run_file.write_text(
        f'[data]\ndirectory = "{tmp_path}/data"\n[[prepare.sources]]\n' + lines.replace("{0}", str(tmp_path))
    )
    monkeypatch.setattr(sys, "argv", ["bigmodel", "prepare", str(run_file)])
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr().err
    assert stop.value.code == 2
    assert printed.startswith("bigmodel: ")
    assert "Traceback" not in printed
    for word in words:
        assert word in printed
    assert not (tmp_path / "data").exists()


def test_a_given_tokenizer_is_used_as_it_is(home: Path, tmp_path: Path) -> None:
    given = home / "data" / "tokenizer.json"
    directory = prepared(tmp_path, tokenizer=str(given))
    assert (directory / "tokenizer.json").read_bytes() == given.read_bytes()
    assert Manifest.read(directory).vocabulary == 300


def test_a_given_tokenizer_that_changes_is_not_used(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "given.json"
    given.write_bytes((home / "data" / "tokenizer.json").read_bytes())
    scan_all = preparing.scan_all

    def change(*arguments: Any, **named: Any) -> Any:
        given.write_bytes(given.read_bytes() + b" ")
        return scan_all(*arguments, **named)

    monkeypatch.setattr(preparing, "scan_all", change)
    with pytest.raises(UserError, match=r"given\.json: changed while it was prepared"):
        prepared(tmp_path, tokenizer=str(given))


def test_the_command_takes_a_hugging_face_folder_and_keeps_its_names(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    description = json.loads((home / "data" / "tokenizer.json").read_text())
    text = json.dumps(description).replace("<|bos|>", "<|open|>").replace("<|eos|>", "<|close|>")
    (given / "tokenizer.json").write_text(text)
    (given / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": {"content": "<|close|>"}, "x": 1}')
    run_file = tmp_path / "run.toml"
    run_file.write_text(
        f'[data]\ndirectory = "{tmp_path}/data"\n[prepare]\ntokenizer = "train"\nvalidation_share = 0.2\n'
        f'[[prepare.sources]]\nname = "letters"\nfiles = ["{home}/text/letters.parquet"]\n'
    )
    monkeypatch.setattr(sys, "argv", ["bigmodel", "prepare", str(run_file), "--tokenizer", str(given)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    manifest = Manifest.read(tmp_path / "data")
    assert (manifest.bos, manifest.eos, manifest.vocabulary, manifest.document) == (1, 1, 300, "[bos] text [eos]")
    assert Tokenizer.load(tmp_path / "data" / "tokenizer.json").bos == 1
    assert json.loads((tmp_path / "data" / "tokenizer_config.json").read_text())["eos_token"] == "<|close|>"
    stored = ShardStore(tmp_path / "data", "train").document("letters", 0, 0)
    assert (stored[0], stored[-1]) == (1, 1)
    monkeypatch.setattr(sys, "argv", ["bigmodel", "prepare", str(run_file), "--tokenizer", "train"])
    with pytest.raises(UserError, match=r"prepare.vocabulary was None, is 32000; prepare.tokenizer was"):
        app(standalone_mode=False)


def test_a_source_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": "two"}\n')
    unit = corpus.plan_units(corpus.Source("a", (str(file),), ("text",), (Format("jsonl"),)))[0]
    settings = tiny_settings(tmp_path).prepare
    scan = cleaning.scan_unit(unit, settings)
    assert [texts for _, texts in encoding.kept_rows(unit, scan, settings)] == [("one",), ("two",)]
    for changed in (
        '{"text": "one"}\n',
        '{"text": "one"}\n{"text": "two"}\n{}\n',
        '{"text": "one"}\n{"text": "other"}\n',
        '{"text": "one"}\n{"text": "owt"}\n',
    ):
        file.write_text(changed)
        with pytest.raises(UserError, match=r"a\.jsonl: changed while it was prepared"):
            list(encoding.kept_rows(unit, scan, settings))


def test_pairs_are_stored_as_two_columns_of_one_sample(tmp_path: Path) -> None:
    pairs = [{"de": f"Haus {n} " * (n % 9 + 9), "en": f"house {n}"} for n in range(60)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in [*pairs, pairs[7], {"de": "nur", "en": None}]))
    source = {"name": "pairs", "files": [str(file)], "column": "de", "target_column": "en"}
    directory = prepared(tmp_path, sources=[source], vocabulary=270, shard_tokens=1000)
    manifest, store = Manifest.read(directory), ShardStore(directory, "train")
    assert manifest.rows["pairs"] | {"read": 62, "kept": 60, "null": 1, "duplicate": 1} == manifest.rows["pairs"]
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    found, tokens = [], 0
    assert store.num_shards("pairs") >= 2
    for shard in range(store.num_shards("pairs")):
        targets = store.target_lengths("pairs", shard)
        assert len(targets) == len(store.lengths("pairs", shard))
        for row, lengths in enumerate(zip(store.lengths("pairs", shard), targets, strict=True)):
            pair = store.document("pairs", shard, row)
            assert (len(pair.source), len(pair.target)) == lengths
            found.append({"de": tokenizer.decode(pair.source), "en": tokenizer.decode(pair.target)})
            tokens += len(pair.target)
    assert manifest.counts["pairs"]["train"]["target_tokens"] == tokens
    assert store.num_labels == tokens - len(found)
    assert manifest.counts["pairs"]["train"]["text_bytes"] == sum(len(pair["de"].encode()) for pair in found)
    assert store.text_bytes == sum(len(pair["en"].encode()) for pair in found)
    assert manifest.counts["pairs"]["train"]["target_text_bytes"] == store.text_bytes
    assert manifest.row_bytes["pairs"]["kept"] == sum(len(text.encode()) for pair in pairs for text in pair.values())
    both = manifest.counts["pairs"].values()
    tokens = sum(counts["tokens"] - 2 * counts["documents"] for counts in both)
    assert manifest.statistics["bytes_per_token"] == sum(len(pair["de"].encode()) for pair in pairs) / tokens
    of_targets = manifest.statistics["target"]
    assert sum(of_targets["histogram"].values()) == sum(manifest.statistics["histogram"].values()) == 60
    assert of_targets["mean_tokens"] == sum(counts["target_tokens"] for counts in both) / 60
    assert of_targets["max_tokens"] < manifest.statistics["median_tokens"]  # "house 7" against nine times "Haus 7"
    assert found == [pair for pair in pairs if pair in found]
    assert 30 < len(found) < 60
    assert verify(str(directory), quiet()) == []


def test_cleaning_and_decontamination_reach_the_shards_and_the_manifest(home: Path, tmp_path: Path) -> None:
    exam = tmp_path / "exam.txt"
    exam.write_text(" ".join(NEWS[43].split()[2:30]))
    directory = prepared(
        tmp_path, min_characters=60, decontaminate={"files": [str(exam)], "ngram": 13}, unicode_nfc=True
    )
    rows = Manifest.read(directory).rows["news"]
    assert rows["too_short"] == sum(len(text) < 60 for text in NEWS) > 0
    assert rows["contaminated"] >= 1
    assert rows["kept"] == 100 - rows["too_short"] - rows["contaminated"] > 50
    stored = [*documents(directory, "train", "news"), *documents(directory, "validation", "news")]
    assert NEWS[43] not in stored
    assert Manifest.read(directory).recipe["decontaminate"]["ngram"] == 13
    exam.write_text("another exam")
    with pytest.raises(UserError, match=r"prepare.evaluation_sha256 was"):
        prepared(tmp_path, min_characters=60, decontaminate={"files": [str(exam)], "ngram": 13}, unicode_nfc=True)


def test_adding_data_moves_no_document_between_the_splits(home: Path, tmp_path: Path) -> None:
    sources = tiny_settings(home).prepare.model_dump()["sources"]
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({"body": f"one more document, number {n}"}) + "\n" for n in range(50)))
    directory = prepared(tmp_path, sources=[{**sources[0], "files": [str(more), *sources[0]["files"]]}, sources[1]])
    for split, at_least in (("train", 70), ("validation", 10)):
        before, after = (set(documents(folder, split, "news")) for folder in (home / "data", directory))
        assert before < after
        assert len(before) >= at_least


def test_the_embedded_corpus_is_prepared_without_any_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [(path, content) for path, content in embedded.standard_library() if len(content) < 20_000][:60]
    monkeypatch.setattr(embedded, "standard_library", lambda: modules)
    directory = prepared(tmp_path, sources=[], validation_share=0.2, shard_tokens=1_000_000)
    store = ShardStore(directory, "train")
    assert store.sources == ["code", "docs"]
    assert store.manifest.rows["code"]["read"] == store.manifest.rows["docs"]["read"] == 60
    assert {path.name for path in (directory / "corpus").iterdir()} == {"code.parquet", "docs.parquet"}
    assert verify(str(directory), quiet()) == []
    prepared(tmp_path, sources=[], validation_share=0.2, shard_tokens=1_000_000)
    monkeypatch.setattr(embedded, "standard_library", lambda: modules[1:])
    with pytest.raises(UserError, match="Python's standard library has other content now"):
        prepared(tmp_path, sources=[], validation_share=0.2, shard_tokens=1_000_000)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "arrow", "parquet"])
def test_one_large_file_is_tokenized_in_parts_by_several_tasks_and_goes_on_between_them(
    kind: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [*NEWS, None, "", NEWS[3]]
    file = tmp_path / f"news.{kind}"
    if kind.startswith("jsonl"):
        with pyarrow.CompressedOutputStream(str(file), "gzip" if kind.endswith("gz") else "zstd") as stream:
            stream.write("".join(json.dumps({"body": text}) + "\n" for text in texts).encode())
    elif kind == "arrow":
        table = pyarrow.table({"id": list(range(len(texts))), "body": texts})
        with pyarrow.ipc.new_stream(str(file), table.schema) as writer:
            writer.write_table(table)
    else:
        pyarrow.parquet.write_table(pyarrow.table({"body": texts}), file)
    sources = tiny_settings(home).prepare.model_dump()["sources"]
    sources[0]["files"] = [str(file)]
    settings = elsewhere(tiny_settings(home, sources=sources), tmp_path)
    monkeypatch.setattr(corpus, "UNIT_BYTES", 5000)
    monkeypatch.setattr(preparing, "TASKS_A_PROCESS", 12)
    tasks: list[tuple[int, list[int]]] = []
    kills = [2]  # at the second task
    encode = encoding.encode_parts

    def note(number: int, unit: corpus.Unit, parts: list[cleaning.Part], *rest: Any) -> None:
        tasks.append((number, [part.number for part in parts]))
        if len(tasks) in kills:
            raise RuntimeError("killed")
        encode(number, unit, parts, *rest)

    monkeypatch.setattr(encoding, "encode_parts", note)
    with pytest.raises(RuntimeError, match="killed"):
        prepare(settings, quiet())
    assert [name for name in partial_files(tmp_path) if name.startswith("encoded")] == [
        "encoded/00000-0000.npz",
        "encoded/00000-0001.npz",
        "encoded/00000-0002.npz",
    ]
    tasks.clear()
    kills.clear()
    prepare(settings, quiet())
    assert tasks[:3] == [(0, [0, 1, 2]), (0, [3, 4, 5]), (0, [6, 7])]  # 34,000 bytes of text
    for folder in ("train/news", "validation/news", "train/letters", "validation/letters"):
        assert content(tmp_path / "data" / folder) == content(home / "data" / folder)


def test_what_came_of_it_stands_below_the_bars_with_why_rows_were_dropped(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"A text of its own, number {number}.\n" * 20)
    sources = [*write_sources(tmp_path / "text"), {"name": "plain", "files": [str(texts / "*.txt")]}]
    printed = io.StringIO()
    with Progress(console=Console(file=printed, force_terminal=True, width=200)) as progress:
        prepare(tiny_settings(tmp_path, sources=sources), progress)
    end = printed.getvalue().rpartition("100%")[2]
    for line in (
        "data: 162 documents, ",
        " tokens prepared\n  plain: 12 .txt files, one document each\n",
        "\n  news: dropped 1 duplicate, 1 empty, 1 null\n",
    ):
        assert line in end
        assert printed.getvalue().count(line) == 1


def test_in_a_file_the_summary_starts_a_line_of_its_own(tmp_path: Path) -> None:
    printed = io.StringIO()
    with Progress(console=Console(file=printed, force_terminal=False, width=200)) as progress:
        prepare(tiny_settings(tmp_path, sources=write_sources(tmp_path / "text")), progress)
    assert "100%" in printed.getvalue()
    assert re.search(r"^\S*data: \d+ documents, ", printed.getvalue(), re.MULTILINE)
    assert not printed.getvalue().endswith("\n\n")
