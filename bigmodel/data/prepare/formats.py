"""Formats: the columns, pieces and rows of one file of documents.

In: a file (Parquet, Arrow, JSONL, text, MDS; local or in a store) and the wanted columns. Out: the columns that it has,
the pieces that can be read independently, and the rows of a piece. Example, a file a.jsonl with the lines
`{"text": "A cat."}` and `{"text": 5}`, column `text`:

    (("A cat.",), None)                                                                   # texts, key
    (Malformed("a.jsonl", "byte 19", "'text' is int, not text", num_bytes=12, offset=19), None)

Guarantees: pieces depend on the file alone. A piece gives the same rows in the same order in any process. A record that
violates its format or column becomes `Malformed`, with place and reason; an unreadable file raises `UserError`.

Costs: beside a row, reading holds some MB of a Parquet column whatever the size of its row groups, a record batch of
Arrow with all its columns, a line of JSONL, a text file, or an MDS shard. A compressed JSONL file and an Arrow stream
cannot be cut: each is one piece, and reading its last rows decompresses all rows before them.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from bigmodel.config.settings import UserError
from bigmodel.data.store import files, mds

BATCH_ROWS = 256  # Parquet or Arrow rows decoded together: bounds memory at long documents
BUFFER_BYTES = 1 << 20  # per read: a remote store answers each read separately
FIRST_LINES = 100  # of a JSONL file: the well-formed ones among them show its columns
KINDS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "lines",
    ".jsonl.gz": "lines",
    ".jsonl.zst": "lines",
    ".txt": "text",
    ".mds": "shard",
    **{f".mds{ending}": "shard" for ending in mds.COMPRESSIONS},
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a file that is read on its own. Parquet: row group `start`. Arrow: record batch `start`. Plain JSONL:
    the lines that begin in the bytes [start, stop). Others: the whole file. `num_bytes`: its weight in the progress
    bar."""

    file: str
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


def kind(file: str) -> str:
    """Kind of a file by its name; empty without a reader for it."""
    name = files.without_settings(file)
    return next((one for ending, one in KINDS.items() if name.endswith(ending)), "")


def compression(file: str) -> str:
    name = files.without_settings(file)
    return next((one for ending, one in COMPRESSIONS.items() if name.endswith(ending)), "")


# ---- columns ----------------------------------------------------------------------------------------------------


def find_columns(file: str, wanted: tuple[str, ...]) -> list[str]:
    """Names of all columns, nested ones dotted; none if the first lines of a JSONL file are malformed. Raises
    `UserError` if a wanted column does not hold text."""
    look = {"lines": _first_line_columns, "shard": _shard_columns}.get(kind(file), _schema_columns)
    return look(file, wanted)


def _schema_columns(file: str, wanted: tuple[str, ...]) -> list[str]:
    with files.readable(file):
        schema = _read_schema(file)
    known = dict(_flattened(schema))
    for column in wanted:
        if column in known and not _is_text(known[column]):
            raise UserError(f"{file}: column {column!r} holds {known[column]}, not text; set `column` to a text column")
        if column in known and not _index_path(list(schema), column):
            raise UserError(f"{file}: has two columns {column!r}; rewrite it with a different name for each")
    return list(known)


def _read_schema(file: str) -> pyarrow.Schema:
    with files.open_file(file) as stream:
        if kind(file) == "parquet":
            return pyarrow.parquet.read_schema(stream)
        return (pyarrow.ipc.open_file if _is_arrow_file(stream) else pyarrow.ipc.open_stream)(stream).schema


def _flattened(columns: Any, before: str = "") -> Iterator[tuple[str, pyarrow.DataType]]:
    for field in columns:
        yield before + field.name, field.type
        if pyarrow.types.is_struct(field.type):
            yield from _flattened(field.type, f"{before}{field.name}.")


def _is_text(kind: pyarrow.DataType) -> bool:
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    checks = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    return any(check(kind) for check in checks)


def _shard_columns(file: str, wanted: tuple[str, ...]) -> list[str]:
    with files.readable(file):
        try:
            description = mds.describe(files.without_settings(file), lambda: files.open_file(file))
        except ValueError as error:
            raise OSError(str(error)) from None
    known = dict(zip(description["column_names"], description["column_encodings"], strict=True))
    for column in wanted:
        if known.get(column, "str") != "str":
            raise UserError(
                f"{file}: column {column!r} holds {known[column]}, not text; "
                "import shards of tokens with `bigmodel adopt`"
            )
    return list(known)


def _first_line_columns(file: str, _: tuple[str, ...]) -> list[str]:
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


# ---- cutting ----------------------------------------------------------------------------------------------------


def cut(file: str, piece_bytes: int) -> list[Piece]:
    """The pieces of a file, in order; `piece_bytes`: their size in plain JSONL."""
    size = files.size(file)
    if kind(file) == "parquet":
        with files.readable(file), files.open_file(file) as stream:
            metadata = pyarrow.parquet.read_metadata(stream)
        groups = range(metadata.num_row_groups)
        return [Piece(file, group, group + 1, metadata.row_group(group).total_byte_size) for group in groups]
    if kind(file) == "arrow":
        with files.readable(file), files.open_file(file) as stream:
            number = pyarrow.ipc.open_file(stream).num_record_batches if _is_arrow_file(stream) else 1
        return [Piece(file, batch, batch + 1, size // number) for batch in range(number)]
    if kind(file) != "lines" or compression(file):
        return [Piece(file, 0, 0, size)]
    starts = range(0, size, piece_bytes)
    return [Piece(file, start, start + piece_bytes, min(piece_bytes, size - start)) for start in starts]


# ---- reading ----------------------------------------------------------------------------------------------------


def read_piece(piece: Piece, columns: tuple[str, ...], key_column: str | None) -> Iterator[Row]:
    """Rows of a piece, in file order. Raises `UserError` naming a file that cannot be read."""
    readers = {"parquet": _read_row_group, "arrow": _read_record_batches}
    of_kind = kind(piece.file)
    if of_kind in readers:
        return readers[of_kind](piece, columns, key_column)
    return {"lines": _read_json_lines, "text": _read_text, "shard": _read_shard}[of_kind](piece, columns)


def _read_text(piece: Piece, _: tuple[str, ...]) -> Iterator[Row]:
    with files.readable(piece.file), files.open_file(piece.file) as stream:
        content = stream.read().removeprefix(BYTE_ORDER_MARK)
    try:
        yield (content.decode("utf-8"),), None
    except UnicodeDecodeError as error:
        yield Malformed(piece.file, "the whole file", f"not UTF-8: {error.reason}", len(content)), None


def _read_row_group(piece: Piece, columns: tuple[str, ...], key_column: str | None) -> Iterator[Row]:
    """Buffered and without pre-buffering: only both together keep pyarrow from loading the whole row group."""
    with files.readable(piece.file), files.open_file(piece.file) as stream:
        parquet = pyarrow.parquet.ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False)
        wanted = [*columns, *([key_column] if key_column else [])]
        batches = parquet.iter_batches(BATCH_ROWS, row_groups=[piece.start], columns=wanted)
        yield from _rows(piece.file, batches, columns, key_column, f"of row group {piece.start}")


def _read_record_batches(piece: Piece, columns: tuple[str, ...], key_column: str | None) -> Iterator[Row]:
    """One record batch of a file, or a whole stream."""
    with files.readable(piece.file), files.open_file(piece.file) as stream:
        if _is_arrow_file(stream):
            batches = iter([pyarrow.ipc.open_file(stream).get_batch(piece.start)])
            place = f"of record batch {piece.start}"
        else:
            batches = iter(pyarrow.ipc.open_stream(stream))
            place = "of the stream"
        cut = (batch.slice(row, BATCH_ROWS) for batch in batches for row in range(0, batch.num_rows, BATCH_ROWS))
        yield from _rows(piece.file, cut, columns, key_column, place)


def _is_arrow_file(stream: pyarrow.NativeFile) -> bool:
    """Arrow's file format begins with ARROW1; its stream format, which Hugging Face datasets write, does not."""
    magic = stream.read(6)
    stream.seek(0)
    return magic == b"ARROW1"


def _rows(
    file: str, batches: Iterator[pyarrow.RecordBatch], columns: tuple[str, ...], key_column: str | None, place: str
) -> Iterator[Row]:
    number = 0
    for batch in batches:
        of_columns = [_to_texts(_column(batch, name)) for name in columns]
        keys = _column(batch, key_column).to_pylist() if key_column else [None] * batch.num_rows
        for *texts, key in zip(*of_columns, keys, strict=True):
            number += 1
            raw = next((text for text in texts if isinstance(text, bytes)), None)
            if raw is None:
                yield tuple(texts), key
            else:
                yield Malformed(file, f"row {number} {place}", "not UTF-8", len(raw)), key


def _column(batch: pyarrow.RecordBatch, name: str) -> pyarrow.Array:
    """A column by its name, or by its dotted path through structs; the fields of a null struct are null."""
    outer, *inner = _index_path(list(batch.schema), name)
    return pyarrow.compute.struct_field(batch.column(outer), inner) if inner else batch.column(outer)


def _index_path(fields: list[pyarrow.Field], path: str) -> list[int]:
    """Number of a column, and of the fields inside structs; empty unless exactly one matches."""
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
    """A dotted path split at each dot, longest first name first: names may contain dots."""
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


def _read_shard(piece: Piece, columns: tuple[str, ...]) -> Iterator[Row]:
    """Samples of an MDS shard; reads the whole shard."""
    file = piece.file
    try:
        shard = mds.ShardContent.of_file(files.without_settings(file), b"".join(files.chunks(file)))
        for number, raw in enumerate(zip(*(shard.values(column) for column in columns), strict=True), 1):
            texts = tuple(map(_decoded, raw))
            if all(isinstance(text, str) for text in texts):
                yield tuple(text for text in texts if isinstance(text, str)), None
            else:
                yield Malformed(file, f"sample {number}", "not UTF-8", sum(map(len, raw))), None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: cannot be read: {error}; restore the file or leave it out") from None


# ---- lines ------------------------------------------------------------------------------------------------------


def _read_json_lines(piece: Piece, columns: tuple[str, ...]) -> Iterator[Row]:
    for offset, line in _lines(piece.file, piece.start, piece.stop or None):
        value = _parse_line(offset, line)
        texts = value if isinstance(value, str) else _texts_of(value, columns)
        if not isinstance(texts, str):
            yield texts, None
        elif line.strip():
            yield Malformed(piece.file, f"byte {offset}", texts, len(line), offset), None


def _lines(file: str, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that begin in the bytes [start, stop); offsets are uncompressed."""
    with files.readable(file), open_lines(file) as stream:
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
    """Start of the line after the one at `offset`; reads at most up to `stop`, however long the line is."""
    stream.seek(offset)
    piece = b""
    while not piece.endswith(b"\n") and (stop is None or offset < stop):
        piece = stream.readline(BUFFER_BYTES if stop is None else min(BUFFER_BYTES, stop - offset))
        if not piece:
            break
        offset += len(piece)
    return offset


def open_lines(file: str) -> io.BufferedReader:
    stream, how = files.open_file(file), compression(file)
    return io.BufferedReader(pyarrow.CompressedInputStream(stream, how) if how else stream, BUFFER_BYTES)


def _parse_line(offset: int, line: bytes) -> dict[str, Any] | str:
    """The JSON object of a line, or the reason why it is none."""
    try:
        value = json.loads(line.removeprefix(b"" if offset else BYTE_ORDER_MARK).decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error.reason}"
    except (ValueError, RecursionError) as error:
        return f"not valid JSON: {error}"
    return value if isinstance(value, dict) else f"a {type(value).__name__}, not a JSON object"


def _texts_of(value: dict[str, Any], columns: tuple[str, ...]) -> tuple[str | None, ...] | str:
    """The texts of a record, or the reason why one is not text."""
    texts = []
    for column in columns:
        text = _walk(value, column)
        if text is not None and not isinstance(text, str):
            return f"{column!r} is {type(text).__name__}, not text"
        try:
            text is None or text.encode("utf-8")
        except UnicodeEncodeError:
            return f"{column!r} holds half of a surrogate pair, which UTF-8 cannot encode"
        texts.append(text)
    return tuple(texts)


def _walk(value: Any, path: str) -> Any:
    for name, rest in _splits(path) if isinstance(value, dict) else ():
        if name in value:
            inner = _walk(value[name], rest) if rest else value[name]
            if inner is not None:
                return inner
    return None


def count_lines(file: str, offsets: list[int]) -> list[int]:
    """Number, from 1, of the line that begins at each of these rising uncompressed offsets. Reads the file once, up to
    the last offset."""
    numbers, at, number = [], 0, 1
    with files.readable(file), open_lines(file) as stream:
        for offset in offsets:
            while at < offset and (content := stream.read(min(offset - at, BUFFER_BYTES))):
                number += content.count(b"\n")
                at += len(content)
            numbers.append(number)
    return numbers
