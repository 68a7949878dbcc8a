"""Text to ids and back: the fast path and the exact path agree, and no document can fake a boundary."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from bigmodel.config.settings import UserError
from bigmodel.data.objectives.sentences import kinds_of, sentence_ends
from bigmodel.data.store.tokenizer import BOS, EOS, Tokenizer, train

TEXTS = [f"def function_{n}(value):\n    return value + {n * 37}  # naïve été don't\n\n" for n in range(200)]
TRAINED = train(TEXTS, 320)


def both_paths(json_text: str = TRAINED) -> list[Tokenizer]:
    fast, exact = Tokenizer(json_text), Tokenizer(json_text)
    exact.use_exact()
    assert fast.is_fast
    assert not exact.is_fast
    return [fast, exact]


def byte_level(special: list[str], normalizer: object = None, vocabulary: int = 300) -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer.to_str()


def test_training_is_deterministic_and_starts_with_begin_end_and_bytes() -> None:
    assert train(TEXTS[::-1], 320) == TRAINED  # even the order of the texts does not matter
    tokenizer = Tokenizer(TRAINED)
    assert (tokenizer.vocabulary, tokenizer.bos, tokenizer.eos) == (320, 0, 1)
    assert tokenizer.dtype == np.uint16
    assert sorted(json.loads(TRAINED)["model"]["vocab"].values()) == list(range(320))


def test_two_tokens_of_one_id_leave_the_fast_path_without_a_panic() -> None:
    description = json.loads(TRAINED)
    vocabulary = description["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 318  # that of another one
    assert Tokenizer(json.dumps(description)).slow_reason == "two of its tokens have one id"


def test_a_vocabulary_that_the_text_cannot_fill_is_refused_with_the_size_it_reaches() -> None:
    with pytest.raises(UserError, match=r"prepare.vocabulary = 5000: .*set prepare.vocabulary to \d+ or less"):
        train(TEXTS[:5], 5000)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=200))
def test_both_paths_give_the_same_ids_and_the_text_comes_back(text: str) -> None:
    fast, exact = PATHS
    assert fast.encode(text).tolist() == exact.encode(text).tolist()
    assert fast.decode(fast.encode(text)) == text


PATHS = both_paths()


def test_special_tokens_written_in_a_document_stay_text() -> None:
    for tokenizer in both_paths():
        for text in (f"a{BOS}b{EOS}c", EOS, BOS + EOS, f"{EOS}\n{EOS}"):
            ids = tokenizer.encode(text)
            assert len(ids) > 1
            assert 0 not in ids
            assert 1 not in ids
            assert tokenizer.decode(ids) == text


def unigram(alphabet: str = "</s>") -> str:
    """A Unigram model, which finds the names of its special tokens in a text by itself."""
    pieces = [("<pad>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((one, -5.0) for one in alphabet)]
    tokenizer = tokenizers.Tokenizer(models.Unigram([*pieces, ("▁", -3.0), ("a", -3.0), ("b", -3.0)], unk_id=3))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>"])
    return tokenizer.to_str()


def test_a_boundary_that_the_model_itself_finds_in_a_text_is_spelled_out() -> None:
    tokenizer = Tokenizer(unigram())
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    for text in ("a </s> b", "a</s>b<s>", "</s></s>", "<s>"):
        for ids in (tokenizer.encode(text), tokenizer.encode_documents([text])[0][1:-1]):
            assert not {1, 2} & set(ids.tolist())
            assert tokenizer.decode(ids) == text
    words = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "<s>": 1, "</s>": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(UserError, match=r"reads '<s>' inside a text as its begin or end token, and has no other"):
        Tokenizer(words.to_str())


def test_begin_and_end_that_are_added_as_plain_text_stay_text_too() -> None:
    description = json.loads(TRAINED)
    for token in description["added_tokens"]:
        token["special"] = False
    tokenizer = Tokenizer(json.dumps(description))
    text = f"a {BOS} b{EOS}"
    for ids in (tokenizer.encode(text), tokenizer.encode_documents([text])[0][1:-1]):
        assert not {0, 1} & set(ids.tolist())
        assert tokenizer.decode(ids) == text


def test_a_pattern_that_tiktoken_cannot_read_keeps_the_exact_path() -> None:
    description = json.loads(TRAINED)
    description["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\X"}
    assert Tokenizer(json.dumps(description)).slow_reason.startswith("its pattern is none that both libraries")
    tokenizer = Tokenizer(json.dumps(description), proven=False)
    assert tokenizer.slow_reason.startswith("tiktoken cannot read its pattern")
    assert tokenizer.decode(tokenizer.encode("two words")) == "two words"


def test_a_file_of_an_early_version_of_the_library_does_not_name_its_kind_of_model() -> None:
    description = json.loads(TRAINED)
    del description["model"]["type"]
    assert Tokenizer(json.dumps(description)).is_fast


def test_an_empty_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json: its vocabulary is empty"):
        Tokenizer(tokenizers.Tokenizer(models.BPE()).to_str())


def test_a_stored_document_is_begin_text_end_in_the_smallest_dtype() -> None:
    for tokenizer in both_paths():
        stored = tokenizer.encode_document("return 1")
        assert stored.dtype == np.uint16
        assert (stored[0], stored[-1]) == (0, 1)
        assert stored[1:-1].tolist() == tokenizer.encode("return 1").tolist()
        assert tokenizer.decode(stored) == "return 1"
        assert tokenizer.encode_document("").tolist() == [0, 1]
        several = tokenizer.encode_documents(TEXTS[:5])
        assert [one.tolist() for one in several] == [tokenizer.encode_document(text).tolist() for text in TEXTS[:5]]
        assert {one.dtype for one in several} == {np.dtype(np.uint16)}


def test_what_another_process_found_of_the_fast_path_is_not_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers.Tokenizer, "encode_batch_fast", lambda *_, **__: pytest.fail("compared"))
    assert Tokenizer(TRAINED, fast=True).is_fast
    assert not Tokenizer(TRAINED, fast=False).is_fast


def test_a_vocabulary_above_65536_is_stored_in_32_bits() -> None:
    model = models.WordLevel(
        {"[UNK]": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, 70_000)}, unk_token="[UNK]"
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    loaded = Tokenizer(tokenizer.to_str())
    assert (loaded.vocabulary, loaded.bos, loaded.eos, loaded.dtype) == (70_000, 1, 2, np.uint32)
    assert loaded.slow_reason == "it is not a plain byte-level BPE"
    assert loaded.encode("w69999 w5").tolist() == [69_999, 5]


def test_common_names_of_begin_and_end_are_known_and_gpt2_style_is_fast() -> None:
    tokenizer = Tokenizer(byte_level(["<unk>", "<s>", "</s>"]))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.is_fast) == (1, 2, True)
    tokenizer = Tokenizer(byte_level(["<|endoftext|>"]))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.is_fast) == (0, 0, True)


def test_a_tokenizer_without_begin_and_end_is_refused_by_what_it_has() -> None:
    with pytest.raises(UserError, match=r"its special tokens are \[CLS\], <pad>; add <\|bos\|> and <\|eos\|>"):
        Tokenizer(byte_level(["[CLS]", "<pad>"]))


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.json: cannot be read as a tokenizer: No such file.*; give a tokeni"):
        Tokenizer.load(tmp_path / "missing.json")
    (tmp_path / "wide.json").write_text(TRAINED, "utf-16")
    with pytest.raises(
        UserError, match=r"wide\.json: cannot be read as a tokenizer: it is no text in UTF-8; give a to"
    ):
        Tokenizer.load(tmp_path / "wide.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other\.json: not a tokenizer.json"):
        Tokenizer.load(tmp_path / "other.json")


def test_a_normalizer_keeps_the_exact_path() -> None:
    tokenizer = Tokenizer(byte_level([BOS, EOS], normalizers.Lowercase()))
    assert tokenizer.slow_reason == "it has a normalizer"
    assert tokenizer.decode(tokenizer.encode("ABC")) == "abc"


def test_ids_out_of_merge_order_keep_the_exact_path_by_proof_and_by_comparison() -> None:
    description = json.loads(TRAINED)
    vocabulary = description["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    # The merges in reverse of their ids: tiktoken, which goes by ids, would merge in the wrong order.
    for number, token in enumerate(tokens[258:][::-1], 258):
        vocabulary[token] = number
    assert Tokenizer(json.dumps(description)).slow_reason == "its ids are not in the order of its merges"
    tokenizer = Tokenizer(json.dumps(description), proven=False)
    assert tokenizer.slow_reason.startswith("tiktoken and tokenizers differ on")
    ids = tokenizer.encode(TEXTS[0])
    assert tokenizer.decode(ids) == TEXTS[0]


def test_a_million_spaces_are_encoded() -> None:
    fast, _ = both_paths()
    assert fast.decode(fast.encode(" " * 1_000_000)) == " " * 1_000_000


def hugging_face_folder(folder: Path, special: list[str], **files: object) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(byte_level(special))
    for name, table in files.items():
        (folder / f"{name}.json").write_text(json.dumps(table))
    return folder


def test_a_hugging_face_folder_says_what_begins_and_ends_a_document(tmp_path: Path) -> None:
    names = ["<s>", "</s>", "<|open|>", "<|close|>"]  # the first two would be taken if nothing else were said
    end = {"content": "<|close|>", "lstrip": False, "special": True}
    cases = {
        "config": ({"tokenizer_config": {"bos_token": "<|open|>", "eos_token": end}}, (2, 3)),
        "map": ({"special_tokens_map": {"bos_token": "<|open|>", "eos_token": "<|close|>"}}, (2, 3)),
        "both": (
            {
                "special_tokens_map": {"bos_token": "<s>"},
                "tokenizer_config": {"bos_token": "<|open|>", "eos_token": end},
            },
            (2, 3),
        ),
        "end_only": ({"tokenizer_config": {"bos_token": None, "eos_token": "<|close|>"}}, (3, 3)),
        "nothing": ({"tokenizer_config": {"model_max_length": 9}}, (0, 1)),
    }
    for name, (files, expected) in cases.items():
        folder = hugging_face_folder(tmp_path / name, names, **files)
        for path in (folder, folder / "tokenizer.json"):
            tokenizer = Tokenizer.load(path)
            assert (tokenizer.bos, tokenizer.eos) == expected, name
            assert tokenizer.is_fast
    wrong = hugging_face_folder(tmp_path / "wrong", names, tokenizer_config={"eos_token": "<eot>"})
    with pytest.raises(UserError, match=r"lacks '<eot>', which the files beside it name"):
        Tokenizer.load(wrong)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty/tokenizer\.json: cannot be read as a tokenizer"):
        Tokenizer.load(tmp_path / "empty")


def test_bert_and_t5_have_other_names_for_begin_and_end(tmp_path: Path) -> None:
    names = ["<s>", "</s>", "[CLS]", "[SEP]", "<pad>"]
    bert = hugging_face_folder(tmp_path / "bert", names, tokenizer_config={"cls_token": "[CLS]", "sep_token": "[SEP]"})
    both = {"cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "</s>"}
    t5 = hugging_face_folder(tmp_path / "t5", names, tokenizer_config=both)
    assert [(one.bos, one.eos) for one in map(Tokenizer.load, (bert, t5))] == [(2, 3), (1, 1)]
    (t5 / "config.json").write_text('{"model_type": "t5", "decoder_start_token_id": 4}')
    assert (Tokenizer.load(t5).bos, Tokenizer.load(t5).eos) == (4, 1)


def test_names_of_a_given_tokenizer_written_in_a_document_stay_text_on_both_paths(tmp_path: Path) -> None:
    config = {"bos_token": "<|open|>", "eos_token": "<|close|>"}
    folder = hugging_face_folder(tmp_path / "given", ["<|open|>", "<|close|>"], tokenizer_config=config)
    fast, exact = Tokenizer.load(folder), Tokenizer.load(folder)
    exact.use_exact()
    assert fast.is_fast
    text = "a<|open|>b<|close|>"
    assert fast.encode(text).tolist() == exact.encode(text).tolist()
    for tokenizer in (fast, exact):
        stored = tokenizer.encode_document(text).tolist()
        assert (stored[0], stored[-1]) == (0, 1)
        assert not {0, 1} & set(stored[1:-1])
        assert tokenizer.decode(stored) == text


def test_sentences_are_found_where_a_tokenizer_drops_white_space() -> None:
    names = ["[UNK]", "We", "run", ".", "fast", "Go", "!", '"', "##ing", "run</w>", ".</w>"]
    words = tokenizers.Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, "[UNK]"))
    words.add_special_tokens(["[BOS]", "[EOS]"])
    for decoder, tokens, expected in (
        (None, ["We", "run", ".", '"', "Go", "!", "!", "We"], [' We run."', " Go!!", " We"]),
        (decoders.WordPiece(), ["Go", "##ing", "fast", ".", "We"], [" Going fast.", " We"]),
        (decoders.BPEDecoder(), ["Go", "run</w>", ".</w>", "We"], ["Gorun . ", "We"]),
    ):
        if decoder is not None:
            words.decoder = decoder
        made = Tokenizer(words.to_str())
        pieces = [made.piece_of(number) for number in range(made.vocabulary)]
        ids = np.array([made.number_of(token) for token in tokens])
        ends = sentence_ends(ids, kinds_of(pieces))
        found = ["".join(pieces[one] for one in part) for part in np.split(ids, ends[:-1])]
        assert found == expected
