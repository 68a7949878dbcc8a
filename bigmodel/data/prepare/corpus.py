"""Corpus: the user's files as units of rows.

In: the sources of a run file. Out: units of about 16 MB, each a work item that any process can read, clean and tokenize
on its own. `bigmodel.data.prepare.formats` reads the files.

Guarantees: units depend on the files of a source alone. A unit gives the same rows in the same order in any process.
Small files and small pieces share a unit, so their number costs nothing.

Costs: a file is opened once each for its format, its columns and its pieces, 16 files at a time.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from bigmodel.config.settings import SourceSettings, UserError
from bigmodel.data.prepare import formats, lance_text
from bigmodel.data.prepare.json_text import count_lines
from bigmodel.data.prepare.rows import Format, LabelColumn, Malformed, Piece, Record, Row
from bigmodel.data.store import files
from bigmodel.data.store.mds_index import Listed, listed_beside

UNIT_BYTES = 16 << 20  # about a second of tokenizing
SHOWN = 5  # malformed records in a message
LOOKS_AT_ONCE = 16  # files, because a store answers each request after a delay
CHANGED = "changed while it was prepared; prepare again when no process writes to it"


@dataclass(frozen=True, slots=True)
class Source:
    """A named list of files. `columns`: of the text and, for pairs, of the target. The value of `key_column`, or the
    text without one, decides between train and validation. `formats`: of the files, in order."""

    name: str
    files: tuple[str, ...]
    columns: tuple[str, ...]
    formats: tuple[Format, ...]
    key_column: str | None = None
    record: Record | None = None  # of a supervised source, whose `columns` is the first of these
    tag: str = ""  # before each source text of pairs
    split_by_target: bool = False  # the target text of a pair decides between train and validation


@dataclass(frozen=True, slots=True)
class Unit:
    """The work item of one process: neighbouring pieces of a source, together up to 16 MB, or one larger piece."""

    source: str
    pieces: tuple[Piece, ...]
    columns: tuple[str, ...]
    key_column: str | None
    record: Record | None = None
    tag: str = ""
    split_by_target: bool = False

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)

    @property
    def has_labels(self) -> bool:
        """Whether the last text of a row is its class."""
        return isinstance(self.columns[-1], LabelColumn)


# ---- finding files --------------------------------------------------------------------------------------------


def find_source(
    settings: SourceSettings, where: str = "prepare.sources", say: Callable[[str], None] = lambda _: None
) -> Source:
    """Resolve the paths, URLs and patterns of a source and check each file's columns. `say` gets a line about what
    was passed over.

    Raises `UserError` for a pattern without matches, a folder, an unknown format, an unreadable file, and a column
    missing from the schema of a file or from the first records of a JSON file.
    """
    where = f"{where} {settings.name!r}"
    found: dict[str, None] = {}
    for pattern in settings.files:
        matches = files.find(pattern, say)
        if not matches:
            looked = "" if files.is_remote(pattern) else f" (in {Path.cwd()})"
            raise UserError(
                f"{where}: files = {pattern!r} matches nothing{looked}; give a path, URL or pattern of existing files"
            )
        found.update(dict.fromkeys(_named(where, files.absolute(match)) for match in matches))
    second = LabelColumn(settings.label_column) if settings.label_column else settings.target_column
    columns = (settings.column, *([second] if second else []))
    record = _record(settings)
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        if record:
            known = pool.map(lambda file: _check_record_file(where, file, settings.format, record), found)
            return Source(settings.name, tuple(found), record.columns[:1], tuple(known), record=record)
        known = pool.map(lambda file: _check_file(where, file, settings.format, columns), found)
        by_target = settings.split_by == "target"
        return Source(settings.name, tuple(found), columns, tuple(known), tag=settings.tag, split_by_target=by_target)


def _record(settings: SourceSettings) -> Record | None:
    weight = (settings.weight_column,) if settings.weight_column else ()
    if settings.messages_column:
        return Record("chat", (settings.messages_column, *weight), bool(weight))
    if settings.prompt_column:
        return Record("response", (settings.prompt_column, settings.column, *weight), bool(weight))
    return None


def listed_shards(sources: Sequence[Source]) -> list[Listed]:
    """The MDS shards of sources that an index.json beside them lists."""
    named = [pair for source in sources for pair in zip(source.files, source.formats, strict=True)]
    return listed_beside([file for file, form in named if form.kind == "mds"])


def _named(where: str, file: str) -> str:
    try:
        file.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: {file!a}: the file's name is not UTF-8; rename it") from None
    return file


def _check_record_file(where: str, file: str, told: str, record: Record) -> Format:
    form = _recognized(where, file, told)
    if form.kind in ("text", "mds", "webdataset", "lance"):
        raise UserError(f"{where}: {file}: chats and responses are read from JSONL, JSON, Parquet or Arrow; convert it")
    known = formats.find_columns(file, form, ())
    names = ["prompt_column", "column"] if record.kind == "response" else ["messages_column"]
    for setting, column in zip([*names, "weight_column"], record.columns, strict=False):
        if known and column not in known:
            raise UserError(
                f"{where}: {file} has no column {column!r}; it has {', '.join(map(repr, known))}; "
                f"set `{setting}` of this source to the right one"
            )
    return replace(form, record=record)


def _recognized(where: str, file: str, told: str) -> Format:
    is_lance = (told or formats.kind_by_name(file)) == "lance"
    is_folder = files.is_folder(file)
    if is_lance and not is_folder:
        raise UserError(f"{where}: {file}: a Lance dataset is a folder; name the one named *.lance")
    if is_folder and not is_lance:
        raise UserError(f"{where}: {file} is a folder; name its files, for example {file}/*.parquet")
    if not is_lance and not files.is_remote(file) and Path(file).exists() and not Path(file).is_file():
        raise UserError(f"{where}: {file} is a pipe or device, which can be read only once; write it to a file first")
    return formats.recognize(file, told)


def _check_file(where: str, file: str, told: str, columns: tuple[str, ...]) -> Format:
    second = "label_column" if isinstance(columns[-1], LabelColumn) else "target_column"
    form = _recognized(where, file, told)
    if form.kind == "text" and len(columns) > 1:
        raise UserError(f"{where}: {file}: a text file has no columns, so no {second}; use JSONL or Parquet")
    known = formats.find_columns(file, form, columns)
    for setting, column in zip(("column", second), columns, strict=False):
        if known and column not in known:
            held = "class" if setting == "label_column" else "text"
            raise UserError(
                f"{where}: {file} has no column {column!r}; it has {', '.join(map(repr, known))}; "
                f"set `{setting}` of this source to the one that holds the {held}"
            )
    return form


def corpus_hash(sources: Sequence[Source]) -> str:
    """SHA-256 over the sources' names, columns and files, in order: the content of local files (about 1 GB/s and core),
    size and time of the last change of remote ones."""
    total = hashlib.sha256()
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        for source in sources:
            total.update(f"{source.name}\0{' '.join(source.columns)}\0{len(source.files)}\0".encode())
            for file, digest in zip(source.files, pool.map(_identity, source.files, source.formats), strict=True):
                total.update(base_name(file).encode() + b"\0" + digest.encode())
    return total.hexdigest()


def base_name(file: str) -> str:
    """Name of a file in the result. Its folder and URL settings are left out: they differ between machines that make
    the same result."""
    return files.without_settings(file).rpartition("/")[2]


def _identity(file: str, form: Format) -> str:
    if form.kind == "lance":
        return lance_text.identity(file)
    return files.identity(file) if files.is_remote(file) else hash_file(file)


def identities(sources: Sequence[Source]) -> dict[str, str]:
    """`files.identity` of every file: detects changed files without reading them."""
    named = [pair for source in sources for pair in zip(source.files, source.formats, strict=True)]
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        found = pool.map(lambda pair: (lance_text if pair[1].kind == "lance" else files).identity(pair[0]), named)
        return dict(zip((file for file, _ in named), found, strict=True))


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal. Raises `UserError` if it cannot be read."""
    with files.readable(str(path)), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- cutting and reading --------------------------------------------------------------------------------------


def plan_units(source: Source) -> list[Unit]:
    """Cut a source into units; depends on the files alone, not on the number of processes."""
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        cut = list(pool.map(lambda file, form: formats.cut(file, form, UNIT_BYTES), source.files, source.formats))
    pieces = (piece for of_file in cut for piece in of_file)
    same = (source.columns, source.key_column, source.record, source.tag, source.split_by_target)
    return [Unit(source.name, group, *same) for group in _group_by_size(pieces)]


def _group_by_size(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, ...]]:
    """Groups of neighbours up to the size of a unit, because each unit costs some file operations."""
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
    """Rows of a unit, in file order; a source text begins with the tag, if it is not empty. Raises `UserError` naming
    a file that cannot be read."""
    for piece in unit.pieces:
        rows = formats.read_piece(piece, unit.columns, unit.key_column)
        yield from (_tagged(row, unit.tag) for row in rows) if unit.tag else rows


def _tagged(row: Row, tag: str) -> Row:
    texts, key = row
    if isinstance(texts, Malformed) or not texts[0] or not texts[0].strip():
        return row
    return (tag + texts[0], *texts[1:]), key


def with_line_numbers(records: Sequence[Malformed]) -> list[Malformed]:
    """The same records, with line numbers as places of JSONL lines. Reads each file with such a record once."""
    offsets: dict[str, list[int]] = {}
    for record in records:
        if record.offset >= 0:
            offsets.setdefault(record.file, []).append(record.offset)
    numbers = {
        (file, offset): number
        for file, of_file in offsets.items()
        for offset, number in zip(sorted(of_file), count_lines(file, sorted(of_file)), strict=True)
    }
    return [
        replace(record, place=f"line {numbers[record.file, record.offset]}") if record.offset >= 0 else record
        for record in records
    ]


def in_lines(records: Sequence[Malformed]) -> str:
    """The first malformed records, each with file, place and reason."""
    shown = [f"  {one.file}: {one.place}: {one.reason}" for one in with_line_numbers(records[:SHOWN])]
    return "\n".join([*shown, *(["  ..."] if len(records) > SHOWN else [])])
