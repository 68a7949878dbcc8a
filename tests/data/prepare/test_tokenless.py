"""Text that a given tokenizer has no tokens for is counted, named and refused; dropout of a BPE is a decision."""

import io
import json
from pathlib import Path

import pytest
import tokenizers
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from tokenizers import models

from bigmodel.config.settings import UserError
from bigmodel.data.prepare import pipeline
from bigmodel.data.prepare.pipeline import prepare, quiet
from bigmodel.data.prepare.verify import verify
from bigmodel.data.store.manifest import Manifest
from tests.support.tiny_corpus import LETTERS, NEWS, prepared, tiny_settings

ALPHABET = sorted(set("".join(NEWS + LETTERS)) - {"é", "|"})


def write_tokenizer(path: Path, unknown: str | None = None, dropout: float | None = None) -> str:
    """A BPE of the tiny corpus' characters, but for é and |."""
    tokens = ["<s>", "</s>", "<unk>", *ALPHABET, "Do", "ti", "me", "time"]
    merges = [("D", "o"), ("t", "i"), ("m", "e"), ("ti", "me")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    options = {name: value for name, value in (("unk_token", unknown), ("dropout", dropout)) if value}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, **options))
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.save(str(path))
    return str(path)


def said(folder: Path, **changes: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    with Progress(console=console) as progress:
        prepare(tiny_settings(folder, **changes), progress)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_dropped_characters_are_counted_named_and_refused_above_the_declared_share(tmp_path: Path) -> None:
    given = write_tokenizer(tmp_path / "given.json")
    characters = sum(map(len, NEWS + LETTERS))
    lost = "".join(NEWS + LETTERS).count("é") + "".join(NEWS + LETTERS).count("|")
    with pytest.raises(UserError) as error:
        prepared(tmp_path, tokenizer=given)
    assert (
        f"given.json: has no token for {lost} of {characters:,} characters and drops them: 'é' (U+00E9) 30 times, "
        "'|' (U+007C) 30 times; this is above prepare.dropped_characters_share = 0; use a tokenizer with byte "
        "fallback or an unknown token, or set the share to "
    ) in str(error.value)
    assert not (tmp_path / "data").exists()
    share = float(str(error.value).rpartition(" ")[2])
    with pytest.raises(UserError, match=r"given\.json: has no token for 60 of"):
        prepared(tmp_path, tokenizer=given, dropped_characters_share=share / 2)
    printed = said(tmp_path, tokenizer=given, dropped_characters_share=share)
    assert "going on from" in printed  # nothing is tokenized again
    assert "news: text without a token: 40 dropped characters" in printed
    assert Manifest.read(tmp_path / "data").without_token == {
        "news": {"unknown_tokens": 0, "dropped_characters": 40},
        "letters": {"unknown_tokens": 0, "dropped_characters": 20},
    }


def test_unknown_ids_stand_in_the_manifest_and_earlier_manifests_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "WARNED_UNKNOWN_SHARE", 1e-4)
    given = write_tokenizer(tmp_path / "given.json", unknown="<unk>")
    printed = said(tmp_path, tokenizer=given)
    assert "letters: text without a token: 20 unknown tokens" in printed
    assert "% of the tokens of letters are the unknown token, their text is lost" in printed
    path = tmp_path / "data" / "manifest.json"
    manifest = Manifest.read(tmp_path / "data")
    assert manifest.without_token["news"] == {"unknown_tokens": 40, "dropped_characters": 0}
    earlier = json.loads(path.read_text())
    del earlier["without_token"]
    path.write_text(json.dumps(earlier))
    assert Manifest.read(tmp_path / "data").without_token == {}
    assert verify(str(tmp_path / "data"), quiet()) == []
    path.write_text(json.dumps(earlier | {"other": 1}))
    with pytest.raises(UserError, match="damaged: other"):
        Manifest.read(tmp_path / "data")


def test_bpe_dropout_is_refused_or_switched_off_by_a_setting_that_is_printed(tmp_path: Path) -> None:
    given = write_tokenizer(tmp_path / "given.json", unknown="<unk>", dropout=0.25)
    with pytest.raises(UserError, match=r'has dropout = 0\.25: .*set prepare\.bpe_dropout = "off" to use all merges'):
        prepared(tmp_path, tokenizer=given)
    assert "BPE dropout of 0.25 is off" in said(tmp_path, tokenizer=given, bpe_dropout="off")
    assert Manifest.read(tmp_path / "data").recipe["tokenizer"]["bos"] == 0


def test_a_text_without_a_token_is_refused_by_the_name_of_the_users_file(tmp_path: Path) -> None:
    given = write_tokenizer(tmp_path / "given.json", unknown="<none>")
    with pytest.raises(
        UserError, match=r"^prepare\.tokenizer = .*given\.json: has no token for 'é' .*; add '<none>' to"
    ):
        prepared(tmp_path, tokenizer=given)


def test_a_tokenizer_in_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValidationError, match=r"prepare\.tokenizer = s3://bucket/a\.json: is a URL.*; copy the file or"
    ):
        tiny_settings(tmp_path, tokenizer="s3://bucket/a.json")
