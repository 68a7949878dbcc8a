"""Tokenizer files that are no tokenizer.json: what they are, and the command that converts them.

In: the content of a file, or a folder. Out: a sentence for an error message.

The commands need sentencepiece, protobuf and transformers 4 (5.24 writes a tokenizer without the pieces). They gave the
ids of sentencepiece on 23,842 lines of text, but for the text of special tokens, and for ties of two ways to cut a run
of one character in Unigram (November 2026, transformers 4.57.6, sentencepiece 0.2.3).
Without `add_prefix_space=True` transformers leaves out the space before the first word.
"""

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KINDS = {1: "Unigram", 2: "BPE", 3: "words", 4: "characters"}
UNUSUAL_PIECES = (4, 5)  # user-defined, unused
CONVERT = "python -c \"from transformers import {} as T; T({}).save_pretrained('{}')\""
NEEDS = "pip install sentencepiece protobuf 'transformers<5'"


class NotSentencePiece(Exception):
    """The content is no sentencepiece model."""


@dataclass(frozen=True)
class SentencePiece:
    """What of a sentencepiece model decides about its conversion (sentencepiece_model.proto)."""

    kind: str
    byte_fallback: bool
    normalizes: bool  # has a table of replaced characters
    adds_prefix: bool
    removes_spaces: bool
    unusual: bool  # spaces after words or unmarked, or pieces that are user-defined or unused

    @classmethod
    def parse(cls, content: bytes) -> "SentencePiece":
        """Raises `NotSentencePiece` if the content is no model."""
        model = _messages(content)
        if 1 not in model or 2 not in model:
            raise NotSentencePiece
        if not all(isinstance(part, bytes) for number in (1, 2, 3) for part in model.get(number, [])):
            raise NotSentencePiece
        trainer, normalizer = _messages(model[2][-1]), _messages((model.get(3) or [b""])[-1])
        kind = KINDS.get(trainer.get(3, [1])[-1])
        if kind is None:
            raise NotSentencePiece
        return cls(
            kind,
            bool(trainer.get(35, [0])[-1]),
            bool(normalizer.get(2, [b""])[-1]),
            bool(normalizer.get(3, [1])[-1]),
            bool(normalizer.get(4, [1])[-1]),
            bool(trainer.get(24, [0])[-1])
            or not normalizer.get(5, [1])[-1]
            or any(_messages(piece).get(3, [1])[-1] in UNUSUAL_PIECES for piece in model[1]),
        )

    def tokenizer_class(self) -> str:
        """The class of transformers that converts it to the same ids; empty if there is none."""
        if self.unusual:
            return ""
        if self.kind == "BPE" and not (self.normalizes or self.removes_spaces) and self.adds_prefix:
            return "LlamaTokenizerFast"
        by_table = self.normalizes and self.removes_spaces
        if self.kind == "Unigram" and not self.byte_fallback and by_table and self.adds_prefix:
            return "T5TokenizerFast"
        return ""


def _messages(content: bytes) -> dict[int, list]:
    """The values of a message of protocol buffers by field number. Raises `NotSentencePiece` if it is none."""
    found: dict[int, list] = {}
    for number, value in _fields(content):
        found.setdefault(number, []).append(value)
    return found


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    place = 0
    while place < len(content):
        tag, place = _varint(content, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(content, place)
            yield tag >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, place = _varint(content, place)
        if size is None or place + size > len(content):
            raise NotSentencePiece
        yield tag >> 3, content[place : place + size]
        place += size


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(content):
            break
        value |= (content[place] & 0x7F) << shift
        place += 1
        if content[place - 1] < 0x80:
            return value, place
    raise NotSentencePiece


def what_it_is(path: Path, content: bytes) -> str:
    """What a file that is no tokenizer.json is, and the remedy; empty if it is nothing known."""
    try:
        model = SentencePiece.parse(content)
    except NotSentencePiece:
        return _is_of_tiktoken(path, content)
    it = f"is a sentencepiece model ({model.kind}), not a tokenizer.json"
    name = model.tokenizer_class()
    if not name:
        return f"{it}; transformers has no conversion that keeps its ids; use another tokenizer"
    given = f"vocab_file='{path}', add_prefix_space=True" + (", extra_ids=0" if name == "T5TokenizerFast" else "")
    return (
        f"{it}; `{NEEDS}`, convert it with `{CONVERT.format(name, given, 'FOLDER')}`, and set prepare.tokenizer to "
        "FOLDER"
    )


def _is_of_tiktoken(path: Path, content: bytes) -> str:
    """tiktoken's files have lines of a token in base64 and its rank."""
    try:
        token, rank = content[:1000].splitlines()[0].split()
        base64.b64decode(token, validate=True)
        int(rank)
    except (IndexError, ValueError, binascii.Error):
        return ""
    return (
        "is a list of ranks for tiktoken, not a tokenizer.json: it lacks the pattern and the special tokens; use the "
        "tokenizer.json of the same model"
    )


def what_is_there(folder: Path) -> str:
    """What a folder without tokenizer.json holds, and the remedy; empty if it is nothing known."""
    if (folder / "tokenizer.model").is_file():
        file = folder / "tokenizer.model"
        return f"{file.name} {it}" if (it := what_it_is(file, file.read_bytes())) else ""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        convert = CONVERT.format("GPT2TokenizerFast", f"'{folder}/vocab.json', '{folder}/merges.txt'", "FOLDER")
        return f"vocab.json and merges.txt are a BPE as GPT-2's; convert it with `{convert}`, and set it to FOLDER"
    return ""
