"""Prepared data goes out as token files of other systems and comes back the same, by any of them."""

import contextlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from bigmodel.config.settings import UserError
from bigmodel.data.prepare import adopt_tokens, convert
from bigmodel.data.prepare.adopt import Adoption, adopt
from bigmodel.data.prepare.adopt_shard import Taken
from bigmodel.data.prepare.pipeline import quiet
from bigmodel.data.prepare.token_files import named_files, read_ids, recognize
from bigmodel.data.prepare.verify import verify
from bigmodel.data.store.manifest import Manifest
from bigmodel.data.store.shards import ShardStore
from bigmodel.data.store.tokenizer import Tokenizer
from tests.data.prepare.test_pipeline import content
from tests.data.prepare.test_token_files import IDS, THEIRS
from tests.data.store.test_remote import run
from tests.support.tiny_corpus import LETTERS, prepared

PLACES = {
    "megatron": ("train", "validation"),
    "nanogpt": ("train.bin", "val.bin"),
    "llmc": ("train_*.bin", "val_*.bin"),
    "olmo": ("train", "validation"),
}
GPT2 = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}


def take(folder: str | Path, into: Path, tokenizer: Path = THEIRS, **options: Any) -> Path:
    return adopt(Adoption(str(folder), into, tokenizer, **options), quiet())


def fingerprints(directory: Path) -> list[str]:
    return [ShardStore(directory, split).fingerprint for split in ("train", "validation")]


def stored(directory: Path, split: str) -> list[list[int]]:
    store = ShardStore(directory, split)
    return [
        np.asarray(store.document(source, shard, row)).tolist()
        for source in store.sources
        for shard in range(store.num_shards(source))
        for row in range(len(store.lengths(source, shard)))
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data: two sources in small shards. theirs: Megatron-LM's documents, adopted. same: again, by a tokenizer with
    one token for begin and end."""
    folder = tmp_path_factory.mktemp("convert")
    prepared(folder, shard_tokens=8000, vocabulary=258)
    take(THEIRS / "uint16.bin", folder / "theirs", validation_share=0.3)
    (folder / "gpt2").mkdir()
    description = json.loads((THEIRS / "tokenizer.json").read_text().replace("<|eos|>", "<|endoftext|>"))
    (folder / "gpt2" / "tokenizer.json").write_text(json.dumps(description))
    (folder / "gpt2" / "tokenizer_config.json").write_text(json.dumps(GPT2))
    take(THEIRS / "uint16.bin", folder / "same", folder / "gpt2", validation_share=0.3)
    return folder


def test_the_same_documents_give_the_same_data_from_any_kind_of_files(home: Path, tmp_path: Path) -> None:
    train, validation = stored(home / "theirs", "train"), stored(home / "theirs", "validation")
    assert sorted(train + validation) == sorted([0, *ids, 1] for ids in IDS)
    assert verify(str(home / "theirs"), quiet()) == []
    take(THEIRS / "sentences.bin", tmp_path / "sentences", validation_share=0.3)
    assert fingerprints(tmp_path / "sentences") == fingerprints(home / "theirs")
    manifests = [Manifest.read(home / "theirs"), Manifest.read(tmp_path / "sentences")]
    assert manifests[0].corpus_sha256 == manifests[1].corpus_sha256
    assert [one.rows["adopted"]["empty"] for one in manifests] == [0, 1]
    added = [(one.recipe["adopted"]["begins_added"], one.recipe["adopted"]["ends_added"]) for one in manifests]
    assert added == [(12, 0), (12, 12)]


@pytest.mark.parametrize("to", list(PLACES))
def test_what_was_converted_is_adopted_as_the_same_documents(home: Path, tmp_path: Path, to: str) -> None:
    out = convert.convert(home / "data", tmp_path / "out", to, quiet())
    train, validation = PLACES[to]
    take(out / train, tmp_path / "back", out, validation=str(out / validation))
    for split in ("train", "validation"):
        assert stored(tmp_path / "back", split) == stored(home / "data", split)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "out"]
    added = Manifest.read(tmp_path / "back").recipe["adopted"]
    assert (added["begins_added"], added["ends_added"]) == (0, 0)


@pytest.mark.parametrize("to", ["nanogpt", "llmc"])
def test_one_token_that_begins_and_ends_lies_once_between_documents(home: Path, tmp_path: Path, to: str) -> None:
    out = convert.convert(home / "same", tmp_path / "out", to, quiet())
    written = np.fromfile(next(out.glob("train*.bin")), np.uint16)[512 if to == "llmc" else 0 :].tolist()
    train = stored(home / "same", "train")
    kept = slice(None, -1) if to == "llmc" else slice(1, None)
    assert written == [one for document in train for one in document[kept]]
    assert written.count(1) == len(train) >= 5
    take(out / PLACES[to][0], tmp_path / "back", out, validation=str(out / PLACES[to][1]))
    assert fingerprints(tmp_path / "back") == fingerprints(home / "same")


def test_a_killed_adoption_goes_on_and_gives_the_same_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adopt_tokens, "PIECE_TOKENS", 300)
    monkeypatch.setattr(adopt_tokens, "RANGE_TOKENS", 300)
    undisturbed = content(take(THEIRS / "int32", tmp_path / "whole", validation_share=0.3))
    write, calls, kept = Taken.write, [], []

    def killed_at_the_second(self: Taken, path: Path, text: bytes) -> None:
        calls.append(path.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(self, path, text)

    monkeypatch.setattr(Taken, "write", killed_at_the_second)
    while not (tmp_path / "data").exists():
        calls.clear()
        with contextlib.suppress(KeyboardInterrupt):
            take(THEIRS / "int32", tmp_path / "data", validation_share=0.3)
        kept.append(len(list((tmp_path / "data.partial").rglob("taken/*.npz"))))
        assert len(kept) < 10
    assert kept[:-1] == list(range(1, len(kept)))
    assert len(kept) == 3
    assert content(tmp_path / "data") == undisturbed


def test_a_killed_conversion_goes_on_and_gives_the_same_files(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = convert.convert(home / "data", tmp_path / "whole", "megatron", quiet())
    write, calls = convert.write_atomically, []

    def killed_at_the_third(path: Path, new: bytes) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(path, new)

    monkeypatch.setattr(convert, "write_atomically", killed_at_the_third)
    for _ in range(2):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            convert.convert(home / "data", tmp_path / "out", "megatron", quiet())
    assert len(list((tmp_path / "out.partial").rglob("done/*"))) == 4
    monkeypatch.setattr(convert, "write_atomically", write)
    out = convert.convert(home / "data", tmp_path / "out", "megatron", quiet())
    for path in whole.rglob("*.*"):
        assert path.read_bytes() == (out / path.relative_to(whole)).read_bytes()


def test_files_in_a_store_are_adopted_by_their_url(home: Path, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for file in (THEIRS / "uint16.bin", THEIRS / "uint16.idx"):
        store.pipe(f"/tokens/{file.name}", file.read_bytes())
    take("memory://tokens/uint16.bin", tmp_path / "data", validation_share=0.3)
    assert fingerprints(tmp_path / "data") == fingerprints(home / "theirs")


def test_options_and_names_that_do_not_fit_are_one_message(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gpt").mkdir()
    for name in ("train.bin", "val.bin"):
        (tmp_path / "gpt" / name).write_bytes((THEIRS / "uint16.bin").read_bytes())
    ids = str(THEIRS / "uint16.bin")
    for arguments, message in (
        (
            [ids, "--column", "tokens"],
            "--column tokens: .*uint16.bin holds files of ids, without columns; leave it out",
        ),
        ([ids, "--validation", str(home / "data")], "--validation .*: no .bin or .npy file; name files"),
        ([ids, "--dtype", "float32"], "--dtype float32: no type of integers; name one"),
        ([ids, "--name", "A b"], "prepare.sources.0.name"),
        ([str(tmp_path / "gpt")], "val.bin is named as held out, and would be trained; name the files for training"),
    ):
        given = ["--tokenizer", str(THEIRS), "--into", str(tmp_path / "data")]
        code, printed = run(monkeypatch, capsys, "adopt", *arguments, *given)
        assert (code, "Traceback" in printed) == (2, False)
        assert re.search(message, " ".join(printed.split())), printed
    code, printed = run(monkeypatch, capsys, "convert", str(home / "data"), str(tmp_path / "out"), "--to", "nanogpt")
    assert code == 0
    assert "150 documents" in printed
    for target, message in (("nanogpt", "out: exists already; choose another folder"), ("x", "--to x: no such format")):
        out = str(tmp_path / ("out" if target == "nanogpt" else "other"))
        code, printed = run(monkeypatch, capsys, "convert", str(home / "data"), out, "--to", target)
        assert (code, message in printed) == (2, True)


def test_pairs_are_refused(tmp_path: Path) -> None:
    pairs = [{"text": text, "target": text[:9]} for text in LETTERS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    source = {"name": "pairs", "files": [str(tmp_path / "pairs.jsonl")], "target_column": "target"}
    prepared(tmp_path, sources=[source], vocabulary=258)
    with pytest.raises(UserError, match=r"source 'pairs': holds pairs of texts, and these formats hold single ones"):
        convert.convert(tmp_path / "data", tmp_path / "out", "olmo", quiet())


def test_chats_and_responses_are_refused(tmp_path: Path) -> None:
    (tmp_path / "sums.jsonl").write_text(
        "".join(json.dumps({"q": f"{n} + 1 = ", "a": f"{n + 1}"}) + "\n" for n in range(40))
    )
    source = {"name": "sums", "files": [str(tmp_path / "sums.jsonl")], "prompt_column": "q", "column": "a"}
    prepared(tmp_path, sources=[source], vocabulary=258)
    for to in convert.TARGETS:
        with pytest.raises(UserError, match=r"source 'sums': holds chats or responses, and .* which of their tokens"):
            convert.convert(tmp_path / "data", tmp_path / "out", to, quiet())


def test_files_of_nothing_but_begin_and_end_tokens_are_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(THEIRS)
    np.full(600, tokenizer.eos, np.uint16).tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match=r"train.bin: holds no document, only begin and end tokens of the tokenizer"):
        take(tmp_path / "train.bin", tmp_path / "data")


def test_ids_that_uint16_cannot_hold_are_refused_or_wider(home: Path, tmp_path: Path) -> None:
    data = shutil.copytree(home / "data", tmp_path / "data")
    replace(Manifest.read(data), vocabulary=65_537).write(data)
    with pytest.raises(
        UserError, match=r"has 65,537 tokens, and nanoGPT's uint16 ends at 65,535; choose --to megatron"
    ):
        convert.convert(data, tmp_path / "out", "nanogpt", quiet())
    assert convert.convert(data, tmp_path / "megatron", "megatron", quiet())
    assert recognize(named_files(str(tmp_path / "megatron" / "train" / "news")), "", 65_537)[0].dtype == "<i4"
    assert convert.convert(data, tmp_path / "llmc", "llmc", quiet())
    assert {one.dtype for one in recognize(named_files(str(tmp_path / "llmc")), "", 65_537)} == {"<u4"}
    convert.convert(data, tmp_path / "olmo", "olmo", quiet())
    (file,) = recognize(named_files(str(tmp_path / "olmo" / "validation" / "news-00000.npy")), "", 65_537)
    assert (file.dtype, file.kind) == ("<u4", "olmo_csv")
    assert read_ids(file, 0, file.tokens).tolist()[:1] == [0]
