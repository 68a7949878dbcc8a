"""Tars of WebDataset are sources of prepare; a cut or damaged one is an error."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import webdataset

from bigmodel.config.data_settings import SourceSettings
from bigmodel.config.settings import UserError
from bigmodel.data.prepare.corpus import Source, find_source, plan_units, read_unit
from bigmodel.data.prepare.rows import Malformed

TEXTS = [f"Text {number}: été\n" * (1 + number % 3) for number in range(7)]


def write_tar(path: Path, samples: list[dict[str, Any]]) -> Path:
    with webdataset.TarWriter(str(path)) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"part.d/{number:03}"} | sample)
    return path


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [{"txt": text, "json": {"title": text[:6], "n": {"m": text}}} for text in TEXTS]
    return write_tar(tmp_path_factory.mktemp("tar") / "a.tar", samples)


def source(path: Path, **settings: Any) -> Source:
    return find_source(SourceSettings(name="tars", files=[str(path)], **settings))


def rows(path: Path, **settings: Any) -> list[Any]:
    return [row for unit in plan_units(source(path, **settings)) for row, _ in read_unit(unit)]


@pytest.mark.parametrize("column", ["text", "txt", "json.n.m"])
def test_a_text_or_a_field_of_a_json_member_is_a_column(tar: Path, column: str) -> None:
    assert rows(tar, column=column) == [(text,) for text in TEXTS]


def test_the_samples_are_those_of_webdataset(tmp_path: Path) -> None:
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("x.txt", "d/x.txt", "d/x.seg.TXT", "noending", "__meta__", "d/y.z/1.txt", "x.txt"):
            entry = tarfile.TarInfo(name)
            entry.size = len(name)
            tar.addfile(entry, io.BytesIO(name.encode()))
        tar.addfile(tarfile.TarInfo("d/link.txt"))
        link = tarfile.TarInfo("d/symbolic.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "x.txt"
        tar.addfile(link)
    theirs = [
        (one["txt"].decode() if "txt" in one else None, one["seg.txt"].decode() if "seg.txt" in one else None)
        for one in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    assert rows(path, column="txt", target_column="seg.txt") == theirs
    assert len(theirs) == 5


@pytest.mark.parametrize("ending", ["tar.gz", "tgz", "tar.zst", "tar"])
def test_compressed_tars_are_read_whatever_their_name(tar: Path, tmp_path: Path, ending: str) -> None:
    stored = tar.read_bytes()
    packed = pyarrow.compress(stored, "zstd", asbytes=True) if ending == "tar.zst" else gzip.compress(stored)
    path = tmp_path / f"a.{ending}"
    path.write_bytes(packed)
    assert rows(path) == [(text,) for text in TEXTS]


def test_a_sample_without_the_member_is_null_and_one_that_is_no_text_is_malformed(tmp_path: Path) -> None:
    samples = [{"txt": "a"}, {"cls": "5"}, {"txt": b"\xff"}, {"json": {"text": "b"}}, {"json": {"text": 5}}]
    found = rows(write_tar(tmp_path / "b.tar", samples))
    assert [one for one in found if not isinstance(one, Malformed)] == [("a",), (None,), ("b",)]
    malformed = [(one.place, one.reason) for one in found if isinstance(one, Malformed)]
    assert malformed == [
        ("sample 'part.d/002'", "'txt' is not UTF-8"),
        ("sample 'part.d/004'", "'text' is a number, not text"),
    ]


def test_a_missing_column_is_named_with_those_that_are_there(tar: Path) -> None:
    with pytest.raises(UserError, match=r"a.tar has no column 'body'; it has 'json', 'txt', 'json.title', 'json.n', "):
        source(tar, column="body")


def test_a_cut_or_damaged_tar_is_an_error_wherever_it_is_cut(tar: Path, tmp_path: Path) -> None:
    stored = tar.read_bytes()
    heads = [place for place in range(0, len(stored), 512) if stored[place + 257 : place + 262] == b"ustar"]
    assert len(heads) == 28  # two a member: TarWriter puts a pax record before each
    path = tmp_path / "cut.tar"
    for end in (heads[6], heads[6] + 100, heads[6] + 512, heads[7], heads[7] + 520, heads[-1] + 1024):
        path.write_bytes(stored[:end])
        with pytest.raises(UserError, match=r"cut.tar: is cut.*; restore the file or leave it out"):
            rows(path)
    path.write_bytes(stored[: heads[10]] + b"\xff" * 512 + stored[heads[10] + 512 :])
    with pytest.raises(UserError, match=rf"cut.tar: is damaged at byte {heads[10]:,}"):
        rows(path)
    path.write_bytes(stored + stored)
    with pytest.raises(
        UserError, match=r"cut.tar: goes on behind its end, as tars that were joined do, at byte 28,672"
    ):
        rows(path)
    path.write_bytes(json.dumps(TEXTS).encode() * 20)
    with pytest.raises(UserError, match=r"cut.tar: is cut, or no tar"):
        rows(path)
