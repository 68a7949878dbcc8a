"""Text without a token is named: where the library drops it, and where it raises."""

from typing import Any

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from bigmodel.config.settings import UserError
from bigmodel.data.store.tokenizer import Tokenizer

ENDS = {"<s>": 0, "</s>": 1}
LETTERS = ENDS | {"a": 2, "b": 3, "ab": 4, " ": 5}
MERGES = [("a", "b")]
IN_BYTES = {f"<0x{byte:02X}>": 6 + byte for byte in range(256)}


def loaded(model: models.Model, **parts: Any) -> Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(list(ENDS))
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return Tokenizer(tokenizer.to_str())


def test_characters_that_a_bpe_drops_are_named_though_the_library_merges_over_the_gap() -> None:
    tokenizer = loaded(models.BPE(LETTERS, MERGES))
    assert tokenizer.encode("axb é bx").tolist() == [4, 5, 5, 3]  # "ab" was not in the text
    assert tokenizer.drops_text
    assert tokenizer.find_dropped("axb é bx") == ["x", "é", "x"]
    assert tokenizer.find_dropped("ab a") == []
    decomposed = loaded(models.BPE(LETTERS, MERGES), normalizer=normalizers.NFD())
    assert decomposed.find_dropped("ábx") == ["á", "x"]  # of "á" the accent


def test_a_bpe_with_an_unknown_token_or_all_bytes_drops_nothing() -> None:
    unknown = loaded(models.BPE(LETTERS | {"<unk>": 6}, MERGES, unk_token="<unk>"))
    assert (unknown.unknown, unknown.drops_text) == (6, False)
    assert unknown.encode("axb").tolist() == [2, 6, 3]
    assert not loaded(models.BPE(LETTERS | IN_BYTES, MERGES, byte_fallback=True)).drops_text
    incomplete = dict(list(IN_BYTES.items())[:-100])
    assert loaded(models.BPE(LETTERS | incomplete, MERGES, byte_fallback=True)).find_dropped("aü") == ["ü"]
    alphabet = {character: 6 + number for number, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert not loaded(models.BPE(ENDS | alphabet, []), pre_tokenizer=byte_level).drops_text
    alphabet.pop("Ã")
    assert loaded(models.BPE(ENDS | alphabet, []), pre_tokenizer=byte_level).find_dropped("né") == ["é"]


NO_ID = "its model has no unk_id.*; set model.unk_id in the file to the place"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            models.BPE(LETTERS, MERGES, unk_token="[UNK]"),
            r"'z' \(U\+007A\), and its unknown token '\[UNK\]' is not in .*; add '\[UNK\]' to model.vocab in the file",
        ),
        (
            models.WordLevel(LETTERS, unk_token="[UNK]"),
            r"'zé' \(U\+007A U\+00E9\), and its unknown token '\[UNK\]' is not .*; add '\[UNK\]' to model.vocab",
        ),
        (
            models.WordPiece(LETTERS, unk_token="<none>"),
            r"'zé' \(U\+007A U\+00E9\), and its unknown token '<none>' is not .*; add '<none>' to model.vocab",
        ),
        (models.Unigram([(piece, -1.0) for piece in LETTERS]), rf"'zé' \(U\+007A U\+00E9\), and {NO_ID}"),
        # All bytes and the whole word have tokens; the library still wants an id for a character without its own.
        (
            models.Unigram([(piece, -1.0) for piece in [*LETTERS, *IN_BYTES]], byte_fallback=True),
            rf"'z' \(U\+007A\), and {NO_ID}",
        ),
        (models.Unigram([(piece, -1.0) for piece in [*LETTERS, "zé"]]), rf"'z' \(U\+007A\), and {NO_ID}"),
    ],
)
def test_a_text_that_makes_the_library_raise_is_named_with_the_remedy(model: models.Model, reason: str) -> None:
    tokenizer = loaded(model, pre_tokenizer=pre_tokenizers.Whitespace())
    assert tokenizer.encode("ab a").tolist() == [4, 2]
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_documents(["a", text])):
        with pytest.raises(UserError, match=rf"tokenizer\.json: has no token for {reason}.*, or use another tokenizer"):
            encode("ab zé")


def test_an_added_token_behind_the_vocabulary_is_not_a_dropped_one() -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE(LETTERS, MERGES))
    tokenizer.add_special_tokens(list(ENDS))
    tokenizer.add_tokens(["xyz", "éé"])
    ours = Tokenizer(tokenizer.to_str())
    assert ours.encode("axyzbéé").tolist() == [2, 6, 3, 7]
    assert ours.find_dropped("axyzbéé é") == ["é"]


def test_an_unknown_token_that_is_the_end_too_is_refused_where_a_text_needs_it() -> None:
    tokenizer = loaded(models.BPE(LETTERS | {"<": 6, "/": 7, "s": 8, ">": 9}, MERGES, unk_token="</s>"))
    assert tokenizer.encode("ab</s>").tolist() == [4, 6, 7, 8, 9]
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_documents(["a", text])):
        with pytest.raises(UserError, match=r"gives its unknown token '</s>' for 'é' \(U\+00E9\), and begins or ends"):
            encode("abé")


def test_dropout_of_a_bpe_is_known_and_never_applied() -> None:
    tokenizer = loaded(models.BPE(LETTERS, MERGES, dropout=0.5))
    assert tokenizer.dropout == 0.5
    assert {tuple(tokenizer.encode("ab")) for _ in range(20)} == {(4,)}
    assert loaded(models.BPE(LETTERS, MERGES)).dropout == 0


def test_the_library_finds_plain_added_tokens_in_normalized_text_and_special_ones_literally() -> None:
    """What the hiding of begin and end in documents rests on; seen with tokenizers 0.22.2."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens(["<plain>"])
    tokenizer.add_special_tokens(["<eos>"])
    found = {text: tokenizer.encode(text).tokens for text in ("<PLAIN>", "<plain>", "<EOS>", "<eos>")}
    assert found == {"<PLAIN>": ["<plain>"], "<plain>": ["<plain>"], "<EOS>": ["[UNK]"], "<eos>": ["<eos>"]}
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("<eos>").tokens == ["[UNK]"]
    assert "encode_special_tokens" not in tokenizer.to_str()
    assert tokenizers.Tokenizer.from_str(tokenizer.to_str()).encode("<eos>").tokens == ["<eos>"]


def test_no_spelling_of_a_plain_end_token_in_a_document_becomes_the_end() -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE(LETTERS | {"<": 6, ">": 7, "/": 8, "s": 9}, MERGES))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens(list(ENDS))
    assert tokenizer.encode("a</S>").ids == [2, 1]
    ours = Tokenizer(tokenizer.to_str())
    assert [ours.encode(text).tolist() for text in ("a</S>", "a</s>")] == [[2, 6, 8, 9, 7]] * 2
