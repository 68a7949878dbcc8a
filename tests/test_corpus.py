"""Which documents are kept, for what reason others are not, and on which side of the split they fall."""

import ast
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from bigmodel.config import SourceSettings, UserError
from bigmodel.data import corpus
from bigmodel.data.corpus import DUPLICATE, KEPT

TEXTS = [f"document {number}: " + "été " * number for number in range(40)]


def units_of(*files: Path, column: str = "text", name: str = "a") -> list[corpus.Unit]:
    return corpus.plan_units(
        corpus.find_source(SourceSettings(name=name, files=[str(f) for f in files], column=column))
    )


def texts_of(*files: Path, column: str = "text") -> list[object]:
    return [text for unit in units_of(*files, column=column) for text, _ in corpus.read_unit(unit)]


def write_jsonl(path: Path, values: list[object]) -> Path:
    path.write_text("".join(json.dumps({"text": value, "id": 7}) + "\n" for value in values))
    return path


def write_parquet(path: Path, values: list[object], kind: pyarrow.DataType | None = None) -> Path:
    table = pyarrow.table({"text": pyarrow.array(values, kind), "id": list(range(len(values)))})
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    return path


def test_every_format_gives_the_same_documents_in_order(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number:02}.txt").write_bytes(text.encode())
    assert texts_of(plain) == TEXTS
    assert texts_of(packed) == TEXTS
    assert texts_of(tmp_path / "*.txt") == TEXTS
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        file = write_parquet(tmp_path / "a.parquet", TEXTS, kind)
        assert texts_of(file) == TEXTS
        assert len(units_of(file)) == 6  # 40 rows in groups of 7: read a group at a time


@pytest.mark.parametrize("unit_bytes", [1, 7, 50, 333, 1 << 20])
def test_a_jsonl_file_cut_anywhere_gives_every_line_once(tmp_path: Path, monkeypatch, unit_bytes: int) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    file.write_bytes(b"\n" + file.read_bytes() + b"\n  \n")
    monkeypatch.setattr(corpus, "UNIT_BYTES", unit_bytes)
    assert len(units_of(file)) == -(-file.stat().st_size // unit_bytes)
    assert texts_of(file) == TEXTS


def test_rows_are_kept_or_dropped_for_one_reason_and_add_up(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["one", None, "", " \n", "two", "one", "\ud800", "three"])
    scans = [corpus.scan_unit(unit, 0.5) for unit in units_of(file)]
    corpus.mark_duplicates(scans)
    assert corpus.count_reasons(scans) == {
        "read": 8,
        "kept": 3,
        "null": 1,
        "empty": 2,
        "invalid_unicode": 1,
        "duplicate": 1,
    }


def test_bytes_that_are_not_utf8_are_dropped_from_parquet_and_their_neighbours_are_not(tmp_path: Path) -> None:
    bad = pyarrow.array([b"fine", b"\xff\xfe", None, b"also fine"], pyarrow.binary()).view(pyarrow.string())
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), file)
    scan = corpus.scan_unit(units_of(file)[0], 0.5)
    assert corpus.count_reasons([scan])["invalid_unicode"] == 1
    assert corpus.count_reasons([scan])["kept"] == 2


def test_a_text_is_kept_once_over_all_sources_and_the_first_stays(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", ["x", "y"])
    second = write_jsonl(tmp_path / "b.jsonl", ["y", "z", "x", "z"])
    scans = [corpus.scan_unit(units_of(file)[0], 0.5) for file in (first, second)]
    corpus.mark_duplicates(scans)
    assert scans[0].status.tolist() == [KEPT, KEPT]
    assert scans[1].status.tolist() == [DUPLICATE, KEPT, DUPLICATE, DUPLICATE]


def test_adding_documents_moves_none_between_train_and_validation(tmp_path: Path) -> None:
    def sides(texts: list[str]) -> dict[str, bool]:
        scan = corpus.scan_unit(units_of(write_jsonl(tmp_path / "a.jsonl", texts))[0], 0.3)
        return dict(zip(texts, scan.validation.tolist(), strict=True))

    few = sides(TEXTS[:20])
    many = sides(TEXTS[::-1])
    assert all(many[text] == side for text, side in few.items())
    assert 4 <= sum(many.values()) <= 20  # 30% of 40, so neither side is empty by accident


def test_documents_of_one_key_are_on_the_same_side(tmp_path: Path) -> None:
    sides = {corpus.is_validation("json/decoder.py", bytes(16) + bytes([n * 12]) * 8, 0.5) for n in range(20)}
    assert len(sides) == 1
    by_text = {corpus.is_validation(None, bytes(16) + bytes([n * 12]) * 8, 0.5) for n in range(20)}
    assert by_text == {True, False}


def test_a_sample_is_of_the_train_split_within_its_limit_and_does_not_depend_on_order(tmp_path: Path) -> None:
    def sample(texts: list[str], limit: int) -> set[str]:
        units = units_of(write_parquet(tmp_path / "a.parquet", texts))
        scans = [corpus.scan_unit(unit, 0.3) for unit in units]
        chosen = corpus.choose_sample(scans, limit)
        assert not any(scan.validation[rows].any() for scan, rows in zip(scans, chosen, strict=True))
        return {
            text
            for unit, rows in zip(units, chosen, strict=True)
            for row, (text, _) in enumerate(corpus.read_unit(unit))
            if row in rows
        }

    some = sample(TEXTS, 1000)
    assert some == sample(TEXTS[::-1], 1000)
    assert 0 < sum(len(text.encode()) for text in some) <= 1000
    assert some < sample(TEXTS, 10**9)
    assert len(sample(TEXTS, 1)) == 1


def test_what_a_user_can_get_wrong_is_named_with_a_remedy(tmp_path: Path) -> None:
    parquet = write_parquet(tmp_path / "a.parquet", TEXTS)
    jsonl = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "cut.parquet").write_bytes(parquet.read_bytes()[:-20])
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes())[:-20])
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "list.jsonl").write_text('{"text": "x"}\n[1]\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "x"}\n\n{"text": \n')
    cases = [
        ("none*.jsonl", "text", "matches nothing"),
        ("missing.parquet", "text", "matches nothing"),
        ("", "text", "is a folder"),
        ("a.csv", "text", "unknown extension; known are .parquet"),
        ("a.parquet", "body", "has no column 'body'; it has 'text', 'id'"),
        ("a.jsonl", "body", "has no column 'body'; it has 'text', 'id'"),
        ("a.parquet", "id", "holds int64, not text"),
        ("a.jsonl", "id", "line 1: 'id' is int, not text"),
        ("cut.parquet", "text", "cannot be read as Parquet"),
        ("cut.jsonl.gz", "text", "cannot be read"),
        ("latin.txt", "text", "cannot be read as UTF-8"),
        ("list.jsonl", "text", "line 2 is a list, not a JSON object"),
        ("broken.jsonl", "text", "line 3 is not valid JSON"),
    ]
    for name, column, message in cases:
        with pytest.raises(UserError) as error:
            texts_of(tmp_path / name, column=column)
        assert message in str(error.value)
        assert name in str(error.value)


def test_the_corpus_hash_changes_with_content_order_and_column(tmp_path: Path) -> None:
    a, b = write_jsonl(tmp_path / "a.jsonl", ["x"]), write_jsonl(tmp_path / "b.jsonl", ["y"])

    def digest(*files: Path, column: str = "text") -> str:
        return corpus.corpus_hash([corpus.Source("s", files, column)])

    digests = [digest(a), digest(a, b), digest(b, a), digest(a, column="id")]
    write_jsonl(a, ["z"])
    assert len({*digests, digest(a)}) == 5


MODULE = '''\
"""Module words."""

import os


class A:
    """Class words,

    twice: é.
    """

    x = 1

    def method(self):
        """Method words."""

    async def other(self):
        """Other words."""
        return """not documentation"""


def short(): "stays"
'''


def test_documentation_strings_leave_the_code_and_nothing_else_does() -> None:
    assert corpus.strip_docstrings(MODULE) == (
        "import os\n\n\nclass A:\n    x = 1\n\n    def method(self):\n        pass\n\n    async def other(self):\n"
        '        return """not documentation"""\n\n\ndef short(): "stays"\n'
    )


def test_documentation_is_one_document_with_qualified_names() -> None:
    assert corpus.module_documentation(ast.parse(MODULE), "m").startswith(
        "m\n\nModule words.\n\nm.A\n\nClass words,\n\ntwice: é.\n\nm.A.method\n\nMethod words.\n\nm.A.other\n"
    )


def test_the_library_without_documentation_strings_is_the_same_program() -> None:
    def without_documentation(tree: ast.AST) -> str:
        for node in ast.walk(tree):
            if isinstance(node, corpus._Documented) and ast.get_docstring(node) is not None:
                keeps = node.body[0].lineno == getattr(node, "lineno", 0)  # shares the line of its `def`
                empty = len(node.body) == 1 and not isinstance(node, ast.Module)
                node.body = node.body if keeps else ([ast.Pass()] if empty else node.body[1:])
        return ast.dump(tree)

    modules = [(path, content) for path, content in corpus.standard_library() if path < "c"]
    assert len(modules) > 50
    for path, content in modules:
        documents = corpus._documents_of(path, content)
        assert documents is not None, path
        code = documents[0][2]
        assert without_documentation(ast.parse(code)) == without_documentation(ast.parse(content)), path


def test_the_embedded_corpus_holds_code_and_documentation_under_the_module_as_key(tmp_path: Path) -> None:
    modules = [("m.py", MODULE.replace("Module words.", "Module words. " * 20).encode()), ("bad.py", b"def (:\n")]
    sources, dropped = corpus.write_embedded_corpus(tmp_path / "corpus", modules)
    assert [source.name for source in sources] == ["code", "docs"]
    assert dropped["code"] == {"not_parsed": 1, "too_short": 0}
    rows = [list(corpus.read_unit(corpus.plan_units(source)[0])) for source in sources]
    assert [key for source in rows for _, key in source] == ["m.py", "m.py"]
    assert "Class words" in str(rows[1])
    assert "Class words" not in str(rows[0])


def test_the_standard_library_is_there_without_tests_and_build_settings() -> None:
    paths = [path for path, _ in corpus.standard_library()]
    assert {"json/decoder.py", "pydoc_data/topics.py"} <= set(paths)
    assert not any("/test/" in f"/{path}" or "site-packages" in path or "_sysconfigdata" in path for path in paths)
    assert paths == sorted(paths)
    assert len(paths) > 400


def test_an_empty_list_of_scans_is_no_error() -> None:
    corpus.mark_duplicates([])
    empty = corpus.Scan(np.zeros(0, np.uint8), np.zeros((0, 2), np.uint64), np.zeros(0, bool), np.zeros(0, np.int64))
    corpus.mark_duplicates([empty])
    assert corpus.count_reasons([empty])["read"] == 0
