"""Lance datasets are sources of prepare: fragments in order, without deleted rows; broken ones are an error."""

import shutil
import sys
from pathlib import Path
from typing import Any

import lance
import pyarrow
import pytest

from bigmodel.config.data_settings import SourceSettings
from bigmodel.config.settings import UserError
from bigmodel.data.prepare.corpus import Source, corpus_hash, find_source, plan_units, read_unit
from bigmodel.data.prepare.pipeline import quiet
from bigmodel.data.prepare.verify import verify
from tests.support.tiny_corpus import NEWS, prepared

TEXTS = [*NEWS[:30], None, ""]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lance") / "a.lance"
    inside = [{"body": text, "n": 1} for text in TEXTS]
    table = pyarrow.table({"text": TEXTS, "number": list(range(32)), "deep": inside})
    lance.write_dataset(table, str(folder), max_rows_per_file=10)
    return folder


def source(folder: Path, **settings: Any) -> Source:
    return find_source(SourceSettings(name="lance", files=[str(folder)], **settings))


def rows(folder: Path, **settings: Any) -> list[Any]:
    return [row for unit in plan_units(source(folder, **settings)) for row, _ in read_unit(unit)]


def test_rows_come_in_order_of_the_fragments_without_deleted_ones(dataset: Path, tmp_path: Path) -> None:
    assert rows(dataset) == rows(dataset.parent / "*.lance", column="deep.body") == [(text,) for text in TEXTS]
    assert len(plan_units(source(dataset))[0].pieces) == 4
    changed = tmp_path / "renamed"
    shutil.copytree(dataset, changed)
    before = corpus_hash([source(changed, format="lance")])
    assert before == corpus_hash([source(changed, format="lance")])
    lance.dataset(str(changed)).delete("number = 3 or number >= 20")
    assert rows(changed, format="lance") == [(text,) for number, text in enumerate(TEXTS[:20]) if number != 3]
    assert before != corpus_hash([source(changed, format="lance")])


def test_a_dataset_is_prepared_as_any_source(dataset: Path, tmp_path: Path) -> None:
    sources = [{"name": "lance", "files": [str(dataset)]}]
    directory = prepared(tmp_path, sources=sources, vocabulary=258, validation_share=0.3)
    assert verify(str(directory), quiet(), share=1.0) == []


def test_broken_datasets_are_one_message(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "b.lance"
    shutil.copytree(dataset, broken)
    piece = sorted((broken / "data").iterdir())[0]
    with pytest.raises(UserError, match=r"\.lance: a Lance dataset is a folder; name the one named"):
        source(piece)
    for column, reason in (
        ("number", "holds int64, not text"),
        ("body", "has no column 'body'; it has 'text', 'number'"),
    ):
        with pytest.raises(UserError, match=reason):
            source(broken, column=column)
    piece.write_bytes(piece.read_bytes()[:100])
    with pytest.raises(UserError, match=r"b\.lance: cannot be read by Lance: .*; restore the dataset or leave it out"):
        rows(broken)
    piece.unlink()
    with pytest.raises(UserError, match=r"b\.lance: cannot be read by Lance: .*[Nn]ot found"):
        rows(broken)
    shutil.rmtree(broken / "_versions")
    with pytest.raises(UserError, match=r"b\.lance: cannot be read by Lance: Dataset at path .* was not found"):
        source(broken)
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(UserError, match=r"needs the package pylance; pip install 'bigmodel\[lance\]'"):
        source(broken)
