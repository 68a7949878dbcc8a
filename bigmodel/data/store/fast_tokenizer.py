"""The fast path of a tokenizer: tiktoken, built from a tokenizer.json, and the texts on which it is proven.

In: the description in a tokenizer.json, a text. Out: the ids that the `tokenizers` library would give, or None where
this is not proven; then the library itself must encode the text.

The two merge by different rules. The library applies its list of merges, first in the list first. tiktoken has no list:
it takes any two neighbours whose joined bytes are a token, lowest id first, and it gives a word that is a token as
this token. They are equal where

1. both cut a text at the same places: the pattern is one of `PATTERNS`, whose character classes are compared in both
   libraries on all characters (`tests/data/store/test_fast_tokenizer.py` compares the cuts);
2. the results of the merges, in the order of the list, have rising ids;
3. every token is what the list, restricted to merges of lower ids, makes of this token's own bytes.

Why: by 2 and 3 the list makes a token t out of one pair only. Take two other neighbours that join to t. Nothing was
merged over the ends of the two, so what happened between the ends is what happens to t alone; but alone, t had only
its own pair before its turn, and is one token after it. So whenever tiktoken chooses a pair, the list does too.

Tokens that fail 3 exist: words that no merge leads to, special tokens, 695 of the 128,000 of Llama 3. They and all
tokens that contain one are unproven. If tiktoken gives no unproven id for a text, it formed none on the way, because
tokens only grow, and the proof holds for this text.

Costs: 10 to 13 MB/s a core. Construction takes 0.4 s for GPT-2 (50,000 merges), 1.7 s for Llama 3 (280,000).
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import tiktoken
from tokenizers import Regex, models, normalizers

# Where our own tokenizer cuts a text before merging: contractions, words with the space before them, up to three
# digits, runs of punctuation with the line ends after them, line ends with the blank space before them, other space.
WORD_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The `tokenizers` library's pattern where ByteLevel has use_regex (that of GPT-2).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION, _SPACE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|\p{{N}}%s"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}"
)
_UNCASED = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACE}"
# Patterns that both regular-expression engines read alike: those of well-known tokenizers.
PATTERNS = {
    "ours": WORD_PATTERN,
    "ByteLevel": GPT2_PATTERN,
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "Llama 3, cl100k": _UNCASED % "{1,3}",
    "Qwen 2": _UNCASED % "",
    "Llama 4, o200k": _CASED % (f"{_CONTRACTION}?", f"{_CONTRACTION}?", "{1,3}"),
    "Mistral NeMo": _CASED % ("", "", ""),
}
CLASSES = (r"\p{L}", r"\p{N}", r"\s", r"\p{M}", r"\p{Lu}", r"\p{Lt}", r"\p{Lm}", r"\p{Lo}", r"\p{Ll}")
ASSIGNED = (range(0xD800), range(0xE000, 0x34000), range(0xE0000, 0xE0200))  # no version of Unicode has others in use
MOST_UNLED = 5_000  # tokens: above, nearly every text would be encoded twice


class NotFast(Exception):
    """The reason why tiktoken cannot replace a tokenizer."""


class FastPath:
    """tiktoken's encoding of a tokenizer.json.

    `proven`: give up texts on which the two libraries may differ. False: as earlier versions did, which prepared data
    with it: tiktoken decides about every text. Raises `NotFast` if the tokenizer is none for tiktoken.
    """

    def __init__(self, description: Mapping[str, Any], proven: bool = True) -> None:
        _check_kind(description)
        pattern = _split_pattern(description.get("pre_tokenizer") or {})
        if proven:
            _check_pattern(pattern)
        special = {token["content"] for token in description.get("added_tokens", [])}
        vocabulary = {t: i for t, i in description["model"]["vocab"].items() if proven or t not in special}
        ranks = _ranks(vocabulary)
        self._unproven = np.zeros(max(ranks.values()) + 1, bool)
        if proven:
            self._unproven[_find_unproven(description["model"], vocabulary, ranks)] = True
        self._decides_all = not self._unproven.any()
        try:
            self._encoding = tiktoken.Encoding("bigmodel", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        except ValueError as error:
            raise NotFast(f"tiktoken cannot read its pattern: {error}") from None

    def encode(self, text: str) -> np.ndarray | None:
        """(n,) uint32 ids; None where the library must decide, or a run of about a million spaces is above the
        pattern's backtracking limit."""
        try:
            ids = self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            return None
        return ids if self._decides_all or not self._unproven[ids].any() else None


def gives_back_text(description: Mapping[str, Any]) -> bool:
    """Whether the ids of a text decode to this text, whatever it is."""
    try:
        _check_kind(description)
        _split_pattern(description.get("pre_tokenizer") or {})
    except NotFast:
        return False
    decoder = description.get("decoder") or {}
    return decoder.get("type") == "ByteLevel" and has_all_bytes(description["model"]["vocab"])


def _check_kind(description: Mapping[str, Any]) -> None:
    model = description["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise NotFast("it is not a plain byte-level BPE")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise NotFast("its tokens carry prefixes or suffixes")
    if description.get("normalizer"):
        raise NotFast("it has a normalizer")
    if any(not token["special"] for token in description.get("added_tokens", [])):
        raise NotFast("it has added tokens that are plain text")


def _split_pattern(pre_tokenizer: Mapping[str, Any]) -> str:
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    byte_level = steps[-1] if steps else {}
    if byte_level.get("type") != "ByteLevel" or byte_level.get("add_prefix_space"):
        raise NotFast("its pre-tokenizer is not ByteLevel without a prefix space")
    if len(steps) == 1 and byte_level.get("use_regex", True):
        return GPT2_PATTERN
    split = steps[0]
    plain = split.get("type") == "Split" and split.get("behavior") == "Isolated" and not split.get("invert")
    if len(steps) == 2 and plain and not byte_level.get("use_regex", True) and "Regex" in split["pattern"]:
        return split["pattern"]["Regex"]
    raise NotFast("its pre-tokenizer is more than one pattern and ByteLevel")


def _check_pattern(pattern: str) -> None:
    if pattern not in PATTERNS.values():
        raise NotFast(f"its pattern is none that both libraries are known to read alike ({', '.join(PATTERNS)})")
    for characters in CLASSES:
        if characters in pattern and (different := differing_characters(characters)):
            raise NotFast(
                f"the installed tiktoken and tokenizers differ on {len(different)} characters in {characters}, "
                f"the first U+{ord(different[0]):04X}"
            )


@lru_cache
def differing_characters(characters: str) -> str:
    """Characters that one of the two regular-expression engines counts to a class and the other does not: their
    versions of Unicode differ."""
    everything = "".join(chr(code) for codes in ASSIGNED for code in codes)
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    of_tiktoken = tiktoken.Encoding("class", pat_str=f"{characters}+", mergeable_ranks=single_bytes, special_tokens={})
    found = bytes(of_tiktoken.encode_to_numpy(everything, disallowed_special=()).astype(np.uint8)).decode()
    expected = normalizers.Replace(Regex(f"[^{characters}]+"), "").normalize_str(everything)
    return "".join(sorted(set(found) ^ set(expected)))


def _ranks(vocabulary: Mapping[str, int]) -> dict[bytes, int]:
    """The ids of the tokens that words can consist of, by their bytes."""
    ranks = {content: rank for token, rank in vocabulary.items() if (content := bytes_of_token(token))}
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise NotFast("it lacks tokens for single bytes")
    if len(set(ranks.values())) < len(ranks):  # tiktoken panics, which is no Exception
        raise NotFast("two of its tokens have one id")
    return ranks


def _find_unproven(model: Mapping[str, Any], vocabulary: Mapping[str, int], ranks: Mapping[bytes, int]) -> list[int]:
    """Ids of the tokens that no merge leads to, and of those that contain one. Raises `NotFast` if the order of the
    merges is not that of the ids."""
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in _listed(model["merges"])]
    made = [vocabulary[left + right] for left, right in merges]
    if any(first > second for first, second in pairwise(made)):
        raise NotFast("its ids are not in the order of its merges")
    rising = [
        pair
        for pair, result in zip(merges, made, strict=True)
        if all(len(part) == 1 or vocabulary[part] < result for part in pair)
    ]
    listed = models.BPE(vocab=dict(vocabulary), merges=rising)
    unled = [
        content
        for token, rank in vocabulary.items()
        if len(content := bytes_of_token(token)) > 1 and [one.id for one in listed.tokenize(token)] != [rank]
    ]
    if len(unled) > MOST_UNLED:
        raise NotFast(f"no merge leads to {len(unled):,} of its tokens")
    return _containing(unled, ranks)


def _listed(merges: list[Any]) -> Iterator[Any]:
    """The merges without what the library takes for the first line of a merges.txt, wherever it stands."""
    return (merge for merge in merges if not (isinstance(merge, str) and merge.startswith("#version")))


def _containing(parts: list[bytes], ranks: Mapping[bytes, int]) -> list[int]:
    """Ids of the tokens that contain one of the parts; a part found over the ends of two tokens counts for the
    first, which is unproven too then."""
    tokens = list(ranks)
    starts = np.cumsum([0, *map(len, tokens)])
    joined, places = b"".join(tokens), []
    for part in parts:
        place = joined.find(part)
        while place >= 0:
            places.append(place)
            place = joined.find(part, place + 1)
    return [ranks[tokens[number]] for number in np.unique(np.searchsorted(starts, places, side="right") - 1)]


def has_all_bytes(vocabulary: Iterable[str]) -> bool:
    """Whether a byte-level vocabulary has a token for each single byte."""
    return {bytes_of_token(token) for token in vocabulary if len(token) == 1} >= {bytes([byte]) for byte in range(256)}


def bytes_of_token(token: str) -> bytes:
    """The bytes of a token in a byte-level vocabulary; empty if a character stands for none: no word has this token."""
    try:
        return token.translate(_BYTES).encode("latin-1")
    except UnicodeEncodeError:
        return b""


def _bytes_by_character() -> dict[int, int]:
    """Byte of each character: printable Latin-1 characters are their own bytes; from U+0100 come the 68 other bytes in
    order (the map of GPT-2). The other characters of Latin-1 become one that is not."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return dict.fromkeys(others, 0x2400) | {0x100 + i: byte for i, byte in enumerate(others)}


_BYTES = _bytes_by_character()
