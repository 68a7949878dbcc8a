"""Tars: the texts of WebDataset's tar files.

In: a tar, compressed or not. A sample is the neighbouring members of one key; a member's name is its key, a dot and its
suffix, the part behind the first dot of the last folder. Example, the key `web/7` with the suffixes `txt` and `json`:

    web/7.txt  web/7.json  web/8.txt  web/8.json

Out: the suffixes, and the fields of .json members, as columns: `txt`, `json`, `json.title`; the rows. Where no suffix
is named `text`, this column is the member .txt, or else the field `text` of .json. Folders, links and members named
`__...__` are no samples, as in webdataset.

Guarantees: a tar that is cut or damaged raises `UserError`, also where Python's tarfile, and webdataset with it, ends
without a word: at a damaged head of a member, at a cut between two members, and behind the first of joined tars.

Costs: one sample in memory. A tar is one piece.

Source: webdataset 1.0.2, `tariterators.py`; POSIX.1-2017, pax, for the two blocks of zeros that end a tar.
"""

import re
import tarfile
from collections.abc import Iterator
from itertools import islice
from typing import IO

from bigmodel.config.settings import UserError
from bigmodel.data.prepare import compression
from bigmodel.data.prepare.json_text import paths_of_object, texts_of_object
from bigmodel.data.prepare.rows import (
    NO_CLASS,
    Format,
    LabelColumn,
    Malformed,
    Piece,
    Row,
    decoded,
    label_of,
    splits,
)

FIRST_SAMPLES = 100  # of a tar show its columns
NAME = re.compile(r"(?s)((?:.*/)?[^./]+)\.([^/]*)")  # key and suffix
META = re.compile(r"__[^/]*__($|/)")
BLOCK_BYTES = 512
TEXT = "text"
Sample = dict[str, bytes]  # by suffix


class _Blocks:
    """A stream that remembers the last block of bytes read, and where it began."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._last, self._start = stream, b"", 0

    def read(self, size: int) -> bytes:
        block = self._stream.read(size)
        if block:
            self._last, self._start = block, self._start + len(self._last)
        return block

    def end(self, place: int) -> str:
        """What is wrong with the end of a tar whose last head was looked for here; reads the stream to its end."""
        rest = self._last[place - self._start :]
        if len(rest) < BLOCK_BYTES:
            return "is cut"
        if any(rest[:BLOCK_BYTES]):
            return "is damaged"
        while rest:
            if rest.count(0) < len(rest):
                return "goes on behind its end, as tars that were joined do,"
            rest = self.read(compression.BUFFER_BYTES)
        return ""


def first_columns(file: str, form: Format, wanted: tuple[str, ...]) -> list[str]:
    """Columns of the first samples; of the column `text`, if any member can be it."""
    found: dict[str, None] = {}
    for _, sample, _ in islice(_samples(file, form.compression), FIRST_SAMPLES):
        found |= dict.fromkeys(sample)
        for suffix, content in sample.items():
            if suffix.endswith("json"):
                found |= dict.fromkeys(f"{suffix}.{path}" for path in paths_of_object(content))
    usable = [name for name in wanted if name == TEXT and ("txt" in found or f"json.{TEXT}" in found)]
    return list(found | dict.fromkeys(usable))


def read_tar(piece: Piece, columns: tuple[str, ...]) -> Iterator[Row]:
    """The rows of a tar; a sample without a wanted member has a null."""
    for key, sample, twice in _samples(piece.file, piece.format.compression):
        found = twice or _texts(sample, columns)
        if isinstance(found, str):
            yield Malformed(piece.file, f"sample {key!r}", found, sum(map(len, sample.values()))), None
        else:
            yield found, None


def _texts(sample: Sample, columns: tuple[str, ...]) -> tuple[str | None, ...] | str:
    """The texts of a sample, or the reason why one is not text."""
    texts: list[str | None] = []
    for column in columns:
        found = _text(sample, column)
        if isinstance(column, LabelColumn) and isinstance(found, tuple):
            label = label_of((found[0] or "").strip())
            found = (label,) if label else f"{column!r} {NO_CLASS}"
        if isinstance(found, tuple):
            texts += found
        else:
            return found
    return tuple(texts)


def _text(sample: Sample, column: str) -> tuple[str | None, ...] | str:
    for suffix, path in [*splits(column), *([("txt", ""), ("json", TEXT)] if column == TEXT else [])]:
        if suffix not in sample:
            continue
        if path:
            wanted = LabelColumn(path) if isinstance(column, LabelColumn) else path
            return texts_of_object(sample[suffix], (wanted,))
        text = decoded(sample[suffix])
        return (text,) if isinstance(text, str) else f"{suffix!r} is not UTF-8"
    return (None,)


def _samples(file: str, how: str) -> Iterator[tuple[str, Sample, str]]:
    """(key, sample, what is wrong with it) of each sample, in order."""
    key, sample, twice = "", Sample(), ""
    for name, content in _members(file, how):
        match = NAME.fullmatch(name)
        if not match or META.match(name):
            continue
        if match[1] != key and sample:
            yield key, sample, twice
            sample, twice = {}, ""
        key, suffix = match[1], match[2].lower()
        if suffix in sample:
            twice = f"two members {suffix!r}"
        sample[suffix] = content
    if sample:
        yield key, sample, twice


def _members(file: str, how: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each regular file."""
    with compression.opened(file, how) as stream:
        blocks = _Blocks(stream)
        try:
            with tarfile.open(fileobj=blocks, mode="r|") as tar:  # type: ignore[call-overload]
                for member in tar:
                    if member.isreg():
                        content = tar.extractfile(member)
                        assert content is not None, "a regular file has content"
                        yield member.name, content.read()
                    tar.members = []  # else it keeps all of them
                end = tar.offset
        except tarfile.TarError as error:
            raise UserError(f"{file}: is cut, or no tar: {error}; restore the file or leave it out") from None
        if wrong := blocks.end(end):
            raise UserError(
                f"{file}: {wrong} at byte {end:,}: a tar ends with blocks of zeros; restore the file or leave it out"
            )
