"""Documents: from the user's files to rows of text, a unit at a time.

Takes the sources of a run file. Gives units (a Parquet row group, an Arrow record batch, a stretch of a JSONL file,
a handful of text files), small enough to be read, judged and tokenized one at a time by any process, and the rows
of a unit.

Guarantees: how a source is cut depends on its files alone; a unit gives the same rows in the same order whoever
reads it; a record that is not what its format or column promises comes out as `Malformed`, with its place and the
reason; what cannot be read at all is a `UserError`.

Costs: a Parquet file is read a batch of rows at a time and only in the columns asked for, a `.jsonl` file a line at
a time. A compressed JSONL file and an Arrow stream cannot be cut: each is one unit.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from bigmodel.config import SourceSettings, UserError
from bigmodel.data import files, mds

UNIT_BYTES = 16 << 20  # a unit of JSONL or of text files: about a second of tokenizing
BATCH_ROWS = 256  # Parquet or Arrow rows decoded together: bounds memory at long documents
BUFFER_BYTES = 1 << 20  # read at once: a remote store answers each read separately
FIRST_LINES = 100  # of a JSONL file, in which a well-formed line must show the columns
KINDS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "lines",
    ".jsonl.gz": "lines",
    ".jsonl.zst": "lines",
    ".txt": "text",
    ".mds": "shard",
    ".mds.gz": "shard",
    ".mds.zstd": "shard",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
CHANGED = "changed while it was prepared; prepare again when nothing writes to it"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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
    """What one process reads in one go: of Parquet the row group `start`, of an Arrow file the record batch
    `start`, of JSONL the lines that begin in the bytes [start, stop), of text every file. `num_bytes` is its weight
    in the progress display."""

    source: str
    files: tuple[str, ...]
    columns: tuple[str, ...]
    key_column: str | None
    start: int
    stop: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Malformed:
    """A record that its format or column does not allow: where it stands, why, and how long it is."""

    file: str
    place: str
    reason: str
    num_bytes: int


# A row's texts (two for a pair), each None where it is null; and its key.
Row = tuple[tuple[str | None, ...] | Malformed, str | None]


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
    for file in found:
        _check_file(where, file, columns)
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
    kind = _kind(file)
    if kind == "":
        raise UserError(f"{where}: {file}: unknown extension; known are {', '.join(KINDS)}")
    if kind == "text":
        if len(columns) > 1:
            raise UserError(f"{where}: {file}: a text file has no columns, so no target_column; use JSONL or Parquet")
        return
    look = {"lines": _first_line_columns, "shard": _shard_columns}.get(kind, _schema_columns)
    known = look(file, columns)
    for setting, column in zip(("column", "target_column"), columns, strict=False):
        if known and column not in known:
            raise UserError(
                f"{where}: {file} has no column {column!r}; it has {', '.join(map(repr, known))}: "
                f"set `{setting}` of this source to the one that holds the text"
            )


def _kind(file: str) -> str:
    name = file.partition("?")[0] if files.is_remote(file) else file
    return next((kind for ending, kind in KINDS.items() if name.endswith(ending)), "")


def _schema_columns(file: str, columns: tuple[str, ...]) -> list[str]:
    """Every column's name, nested ones dotted. Raises `UserError` where a wanted one does not hold text."""
    with files.readable(file):
        schema = _read_schema(file)
    known = dict(_flattened(schema))
    for column in columns:
        if column in known and not _is_text(known[column]):
            raise UserError(f"{file}: column {column!r} holds {known[column]}, not text; set `column` to a text column")
        if column in known and not _index_path(list(schema), column):
            raise UserError(f"{file}: has two columns {column!r}; write it anew with a name for each")
    return list(known)


def _flattened(columns: Any, before: str = "") -> Iterator[tuple[str, pyarrow.DataType]]:
    for field in columns:
        yield before + field.name, field.type
        if pyarrow.types.is_struct(field.type):
            yield from _flattened(field.type, f"{before}{field.name}.")


def _is_text(kind: pyarrow.DataType) -> bool:
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    checks = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    return any(check(kind) for check in checks)


def _shard_columns(file: str, columns: tuple[str, ...]) -> list[str]:
    """Every column's name. Raises `UserError` where a wanted one does not hold text."""
    with files.readable(file), _open_lines(file) as stream:
        try:
            description = mds.read_head(stream)[1]
        except ValueError as error:
            raise OSError(str(error)) from None
    known = dict(zip(description["column_names"], description["column_encodings"], strict=True))
    for column in columns:
        if known.get(column, "str") != "str":
            raise UserError(
                f"{file}: column {column!r} holds {known[column]}, not text; "
                "shards of tokens are taken in by `python -m bigmodel adopt`"
            )
    return list(known)


def _first_line_columns(file: str, _: tuple[str, ...]) -> list[str]:
    """Names in the first lines, nested ones dotted; none where no line is well-formed."""
    names: dict[str, None] = {}
    for offset, line in islice(_lines(file, 0, None), FIRST_LINES):
        value = _parse_line(offset, line)
        names |= dict.fromkeys(_dotted(value) if isinstance(value, dict) else [])
    return list(names)


def _dotted(value: dict[str, Any], before: str = "") -> list[str]:
    names = []
    for name, inner in value.items():
        names.append(before + name)
        if isinstance(inner, dict):
            names += _dotted(inner, f"{before}{name}.")
    return names


def corpus_hash(sources: Sequence[Source]) -> str:
    """SHA-256 over the sources' names, columns and files, in order: of a local file the content (about 1 GB/s and
    core), of a remote one the size and the time of its last change."""
    total = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        for source in sources:
            total.update(f"{source.name}\0{' '.join(source.columns)}\0{len(source.files)}\0".encode())
            for file, digest in zip(source.files, pool.map(_identity, source.files), strict=True):
                total.update(base_name(file).encode() + b"\0" + digest.encode())
    return total.hexdigest()


def base_name(file: str) -> str:
    """What a result may say of a file: where it lies differs between machines that make the same result."""
    return file.rpartition("/")[2]


def _identity(file: str) -> str:
    return files.identity(file) if files.is_remote(file) else hash_file(file)


def identities(sources: Sequence[Source]) -> dict[str, str]:
    """What changes when a file does, without reading it."""
    names = [file for source in sources for file in source.files]
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(files.identity, names), strict=True))


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal. Raises `UserError` if it cannot be read."""
    with files.readable(str(path)), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- cutting --------------------------------------------------------------------------------------------------


def plan_units(source: Source) -> list[Unit]:
    """Cut a source into units; depends on the files alone, never on how many processes read them."""
    units: list[Unit] = []
    texts: list[str] = []
    for file in source.files:
        if _kind(file) == "text":
            texts.append(file)
            continue
        for start, stop, num_bytes in _pieces(file):
            units.append(Unit(source.name, (file,), source.columns, source.key_column, start, stop, num_bytes))
    for group, num_bytes in _group_by_size(texts):
        units.append(Unit(source.name, group, source.columns, source.key_column, 0, 0, num_bytes))
    return units


def _pieces(file: str) -> list[tuple[int, int, int]]:
    """(start, stop, weight in bytes) of each unit of a Parquet, Arrow or JSONL file."""
    kind, size = _kind(file), files.size(file)
    if kind == "parquet":
        with files.readable(file), files.open_file(file) as stream:
            metadata = pyarrow.parquet.read_metadata(stream)
        weights = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
        return [(group, group + 1, weight) for group, weight in enumerate(weights)]
    if kind == "arrow":
        with files.readable(file), files.open_file(file) as stream:
            number = pyarrow.ipc.open_file(stream).num_record_batches if _is_arrow_file(stream) else 1
        return [(batch, batch + 1, size // number) for batch in range(number)]
    if kind == "shard" or _compression(file):
        return [(0, 0, size)]
    return [(start, start + UNIT_BYTES, min(UNIT_BYTES, size - start)) for start in range(0, size, UNIT_BYTES)]


def _group_by_size(texts: Sequence[str]) -> Iterator[tuple[tuple[str, ...], int]]:
    group: list[str] = []
    num_bytes = 0
    for file in texts:
        group.append(file)
        num_bytes += files.size(file)
        if num_bytes >= UNIT_BYTES:
            yield tuple(group), num_bytes
            group, num_bytes = [], 0
    if group:
        yield tuple(group), num_bytes


# ---- reading --------------------------------------------------------------------------------------------------


def read_unit(unit: Unit) -> Iterator[Row]:
    """Every row of a unit, in file order. Raises `UserError` naming the file that cannot be read."""
    readers = {"parquet": _read_row_group, "arrow": _read_record_batch, "lines": _read_json_lines, "text": _read_texts}
    readers["shard"] = _read_shard
    return readers[_kind(unit.files[0])](unit)


def _read_texts(unit: Unit) -> Iterator[Row]:
    for file in unit.files:
        with files.readable(file), files.open_file(file) as stream:
            content = stream.read().removeprefix(BYTE_ORDER_MARK)
        try:
            yield (content.decode("utf-8"),), None
        except UnicodeDecodeError as error:
            yield Malformed(file, "the whole file", f"not UTF-8: {error.reason}", len(content)), None


def _read_row_group(unit: Unit) -> Iterator[Row]:
    columns = [*unit.columns, *([unit.key_column] if unit.key_column else [])]
    with files.readable(unit.files[0]), files.open_file(unit.files[0]) as stream:
        parquet = pyarrow.parquet.ParquetFile(stream)
        batches = parquet.iter_batches(BATCH_ROWS, row_groups=[unit.start], columns=columns)
        yield from _rows(unit, batches, f"of row group {unit.start}")


def _read_record_batch(unit: Unit) -> Iterator[Row]:
    with files.readable(unit.files[0]), files.open_file(unit.files[0]) as stream:
        if _is_arrow_file(stream):
            batches = iter([pyarrow.ipc.open_file(stream).get_batch(unit.start)])
            place = f"of record batch {unit.start}"
        else:
            batches = iter(pyarrow.ipc.open_stream(stream))
            place = "of the stream"
        pieces = (batch.slice(row, BATCH_ROWS) for batch in batches for row in range(0, batch.num_rows, BATCH_ROWS))
        yield from _rows(unit, pieces, place)


def _is_arrow_file(stream: pyarrow.NativeFile) -> bool:
    """Arrow's file form begins with its name; its stream form, as Hugging Face datasets write it, does not."""
    magic = stream.read(6)
    stream.seek(0)
    return magic == b"ARROW1"


def _read_schema(file: str) -> pyarrow.Schema:
    with files.open_file(file) as stream:
        if _kind(file) == "parquet":
            return pyarrow.parquet.read_schema(stream)
        return (pyarrow.ipc.open_file if _is_arrow_file(stream) else pyarrow.ipc.open_stream)(stream).schema


def _rows(unit: Unit, batches: Iterator[pyarrow.RecordBatch], place: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        columns = [_to_texts(_column(batch, name)) for name in unit.columns]
        keys = _column(batch, unit.key_column).to_pylist() if unit.key_column else [None] * batch.num_rows
        for *texts, key in zip(*columns, keys, strict=True):
            number += 1
            raw = next((text for text in texts if isinstance(text, bytes)), None)
            if raw is None:
                yield tuple(texts), key
            else:
                yield Malformed(unit.files[0], f"row {number} {place}", "not UTF-8", len(raw)), key


def _column(batch: pyarrow.RecordBatch, name: str) -> pyarrow.Array:
    """A column by its name, or by its dotted path through structs; where a struct is null so are its fields."""
    outer, *inner = _index_path(list(batch.schema), name)
    return pyarrow.compute.struct_field(batch.column(outer), inner) if inner else batch.column(outer)


def _index_path(fields: list[pyarrow.Field], path: str) -> list[int]:
    """Where a column stands: its number, and inside structs the fields' numbers; empty if not there once."""
    names = [field.name for field in fields]
    for name, rest in _splits(path):
        if names.count(name) == 1:
            number = names.index(name)
            kind = fields[number].type
            inner = _index_path(list(kind), rest) if rest and pyarrow.types.is_struct(kind) else []
            if inner or not rest:
                return [number, *inner]
    return []


def _splits(path: str) -> Iterator[tuple[str, str]]:
    """A dotted path cut in two at every dot, the longest first name first: names may have dots of their own."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        yield ".".join(parts[:count]), ".".join(parts[count:])


def _to_texts(column: pyarrow.Array) -> list[str | bytes | None]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if pyarrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        return [None if raw is None else _decoded(raw) for raw in column.cast(pyarrow.large_binary()).to_pylist()]


def _decoded(raw: bytes) -> str | bytes:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw


def _read_shard(unit: Unit) -> Iterator[Row]:
    """The samples of an MDS shard, which is read whole."""
    file = unit.files[0]
    try:
        with files.readable(file), _open_lines(file) as stream:
            content = stream.read()
        shard = mds.ShardContent.parse(content)
        for number, raw in enumerate(zip(*(shard.values(column) for column in unit.columns), strict=True), 1):
            texts = tuple(map(_decoded, raw))
            if all(isinstance(text, str) for text in texts):
                yield tuple(text for text in texts if isinstance(text, str)), None
            else:
                yield Malformed(file, f"sample {number}", "not UTF-8", sum(map(len, raw))), None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: cannot be read: {error}; make it whole or leave it out") from None


def _read_json_lines(unit: Unit) -> Iterator[Row]:
    file = unit.files[0]
    before: int | None = None  # lines before the unit: counted when the first malformed one needs it
    for number, (offset, line) in enumerate(_lines(file, unit.start, None if _compression(file) else unit.stop)):
        value = _parse_line(offset, line)
        texts = value if isinstance(value, str) else _texts_of(value, unit.columns)
        if not isinstance(texts, str):
            yield texts, None
        elif line.strip():
            before = _count_lines(file, offset) - number if before is None else before
            yield Malformed(file, f"line {before + number + 1}", texts, len(line)), None


def _lines(file: str, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that begin in the bytes [start, stop); offsets are uncompressed."""
    with files.readable(file), _open_lines(file) as stream:
        offset = start
        if start:
            offset = _skip_line(stream, start - 1, stop)
        while stop is None or offset < stop:
            line = stream.readline()
            if not line:
                return
            yield offset, line
            offset += len(line)


def _skip_line(stream: io.BufferedReader, offset: int, stop: int | None) -> int:
    """Where the line after the one at `offset` begins; `stop` or less is read of a line, however long it is."""
    stream.seek(offset)
    piece = b""
    while not piece.endswith(b"\n") and (stop is None or offset < stop):
        piece = stream.readline(BUFFER_BYTES if stop is None else min(BUFFER_BYTES, stop - offset))
        if not piece:
            break
        offset += len(piece)
    return offset


def _open_lines(file: str) -> io.BufferedReader:
    stream, compression = files.open_file(file), _compression(file)
    return io.BufferedReader(
        pyarrow.CompressedInputStream(stream, compression) if compression else stream, BUFFER_BYTES
    )


def _compression(file: str) -> str:
    name = file.partition("?")[0] if files.is_remote(file) else file
    return next((compression for ending, compression in COMPRESSIONS.items() if name.endswith(ending)), "")


def _parse_line(offset: int, line: bytes) -> dict[str, Any] | str:
    """The object of a line, or in words why it is none."""
    try:
        value = json.loads(line.removeprefix(b"" if offset else BYTE_ORDER_MARK).decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error.reason}"
    except (ValueError, RecursionError) as error:
        return f"not valid JSON: {error}"
    return value if isinstance(value, dict) else f"a {type(value).__name__}, not a JSON object"


def _texts_of(value: dict[str, Any], columns: tuple[str, ...]) -> tuple[str | None, ...] | str:
    """The texts of a record, or in words why one is not text."""
    texts = []
    for column in columns:
        text = _walk(value, column)
        if text is not None and not isinstance(text, str):
            return f"{column!r} is {type(text).__name__}, not text"
        try:
            text is None or text.encode("utf-8")
        except UnicodeEncodeError:
            return f"{column!r} holds half of a surrogate pair, which no encoding has"
        texts.append(text)
    return tuple(texts)


def _walk(value: Any, path: str) -> Any:
    for name, rest in _splits(path) if isinstance(value, dict) else ():
        if name in value:
            inner = _walk(value[name], rest) if rest else value[name]
            if inner is not None:
                return inner
    return None


def _count_lines(file: str, offset: int) -> int:
    """Lines that end before a byte of the uncompressed file."""
    with _open_lines(file) as stream:
        number = 0
        while offset > 0:
            content = stream.read(min(offset, BUFFER_BYTES))
            number += content.count(b"\n")
            offset -= len(content)
        return number
