"""A file is read for what it is: by its name, its first bytes, or the format that its source states."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from bigmodel.config.settings import SourceSettings, UserError
from bigmodel.data.prepare import corpus, formats
from bigmodel.data.prepare.rows import Format, Malformed
from tests.data.prepare.test_corpus import TEXTS, texts_of, write_arrow, write_jsonl, write_parquet


def read_as(told: str, file: Path) -> list[object]:
    source = corpus.find_source(SourceSettings.model_validate({"name": "a", "files": [str(file)], "format": told}))
    return [row[0] for unit in corpus.plan_units(source) for row, _ in corpus.read_unit(unit) if isinstance(row, tuple)]


def test_case_and_compression_of_a_name_are_habits(tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes()
    array = json.dumps([{"text": text} for text in TEXTS]).encode()
    for name, content in (
        ("A.JSONL", lines),
        ("a.json.gz", gzip.compress(lines)),
        ("array.json.GZ", gzip.compress(array)),
        ("a.ndjson.xz", lzma.compress(lines)),
        ("a.jsonl.bz2", bz2.compress(lines)),
        ("plain.jsonl.gz", lines),  # unpacked by the client that fetched it
        ("packed.jsonl", gzip.compress(lines)),
        ("other.jsonl.gz", bz2.compress(lines)),
    ):
        (tmp_path / name).write_bytes(content)
        assert texts_of(tmp_path / name) == TEXTS, name
    (tmp_path / "a.TXT.gz").write_bytes(gzip.compress(b"one\n\ntwo"))
    assert texts_of(tmp_path / "a.TXT.gz") == ["one\n\ntwo"]
    for made, name in ((write_parquet, "a.Parquet"), (write_arrow, "a.ARROW")):
        assert texts_of(made(tmp_path / name, TEXTS)) == TEXTS
    write_parquet(tmp_path / "parquet.arrow", TEXTS)
    write_arrow(tmp_path / "arrow.jsonl", TEXTS)
    assert texts_of(tmp_path / "parquet.arrow") == texts_of(tmp_path / "arrow.jsonl") == TEXTS


def test_a_source_may_state_the_format_of_files_with_other_names(tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "c4-train.00000-of-01024", TEXTS)
    with pytest.raises(UserError, match=r"01024: unknown extension; known are .*else set `format` of this source"):
        texts_of(lines)
    assert read_as("jsonl", lines) == read_as("json", lines) == TEXTS
    assert read_as("text", lines) == [lines.read_text()]
    assert read_as("parquet", write_parquet(tmp_path / "part-0", TEXTS)) == TEXTS
    assert read_as("arrow", write_arrow(tmp_path / "part-1", TEXTS)) == TEXTS
    assert texts_of(tmp_path / "part-?") == TEXTS * 2  # these two show it
    with pytest.raises(UserError, match=r"part-0: cannot be read"):
        read_as("arrow", tmp_path / "part-0")


def test_a_shard_whose_number_of_samples_looks_like_gzip_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.mds").write_bytes(b"\x1f\x8b\x08\0")  # 559,903 samples
    assert formats.recognize(str(tmp_path / "a.mds")) == Format("mds")
    assert formats.recognize("b.MDS.gz") == Format("mds")


def test_files_that_cannot_be_read_in_parts_or_are_cut_to_nothing_are_named(tmp_path: Path) -> None:
    packed = tmp_path / "a.parquet.gz"
    packed.write_bytes(gzip.compress(write_parquet(tmp_path / "a.parquet", TEXTS).read_bytes()))
    with pytest.raises(UserError, match=r"a\.parquet\.gz: is compressed as a whole.*; decompress it"):
        texts_of(packed)
    (tmp_path / "empty.jsonl.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty\.jsonl\.gz: is empty, not even a file of gzip; restore it"):
        texts_of(tmp_path / "empty.jsonl.gz")
    (tmp_path / "none.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "none.jsonl").write_bytes(b"")
    assert texts_of(tmp_path / "none.*") == []


def test_a_column_of_nulls_holds_empty_records(tmp_path: Path) -> None:
    table = pyarrow.table(
        {"text": pyarrow.nulls(3), "page": pyarrow.nulls(3), "deep": pyarrow.array([{"inner": None}] * 3)}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for opener, name in ((pyarrow.ipc.new_file, "b.arrow"), (pyarrow.ipc.new_stream, "c.arrow")):
        with opener(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        for column in ("text", "page.body.text", "deep.inner", "deep.inner.text"):
            assert texts_of(tmp_path / name, column=column) == [None] * 3, (name, column)
        with pytest.raises(UserError, match=r"has no column 'deep.other'; it has 'text', 'page', 'deep', 'deep.inner'"):
            texts_of(tmp_path / name, column="deep.other")


def test_a_column_of_strings_in_any_form_is_text(tmp_path: Path) -> None:
    plain = pyarrow.array(["a", "b", "b", None])
    stored = pyarrow.array([b"x", b"\xff", None, b"z"]).view(pyarrow.string())
    pair = {"a": pyarrow.ExtensionArray.from_storage(pyarrow.json_(), stored), "b": plain.dictionary_encode()}
    pyarrow.parquet.write_table(pyarrow.table(pair), tmp_path / "a.parquet")
    runs = pyarrow.compute.run_end_encode(plain)
    table = pyarrow.table({**pair, "runs": runs, "view": plain.cast(pyarrow.string_view()), "list": [["a"]] * 4})
    with pyarrow.ipc.new_file(str(tmp_path / "b.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name, place in (("a.parquet", "row 2 of row group 0"), ("b.arrow", "row 2 of record batch 0")):
        malformed = Malformed(str(tmp_path / name), place, "not UTF-8", 1)
        assert texts_of(tmp_path / name, column="a") == ["x", malformed, None, "z"]
    for name, column in (("a.parquet", "b"), ("b.arrow", "b"), ("b.arrow", "runs"), ("b.arrow", "view")):
        assert texts_of(tmp_path / name, column=column) == ["a", "b", "b", None], column
    with pytest.raises(UserError, match=r"b\.arrow: column 'list' holds list<.*, not text"):
        texts_of(tmp_path / "b.arrow", column="list")
