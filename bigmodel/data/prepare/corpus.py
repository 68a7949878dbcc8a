"""Documents: from the user's files to rows of text, a unit at a time.

Takes the sources of a run file. Gives units, of some 16 MB, that any process can read, judge and tokenize by itself.
What is inside the files is the business of `bigmodel.data.prepare.formats`.

Guarantees: how a source is cut depends on its files alone, and a unit gives the same rows in the same order whoever
reads it; small files and small pieces of files share a unit, so that their number costs nothing.

Costs: a file is opened once to look into it and once to cut it, 16 at a time.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from bigmodel.config.settings import SourceSettings, UserError
from bigmodel.data.prepare import formats
from bigmodel.data.prepare.formats import Malformed, Piece, Row
from bigmodel.data.store import files

UNIT_BYTES = 16 << 20  # about a second of tokenizing
LOOKS_AT_ONCE = 16  # files: a store answers each request after a while
CHANGED = "changed while it was prepared; prepare again when nothing writes to it"


@dataclass(frozen=True, slots=True)
class Source:
    """A named list of files. `columns` holds the text's, and for pairs the target's after it. `key_column` decides
    train or validation where there is one, else the text does."""

    name: str
    files: tuple[str, ...]
    columns: tuple[str, ...]
    key_column: str | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """What one process reads in one go: neighbouring pieces of a source, together of 16 MB, or one larger piece."""

    source: str
    pieces: tuple[Piece, ...]
    columns: tuple[str, ...]
    key_column: str | None

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)


# ---- finding files --------------------------------------------------------------------------------------------


def find_source(settings: SourceSettings, where: str = "prepare.sources") -> Source:
    """Resolve the paths, URLs and patterns of a source and look into each file's schema.

    Raises `UserError` for a pattern that matches nothing, a folder, an unknown extension, an unreadable file, and a
    column that a Parquet or Arrow file or the first lines of a JSONL file do not have.
    """
    where = f"{where} {settings.name!r}"
    found: dict[str, None] = {}
    for pattern in settings.files:
        matches = files.find(pattern)
        if not matches:
            looked = "" if files.is_remote(pattern) else f" (looked from {Path.cwd()})"
            raise UserError(
                f"{where}: files = {pattern!r} matches nothing{looked}; give a path, URL or pattern of existing files"
            )
        found.update(dict.fromkeys(_named(where, files.absolute(match)) for match in matches))
    columns = (settings.column, *([settings.target_column] if settings.target_column else []))
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        list(pool.map(lambda file: _check_file(where, file, columns), found))
    return Source(settings.name, tuple(found), columns)


def _named(where: str, file: str) -> str:
    try:
        file.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: {file!a}: the file's name is not UTF-8; rename it") from None
    return file


def _check_file(where: str, file: str, columns: tuple[str, ...]) -> None:
    if files.is_folder(file):
        raise UserError(f"{where}: {file} is a folder; name its files, for example {file}/*.parquet")
    if not files.is_remote(file) and Path(file).exists() and not Path(file).is_file():
        raise UserError(f"{where}: {file} is a pipe or device, which can be read once only; write it into a file first")
    kind = formats.kind(file)
    if kind == "":
        raise UserError(f"{where}: {file}: unknown extension; known are {', '.join(formats.KINDS)}")
    if kind == "text":
        if len(columns) > 1:
            raise UserError(f"{where}: {file}: a text file has no columns, so no target_column; use JSONL or Parquet")
        return
    known = formats.find_columns(file, columns)
    for setting, column in zip(("column", "target_column"), columns, strict=False):
        if known and column not in known:
            raise UserError(
                f"{where}: {file} has no column {column!r}; it has {', '.join(map(repr, known))}: "
                f"set `{setting}` of this source to the one that holds the text"
            )


def corpus_hash(sources: Sequence[Source]) -> str:
    """SHA-256 over the sources' names, columns and files, in order: of a local file the content (about 1 GB/s and
    core), of a remote one the size and the time of its last change."""
    total = hashlib.sha256()
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        for source in sources:
            total.update(f"{source.name}\0{' '.join(source.columns)}\0{len(source.files)}\0".encode())
            for file, digest in zip(source.files, pool.map(_identity, source.files), strict=True):
                total.update(base_name(file).encode() + b"\0" + digest.encode())
    return total.hexdigest()


def base_name(file: str) -> str:
    """What a result may say of a file: where it lies, and by what settings of a URL it is reached, differs between
    machines that make the same result."""
    return files.without_settings(file).rpartition("/")[2]


def _identity(file: str) -> str:
    return files.identity(file) if files.is_remote(file) else hash_file(file)


def identities(sources: Sequence[Source]) -> dict[str, str]:
    """What changes when a file does, without reading it."""
    names = [file for source in sources for file in source.files]
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        return dict(zip(names, pool.map(files.identity, names), strict=True))


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal. Raises `UserError` if it cannot be read."""
    with files.readable(str(path)), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- cutting and reading --------------------------------------------------------------------------------------


def plan_units(source: Source) -> list[Unit]:
    """Cut a source into units; depends on the files alone, never on how many processes read them."""
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        cut = list(pool.map(lambda file: formats.cut(file, UNIT_BYTES), source.files))
    pieces = (piece for of_file in cut for piece in of_file)
    return [Unit(source.name, group, source.columns, source.key_column) for group in _group_by_size(pieces)]


def _group_by_size(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, ...]]:
    """Neighbours together, as far as they stay below the size of a unit: a unit costs some file operations."""
    group: list[Piece] = []
    num_bytes = 0
    for piece in pieces:
        if group and num_bytes + piece.num_bytes > UNIT_BYTES:
            yield tuple(group)
            group, num_bytes = [], 0
        group.append(piece)
        num_bytes += piece.num_bytes
    if group:
        yield tuple(group)


def read_unit(unit: Unit) -> Iterator[Row]:
    """Every row of a unit, in file order. Raises `UserError` naming the file that cannot be read."""
    for piece in unit.pieces:
        yield from formats.read_piece(piece, unit.columns, unit.key_column)


def with_line_numbers(records: Sequence[Malformed]) -> list[Malformed]:
    """The same records; of lines, the place is the line's number. Reads each file that has one at most once."""
    offsets: dict[str, list[int]] = {}
    for record in records:
        if record.offset >= 0:
            offsets.setdefault(record.file, []).append(record.offset)
    numbers = {
        (file, offset): number
        for file, of_file in offsets.items()
        for offset, number in zip(sorted(of_file), formats.count_lines(file, sorted(of_file)), strict=True)
    }
    return [
        replace(record, place=f"line {numbers[record.file, record.offset]}") if record.offset >= 0 else record
        for record in records
    ]
