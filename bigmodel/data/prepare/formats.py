"""Formats: the columns, pieces and rows of one file of documents.

In: a file (Parquet, Arrow, JSONL, JSON, text, MDS, tar; local or in a store) or a folder that is a Lance dataset, and
the wanted columns. Out: its format, the columns that it has, the pieces that can be read independently, and the rows of
a piece (`rows`).

A name tells the kind of file, or the `format` of its source does; upper and lower case are the same. The first bytes
tell the compression (of MDS shards the name does), and Parquet and Arrow under another name. A .json file
with an object on each line is read as JSONL.

Guarantees: pieces depend on the file alone. A piece gives the same rows in the same order in any process. A record that
violates its format or column becomes `Malformed`, with place and reason; an unreadable file raises `UserError`.

Costs: beside a row, what `columns` and `json_text` state, a whole text file, or a whole MDS shard. A compressed file
cannot be cut: it is one piece.
"""

from collections.abc import Iterator

from bigmodel.config.settings import UserError
from bigmodel.data.prepare import compression
from bigmodel.data.prepare.columns import cut_columns, read_columns, schema_columns
from bigmodel.data.prepare.json_text import BYTE_ORDER_MARK, first_columns, holds_lines, read_lines, read_values
from bigmodel.data.prepare.lance_text import cut_dataset, dataset_columns, read_fragment
from bigmodel.data.prepare.rows import NO_CLASS, Format, LabelColumn, Malformed, Piece, Row, decoded, label_of
from bigmodel.data.prepare.tars import first_columns as first_members
from bigmodel.data.prepare.tars import read_tar
from bigmodel.data.store import files, mds

KINDS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "text",
    ".tar": "webdataset",
    ".tgz": "webdataset",
    ".lance": "lance",
    **{f".mds{ending}": "mds" for ending in ("", *mds.COMPRESSIONS)},
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd", ".lz4": "lz4"}
MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow"}
TABLES = ("parquet", "arrow")


def kind_by_name(file: str) -> str:
    """Kind of a file by its name; empty: unknown."""
    name = _name(file)
    bare = name.removesuffix(_compressed_ending(file))
    return next(
        (kind for end, kind in KINDS.items() if name.endswith(end) or (kind != "mds" and bare.endswith(end))), ""
    )


def _name(file: str) -> str:
    return files.without_settings(file).lower()


def _compressed_ending(file: str) -> str:
    return next((ending for ending in COMPRESSIONS if _name(file).endswith(ending)), "")


def recognize(file: str, told: str = "") -> Format:
    """Format of a file; `told`: its kind in the settings. Raises `UserError` for a file without a known format."""
    kind = told or kind_by_name(file)
    if kind in ("mds", "lance"):  # MDS begins with a number, which may look like anything; its name says how it is
        return Format(kind)  # compressed
    ending = _compressed_ending(file)
    head = compression.head_of(file)
    if ending and not head:
        raise UserError(f"{file}: is empty, not even a file of {COMPRESSIONS[ending]}; restore it or leave it out")
    how = compression.detect(file, head)
    if not told and kind != "text":
        kind = next((found for magic, found in MAGIC.items() if head.startswith(magic)), kind)
    if not kind:
        raise UserError(f"{file}: unknown extension; known are {', '.join(KINDS)}; else set `format` of this source")
    if how and kind in TABLES:
        raise UserError(f"{file}: is compressed as a whole, so its rows cannot be found; decompress it")
    if kind == "json" and holds_lines(file, how):
        kind = "jsonl"
    return Format(kind, how)


def find_columns(file: str, form: Format, wanted: tuple[str, ...]) -> list[str]:
    """Names of all columns, nested ones dotted; none for text, and if the first records of a JSON file are malformed.
    Raises `UserError` if a wanted column does not hold text."""
    if form.kind == "text":
        return []
    if form.kind in TABLES:
        return schema_columns(file, form.kind, wanted)
    if form.kind in ("mds", "lance"):
        return (_shard_columns if form.kind == "mds" else dataset_columns)(file, wanted)
    return (first_members if form.kind == "webdataset" else first_columns)(file, form, wanted)


def _shard_columns(file: str, wanted: tuple[str, ...]) -> list[str]:
    with files.readable(file):
        try:
            description = mds.describe(_name(file), lambda: files.open_file(file))
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


def cut(file: str, form: Format, piece_bytes: int) -> list[Piece]:
    """The pieces of a file, in order; `piece_bytes`: their size in plain JSONL."""
    if form.kind == "lance":
        return cut_dataset(file, form)
    size = files.size(file)
    if form.kind in TABLES:
        return [Piece(file, form, number, number + 1, part) for number, part in cut_columns(file, form.kind, size)]
    if form.kind != "jsonl" or form.compression:
        return [Piece(file, form, 0, 0, size)]
    starts = range(0, size, piece_bytes)
    return [Piece(file, form, start, start + piece_bytes, min(piece_bytes, size - start)) for start in starts]


def read_piece(piece: Piece, columns: tuple[str, ...], key_column: str | None) -> Iterator[Row]:
    """Rows of a piece, in file order. Raises `UserError` naming a file that cannot be read."""
    if piece.format.kind in TABLES:
        return read_columns(piece, columns, key_column)
    return READERS[piece.format.kind](piece, columns)


def _read_text(piece: Piece, _: tuple[str, ...]) -> Iterator[Row]:
    with compression.opened(piece.file, piece.format.compression) as stream:
        content = stream.read().removeprefix(BYTE_ORDER_MARK)
    try:
        yield (content.decode("utf-8"),), None
    except UnicodeDecodeError as error:
        yield Malformed(piece.file, "the whole file", f"not UTF-8: {error.reason}", len(content)), None


def _read_shard(piece: Piece, columns: tuple[str, ...]) -> Iterator[Row]:
    """Samples of an MDS shard; reads the whole shard."""
    file = piece.file
    try:
        shard = mds.ShardContent.of_file(_name(file), b"".join(files.chunks(file)))
        for number, raw in enumerate(zip(*(shard.values(column) for column in columns), strict=True), 1):
            texts = tuple(map(decoded, raw))
            if isinstance(columns[-1], LabelColumn) and label_of(texts[-1]) is None:
                yield Malformed(file, f"sample {number}", f"{columns[-1]!r} {NO_CLASS}", sum(map(len, raw))), None
            elif all(isinstance(text, str) for text in texts):
                yield tuple(text for text in texts if isinstance(text, str)), None
            else:
                yield Malformed(file, f"sample {number}", "not UTF-8", sum(map(len, raw))), None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: cannot be read: {error}; restore the file or leave it out") from None


READERS = {
    "jsonl": read_lines,
    "json": read_values,
    "text": _read_text,
    "mds": _read_shard,
    "webdataset": read_tar,
    "lance": read_fragment,
}
