"""Verify tokenizes a share of the documents again, and says by which text it did."""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from bigmodel.__main__ import main
from bigmodel.data.prepare.verify import verify
from bigmodel.data.store import mds
from bigmodel.data.store.manifest import Manifest, describe_files
from bigmodel.data.store.tokenizer import Tokenizer
from tests.data.prepare.test_tokenless import write_tokenizer
from tests.data.store.test_tokenizer import TRAINED
from tests.support.tiny_corpus import prepared


def verified(folder: Path, share: float = 1.0) -> tuple[str, list[str]]:
    """What is printed, and the problems."""
    console = Console(file=io.StringIO(), width=200)
    with Progress(console=console) as progress:
        problems = verify(str(folder), progress, share=share)
    return console.file.getvalue(), problems  # type: ignore[attr-defined]


def change_ids(folder: Path, change: Callable[[Tokenizer, np.ndarray], None]) -> None:
    """Change ids of a document of the news, as a faulty tokenizer would have."""
    path = folder / "train" / "news" / "shard.00000.mds"
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    parsed = mds.ShardContent.parse(path.read_bytes())
    documents = [mds.decode_array(value, np.dtype(np.uint16)).copy() for value in parsed.values("tokens")]
    change(tokenizer, documents[1])
    path.write_bytes(mds.encode_shard({"tokens": documents}))
    replace(Manifest.read(folder), files=describe_files(folder)).write(folder)


def unmerge(tokenizer: Tokenizer, document: np.ndarray) -> None:
    """Write two letters side by side that the library merges."""
    word = next(word for word in ("ti", "me", "wo", "an") if len(tokenizer.encode(word)) == 1)
    document[2:4] = [tokenizer.encode(letter)[0] for letter in word]


def swap(_: Tokenizer, document: np.ndarray) -> None:
    document[1:3] = document[[2, 1]]


def test_ids_are_compared_with_the_library_by_the_text_that_they_decode_to(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    assert verified(folder)[1] == []
    assert (
        "the library tokenized 150 texts again, by the text that their ids stand for; 150 are stored"
        in verified(folder)[0]
    )
    assert "the library tokenized 7 texts again" in verified(folder, 0.001)[0]  # one of each shard
    change_ids(folder, unmerge)
    assert verify(str(folder), Progress(disable=True)) == []  # nothing else shows it
    (problem,) = verified(folder)[1]
    assert "train/news/shard.00000.mds: document 1: has other ids than the library gives, from token " in problem


def test_texts_are_compared_by_themselves(tmp_path: Path) -> None:
    printed, problems = verified(prepared(tmp_path, content="text"))
    assert problems == []
    assert "the library tokenized 150 texts again, by their stored text; 150 are stored" in printed


def test_texts_that_ids_do_not_give_back_are_read_again_from_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepared(tmp_path, tokenizer=write_tokenizer(tmp_path / "given.json", unknown="<unk>"))
    printed, problems = verified(folder)
    assert problems == []
    assert (
        "the library tokenized 151 texts again, read again from the sources; 150 are stored" in printed
    )  # a duplicate
    monkeypatch.setattr(sys, "argv", ["bigmodel", "verify", str(folder), "--retokenize", "--share", "0.2"])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr().out
    assert 10 < int(printed.split("the library tokenized ")[1].split(" ")[0]) < 60
    assert printed.endswith("every file agrees with the manifest\n")
    change_ids(folder, swap)
    assert [one.partition(" for ")[0] for one in verified(folder)[1]] == [
        "news: no document has the ids that the library gives"
    ]
    with open(tmp_path / "text" / "news.jsonl", "a") as file:
        file.write(json.dumps({"body": "more"}) + "\n")
    assert verified(folder)[1] == [
        f"{folder}: no text was tokenized again: the ids do not give back their text, and it cannot be read again: "
        "prepare.sources: the files have other content now; start this where `bigmodel prepare` ran, or leave out "
        "--retokenize"
    ]


def test_at_least_one_text_is_read_again(tmp_path: Path) -> None:
    folder = prepared(tmp_path, tokenizer=write_tokenizer(tmp_path / "given.json", unknown="<unk>"))
    assert "the library tokenized 1 text again, read again from the sources" in verified(folder, 1e-9)[0]


def test_a_special_token_that_is_a_word_of_a_text_is_a_part_of_this_text(tmp_path: Path) -> None:
    table = json.loads(TRAINED)
    table["model"] |= {"ignore_merges": True, "vocab": table["model"]["vocab"] | {"Document": 320}}
    table["added_tokens"].append(table["added_tokens"][0] | {"id": 320, "content": "Document"})
    (tmp_path / "given.json").write_text(json.dumps(table))
    printed, problems = verified(prepared(tmp_path, tokenizer=str(tmp_path / "given.json")))
    assert problems == []
    assert "the library tokenized 150 texts again, by the text that their ids stand for" in printed


@pytest.mark.parametrize("asked", [["--share", "0.5"], ["--retokenize", "--share", "0"]])
def test_a_share_without_retokenizing_and_one_of_nothing_are_refused(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bigmodel", "verify", "data", *asked])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "bigmodel: --share 0" in capsys.readouterr().err
