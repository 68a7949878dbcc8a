"""A text is found in every place where the data holds it, with the tokens that cover it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from bigmodel.config.settings import UserError
from bigmodel.data.store.shards import ShardStore
from bigmodel.printed import one_line
from bigmodel.provenance.search import find
from tests.support.tiny_corpus import LETTERS, NEWS, WORDS, prepared


def write_words(file: Path) -> Path:
    """A tokenizer of lower-case words, which decodes with a space between any two tokens."""
    names = ["[UNK]", "<s>", "</s>", "document", ":", *WORDS, *map(str, range(150))]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, "[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(file))
    return file


@pytest.fixture(scope="module", params=["byte-level tokens", "byte-level texts", "words"])
def store(request: pytest.FixtureRequest, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardStore:
    folder = tmp_path_factory.mktemp("search")
    if request.param == "byte-level texts":
        shards = prepared(folder, content="text", shard_tokens=1500)
    elif request.param == "words":
        shards = prepared(folder, tokenizer=str(write_words(folder / "words.json")), shard_tokens=1500)
    return ShardStore(shards, "train")


def documents(store: ShardStore) -> Iterator[tuple[tuple[str, int, int], np.ndarray, str]]:
    for name in store.sources:
        for shard in range(store.num_shards(name)):
            for row in range(len(store.lengths(name, shard))):
                ids = store.document(name, shard, row)
                yield (name, shard, row), ids, store.decode(ids)


def places(whole: str, wanted: str) -> list[int]:
    return [start for start in range(len(whole)) if whole.startswith(wanted, start)]


def test_every_occurrence_is_found_across_tokens_with_the_fewest_tokens_that_cover_it(store: ShardStore) -> None:
    held = {place: (ids, text) for place, ids, text in documents(store)}
    longest = max((text for _, text in held.values()), key=len)
    is_lower = not store.tokenizer.token_bytes
    assert is_lower or {text for _, text in held.values()} <= {*NEWS, *LETTERS}
    texts = [*(longest[at : at + 25] for at in range(90, 110)), "Document 1", longest, "oo"]
    for wanted in texts if is_lower else [*texts, "été <|eos|>", "é", "time time"]:
        form = wanted.lower() if is_lower else wanted
        hits = list(find(store, wanted))
        assert [hit.place for hit in hits] == [p for p, (_, text) in held.items() for _ in places(text, form)], wanted
        assert hits, wanted
        for hit in hits[:100]:
            ids, _ = held[hit.place]
            first, last = hit.first_token, hit.last_token
            assert form in store.decode(ids[first - 1 : last + 2])
            assert form not in store.decode(ids[first : last + 2])
            assert form not in store.decode(ids[first - 1 : last + 1])
            assert one_line(form) in hit.shown


def test_what_is_not_there_is_not_found_and_known_shards_are_not_searched(store: ShardStore) -> None:
    done: list[int] = []
    assert not list(find(store, "never written", done.append))
    assert sum(done) == store.num_documents
    assert not list(find(store, "year", known=lambda source, shard: True))
    one = [hit.place for hit in find(store, "year", known=lambda source, shard: (source, shard) != ("news", 0))]
    assert {place[:2] for place in one} == {("news", 0)}
    with pytest.raises(UserError, match="--text: is empty"):
        list(find(store, ""))
    with pytest.raises(UserError, match="give text in UTF-8"):
        list(find(store, "a\udcff"))


def test_bytes_of_tokens_joined_are_the_decoded_text(store: ShardStore) -> None:
    ids = np.random.default_rng(0).integers(0, max(1, len(store.tokenizer.token_bytes)), 2000)
    if store.tokenizer.token_bytes:  # tokens in any order: cut characters, special tokens
        assert b"".join(store.tokenizer.token_bytes[i] for i in ids).decode(errors="replace") == store.decode(
            np.pad(ids, 1)
        )


def test_control_characters_of_a_text_do_not_reach_the_terminal() -> None:
    assert one_line("a\x1b[2J\n\t b\u202e") == "a\ufffd[2J b\ufffd"
