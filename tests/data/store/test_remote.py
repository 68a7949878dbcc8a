"""A prepared folder in a store: put there with the manifest last, fetched file by file, never half, never other."""

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from bigmodel.__main__ import main
from bigmodel.config.settings import DataSettings, UserError
from bigmodel.data.load.stream import Stream
from bigmodel.data.plan.lanes import deal, mixed_shards
from bigmodel.data.plan.order import Order
from bigmodel.data.plan.sharing import Place
from bigmodel.data.prepare.pipeline import quiet
from bigmodel.data.store import files, remote
from bigmodel.data.store.manifest import Manifest
from bigmodel.data.store.remote import upload
from bigmodel.data.store.shards import ShardStore
from tests.support.s3 import delete, faulty_server, get, put, refusing_server, s3_server
from tests.support.tiny_corpus import prepared

SHARD = "train/news/shard.00001.mds"
_numbers = count()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("remote"))


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def url(bucket: str, whole: Path) -> str:
    """The prepared folder in the store, a copy for this test alone."""
    place = f"{bucket}/copy-{next(_numbers)}"
    upload(whole, place, quiet())
    return place


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and what was printed of `bigmodel ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["bigmodel", *arguments])
    try:
        main()
    except SystemExit as stop:
        printed = capsys.readouterr()
        return int(stop.code or 0), printed.out + printed.err
    raise AssertionError("main returns by SystemExit")


def write_run(folder: Path, directory: Path, url: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    run_file = folder / "run.toml"
    run_file.write_text(f'[data]\ndirectory = "{directory}"\nremote = "{url}"\n')
    return str(run_file)


def flipped(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


# ---- putting it there -----------------------------------------------------------------------------------------


def test_an_upload_is_the_same_files_with_the_manifest_last(
    whole: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def note(location: str, content: object) -> None:
        written.append(location)
        write(location, content)

    write = files.write
    monkeypatch.setattr(files, "write", note)
    upload(whole, f"{bucket}/deep/er", quiet())
    assert written[-1] == f"{bucket}/deep/er/manifest.json"
    names = {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()}
    assert set(files.sizes(f"{bucket}/deep/er")) == names
    assert len(names) > 15
    for name in names:
        assert get(f"{bucket}/deep/er/{name}") == (whole / name).read_bytes()


def test_an_interrupted_upload_has_no_manifest_and_goes_on_with_what_is_missing_or_wrong(
    whole: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, write, written = f"{bucket}/interrupted", files.write, []

    def fail_at_a_shard(location: str, content: object) -> None:
        if location.endswith(SHARD):
            raise UserError(f"{location}: cannot be written")
        written.append(location)
        write(location, content)

    monkeypatch.setattr(files, "write", fail_at_a_shard)
    with pytest.raises(UserError, match="cannot be written"):
        upload(whole, place, quiet())
    assert "manifest.json" not in files.sizes(place)
    with pytest.raises(UserError, match=r"has no manifest.json, so it is not a whole folder"):
        ShardStore(whole.parent / "none", "train", place)
    put(f"{place}/{SHARD}", b"x" * (whole / SHARD).stat().st_size)
    before = len(written)
    monkeypatch.setattr(files, "write", lambda location, content: (written.append(location), write(location, content)))
    upload(whole, place, quiet())
    assert f"{place}/{SHARD}" in written[before:]  # right size, other content
    assert not set(written[:before]) & set(written[before:])
    assert get(f"{place}/{SHARD}") == (whole / SHARD).read_bytes()


def test_a_damaged_folder_and_other_data_in_the_store_are_refused(whole: Path, bucket: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "data"))
    (folder / SHARD).write_bytes(flipped((folder / SHARD).read_bytes()))
    with pytest.raises(UserError, match=r"shard.00001.mds: differs from the manifest"):
        upload(folder, f"{bucket}/damaged", quiet())
    assert "manifest.json" not in files.sizes(f"{bucket}/damaged")
    upload(whole, f"{bucket}/taken", quiet())
    with pytest.raises(UserError, match="holds other prepared data"):
        upload(prepared(tmp_path / "other", shard_tokens=2900), f"{bucket}/taken", quiet())


# ---- fetching it ----------------------------------------------------------------------------------------------


def test_a_node_fetches_what_it_reads_and_no_shard_more(whole: Path, url: str, tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "data", "train", url)
    lengths = store.lengths("news", 1)
    document = store.document("news", 1, 2)
    local = ShardStore(whole, "train")
    assert lengths.tolist() == local.lengths("news", 1).tolist()
    assert np.array_equal(document, local.document("news", 1, 2))
    fetched = files.sizes(str(tmp_path / "data"))
    assert (tmp_path / "data" / ".fetched").read_text() == f"{SHARD}\n"
    del fetched[".fetched"]
    expected = ["manifest.json", "tokenizer.json", "train/news/index.json", "train/news/lengths.00001.npy", SHARD]
    assert sorted(fetched) == expected
    for name in fetched:
        assert (tmp_path / "data" / name).read_bytes() == (whole / name).read_bytes()
    assert store.remote
    assert (store.remote.num_files, store.remote.num_failures) == (4, 0)
    assert store.remote.num_bytes == sum(fetched[name] for name in expected[1:])
    again = ShardStore(tmp_path / "data", "train", url)
    again.document("news", 1, 2)
    assert again.remote
    assert again.remote.num_files == 0


def test_a_damaged_file_of_the_node_is_fetched_anew(whole: Path, url: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "data"))
    (folder / SHARD).write_bytes(flipped((folder / SHARD).read_bytes()))
    ShardStore(folder, "train", url).document("news", 1, 0)
    assert (folder / SHARD).read_bytes() == (whole / SHARD).read_bytes()


def test_a_transfer_that_fails_is_tried_again_logged_and_counted(
    whole: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chunks, failures = files.chunks, []

    def fail_twice(location: str) -> Iterator[bytes]:
        if location.endswith(".mds") and location.startswith("s3:") and len(failures) < 2:
            failures.append(location)
            yield next(chunks(location))[: 50 if len(failures) == 1 else None]
            if len(failures) == 2:
                raise UserError("the line broke")
            return
        yield from chunks(location)

    store = ShardStore(tmp_path / "data", "train", url)
    monkeypatch.setattr(files, "chunks", fail_twice)
    with caplog.at_level(logging.WARNING):
        store.document("news", 1, 0)
    messages = [record.getMessage() for record in caplog.records if record.name == "bigmodel.data.store.remote"]
    assert store.remote
    assert len(failures) == store.remote.num_failures == 2
    assert "50 bytes" in messages[0]
    assert "attempt 1 of 5 failed" in messages[0]
    assert "the line broke; attempt 2 of 5 failed" in messages[1]
    assert (tmp_path / "data" / SHARD).read_bytes() == (whole / SHARD).read_bytes()


def test_what_the_store_holds_instead_of_the_file_is_refused(url: str, tmp_path: Path) -> None:
    put(f"{url}/{SHARD}", flipped(get(f"{url}/{SHARD}")))
    store = ShardStore(tmp_path / "data", "train", url)
    with pytest.raises(UserError) as error:
        store.document("news", 1, 0)
    assert f"{url}/{SHARD}: the received file differs from the manifest" in str(error.value)
    assert f"bigmodel verify {url}" in str(error.value)
    assert store.remote
    assert store.remote.num_failures == 4  # the fifth is the error
    assert list((tmp_path / "data" / "train" / "news").iterdir()) == [tmp_path / "data/train/news/index.json"]


def test_a_file_that_vanished_is_named(url: str, tmp_path: Path) -> None:
    delete(f"{url}/{SHARD}")
    with pytest.raises(UserError, match=rf"{SHARD}: cannot be read: .*credentials"):
        ShardStore(tmp_path / "data", "train", url).document("news", 1, 0)
    assert not (tmp_path / "data" / SHARD).exists()


# ---- names and links that lead outside ------------------------------------------------------------------------


def test_a_manifest_that_names_a_file_outside_its_folder_writes_nothing_there(url: str, tmp_path: Path) -> None:
    content = json.loads(get(f"{url}/manifest.json"))
    content["files"]["../../outside.mds"] = content["files"][SHARD]
    put(f"{url}/manifest.json", json.dumps(content).encode())
    with pytest.raises(UserError, match=r"manifest.json: names '../../outside.mds', which is no file or source inside"):
        ShardStore(tmp_path / "deep" / "er" / "data", "train", url)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["manifest.json"]


def test_a_name_that_is_no_path_inside_is_refused_in_every_manifest(whole: Path) -> None:
    content = json.loads((whole / "manifest.json").read_bytes())
    assert len(Manifest.parse(json.dumps(content).encode(), "m.json").files) > 15
    for table, names in (
        (
            "files",
            [
                "/tmp/x",
                "train/../../x",
                "..",
                ".",
                "./x",
                "",
                "train//x",
                "train/",
                "a\\b",
                "a\0b",
                "a\nb",
                "s3://b/x",
                "x?region=y",
                "x#y",
            ],
        ),
        ("counts", ["../news", "a/b", ".."]),
    ):
        for name in names:
            changed = content | {table: content[table] | {name: next(iter(content[table].values()))}}
            with pytest.raises(UserError, match=r"^m.json: names '.*', which is no file or source inside its folder"):
                Manifest.parse(json.dumps(changed).encode(), "m.json")


def test_nothing_is_fetched_through_a_link_that_leads_outside(url: str, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(tmp_path / "outside")
    store = ShardStore(tmp_path / "data", "train", url)
    with pytest.raises(UserError, match=r"leads outside \S+/data, through a symbolic link to \S+/outside/news/index"):
        store.document("news", 1, 0)
    assert list((tmp_path / "outside").rglob("*")) == []


@pytest.mark.parametrize("name", [".tokenizer.json.part", ".manifest.json.part", ".fetched"])
def test_no_file_of_a_fetch_is_written_through_a_link(name: str, url: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match=rf"^{data / name}: is a symbolic link, which is not followed; delete it$"):
        ShardStore(data, "train", url).document("news", 1, 0)
    assert not (tmp_path / "outside").exists()
    (data / name).unlink()
    assert len(ShardStore(data, "train", url).document("news", 1, 0))


def test_a_file_in_the_place_of_a_folder_is_named(url: str, tmp_path: Path) -> None:
    (tmp_path / "train").write_text("a file")
    with pytest.raises(UserError, match=r"a file is in the place of its folder; delete that file"):
        ShardStore(tmp_path, "train", url).document("news", 1, 0)


def test_an_upload_sends_what_a_link_inside_names_and_refuses_one_that_leads_outside(
    whole: Path, bucket: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "data"))
    shard = folder / SHARD
    shard.rename(folder / "elsewhere")
    shard.symlink_to(folder / "elsewhere")
    upload(folder, f"{bucket}/linked", quiet())
    assert get(f"{bucket}/linked/{SHARD}") == (whole / SHARD).read_bytes()
    shard.unlink()
    shard.symlink_to(whole / SHARD)
    with pytest.raises(UserError, match=rf"{SHARD}: leads outside \S+/data, through a symbolic link to {whole}"):
        upload(folder, f"{bucket}/outside", quiet())
    assert "manifest.json" not in files.sizes(f"{bucket}/outside")
    read = [ShardStore(directory, "train").document("news", 1, 0) for directory in (folder, whole)]
    assert np.array_equal(*read)  # links of the user's own are read


# ---- a node's cache -------------------------------------------------------------------------------------------


def shards_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.mds")}


def shard_bytes(whole: Path, source: str = "news") -> dict[str, int]:
    return {
        f"train/{source}/{path.name}": path.stat().st_size for path in sorted((whole / f"train/{source}").glob("*.mds"))
    }


def age(folder: Path) -> None:
    """As if what is there had been used an hour ago."""
    for path in folder.rglob("*.mds"):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3600))


def test_the_cache_keeps_to_its_limit_by_deleting_what_was_used_longest_ago(
    whole: Path, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = shard_bytes(whole)
    names = list(sizes)
    assert len(names) == 3
    limit = sum(sizes.values()) - min(sizes.values())
    store = ShardStore(tmp_path / "data", "train", url, cache_bytes=limit)
    for number in (0, 1):
        store.document("news", number, 0)
        age(tmp_path / "data")
    store.open_shard("news", 0)  # used again
    store.document("news", 2, 0)
    assert shards_in(tmp_path / "data") == {names[0], names[2]}
    assert store.remote
    assert store.remote.num_deleted == 1
    assert not [record for record in caplog.records if record.name == "bigmodel.data.store.remote"]
    local = ShardStore(whole, "train")
    for number in (1, 0, 2, 1, 1, 0):  # what was deleted comes again, and is the same
        assert np.array_equal(store.document("news", number, 1), local.document("news", number, 1))
        assert sum(sizes[name] for name in shards_in(tmp_path / "data")) <= limit
    assert any("is deleted for room while in use" in record.getMessage() for record in caplog.records)


def test_what_other_processes_are_fetching_counts_towards_the_limit(whole: Path, url: str, tmp_path: Path) -> None:
    sizes = shard_bytes(whole)
    _, second, third = sizes
    store = ShardStore(tmp_path / "data", "train", url, cache_bytes=sum(sizes.values()) - 1)
    store.document("news", 0, 0)
    part = tmp_path / "data" / Path(third).with_name(f".{Path(third).name}.part")
    part.touch()  # as a process that begins does
    store.document("news", 1, 0)
    assert shards_in(tmp_path / "data") == {second}


@pytest.mark.parametrize("case", ["prepared here", "gone from the store", "cut in the store", "the store is silent"])
def test_the_only_copy_of_a_shard_is_never_deleted(
    case: str, whole: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = shard_bytes(whole)
    first, second = list(sizes)[:2]
    store = ShardStore(tmp_path / "data", "train", url, cache_bytes=max(sizes.values()) + 1)
    if case == "prepared here":
        (tmp_path / "data" / first).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(whole / first, tmp_path / "data" / first)
    store.document("news", 0, 0)
    if case == "gone from the store":
        delete(f"{url}/{first}")
    if case == "cut in the store":
        put(f"{url}/{first}", get(f"{url}/{first}")[:-1])
    if case == "the store is silent":
        size = files.size

        def silent(location: str) -> int:
            if location.startswith("s3:"):
                raise UserError("no answer")
            return size(location)

        monkeypatch.setattr(files, "size", silent)
    store.document("news", 1, 0)
    assert shards_in(tmp_path / "data") == {first, second}
    assert store.remote
    assert store.remote.num_deleted == 0


def test_a_limit_below_one_shard_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.cache_bytes = 100: train/\S+ alone has \d+ bytes; raise it"):
        ShardStore(tmp_path / "data", "train", url, cache_bytes=100)


def test_what_killed_fetches_left_is_deleted_and_what_a_live_one_holds_is_not(url: str, tmp_path: Path) -> None:
    ShardStore(tmp_path / "data", "train", url).document("news", 0, 0)
    folder = tmp_path / "data/train/news"
    stale, live, other = (folder / f".{name}.part" for name in ("shard.00001.mds", "shard.00002.mds", "notes.txt"))
    manifest = tmp_path / "data/.manifest.json.part"
    for part in (stale, live, other, manifest):
        part.write_bytes(b"half")
    with open(live, "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        ShardStore(tmp_path / "data", "train", url)
    assert not stale.exists()
    assert not manifest.exists()
    assert live.read_bytes() == b"half"
    assert other.exists()  # not ours


# ---- a store that is slow or fails ----------------------------------------------------------------------------


def test_a_store_that_is_slow_and_fails_for_a_while_gives_the_right_bytes_and_failures_are_counted(
    whole: Path, bucket: str, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with faulty_server(seconds=0.3, failures=3, of=SHARD) as asked:
        store = ShardStore(tmp_path / "data", "train", url)
        with caplog.at_level(logging.WARNING):
            document = store.document("news", 1, 2)
    assert np.array_equal(document, ShardStore(whole, "train").document("news", 1, 2))
    assert (tmp_path / "data" / SHARD).read_bytes() == (whole / SHARD).read_bytes()
    assert store.remote
    assert store.remote.num_failures == 3
    assert len([r for r in caplog.records if "of 5 failed" in r.getMessage()]) == 3
    assert len(asked) > 6  # the others were only slow


@pytest.mark.parametrize("fault", ["busy", "cut"])
def test_a_store_that_is_busy_or_breaks_off_for_a_while_gives_the_right_bytes(
    fault: str, whole: Path, url: str, tmp_path: Path
) -> None:
    with faulty_server(seconds=0.05, failures=4, of=SHARD, fault=fault) as asked:
        store = ShardStore(tmp_path / "data", "train", url)
        store.document("news", 1, 2)
    assert (tmp_path / "data" / SHARD).read_bytes() == (whole / SHARD).read_bytes()
    assert sum(path.endswith(SHARD) for path in asked) > 4  # tried again, by the client of S3 or by us


def test_a_store_that_stays_broken_is_an_error_that_names_the_file(url: str, tmp_path: Path) -> None:
    with faulty_server(seconds=0, failures=10_000, of=SHARD):
        store = ShardStore(tmp_path / "data", "train", url)
        with pytest.raises(UserError, match=rf"{url}/{SHARD}: cannot be read"):
            store.document("news", 1, 2)
    assert not (tmp_path / "data" / SHARD).exists()


def test_a_folder_of_other_data_is_refused(url: str, tmp_path: Path) -> None:
    folder = prepared(tmp_path, shard_tokens=2900)
    (folder / SHARD).unlink()
    with pytest.raises(UserError, match=r"holds other data than data.remote"):
        ShardStore(folder, "train", url).document("news", 1, 0)


def test_where_every_file_is_there_the_store_is_not_asked(whole: Path) -> None:
    with refusing_server():
        store = ShardStore(whole, "train", "s3://closed/data")
        assert len(store.document("news", 1, 0)) > 2


# ---- what a node's stream fetches -----------------------------------------------------------------------------

DATA = DataSettings(max_document_length=40, sequence_length=64, max_documents=8, lanes=2, packing_buffer=12)


def test_each_node_fetches_the_shards_of_its_lanes_ahead_and_no_other(whole: Path, url: str, tmp_path: Path) -> None:
    """Two nodes with folders of their own, one lane each; the batches are those of one node with all files."""
    expected: list[list[str]] = []
    for rank, place in ((0, Place(0, 1)), (0, Place(0, 2)), (1, Place(1, 2))):
        alone = place.num_nodes == 1
        folder = whole if alone else tmp_path / f"node-{rank}"
        store = ShardStore(folder, "train", "" if alone else url)
        lanes = place.lanes(DATA.lanes)
        nodes = None if alone else _Silent()
        stream = Stream(store, Order(store, DATA, 8, 5, lanes=lanes), DATA, 1, place, 5, nodes)
        steps = [[b.fingerprint() for b in next(stream).micro_batches] for _ in range(8)]
        stream.close()
        expected = expected or steps
        if not alone:
            shards = mixed_shards(store, DATA)
            mine = {(name, shard.number) for name, dealt in deal(shards, 2).items() for shard in dealt[rank]}
            names = {f"train/{name}/shard.{number:05}.mds" for name, number in mine}
            assert shards_in(folder) == names
            assert store.remote
            lengths = {name.replace("shard", "lengths").replace(".mds", ".npy") for name in names}
            others = {"tokenizer.json", *(f"train/{name}/index.json" for name in store.sources)}
            assert store.remote.num_files == len(names | lengths | others)
            assert [set(step) <= set(all_) for step, all_ in zip(steps, expected, strict=True)] == [True] * 8
            assert {print_ for step in steps for print_ in step}


class _Silent:
    """`NodeSums` of a node that hears nothing of the others."""

    def add_up(self, step: int, values: Sequence[int], abandoned: object) -> list[int]:
        return list(values)

    def fail(self, step: int, reason: str) -> None:
        raise AssertionError(reason)


def test_a_stream_over_a_store_that_vanishes_ends_with_an_error_that_names_the_file(url: str, tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "data", "train", url)
    data = DATA.model_copy(update={"packing_buffer": 4})
    stream = Stream(store, Order(store, data, 8, 5), data, 1, Place(0, 1), 5)
    next(stream)
    for name in store.manifest.files:
        delete(f"{url}/{name}")
    for path in (tmp_path / "data").rglob("*.mds"):
        path.unlink()
    with pytest.raises(UserError, match=r"shard\.0000\d\.mds: cannot be read"):
        list(stream)
    stream.close()


def fetch_and_hang(url: str, directory: Path, started: object) -> None:
    """In a process of its own: a stream whose shards come, but never to their end."""
    chunks = files.chunks

    def hang(location: str) -> Iterator[bytes]:
        for content in chunks(location):
            if location.endswith(".mds"):
                yield content[:100]
                started.set()  # type: ignore[attr-defined]
                time.sleep(600)
            yield content

    store = ShardStore(directory, "train", url)
    files.chunks = hang
    next(Stream(store, Order(store, DATA, 8, 5), DATA, 1, Place(0, 1), 5))


def test_a_killed_run_leaves_no_shared_memory_and_the_next_one_cleans_up_and_goes_on(
    whole: Path, url: str, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=fetch_and_hang, args=(url, tmp_path / "data", started))
    process.start()
    assert started.wait(120)
    maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    assert [line for line in maps if "/dev/shm/" in line and "/sem." not in line] == []  # semaphores are others'
    process.kill()
    process.join(30)
    assert list((tmp_path / "data").rglob(".*.part"))
    store = ShardStore(tmp_path / "data", "train", url)
    assert not list((tmp_path / "data").rglob(".*.part"))
    stream = Stream(store, Order(store, DATA, 8, 5), DATA, 1, Place(0, 1), 5)
    local = ShardStore(whole, "train")
    other = Stream(local, Order(local, DATA, 8, 5), DATA, 1, Place(0, 1), 5)
    for _ in range(8):
        mine, theirs = next(stream), next(other)
        assert [b.fingerprint() for b in mine.micro_batches] == [b.fingerprint() for b in theirs.micro_batches]
    stream.close()
    other.close()


# ---- two at once ----------------------------------------------------------------------------------------------


def fetch_slowly(url: str, directory: Path, start: object, results: object) -> None:
    """In a process of its own: fetch a shard a few bytes at a time, and say what came and how many were fetched."""
    chunks = files.chunks

    def slow(location: str) -> Iterator[bytes]:
        content = b"".join(chunks(location))
        if location == f"{url}/{SHARD}":
            for place in range(0, len(content), 1000):
                time.sleep(0.05)
                yield content[place : place + 1000]
        else:
            yield content

    files.chunks = slow
    store = ShardStore(directory, "train", url)
    store.lengths("news", 1)
    before = store.remote.num_files
    start.wait(60)
    content = store.file(SHARD).read_bytes()
    results.put((store.remote.num_files - before, content))


def test_of_two_processes_one_fetches_and_the_other_waits_for_the_whole_file(
    whole: Path, url: str, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=fetch_slowly, args=(url, tmp_path / "data", start, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    answers = sorted(results.get(timeout=90) for _ in workers)
    for worker in workers:
        worker.join(30)
    assert [fetched for fetched, _ in answers] == [0, 1]
    assert {content for _, content in answers} == {(whole / SHARD).read_bytes()}
    assert len((whole / SHARD).read_bytes()) > 4000
    assert not list((tmp_path / "data").rglob(".*.part"))


def test_what_a_killed_process_left_half_is_not_used(whole: Path, url: str, tmp_path: Path) -> None:
    store = ShardStore(tmp_path / "data", "train", url)
    part = tmp_path / "data" / "train" / "news" / ".shard.00001.mds.part"
    part.parent.mkdir(parents=True)
    part.write_bytes((whole / SHARD).read_bytes()[:700] + b"half")
    assert store.file(SHARD).read_bytes() == (whole / SHARD).read_bytes()
    assert not part.exists()


def test_a_file_system_without_locks_is_named(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"manifest.json.part: its file system has no locks \(No locks available\)"):
        ShardStore(tmp_path / "data", "train", url)


def test_a_disk_that_becomes_full_is_named_and_nothing_half_stays(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = ShardStore(tmp_path / "data", "train", url)
    monkeypatch.setattr(remote.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        store.file(SHARD)
    assert error.value.filename == str(tmp_path / "data" / SHARD)
    assert not list((tmp_path / "data" / "train").rglob("*.*"))


# ---- the command line -----------------------------------------------------------------------------------------


def test_upload_then_verify_and_show_by_run_file(
    whole: Path,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = f"{bucket}/by-command"
    run_file = write_run(tmp_path, whole, place)
    assert run(monkeypatch, capsys, "upload", run_file)[0] == 0
    for location in (run_file, place):
        code, printed = run(monkeypatch, capsys, "verify", location)
        assert code == 0, printed
        assert f"{place}" in printed
        assert "every file agrees with the manifest" in printed
    node = write_run(tmp_path / "node", tmp_path / "node" / "data", place)
    ShardStore(tmp_path / "node" / "data", "train", place).document("news", 1, 0)
    assert run(monkeypatch, capsys, "verify", node)[0] == 0  # a part of the files is no damage there
    put(f"{place}/{SHARD}", flipped(get(f"{place}/{SHARD}")))
    put(f"{place}/stray.txt", b"")
    code, printed = run(monkeypatch, capsys, "verify", place)
    assert code == 2
    assert f"{place}/{SHARD}: its content differs" in printed
    assert f"{place}/stray.txt: not in the manifest" in printed
    assert "2 problem(s)" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify", "s3://{bucket}/nothing"], ["s3://{bucket}/nothing: has no manifest.json", "bigmodel upload"]),
        (["verify", "s3://nobody/data"], ["s3://nobody/data", "manifest.json"]),
        (["verify", "gopher://hole/data"], ["gopher://hole/data", "no driver"]),
        (["verify", "{none}"], ["no such folder"]),
        (["upload", "{run}"], ["data.remote is not set", "s3://bucket/folder"]),
        (["upload", "{run}", "--set", "data.remote=s3://nobody/x"], ["s3://nobody/x", "cannot be written"]),
        (
            ["show", "data", "{run}", "--set", "data.remote=s3://{bucket}/nothing", "--set", "data.directory={none}"],
            ["has no manifest.json"],
        ),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str],
    words: list[str],
    whole: Path,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_file = write_run(tmp_path, whole, "")
    names = {"bucket": bucket.removeprefix("s3://"), "none": tmp_path / "none", "run": run_file}
    code, printed = run(monkeypatch, capsys, *(argument.format(**names) for argument in arguments))
    assert code == 2, printed
    assert printed.count("bigmodel: ") == 1
    assert "Traceback" not in printed
    for word in words:
        assert word.format(**names) in printed


def test_a_store_that_wants_other_credentials_says_which_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = write_run(tmp_path, tmp_path / "data", "s3://private/data")
    with refusing_server():
        code, printed = run(monkeypatch, capsys, "show", "data", run_file)
    assert code == 2, printed
    assert "s3://private/data/manifest.json: cannot be read" in printed
    assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "data").exists()
