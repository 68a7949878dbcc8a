"""A vocabulary of words: what is a token, what is unknown and counted, and what decoding gives."""

import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from bigmodel.config.settings import UserError
from bigmodel.data.prepare.pipeline import prepare, quiet
from bigmodel.data.prepare.verify import verify
from bigmodel.data.store.manifest import Manifest
from bigmodel.data.store.shards import ShardStore
from bigmodel.data.store.tokenizer import BOS, EOS, Tokenizer
from bigmodel.data.store.word_tokenizer import UNKNOWN, train_words
from bigmodel.generation.text import TextStream
from tests.support.tiny_corpus import LETTERS, NEWS, tiny_settings

WORDS: dict[str, Any] = {"tokenizer_model": "word", "vocabulary": 258, "min_frequency": 3}


def cut(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def trained(texts: list[str], **changes: Any) -> Tokenizer:
    options = {"vocabulary": 300, "words": "punctuation", "lowercase": False, "min_frequency": 1, **changes}
    return Tokenizer(train_words(texts, **options, boundaries=(BOS, EOS)))


def test_frequent_words_are_tokens_and_the_others_unknown_counted_by_source(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    with Progress(console=console) as progress:
        folder = prepare(tiny_settings(tmp_path, **WORDS), progress)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    store = ShardStore(folder, "train")
    tokenizer = Tokenizer.load(folder)
    vocabulary = {tokenizer.token_of(number) for number in range(tokenizer.vocabulary)}
    in_text = Counter(
        word for source in store.sources for text in (NEWS if source == "news" else LETTERS) for word in cut(text)
    )
    assert {"time", "Document", ":", BOS, EOS, UNKNOWN} < vocabulary <= {*in_text, BOS, EOS, UNKNOWN}
    assert [tokenizer.token_of(number) for number in (0, tokenizer.bos, tokenizer.eos)] == [UNKNOWN, BOS, EOS]
    expected = {
        source: sum(word not in vocabulary for text in texts for word in cut(text))
        for source, texts in (("news", NEWS), ("letters", LETTERS))
    }
    manifest = Manifest.read(folder)
    assert {name: counts["unknown_tokens"] for name, counts in manifest.without_token.items()} == expected
    assert {counts["dropped_characters"] for counts in manifest.without_token.values()} == {0}
    assert expected["news"] > 50
    all_tokens = sum(split["tokens"] for split in manifest.counts["news"].values())
    assert f"news: {expected['news'] / all_tokens:.2%} of the tokens are the unknown token; fewer with" in printed
    document = store.document("news", 0, 0)
    words = store.decode(document).split(" ")
    original = next(text for text in NEWS if len(cut(text)) == len(words) and cut(text)[2:6] == words[2:6])
    assert words == [word if word in vocabulary else UNKNOWN for word in cut(original)]
    assert verify(str(folder), quiet(), share=1.0) == []


def test_the_same_text_gives_the_same_folder_and_other_words_are_other_settings(tmp_path: Path) -> None:
    prepare(tiny_settings(tmp_path, **WORDS), quiet())
    manifest = (tmp_path / "data" / "manifest.json").read_bytes()
    prepare(tiny_settings(tmp_path, **WORDS), quiet())
    assert (tmp_path / "data" / "manifest.json").read_bytes() == manifest
    for changes in (WORDS | {"lowercase": True}, {"vocabulary": 258}):
        with pytest.raises(UserError, match=r"already prepared from other text or settings \(prepare\.tokenizer was"):
            prepare(tiny_settings(tmp_path, **changes), quiet())


def test_words_are_cut_at_blank_space_alone_if_asked_and_case_is_dropped_if_asked() -> None:
    texts = ["The cat, the cat."]
    assert trained(texts).encode("The cat,").tolist() == [trained(texts).number_of(one) for one in ("The", "cat", ",")]
    by_space = trained(texts, words="whitespace")
    assert {by_space.token_of(number) for number in range(by_space.vocabulary)} == {
        "The", "cat,", "the", "cat.", BOS, EOS, UNKNOWN,
    }  # fmt: skip
    small = trained(texts, lowercase=True)
    assert small.decode(small.encode("THE CAT")) == "the cat"
    stream, ids = TextStream(small), small.encode("the cat , the dog").tolist()
    assert "".join(stream.add(token) for token in ids) + stream.end() == small.decode(ids) == "the cat , the <unk>"
    assert small.token_of(1) == "cat"  # of equal counts the first in the alphabet
    assert trained(texts, vocabulary=4).vocabulary == 4


@pytest.mark.parametrize("words", ["whitespace", "punctuation"])
def test_no_text_holds_the_begin_or_end_token_or_a_word_of_its_name(words: str) -> None:
    names = f"{BOS} {EOS} {UNKNOWN}"
    tokenizer = trained([names, "a a"], words=words)
    ids = tokenizer.encode(f"{names} a")
    assert {tokenizer.bos, tokenizer.eos}.isdisjoint(ids.tolist())
    assert words == "punctuation" or ids.tolist() == [0, 0, 0, tokenizer.number_of("a")]
    assert json.loads(train_words(["a"], 258, words, False, 1, (BOS, EOS)))["model"]["type"] == "WordLevel"


def test_a_text_without_a_frequent_word_is_refused() -> None:
    with pytest.raises(UserError, match=r"prepare\.min_frequency = 2: no word of the training text is that frequent"):
        trained(["each word once"], min_frequency=2)
