"""What an index.json says of its shards is compared with them; what leads outside its folder is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigmodel.config.settings import UserError
from bigmodel.data.prepare.indexes import compare_with_indexes
from bigmodel.data.prepare.pipeline import quiet
from bigmodel.data.prepare.work_items import processes
from bigmodel.data.store import mds
from bigmodel.data.store.mds_index import compare, list_shards, listed_beside
from tests.data.store.test_mds import write_shards

COMPRESSIONS = {"br": ".br", "bz2:1": ".bz2", "gz": ".gz", "snappy": ".snappy", "zstd:7": ".zstd"}
SAMPLES = [{"tokens": np.arange(number, number + 9, dtype=np.uint16), "url": "x" * number} for number in range(60)]
COLUMNS = {"tokens": "ndarray:uint16", "url": "str"}
# A zstd frame of one byte that asks for a window of 2 GiB: magic, no size, window, one raw block that is the last.
LARGE_WINDOW = bytes.fromhex("28b52ffd 00 a8 090000 41")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard of 60 samples by each compression, with every hash that MDSWriter offers; "raw" is uncompressed."""
    folder = tmp_path_factory.mktemp("written")
    write_shards(folder / "raw", COLUMNS, SAMPLES, size_limit=None, hashes=["md5", "sha1"])
    from streaming.base.hashing import get_hashes

    for name in COMPRESSIONS:
        options = {"compression": name, "hashes": sorted(get_hashes())}
        write_shards(folder / name.partition(":")[0], COLUMNS, SAMPLES, size_limit=None, **options)
    return folder


def copied(written: Path, folder: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
    """The shard of a folder with a changed entry in its index.json."""
    folder.mkdir()
    for path in written.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    index = json.loads((folder / "index.json").read_bytes())
    change(index["shards"][0])
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def differences(*folders: Path) -> str:
    """The error that all shards of these folders give, their folder left out."""
    shards = [shard for folder in folders for shard in list_shards(str(folder))]
    with processes(1, quiet()) as team, pytest.raises(UserError) as error:
        compare_with_indexes(shards, team, quiet())
    return str(error.value).replace(f"{folders[0]}/", "")


def test_every_compression_and_hash_that_mdswriter_offers_is_read_and_compared(written: Path) -> None:
    raw = (written / "raw" / "shard.00000.mds").read_bytes()
    for name, ending in COMPRESSIONS.items():
        (shard,) = list_shards(str(written / name.partition(":")[0]))
        assert shard.file.endswith(f"shard.00000.mds{ending}")
        assert shard.entry.zip_data is not None
        assert len(shard.entry.zip_data.hashes) >= 17
        assert compare(shard).differences == []
        assert compare(shard).unknown == set()
        content = mds.ShardContent.of_file(shard.file, Path(shard.file).read_bytes())
        assert list(content.values("tokens")) == list(mds.ShardContent.parse(raw).values("tokens"))
    assert set(COMPRESSIONS.values()) | {".zst"} == set(mds.COMPRESSIONS)


def test_all_that_is_false_in_an_index_is_one_error(written: Path, tmp_path: Path) -> None:
    def change(entry: dict[str, Any]) -> None:
        entry["samples"], entry["column_names"], entry["column_sizes"] = 75, ["ids", "url"], [2, None]
        entry["raw_data"] |= {"bytes": 7, "hashes": entry["raw_data"]["hashes"] | {"sha1": "0" * 40}}
        entry["zip_data"] |= {"bytes": 8, "hashes": entry["zip_data"]["hashes"] | {"xxh64": "0" * 16}}

    packed = copied(written / "snappy", tmp_path / "packed", change)
    plain = copied(written / "raw", tmp_path / "plain")
    shard = plain / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-1] + b"y")
    found = differences(packed, plain)
    size = json.loads((written / "snappy" / "index.json").read_bytes())["shards"][0]["raw_data"]["bytes"]
    for words in (
        "differ in 9 points",
        "\n  shard.00000.mds.snappy: index.json says 8 bytes, the file has",
        "\n  shard.00000.mds.snappy: index.json says xxh64 0000000000000000, the file has",
        f"\n  shard.00000.mds.snappy: index.json says 7 bytes, its decompressed content has {size:,}",
        f"\n  shard.00000.mds.snappy: index.json says sha1 {'0' * 40}, its decompressed content has",
        "\n  shard.00000.mds.snappy: index.json says 75 samples, the shard has 60",
        "\n  shard.00000.mds.snappy: index.json says column_names ['ids', 'url'], the shard has ['tokens', 'url']",
        "\n  shard.00000.mds.snappy: index.json says column_sizes [2, None], the shard has [None, None]",
        f"\n  {shard}: index.json says md5",
        f"\n  {shard}: index.json says sha1",
        "\nrestore the shards and the index.json that belong together",
    ):
        assert words in found, found


def test_of_many_differences_twenty_are_listed_and_the_others_counted(written: Path, tmp_path: Path) -> None:
    folder = copied(written / "raw", tmp_path / "many", lambda entry: entry.update(samples=1))
    shards = list_shards(str(folder)) * 25
    with processes(1, quiet()) as team, pytest.raises(UserError, match=r"(?s)differ in 25 points.*and 5 more") as error:
        compare_with_indexes(shards, team, quiet())
    assert str(error.value).count("says 1 samples") == 20


def test_a_hash_that_is_unknown_here_is_said(written: Path, tmp_path: Path) -> None:
    entry = {"hashes": {"later1": "12", "shake_128": "34"}}
    folder = copied(written / "raw", tmp_path / "unknown", lambda it: it["raw_data"].update(entry))
    comparison = compare(*list_shards(str(folder)))
    assert (comparison.differences, comparison.unknown) == ([], {"later1", "shake_128"})


def test_what_cannot_be_decompressed_is_named_with_its_true_reason(written: Path) -> None:
    content = {
        name: (written / name.partition(":")[0] / f"shard.00000.mds{COMPRESSIONS[name]}").read_bytes()
        for name in COMPRESSIONS
    }
    for file, stored, reason in [
        (
            "a.mds.zstd",
            LARGE_WINDOW,
            "its zstd window is above 128 MiB, the most that is read; decompress it: zstd -d --rm --long=31",
        ),
        ("a.mds.zst", content["zstd:7"][:-3], "it is cut: its zstd data has no end"),
        ("a.mds.br", content["br"][:-3], "it is cut: its brotli data has no end"),
        ("a.mds.bz2", content["bz2:1"][:-3], "it is cut: its bz2 data has no end"),
        ("a.mds.gz", content["gz"][:-3], "it is cut: its gzip data has no end"),
        ("a.mds.gz", content["gz"][:-8] + bytes(8), "its gzip data is damaged (CRC check failed"),
        ("a.mds.snappy", content["snappy"][:-3], "its snappy data is damaged"),
        ("a.mds.snappy", content["zstd:7"], "its content is compressed by zstd, its name ends otherwise; rename it"),
        ("a.mds", content["bz2:1"], "its content is compressed by bz2, its name ends otherwise; rename it"),
        ("a.mds.zstd", b"", "the file is empty"),
    ]:
        with pytest.raises(ValueError, match=re.escape(reason)):
            mds.ShardContent.of_file(file, stored)
    padded = mds.ShardContent.of_file("a.mds.gz", content["gz"] + bytes(512))
    assert len(padded.bounds) == 61


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda it: it["raw_data"].update(basename="../shard.00000.mds"),
            "lists '../shard.00000.mds', which is no file",
        ),
        (lambda it: it["raw_data"].update(basename="/etc/hostname"), "lists '/etc/hostname', which is no file inside"),
        (lambda it: it["raw_data"].update(basename="shard.mds"), "shard.mds: missing, but index.json lists it"),
        (lambda it: it.update(zip_data=it["raw_data"]), "lists shard.00000.mds twice"),
        (lambda it: it.pop("raw_data"), "damaged; it is not an index of mosaicml-streaming"),
        (lambda it: it["raw_data"].update(hashes=[1]), "damaged; it is not an index of mosaicml-streaming"),
        (lambda it: it.update(column_names=[], column_encodings=[]), "damaged; it is not an index of mosaicml-stream"),
        (lambda it: it.update(column_encodings=[]), "damaged; it is not an index of mosaicml-streaming"),
        (lambda it: it.update(format="csv"), "lists csv shards; only MDS shards can be read"),
    ],
)
def test_an_index_that_cannot_be_followed_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, written: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        list_shards(str(copied(written / "raw", tmp_path / "index", change)))


def test_a_link_in_a_folder_of_shards_is_followed_only_inside(written: Path, tmp_path: Path) -> None:
    folder = copied(written / "raw", tmp_path / "links")
    shard = folder / "shard.00000.mds"
    (folder / "deep").mkdir()
    shard.rename(folder / "deep" / "shard.mds")
    shard.symlink_to("deep/shard.mds")
    assert compare(*list_shards(str(folder))).differences == []
    assert compare(*list_shards(f"file://{folder}")).differences == []
    shard.unlink()
    shard.symlink_to(written / "raw" / "shard.00000.mds")
    for place in (str(folder), f"file://{folder}"):
        with pytest.raises(UserError, match=r"shard.00000.mds: leads outside .*/links, through a symbolic link to "):
            list_shards(place)


def test_a_shard_that_the_index_beside_it_does_not_list_is_named(written: Path, tmp_path: Path) -> None:
    folder = copied(written / "raw", tmp_path / "beside")
    shard = str(folder / "shard.00000.mds")
    (listed,) = listed_beside([shard, str(tmp_path / "no index" / "a.mds")])
    assert compare(listed).differences == []
    with pytest.raises(UserError, match=r"other.mds: not in the index.json beside it; leave it out of the source, or"):
        listed_beside([shard, str(folder / "other.mds")])
