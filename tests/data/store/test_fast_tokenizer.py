"""The fast path gives the library's ids or none; what is not proven is left to the library."""

import json
from itertools import product
from random import Random
from typing import Any

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from bigmodel.data.store.fast_tokenizer import CLASSES, PATTERNS, FastPath, NotFast, differing_characters
from bigmodel.data.store.tokenizer import Tokenizer
from tests.data.store.test_tokenizer import TEXTS, TRAINED

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def description(tokens: list[str], merges: list[list[str]], ignore_merges: bool = False) -> dict[str, Any]:
    """A byte-level BPE of the 256 bytes and `tokens`, in the order of their ids."""
    table: dict[str, Any] = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    table["pre_tokenizer"] = json.loads(pre_tokenizers.ByteLevel(add_prefix_space=False).__getstate__())
    vocabulary = {token: number for number, token in enumerate([*BYTES, *tokens])}
    table["model"] |= {"vocab": vocabulary, "merges": merges, "ignore_merges": ignore_merges}
    return table


def library(table: dict[str, Any]) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(table))


def compare(table: dict[str, Any], texts: list[str]) -> tuple[int, int, int]:
    """How many texts the proven path leaves to the library, encodes wrongly, and would if it were never checked."""
    proven, unproven = FastPath(table), FastPath(table, proven=False)
    expected = [one.ids for one in library(table).encode_batch_fast(texts)]
    found, unchecked = ([path.encode(text) for text in texts] for path in (proven, unproven))
    wrong = [ids is not None and ids.tolist() != right for ids, right in zip(found, expected, strict=True)]
    would = [ids is not None and ids.tolist() != right for ids, right in zip(unchecked, expected, strict=True)]
    return sum(ids is None for ids in found), sum(wrong), sum(would)


def test_a_word_that_no_merge_leads_to_is_left_to_the_library() -> None:
    table = json.loads(TRAINED)
    table["model"]["vocab"]["Ġzqxj"] = 320
    text = "one zqxj, and zqxjs"
    tokenizer = Tokenizer(json.dumps(table))
    assert tokenizer.is_fast
    assert compare(table, [text, " zqxj", " zqx", *TEXTS[:20]]) == (2, 0, 2)
    for ids in (tokenizer.encode(text), tokenizer.encode_documents([text])[0][1:-1]):
        assert ids.tolist() == library(table).encode(text).ids
        assert 320 not in ids
    earlier = Tokenizer(json.dumps(table), fast=True, proven=False)  # reads data that an earlier version prepared
    assert 320 in earlier.encode(text)
    earlier.compare(["one"])
    assert earlier.is_fast
    earlier.compare(["one", text])
    assert earlier.slow_reason.startswith("tiktoken and tokenizers differ on")
    assert 320 not in earlier.encode(text)


def random_tokenizer(random: Random) -> dict[str, Any]:
    """Random tokens of two letters, some of which no merge makes; merges of one or all ways to make a token."""
    tokens: list[str] = []
    for _ in range(random.randint(2, 9)):
        token = random.choice([*"ab", *tokens]) + random.choice([*"ab", *tokens])
        tokens += [token] if token not in tokens and len(token) < 9 else []
    random.shuffle(tokens)
    merges = []
    for token in tokens:
        halves = [[token[:place], token[place:]] for place in range(1, len(token))]
        ways = [pair for pair in halves if all(len(half) == 1 or half in tokens for half in pair)]
        random.shuffle(ways)
        merges += ways[: random.choice([0, 1, 1, 9])]
    return description(tokens, merges, random.random() < 0.5)


def test_where_the_proof_holds_the_ids_are_those_of_the_library() -> None:
    random = Random(1)
    words = ["".join(letters) for length in range(1, 8) for letters in product("ab", repeat=length)]
    counted = [compare(random_tokenizer(random), words) for _ in range(60)]
    left, wrong, would_be_wrong = (sum(column) for column in zip(*counted, strict=True))
    assert wrong == 0
    assert would_be_wrong > 1000
    assert left < len(words) * len(counted)  # not all of them


def test_all_ways_to_make_a_token_may_be_listed_as_in_llama_3() -> None:
    table = description(["ab", "abc", "bc"], [["a", "b"], ["a", "bc"], ["ab", "c"], ["b", "c"]], ignore_merges=True)
    assert compare(table, ["abc", "abcabc", "bc", "aabcbc"]) == (0, 0, 0)


def test_a_first_line_of_merges_txt_among_the_merges_is_passed_over_as_the_library_does() -> None:
    table = description(["ab", "abc"], [["a", "b"], ["ab", "c"]])
    table["model"]["merges"] = ["#version: 0.2", "a b", "ab c"]
    assert compare(table, ["abc", "abab"]) == (0, 0, 0)


def test_ids_that_are_not_in_the_order_of_the_merges_are_refused() -> None:
    with pytest.raises(NotFast, match="its ids are not in the order of its merges"):
        FastPath(description(["bc", "ab"], [["a", "b"], ["b", "c"]]))


def test_a_special_token_that_a_text_could_hold_as_a_word_is_left_to_the_library() -> None:
    table = json.loads(TRAINED)
    table["model"] |= {"ignore_merges": True, "vocab": table["model"]["vocab"] | {"time": 320}}
    table["added_tokens"].append(table["added_tokens"][0] | {"id": 320, "content": "time"})
    tokenizer = Tokenizer(json.dumps(table))
    exact = Tokenizer(json.dumps(table), fast=False)
    assert tokenizer.is_fast
    assert tokenizer.encode("time after time").tolist() == exact.encode("time after time").tolist()


def test_an_unknown_pattern_is_refused_by_the_names_of_the_known() -> None:
    table = json.loads(TRAINED)
    table["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\w+|\W+"}
    with pytest.raises(NotFast, match=r"its pattern is none that both libraries are known to read alike \(ours, Byte"):
        FastPath(table)


AWKWARD = [
    *" \n\r\t'sSdTlveREa1!-_/éß中\u0663\uff12\u017f\u212a\u0149\u02b0\u01c5\u00a0\u2028\u0301\u200d\x1c\x85\ufb05",
    "'ll",
]


@pytest.mark.parametrize("name", PATTERNS)
def test_both_engines_cut_awkward_texts_alike(name: str) -> None:
    random = Random(2)
    texts = ["".join(random.choices(AWKWARD, k=random.randint(2, 12))) for _ in range(1500)]
    steps = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    used = sorted({character for text in AWKWARD for character in steps.pre_tokenize_str(text)[0][0]})
    pairs = [[first, second] for first in used for second in used]  # any two bytes of a piece merge: cuts show
    table = description(["".join(pair) for pair in pairs], pairs)
    if name != "ByteLevel":
        cut = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[name]), "isolated")
        both = pre_tokenizers.Sequence([cut, steps])
        table["pre_tokenizer"] = json.loads(both.__getstate__())
    assert compare(table, texts) == (0, 0, 0)


def test_the_classes_of_both_engines_are_compared_on_all_characters() -> None:
    assert {characters for characters in CLASSES if differing_characters(characters)} == set()
    assert differing_characters(r"\w") == "\u200c\u200d"  # joiners are word characters for one of them
