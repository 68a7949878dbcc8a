"""Every format gives the same rows, however it is cut; what a user can get wrong is named."""

import gzip
import io
import itertools
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from bigmodel.config.settings import SourceSettings, UserError
from bigmodel.data.prepare import compression, corpus, formats, rows
from bigmodel.data.prepare.rows import Format, Malformed

TEXTS = [f"document {number}: " + "été " * number for number in range(40)]


def units_of(*files: Path | str, column: str = "text", name: str = "a", target: str | None = None) -> list[corpus.Unit]:
    settings = SourceSettings(name=name, files=[str(f) for f in files], column=column, target_column=target)
    return corpus.plan_units(corpus.find_source(settings))


def pieces_of(*files: Path | str) -> list[rows.Piece]:
    return [piece for unit in units_of(*files) for piece in unit.pieces]


def rows_of(*files: Path | str, column: str = "text", target: str | None = None) -> list[object]:
    return [row for unit in units_of(*files, column=column, target=target) for row, _ in corpus.read_unit(unit)]


def texts_of(*files: Path | str, column: str = "text") -> list[object]:
    return [row[0] if isinstance(row, tuple) else row for row in rows_of(*files, column=column)]


def write_jsonl(path: Path, values: list[object]) -> Path:
    path.write_text("".join(json.dumps({"text": value, "id": 7}) + "\n" for value in values))
    return path


def write_parquet(path: Path, values: list[object], kind: pyarrow.DataType | None = None) -> Path:
    table = pyarrow.table({"text": pyarrow.array(values, kind), "id": list(range(len(values)))})
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    return path


def write_arrow(path: Path, values: list[object], stream: bool = False) -> Path:
    table = pyarrow.table({"text": values, "id": list(range(len(values)))})
    opener = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with opener(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return path


def test_every_format_gives_the_same_documents_in_order(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as stream:
        stream.write(plain.read_bytes())
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number:02}.txt").write_bytes(text.encode())
    assert texts_of(plain) == TEXTS
    assert texts_of(packed) == TEXTS
    assert texts_of(tmp_path / "a.jsonl.zst") == TEXTS
    assert texts_of(tmp_path / "*.txt") == TEXTS
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        file = write_parquet(tmp_path / "a.parquet", TEXTS, kind)
        assert texts_of(file) == TEXTS
        assert len(pieces_of(file)) == 6  # 40 rows in groups of 7: read a group at a time
    file = write_arrow(tmp_path / "a.arrow", TEXTS)
    assert texts_of(file) == TEXTS
    assert len(pieces_of(file)) == 6
    assert texts_of(write_arrow(tmp_path / "stream.arrow", TEXTS, stream=True)) == TEXTS


def test_unusual_tables_give_the_same_documents(tmp_path: Path) -> None:
    """Row groups without rows, other columns of one name, views."""
    empty = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    with pyarrow.parquet.ParquetWriter(tmp_path / "a.parquet", empty.schema) as writer:
        for table in (empty, pyarrow.table({"text": TEXTS[:9]}), empty, pyarrow.table({"text": TEXTS[9:]}), empty):
            writer.write_table(table)
    assert texts_of(tmp_path / "a.parquet") == TEXTS
    view = pyarrow.array(TEXTS, pyarrow.string_view())
    table = pyarrow.Table.from_arrays([pyarrow.array(TEXTS[::-1])] * 2 + [view], names=["id", "id", "text"])
    for opener, name in ((pyarrow.ipc.new_file, "b.arrow"), (pyarrow.ipc.new_stream, "c.arrow")):
        with opener(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
        assert texts_of(tmp_path / name) == TEXTS


def test_of_a_parquet_row_group_only_some_pages_are_held(tmp_path: Path) -> None:
    texts = [f"{number}: " + "x" * 20_000 for number in range(2000)]  # 40 MB
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    del table
    (piece,) = pieces_of(tmp_path / "a.parquet")
    before, most = pyarrow.total_allocated_bytes(), 0
    for number, (row, _) in enumerate(formats.read_piece(piece, ("text",), None)):
        assert row == (texts[number],)
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert number == 1999
    assert most < 30_000_000  # three times 256 rows, a page of 1,024 rows more


def test_two_gzip_members_in_one_file_are_both_read(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes()
    half = plain.index(b"\n", len(plain) // 2) + 1
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain[:half]) + gzip.compress(plain[half:]))
    assert texts_of(tmp_path / "a.jsonl.gz") == TEXTS


def test_a_nested_column_is_named_by_its_path_and_a_null_around_it_is_a_null(tmp_path: Path) -> None:
    records = [
        {"page": {"body": {"text": "one"}}},
        {"page": None},
        {"page": {"body": None}},
        {"page": {"body": {"text": "two"}}},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    table = pyarrow.Table.from_pylist(records)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("a.jsonl", "a.parquet", "a.arrow"):
        assert texts_of(tmp_path / name, column="page.body.text") == ["one", None, None, "two"]
    for name in ("a.jsonl", "a.parquet", "a.arrow"):
        with pytest.raises(UserError, match=r"has no column 'page.text'; it has 'page', 'page.body', 'page.body.text'"):
            texts_of(tmp_path / name, column="page.text")
    with pytest.raises(UserError, match=r"column 'page.body' holds struct"):
        texts_of(tmp_path / "a.parquet", column="page.body")


def test_a_column_whose_own_name_has_a_dot_is_found(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"a.b": ["x", "y"]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"a.b": "x"}\n{"a.b": "y"}\n')
    assert texts_of(tmp_path / "a.parquet", column="a.b") == texts_of(tmp_path / "a.jsonl", column="a.b") == ["x", "y"]


def test_dots_inside_names_are_told_from_dots_between_them(tmp_path: Path) -> None:
    for record, column in (
        ({"a": {"b.c": "x"}}, "a.b.c"),
        ({"a.b": {"c": "x"}}, "a.b.c"),
        ({"a": {"b.c": "x", "b": {"d": "y"}}}, "a.b.c"),
        ({"a.b": "y", "a": {"b": {"c": "x"}}}, "a.b.c"),
    ):
        (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
        table = pyarrow.Table.from_pylist([record])
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
            writer.write_table(table)
        for name in ("a.jsonl", "a.parquet", "a.arrow"):
            assert texts_of(tmp_path / name, column=column) == ["x"], (name, record)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(UserError, match=rf"{name}: has two columns 'text'"):
            texts_of(tmp_path / name)


def test_names_of_files_and_sources_that_cannot_be_stored_are_refused(tmp_path: Path) -> None:
    (tmp_path / "f\udce9.txt").write_text("x")
    with pytest.raises(UserError, match=r"f\\udce9\.txt': the file's name is not UTF-8; rename it"):
        texts_of(tmp_path / "*.txt")
    with pytest.raises(ValueError, match=r"at most 100 characters"):
        SourceSettings(name="a" * 101, files=["x"])


def test_a_column_need_not_be_in_the_first_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n{"page": null}\n{"page": {"text": "x"}}\n')
    assert texts_of(tmp_path / "a.jsonl", column="page.text") == [None, None, "x"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfx")
    assert texts_of(tmp_path / "a.jsonl") == texts_of(tmp_path / "a.txt") == ["x"]


def test_of_a_line_longer_than_its_unit_no_more_than_the_unit_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "UNIT_BYTES", 1000)
    monkeypatch.setattr(compression, "BUFFER_BYTES", 100)
    file = write_jsonl(tmp_path / "a.jsonl", ["x" * 10_000, "last"])
    read: list[int] = []

    class Counted(io.BufferedReader):
        def readline(self, size: int | None = -1, /) -> bytes:
            read.append(len(line := super().readline(size)))
            return line

    monkeypatch.setattr(compression.io, "BufferedReader", Counted)
    units = units_of(file)
    read.clear()
    assert [list(corpus.read_unit(unit)) for unit in units[1:10]] == [[]] * 9
    assert max(read) <= 100
    assert sum(read) <= 9 * 1001
    assert texts_of(file) == ["x" * 10_000, "last"]


def test_a_pair_has_two_texts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"de": "Haus", "en": "house"}\n{"de": "Hund", "en": null}\n')
    pyarrow.parquet.write_table(pyarrow.table({"en": ["house", None], "de": ["Haus", "Hund"]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert rows_of(tmp_path / name, column="de", target="en") == [("Haus", "house"), ("Hund", None)]
        with pytest.raises(UserError, match=r"has no column 'fr'.*set `target_column`"):
            rows_of(tmp_path / name, column="de", target="fr")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="a text file has no columns"):
        rows_of(tmp_path / "a.txt", target="en")


@pytest.mark.parametrize("unit_bytes", [1, 7, 50, 333, 1 << 20])
def test_a_jsonl_file_cut_anywhere_gives_every_line_once(tmp_path: Path, monkeypatch, unit_bytes: int) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    file.write_bytes(b"\n" + file.read_bytes() + b"\n  \n")
    monkeypatch.setattr(corpus, "UNIT_BYTES", unit_bytes)
    assert len(units_of(file)) == -(-file.stat().st_size // unit_bytes)
    assert texts_of(file) == TEXTS


@pytest.mark.parametrize("unit_bytes", [30, 1 << 20])
def test_malformed_records_come_out_with_place_and_reason(tmp_path: Path, monkeypatch, unit_bytes: int) -> None:
    monkeypatch.setattr(corpus, "UNIT_BYTES", unit_bytes)
    file = tmp_path / "a.jsonl"
    lines = [b'{"text": "x"}', b"", b'{"text": ', b"[1]", b'{"text": "\xe9"}', b'{"text": 7}', b'{"text": "\\ud800"}']
    file.write_bytes(b"\n".join([*lines, b'{"text": "last"}']))
    rows = rows_of(file)
    assert (rows[0], rows[-1]) == (("x",), ("last",))
    malformed = [row for row in rows[1:-1] if isinstance(row, Malformed)]
    assert len(malformed) == len(rows) - 2
    assert all(row.file == str(file) for row in malformed)
    named = reversed(corpus.with_line_numbers(malformed[::-1]))  # whatever their order
    found = [(row.place, row.reason.partition(":")[0]) for row in named]
    assert found == [
        ("line 3", "not valid JSON"),
        ("line 4", "an array, not an object"),
        ("line 5", "not UTF-8"),
        ("line 6", "'text' is a number, not text"),
        ("line 7", "'text' holds half of a surrogate pair, which UTF-8 cannot encode"),
    ]


def test_the_lines_of_malformed_records_are_counted_in_one_pass(tmp_path: Path, monkeypatch) -> None:
    lines = [b'{"text": "x"}\n' if number % 10 else b"[]\n" for number in range(1000)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines[5:]))
    monkeypatch.setattr(corpus, "UNIT_BYTES", 500)
    monkeypatch.setattr(compression, "BUFFER_BYTES", 100)
    malformed = [row for row in rows_of(tmp_path / "*.jsonl*") if isinstance(row, Malformed)]
    opened: list[str] = []
    original = compression.opened
    monkeypatch.setattr(
        compression, "opened", lambda file, how: (opened.append(Path(file).name), original(file, how))[1]
    )
    named = corpus.with_line_numbers(malformed)
    assert opened == ["a.jsonl.gz", "b.jsonl"]
    assert [row.place for row in named] == [
        *(f"line {number}" for number in range(1, 1000, 10)),
        *(f"line {number}" for number in range(6, 995, 10)),
    ]


def test_many_small_files_and_row_groups_share_a_unit_and_large_ones_do_not(tmp_path: Path, monkeypatch) -> None:
    for number in range(3000):
        (tmp_path / f"{number:04}.txt").write_text(f"text {number}")
    write_parquet(tmp_path / "a.parquet", TEXTS)
    for number in range(20):
        write_jsonl(tmp_path / f"{number:02}.jsonl", [f"line {number}"])
    (unit,) = units_of(tmp_path / "*.txt", tmp_path / "a.parquet", tmp_path / "*.jsonl")
    assert len(unit.pieces) == 3000 + 6 + 20
    expected = [f"text {number}" for number in range(3000)] + TEXTS + [f"line {number}" for number in range(20)]
    assert [row[0] for row, _ in corpus.read_unit(unit) if isinstance(row, tuple)] == expected
    monkeypatch.setattr(corpus, "UNIT_BYTES", 2500)
    (tmp_path / "0100.txt").write_text("x" * 3000)
    units = units_of(tmp_path / "*.txt")
    assert sum(len(unit.pieces) for unit in units) == 3000
    assert [unit.num_bytes for unit in units if unit.num_bytes > 2500] == [3000]
    assert len(units) < 20
    for unit, following in itertools.pairwise(units):
        assert unit.num_bytes + following.pieces[0].num_bytes > 2500  # as full as can be


def test_bytes_that_are_not_utf8_are_malformed_and_their_neighbours_are_not(tmp_path: Path) -> None:
    bad = pyarrow.array([b"fine", b"\xff\xfe", None, b"also fine"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "a.parquet")
    place = Malformed(str(tmp_path / "a.parquet"), "row 2 of row group 0", "not UTF-8", 2)
    assert texts_of(tmp_path / "a.parquet") == ["fine", place, None, "also fine"]
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    assert isinstance(texts_of(tmp_path / "latin.txt")[0], Malformed)


def test_what_a_user_can_get_wrong_is_named_with_a_remedy(tmp_path: Path) -> None:
    parquet = write_parquet(tmp_path / "a.parquet", TEXTS)
    jsonl = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    arrow = write_arrow(tmp_path / "a.arrow", TEXTS)
    (tmp_path / "cut.parquet").write_bytes(parquet.read_bytes()[:-20])
    (tmp_path / "cut.arrow").write_bytes(arrow.read_bytes()[:-20])
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes())[:-20])
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.jsonl")
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"x"]}), tmp_path / "bytes.parquet")
    cases = [
        ("gone.json*", "text", "cannot be read"),
        ("pipe.jsonl", "text", "is a pipe or device"),
        ("bytes.parquet", "text", "holds binary, not text"),
        ("none*.jsonl", "text", "matches nothing"),
        ("missing.parquet", "text", "matches nothing"),
        ("", "text", "is a folder"),
        ("a.csv", "text", "unknown extension; known are .parquet"),
        ("a.parquet", "body", "has no column 'body'; it has 'text', 'id'"),
        ("a.jsonl", "body", "has no column 'body'; it has 'text', 'id'"),
        ("a.arrow", "body", "has no column 'body'; it has 'text', 'id'"),
        ("a.parquet", "id", "holds int64, not text"),
        ("cut.parquet", "text", "cannot be read"),
        ("cut.arrow", "text", "cannot be read"),
        ("cut.jsonl.gz", "text", "cannot be read"),
    ]
    for name, column, message in cases:
        with pytest.raises(UserError) as error:
            texts_of(tmp_path / name, column=column)
        assert message in str(error.value), (name, error.value)
        assert name.rstrip("*") in str(error.value)


def test_the_corpus_hash_changes_with_content_order_and_column(tmp_path: Path) -> None:
    a, b = write_jsonl(tmp_path / "a.jsonl", ["x"]), write_jsonl(tmp_path / "b.jsonl", ["y"])

    def digest(*files: Path, column: str = "text") -> str:
        formats = (Format("jsonl"),) * len(files)
        return corpus.corpus_hash([corpus.Source("s", tuple(map(str, files)), (column,), formats)])

    digests = [digest(a), digest(a, b), digest(b, a), digest(a, column="id")]
    write_jsonl(a, ["z"])
    assert len({*digests, digest(a)}) == 5
