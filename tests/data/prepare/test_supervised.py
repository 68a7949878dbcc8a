"""Chats and responses from files: what is stored, what is trained, and what is said about bad records."""

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console
from rich.progress import Progress

from bigmodel.config.settings import Settings, UserError
from bigmodel.data.objectives.supervised import UNITS, Supervised
from bigmodel.data.prepare.adopt import Adoption, adopt
from bigmodel.data.prepare.pipeline import prepare, quiet
from bigmodel.data.prepare.supervised import encode_record, find_template
from bigmodel.data.prepare.verify import verify
from bigmodel.data.store.manifest import Manifest, describe_files
from bigmodel.data.store.shards import ShardStore
from bigmodel.data.store.tokenizer import Tokenizer
from tests.support.chats import chat, tokenizer_folder

CHATS_OF_NONE = {"name": "none", "files": ["none.jsonl"], "messages_column": "messages"}
SHAREGPT = {"user": "human", "assistant": "gpt"}


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def settings_of(folder: Path, sources: list[dict[str, Any]], **changes: Any) -> Settings:
    tokenizer = tokenizer_folder(folder / "tokenizer")
    section = {"sources": sources, "tokenizer": str(tokenizer), "validation_share": 0.2, "workers": 1} | changes
    return Settings.model_validate({"prepare": section, "data": {"directory": str(folder / "data")}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats in three shapes, of which all parquet ones are equal to the first JSONL ones, and responses."""
    path = tmp_path_factory.mktemp("supervised")
    records: list[dict[str, Any]] = [{"messages": chat(number), "weight": None} for number in range(40)]
    records[3]["weight"] = 0.5
    records[4]["messages"][1]["weight"] = 0
    records += [{"messages": chat(50)[:1]}, {"messages": []}, {"messages": None}]
    write_lines(path / "chats.jsonl", records)
    said = [
        [{"from": SHAREGPT[one["role"]], "value": one["content"]} for one in chat(number)] for number in range(60, 80)
    ]
    table = pyarrow.table({"conversations": [*said, said[0]]})
    pyarrow.parquet.write_table(table, path / "chats.parquet")
    pairs = [{"question": f"{number} + 1 = ", "answer": f"{number + 1}"} for number in range(30)]
    write_lines(path / "pairs.jsonl", [*pairs, {"question": "?", "answer": " "}])
    sources = [
        {
            "name": "lines", "files": [str(path / "chats.jsonl")], "messages_column": "messages",
            "weight_column": "weight",
        },
        {"name": "shared", "files": [str(path / "chats.parquet")], "messages_column": "conversations"},
        {"name": "sums", "files": [str(path / "pairs.jsonl")], "prompt_column": "question", "column": "answer"},
    ]  # fmt: skip
    prepare(settings_of(path, sources), quiet())
    return path / "data"


def stored(folder: Path, source: str) -> list[tuple[str, list[tuple[str, float]]]]:
    """(text, its trained parts with their weights) of each document of a source."""
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    found = []
    for split in ("train", "validation"):
        store = ShardStore(folder, split)
        for shard in range(store.num_shards(source)):
            for row in range(len(store.lengths(source, shard))):
                document = store.document(source, shard, row)
                assert isinstance(document, Supervised)
                parts = [
                    (tokenizer.templated.decode(document.tokens[first:end], skip_special_tokens=False), weight / UNITS)
                    for first, end, weight in document.spans.tolist()
                ]
                found.append((tokenizer.templated.decode(document.tokens, skip_special_tokens=False), parts))
    return sorted(found)


def test_a_chat_is_stored_as_its_template_gives_it(folder: Path) -> None:
    expected = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in chat(7))
    assert (expected, [("7 four four <|im_end|>", 1.0), ("8 four four <|im_end|>", 1.0)]) in stored(folder, "lines")
    assert (folder / "chat_template.jinja").read_text().startswith("{% for m in messages %}")
    assert verify(str(folder), quiet()) == []


def test_weights_of_records_and_messages_are_stored(folder: Path) -> None:
    weights = {
        text.split("what is ")[1].split()[0]: [one for _, one in parts] for text, parts in stored(folder, "lines")
    }
    assert (weights["2"], weights["3"], weights["4"]) == ([1.0, 1.0], [0.5, 0.5], [1.0])
    assert ShardStore(folder, "train").has_weights or ShardStore(folder, "validation").has_weights


def test_sharegpt_is_read_too(folder: Path) -> None:
    assert len(stored(folder, "shared")) == 20
    assert stored(folder, "shared")[0][0].startswith("<|im_start|>user\nwhat is 60 and 0?<|im_end|>\n<|im_start|>assi")


def test_of_prompt_and_response_only_the_response_is_trained(folder: Path) -> None:
    assert ("<|bos|>7 + 1 = 8<|eos|>", [("8<|eos|>", 1.0)]) in stored(folder, "sums")
    assert len(stored(folder, "sums")) == 30


def test_what_was_dropped_is_counted_by_reason(folder: Path) -> None:
    manifest = Manifest.read(folder)
    assert manifest.dropped("lines") == {"without_target": 1, "empty": 1, "null": 1}
    assert manifest.dropped("shared") == {"duplicate": 1}
    assert manifest.dropped("sums") == {"empty": 1}
    assert "without_target" not in manifest.rows["shared"]


def test_verify_says_that_chats_and_responses_are_not_tokenized_again(folder: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    with Progress(console=console) as progress:
        assert verify(str(folder), progress, share=1.0) == []
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(
        r"tokenized 0 texts again, .*; (\d+) are stored, \1 of them chats or responses, which are not", told
    )


def test_prepared_chats_are_not_adopted_as_text(folder: Path, tmp_path: Path) -> None:
    wanted = Adoption(str(folder / "train" / "lines"), tmp_path / "data", folder / "tokenizer.json")
    with pytest.raises(UserError, match=r"train/lines: holds chats or responses .* set data.directory to the prepared"):
        adopt(wanted, quiet())


def test_weights_whose_product_is_below_the_smallest_one_have_the_smallest(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    text = json.dumps({"messages": chat(1, 1, weight=2**-10), "weight": 2**-10})
    encoded = encode_record(text, find_template(settings_of(folder.parent, [CHATS_OF_NONE]).prepare), tokenizer)
    assert encoded.spans[:, 2].tolist() == [1]


def test_verify_finds_a_span_outside_its_document(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    name = "train/sums/spans.00000.npy"
    spans = np.load(copy / name)
    spans[0, 2] = 900
    np.save(copy / name, spans)
    replace(Manifest.read(copy), files=describe_files(copy)).write(copy)
    assert any("spans.00000.npy does not fit the documents" in one for one in verify(str(copy), quiet()))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": "no"}, "'messages' is text that is no JSON, not a list of messages"),
        ({"messages": ["no"]}, "message 1 is text, not an object"),
        ({"messages": [{"content": "no"}]}, "message 1 has no role"),
        ({"messages": [{"role": "user"}]}, "message 1 has no content"),
        ({"messages": [{"role": "user", "content": 5}]}, "the content of message 1 is a number, not text"),
        ({"messages": [{"from": "dog", "value": "wuff"}]}, "message 1 is from 'dog'; known are human, user"),
        ({"messages": [{"from": ["dog"], "value": "wuff"}]}, "message 1 is from ['dog']; known are human, user"),
        ({"messages": "[" * 5000 + "]" * 5000}, "'messages' is JSON that is nested too deep"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "message 1 has a part that is image, and only text is read",
        ),
        ({"messages": chat(1, weight=2)}, "weight of message 4 is 2; a weight is 0, or 1/65536 to 1"),
        ({"messages": chat(1), "weight": "much"}, "weight is 'much'; a weight is 0, or 1/65536 to 1"),
    ],
)
def test_a_bad_record_is_named_with_file_line_and_reason(record: Any, reason: str, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "bad.jsonl", [{"messages": chat(0)}, record])
    source = {"name": "bad", "files": [str(file)], "messages_column": "messages", "weight_column": "weight"}
    if "weight" not in record:
        del source["weight_column"]
    else:
        write_lines(file, [{"messages": chat(0), "weight": 1}, record])
    with pytest.raises(UserError) as caught:
        prepare(settings_of(tmp_path, [source]), quiet())
    assert f"{file}: line 2: {reason}" in str(caught.value)


def test_a_chat_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "bad.jsonl", [{"messages": chat(0)}, {"messages": chat(1)}])
    template = tmp_path / "strict.jinja"
    template.write_text("{% if '1' in messages[1].content %}{{ raise_exception('no ones') }}{% endif %}<|im_start|>")
    source = {"name": "bad", "files": [str(file)], "messages_column": "messages"}
    with pytest.raises(UserError, match=r"bad\.jsonl: line \d: the chat template refuses it: no ones"):
        prepare(settings_of(tmp_path, [source], chat_template=str(template)), quiet())
    template.write_text("{% for %}")
    with pytest.raises(UserError, match=r"strict\.jinja: the chat template is no Jinja: line 1: "):
        prepare(settings_of(tmp_path, [source], chat_template=str(template)), quiet())
    with pytest.raises(UserError, match=r"prepare\.chat_template = .*: cannot be read"):
        prepare(settings_of(tmp_path, [source], chat_template=str(tmp_path / "none")), quiet())


def test_a_source_without_the_named_column_is_refused(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "chats.jsonl", [{"messages": chat(0)}])
    source = {"name": "chats", "files": [str(file)], "messages_column": "conversations"}
    with pytest.raises(UserError, match="has no column 'conversations'; it has 'messages'; set `messages_column`"):
        prepare(settings_of(tmp_path, [source]), quiet())
    (tmp_path / "chats.txt").write_text("no")
    with pytest.raises(UserError, match=r"chats and responses are read from JSONL, JSON, Parquet or Arrow"):
        prepare(settings_of(tmp_path, [source | {"files": [str(tmp_path / "chats.txt")]}]), quiet())
