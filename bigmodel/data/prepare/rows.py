"""Rows: what reading a file of documents gives, whatever its format.

Example, a file a.jsonl with the lines `{"text": "A cat."}` and `{"text": 5}`, column `text`:

    (("A cat.",), None)                                                                   # texts, key
    (Malformed("a.jsonl", "byte 19", "'text' is a number, not text", num_bytes=12, offset=19), None)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Record:
    """The columns of a supervised source: of a chat's messages, or of prompt and response, and of a weight at the end
    if it has one. Each record becomes one text: see `bigmodel.data.prepare.records`."""

    kind: Literal["chat", "response"]
    columns: tuple[str, ...]
    has_weight: bool


@dataclass(frozen=True, slots=True)
class Format:
    """How a file is read. `kind`: parquet, arrow, jsonl (an object per line), json (objects in an array or end to
    end), text, mds, webdataset or lance. `compression` of the whole file: a key of `compression.READERS`, or empty.
    `record`: of a supervised source."""

    kind: str
    compression: str = ""
    record: Record | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a file that is read on its own. Parquet: row group `start`. Arrow: record batch `start`. Plain JSONL:
    the lines that begin in the bytes [start, stop). Lance: fragment `start`. Others: the whole file. `num_bytes`: its
    weight in the progress bar."""

    file: str
    format: Format
    start: int
    stop: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Malformed:
    """A record that violates its format or column: place, reason and size. A line of JSONL has its first byte in
    `offset`; `corpus.with_line_numbers` turns it into a line number."""

    file: str
    place: str
    reason: str
    num_bytes: int
    offset: int = -1


class Located(str):
    """A text that knows its place, for what is found in it later."""

    where: Malformed

    @classmethod
    def at(cls, text: str, where: Malformed) -> "Located":
        made = cls(text)
        made.where = where
        return made


class LabelColumn(str):
    """The name of a column of classes: text, integers, true and false are all classes."""


NO_CLASS = "is empty, and a labelled document needs a class"


def label_of(value: object) -> str | None:
    """The text of a class; None: no class. Fractions and other values are returned as they are."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    return value if not isinstance(value, str) or value.strip() else None  # type: ignore[return-value]


# A row's texts (two for a pair, or a text and its class; None: null), and its key.
Row = tuple[tuple[str | None, ...] | Malformed, str | None]


def decoded(raw: bytes) -> str | bytes:
    """The text, or the bytes if they are not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw


def splits(path: str) -> Iterator[tuple[str, str]]:
    """A dotted path split at each dot, longest first name first: names may contain dots."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        yield ".".join(parts[:count]), ".".join(parts[count:])
