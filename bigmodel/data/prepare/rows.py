"""Rows: what reading a file of documents gives, whatever its format.

Example, a file a.jsonl with the lines `{"text": "A cat."}` and `{"text": 5}`, column `text`:

    (("A cat.",), None)                                                                   # texts, key
    (Malformed("a.jsonl", "byte 19", "'text' is a number, not text", num_bytes=12, offset=19), None)
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Format:
    """How a file is read. `kind`: parquet, arrow, jsonl (an object per line), json (objects in an array or end to
    end), text or mds. `compression` of the whole file: a key of `compression.READERS`, or empty."""

    kind: str
    compression: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a file that is read on its own. Parquet: row group `start`. Arrow: record batch `start`. Plain JSONL:
    the lines that begin in the bytes [start, stop). Others: the whole file. `num_bytes`: its weight in the progress
    bar."""

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


# A row's texts (two for a pair; None: null), and its key.
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
