"""Bytes of text behind token ids: the denominator of bits per byte.

In: a prepared split with its tokenizer.json. Out: a table of bytes by token id. Special tokens, sentinels and marks
stand for no text: 0 bytes. So for every objective the bytes of its labels are those of the text that it predicts.

Guarantee: tokens of a byte-level BPE without normalizer hold each byte of the text exactly once, which follows from its
tokenizer.json. For any other tokenizer the bytes of all tokens of the split equal the bytes of its text, or the table
is None: a normalizer, an unknown token or a space put in front of a text makes a difference. The total is compared, so
two differences that cancel in it would pass.
Costs: one reading of tokenizer.json; for other tokenizers than byte-level BPE also one reading of the split.
"""

import json
from typing import Any

import numpy as np

from bigmodel.data.store.shards import ShardStore
from bigmodel.data.store.tokenizer import Tokenizer, read_tokenizer
from bigmodel.evaluation.baselines import token_pairs

KEEPING = ("Split", "Digits", "Punctuation", "ByteLevel")  # pre-tokenizers that keep every character, if not "Removed"


def bytes_by_token(store: ShardStore) -> np.ndarray | None:
    """(V,) int64: the bytes of text of each id of the tokenizer; None where tokens do not tell bytes."""
    path = store.directory / "tokenizer.json"
    tokenizer = Tokenizer.load(path, fast=False)
    description = json.loads(read_tokenizer(path))
    table_V = np.zeros(tokenizer.vocabulary, dtype=np.int64)
    for token, number in _vocabulary(description["model"]):
        table_V[number] = _num_bytes(token, _is_byte_level(description))
    for added in description.get("added_tokens", []):
        table_V[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    table_V[[tokenizer.bos, tokenizer.eos]] = 0
    if _keeps_every_byte(description):
        return table_V
    if store.supervised_sources:  # their bytes are those of records
        return None
    in_all = sum(count_bytes(labels, table_V) for _, labels in token_pairs(store))
    return table_V if in_all == store.text_bytes else None


def count_bytes(labels: np.ndarray, table_V: np.ndarray) -> int:
    """Bytes of text of labels; ids outside the tokenizer's vocabulary are IGNORED, sentinels or marks: 0."""
    ids = labels[(labels >= 0) & (labels < len(table_V))]
    return int(table_V[ids].sum())


def _vocabulary(model: dict[str, Any]) -> list[tuple[str, int]]:
    """Tokens and ids; a Unigram model lists [token, score]."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return list(vocabulary.items())
    return [(token, number) for number, (token, _) in enumerate(vocabulary)]


def _num_bytes(token: str, is_byte_level: bool) -> int:
    """A character is a byte in byte-level vocabularies; in others it is itself, with marks of spaces and bytes."""
    if is_byte_level or (len(token) == 6 and token.startswith("<0x") and token.endswith(">")):
        return len(token) if is_byte_level else 1
    return len(token.replace("▁", " ").encode())


def _steps(description: dict[str, Any]) -> list[dict[str, Any]]:
    pre_tokenizer = description.get("pre_tokenizer") or {}
    return pre_tokenizer.get("pretokenizers", [pre_tokenizer])


def _is_byte_level(description: dict[str, Any]) -> bool:
    return any(step.get("type") == "ByteLevel" for step in _steps(description))


def _keeps_every_byte(description: dict[str, Any]) -> bool:
    """Whether each byte of any text is in exactly one token, as the structure of a tokenizer.json shows."""
    from tokenizers import pre_tokenizers

    model, steps = description["model"], _steps(description)
    added = [token for token in description.get("added_tokens", []) if not token["special"]]
    return (
        model.get("type") == "BPE"
        and not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
        and not description.get("normalizer")
        and not any(token["lstrip"] or token["rstrip"] for token in added)
        and all(step.get("type") in KEEPING and step.get("behavior") != "Removed" for step in steps)
        and [step["type"] == "ByteLevel" for step in steps] == [False] * (len(steps) - 1) + [True]
        and not steps[-1].get("add_prefix_space", True)
        and set(pre_tokenizers.ByteLevel.alphabet()) <= model["vocab"].keys()
    )
