"""Columns: the texts of Parquet and Arrow files, and of any Arrow record batches.

In: a piece of a file and the wanted columns, nested ones by their dotted path. Out: the names of all columns; the rows
of the piece. A column of strings in any form (large, views, dictionaries, run-end encoded, an extension type over
strings) holds text; a column of type null holds a null in each row.

Costs: beside a row, some MB of a Parquet column whatever the size of its row groups; of Arrow a record batch with all
its columns. `pyarrow.parquet` and `pyarrow.compute` are imported where a file needs them: 0.1 s.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pyarrow
from pyarrow import types

from bigmodel.config.settings import UserError
from bigmodel.data.prepare.compression import BUFFER_BYTES
from bigmodel.data.prepare.records import MalformedRecord, record_text
from bigmodel.data.prepare.rows import (
    NO_CLASS,
    LabelColumn,
    Located,
    Malformed,
    Piece,
    Record,
    Row,
    decoded,
    label_of,
    splits,
)
from bigmodel.data.store import files

BATCH_ROWS = 256  # Parquet or Arrow rows decoded together: bounds memory at long documents
TEXT = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)


def schema_columns(file: str, kind: str, wanted: tuple[str, ...]) -> list[str]:
    """Names of all columns, and of the wanted ones inside a column of nulls. Raises `UserError` if a wanted column does
    not hold text."""
    with files.readable(file):
        schema = _read_schema(file, kind)
    return text_columns(file, schema, wanted)


def text_columns(file: str, schema: pyarrow.Schema, wanted: tuple[str, ...]) -> list[str]:
    """As `schema_columns`, of a schema."""
    known = dict(_flattened(schema))
    for column in wanted:
        if column in known and not (_is_class if isinstance(column, LabelColumn) else _is_text)(known[column]):
            raise UserError(f"{file}: column {column!r} holds {known[column]}, not text; set `column` to a text column")
        path = _index_path(list(schema), column)
        if column in known and not path:
            raise UserError(f"{file}: has two columns {column!r}; rewrite it with a different name for each")
        if path:
            known.setdefault(column, pyarrow.null())
    return list(known)


def _read_schema(file: str, kind: str) -> pyarrow.Schema:
    from pyarrow import parquet

    with files.open_file(file) as stream:
        if kind == "parquet":
            return parquet.read_schema(stream)
        return (pyarrow.ipc.open_file if _is_arrow_file(stream) else pyarrow.ipc.open_stream)(stream).schema


def outer_columns(schema: pyarrow.Schema, columns: tuple[str, ...]) -> list[str]:
    """Names of the columns that hold these ones, each once."""
    return list(dict.fromkeys(schema[_index_path(list(schema), column)[0]].name for column in columns))


def _flattened(columns: Any, before: str = "") -> Iterator[tuple[str, pyarrow.DataType]]:
    for field in columns:
        yield before + field.name, field.type
        if types.is_struct(field.type):
            yield from _flattened(field.type, f"{before}{field.name}.")


def _is_text(kind: pyarrow.DataType) -> bool:
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _is_text(kind.storage_type)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _is_text(kind.value_type)
    return any(check(kind) for check in TEXT)


def _is_class(kind: pyarrow.DataType) -> bool:
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _is_class(kind.value_type)
    return _is_text(kind) or types.is_integer(kind) or types.is_boolean(kind)


def cut_columns(file: str, kind: str, size: int) -> list[tuple[int, int]]:
    """(number, bytes) of each row group or record batch; a stream is one piece. `size`: bytes of the file."""
    from pyarrow import parquet

    with files.readable(file), files.open_file(file) as stream:
        if kind == "parquet":
            metadata = parquet.read_metadata(stream)
            return [(group, metadata.row_group(group).total_byte_size) for group in range(metadata.num_row_groups)]
        number = pyarrow.ipc.open_file(stream).num_record_batches if _is_arrow_file(stream) else 1
    return [(batch, size // number) for batch in range(number)]


def read_columns(piece: Piece, columns: tuple[str, ...], key_column: str | None) -> Iterator[Row]:
    """Rows of a row group, a record batch, or a whole stream."""
    read = _read_row_group if piece.format.kind == "parquet" else _read_record_batches
    return read(piece, columns, key_column)


def _read_row_group(piece: Piece, columns: tuple[str, ...], key_column: str | None) -> Iterator[Row]:
    """Buffered and without pre-buffering: only both together keep pyarrow from loading the whole row group."""
    from pyarrow.parquet import ParquetFile

    with files.readable(piece.file), files.open_file(piece.file) as stream:
        parquet = ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False)
        schema = parquet.schema_arrow
        wanted = [*columns, *([key_column] if key_column else [])]
        stored = [_stored_name(schema, name) for name in (*wanted, *_others(piece.format.record))]
        batches = parquet.iter_batches(BATCH_ROWS, row_groups=[piece.start], columns=stored)
        yield from rows_of(piece, batches, columns, key_column, f"of row group {piece.start}")


def _stored_name(schema: pyarrow.Schema, path: str) -> str:
    """The path, or its beginning that names a column of nulls."""
    fields, names = list(schema), []
    for number in _index_path(fields, path):
        names.append(fields[number].name)
        fields = list(fields[number].type) if types.is_struct(fields[number].type) else []
    return ".".join(names)


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
        yield from rows_of(piece, cut, columns, key_column, place)


def _is_arrow_file(stream: pyarrow.NativeFile) -> bool:
    """Arrow's file format begins with ARROW1; its stream format, which Hugging Face datasets write, does not."""
    magic = stream.read(6)
    stream.seek(0)
    return magic == b"ARROW1"


def _others(record: Record | None) -> tuple[str, ...]:
    """The columns of a supervised source after the first, which its text is named by."""
    return record.columns[1:] if record else ()


def rows_of(
    piece: Piece, batches: Iterator[pyarrow.RecordBatch], columns: tuple[str, ...], key_column: str | None, place: str
) -> Iterator[Row]:
    """Rows of record batches; `place`: what their numbers count from, for errors."""
    file, record = piece.file, piece.format.record
    number = 0
    for batch in batches:
        of_columns = [_to_texts(_column(batch, name)) for name in (*columns, *_others(record))]
        keys = _column(batch, key_column).to_pylist() if key_column else [None] * batch.num_rows
        for *texts, key in zip(*of_columns, keys, strict=True):
            number += 1
            raw = next((text for text in texts if isinstance(text, bytes)), None)
            if raw is None and columns and isinstance(columns[-1], LabelColumn):
                texts[-1] = label_of(texts[-1])
                if texts[-1] is None:
                    size = len((texts[0] or "").encode())
                    yield Malformed(file, f"row {number} {place}", f"{columns[-1]!r} {NO_CLASS}", size), key
                    continue
            if raw is not None:
                yield Malformed(file, f"row {number} {place}", "not UTF-8", len(raw)), key
            elif record:
                yield _record_row(texts, record, Malformed(file, f"row {number} {place}", "", 0)), key
            else:
                yield tuple(texts), key


def _record_row(values: list[Any], record: Record, where: Malformed) -> tuple[str | None] | Malformed:
    try:
        (text,) = record_text(values, record)
    except MalformedRecord as reason:
        return replace(where, reason=str(reason))
    return (text if text is None else Located.at(text, where),)


def _to_value(value: pyarrow.Scalar) -> Any:
    """A nested value, or bytes for one that is not UTF-8."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return b""


def _column(batch: pyarrow.RecordBatch, name: str) -> pyarrow.Array:
    """A column by its name, or by its dotted path through structs; the fields of a null struct are null."""
    from pyarrow import compute

    outer, *inner = _index_path(list(batch.schema), name)
    return compute.struct_field(batch.column(outer), inner) if inner else batch.column(outer)


def _index_path(fields: list[pyarrow.Field], path: str) -> list[int]:
    """Number of a column, and of the fields inside structs, up to a column of nulls; empty unless exactly one
    matches."""
    names = [field.name for field in fields]
    for name, rest in splits(path):
        if names.count(name) == 1:
            number = names.index(name)
            kind = fields[number].type
            inner = _index_path(list(kind), rest) if rest and types.is_struct(kind) else []
            if inner or not rest or types.is_null(kind):
                return [number, *inner]
    return []


def _to_texts(column: pyarrow.Array) -> list[Any]:
    from pyarrow import compute

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if types.is_nested(column.type):
            return [_to_value(value) for value in column]
        if types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if types.is_run_end_encoded(column.type):
            column = compute.run_end_decode(column)
        return [None if raw is None else decoded(raw) for raw in column.cast(pyarrow.large_binary()).to_pylist()]
