"""Labels: text, integers, true and false are classes; a document without one is an error; its text alone counts as
duplicate; the manifest counts classes."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from bigmodel.config.settings import Settings, UserError
from bigmodel.data.objectives.examples import Pair
from bigmodel.data.prepare import formats
from bigmodel.data.prepare.embedded_verbs import functions_with_verb, without_name, write_embedded_verbs
from bigmodel.data.prepare.pipeline import prepare, quiet
from bigmodel.data.prepare.rows import LabelColumn, Malformed
from bigmodel.data.store.manifest import Manifest
from bigmodel.data.store.shards import ShardStore
from tests.support.tiny_corpus import text


def settings_for(folder: Path, *files: str, **changes: Any) -> Settings:
    source = {"name": "mail", "files": [str(folder / file) for file in files], "label_column": "label"}
    source |= {name: changes.pop(name) for name in ("column", "label_column") if name in changes}
    directory = changes.pop("directory", "data")
    section = {"validation_share": 0.3, "vocabulary": 270, "workers": 1, "sources": [source], **changes}
    return Settings.model_validate({"prepare": section, "data": {"directory": str(folder / directory)}})


def write_lines(path: Path, labels: list[Any]) -> None:
    lines = [json.dumps({"text": text(number), "label": label}) for number, label in enumerate(labels)]
    path.write_text("\n".join(lines) + "\n")


def labels_of(folder: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for split in Manifest.read(folder).labels["mail"].values():
        for name, count in split.items():
            counts[name] = counts.get(name, 0) + count
    return counts


def test_labels_of_any_plain_kind_are_classes_and_are_stored_with_their_text(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [*["spam", "ham"] * 10, 3, 41, True, False, -1])
    numbers = pyarrow.array([7, 41] * 5, pyarrow.int16())
    words = pyarrow.array(["spam"] * 10).dictionary_encode()
    for number, label in enumerate((numbers, words)):
        table = pyarrow.table({"text": [text(100 + 10 * number + row) for row in range(10)], "label": label})
        pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet")
    folder = prepare(settings_for(tmp_path, "a.jsonl", "0.parquet", "1.parquet", min_characters=10), quiet())
    assert labels_of(folder) == {"spam": 20, "ham": 10, "3": 1, "41": 6, "true": 1, "false": 1, "-1": 1, "7": 5}
    store = ShardStore(folder, "train")
    document = store.document("mail", 0, 0)
    assert isinstance(document, Pair)
    assert store.decode(document.target) in labels_of(folder)


def test_a_document_without_a_class_is_malformed_with_its_line_and_can_be_dropped(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ["spam", None, " ", "ham", 2.5, *["ham"] * 15])
    settings = settings_for(tmp_path, "a.jsonl")
    with pytest.raises(UserError, match=r"(?s)3 of 20 records malformed.*line 2: 'label' is empty.*line 5: .*number"):
        prepare(settings, quiet())
    folder = prepare(settings_for(tmp_path, "a.jsonl", malformed_share=0.2), quiet())
    assert labels_of(folder) == {"spam": 1, "ham": 16}
    table = pyarrow.table({"text": ["a", "b"], "label": pyarrow.array(["x", None])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match="row 2 of row group 0: 'label' is empty, and a labelled document needs a class"
    ):
        prepare(settings_for(tmp_path, "a.parquet", directory="other"), quiet())


def test_members_of_tars_and_columns_of_lance_datasets_are_classes(tmp_path: Path) -> None:
    members = {"1.txt": "one", "1.cls": "3\n", "1.json": '{"kind": true}', "2.txt": "two", "2.json": '{"kind": 7}'}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content.encode()))
    assert rows_of(tmp_path / "a.tar", "txt", "json.kind") == [("one", "true"), ("two", "7")]
    first, second = rows_of(tmp_path / "a.tar", "txt", "cls")
    assert first == ("one", "3")
    assert isinstance(second, Malformed)
    assert second.reason == "'cls' is empty, and a labelled document needs a class"
    lance = pytest.importorskip("lance")
    lance.write_dataset(pyarrow.table({"text": ["a", "b"], "kind": [5, 6]}), tmp_path / "a.lance")
    assert rows_of(tmp_path / "a.lance", "text", "kind") == [("a", "5"), ("b", "6")]


def rows_of(file: Path, column: str, label: str) -> list[Any]:
    columns, form = (column, LabelColumn(label)), formats.recognize(str(file))
    assert set(columns) <= set(formats.find_columns(str(file), form, columns))
    pieces = formats.cut(str(file), form, 1 << 20)
    return [row for piece in pieces for row, _ in formats.read_piece(piece, columns, None)]


def test_equal_texts_are_duplicates_whatever_their_classes(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text(row // 2), "label": "ab"[row % 2]}) for row in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    folder = prepare(settings_for(tmp_path, "a.jsonl"), quiet())
    assert labels_of(folder) == {"a": 20}
    assert Manifest.read(folder).dropped("mail") == {"duplicate": 20}


def test_the_split_of_a_document_does_not_depend_on_its_class(tmp_path: Path) -> None:
    found = []
    for label in ("a", "b"):
        folder = tmp_path / label
        folder.mkdir()
        write_lines(folder / "a.jsonl", [label] * 40)
        store = ShardStore(prepare(settings_for(folder, "a.jsonl"), quiet()), "validation")
        found.append(np.array(store.lengths("mail", 0)).tolist())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_column": "kind"}, "has no column 'kind'; .*set `label_column` of this source to the one that holds"),
        ({"label_column": "score"}, "column 'score' holds double, not"),
        ({"files": "a.txt"}, "a text file has no columns, so no label_column"),
        ({"target_column": "text"}, "a document has a text to predict or a class; leave one of them out"),
    ],
)
def test_a_wrong_label_column_is_refused(change: dict[str, str], message: str, tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", "b"], "label": ["x", "y"], "score": [0.5, 1.5]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("a text")
    source = {"name": "mail", "label_column": "label", **change}
    source["files"] = [str(tmp_path / change.get("files", "a.parquet"))]
    with pytest.raises((UserError, ValueError), match=message):
        prepare(Settings.model_validate({"prepare": {"sources": [source]}, "data": {"directory": str(tmp_path)}}))


def test_a_column_of_more_values_than_classes_can_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigmodel.data.prepare.labels.MOST_CLASSES", 10)
    write_lines(tmp_path / "a.jsonl", [str(number) for number in range(30)])
    with pytest.raises(UserError, match=r"has 30 different values, more than 10 classes"):
        prepare(settings_for(tmp_path, "a.jsonl"), quiet())


CODE = """
class Log:
    def get_name(self):
        if self.parent: return self.parent.get_name() + self.one + self.two + self.three
        return self.name

    def update(self): return self.call(self.one, self.two, self.three)

    def _closeAll(self): self.one.close(); self.two.close(); self.three.close(); self.four.close(); self.five.close()
"""


def test_functions_are_labelled_with_their_verb_and_do_not_show_their_name() -> None:
    found = {name: without_name(source, name) for name, source in functions_with_verb(CODE)}
    assert list(found) == ["get_name", "_closeAll"]
    assert found["get_name"].startswith("def _(self):\n    if self.parent: return self.parent._() + self.one")


def test_a_function_copied_between_modules_is_left_out(tmp_path: Path) -> None:
    alone = "def get_all(one, two):\n    return [three for four in one for three in two.five(four, six=seven)]\n"
    modules = [("a.py", CODE.encode()), ("b.py", (CODE + alone).encode()), ("c.py", b"def (")]
    left_out = write_embedded_verbs(tmp_path, modules)["functions"]
    assert pyarrow.parquet.read_table(tmp_path / "functions.parquet").to_pylist() == [
        {"text": alone.replace("get_all", "_"), "verb": "get", "key": "b.py"}
    ]
    assert (left_out["not_parsed"]["documents"], left_out["shared_with_another_module"]["documents"]) == (1, 4)
