"""Documents: from the user's files, or from the embedded corpus (the Python standard library's own text).

Takes the sources of a run file. Gives units (a Parquet row group, a stretch of a JSONL file, a handful of
text files), small enough to be read, judged and tokenized one at a time by any process.

Guarantees: a row is kept or dropped for one named reason, so kept + dropped = read; a text is kept once over
all sources (exact, by the first 128 bits of its SHA-256; the first one in reading order stays); whether a
document is for validation depends on its own key or text alone, so adding data moves nothing.

Costs: scanning keeps 26 bytes a row in memory. A Parquet file is read a batch of rows at a time, a `.jsonl`
file a line at a time; a `.jsonl.gz` file cannot be cut and is one unit.
"""

import ast
import glob
import gzip
import hashlib
import json
import sysconfig
import tokenize
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from bigmodel.config import SourceSettings, UserError

UNIT_BYTES = 16 << 20  # a unit of JSONL or of text files: about a second of tokenizing
BATCH_ROWS = 256  # Parquet rows decoded together: bounds memory at long documents
SHORTEST_DOCS_CHARACTERS = 200  # documentation shorter than this is a heading and a phrase, not a document
EXTENSIONS = (".parquet", ".jsonl", ".jsonl.gz", ".txt")
KEPT, NULL, EMPTY, INVALID_UNICODE, DUPLICATE = range(5)
DROP_REASONS = {NULL: "null", EMPTY: "empty", INVALID_UNICODE: "invalid_unicode", DUPLICATE: "duplicate"}


@dataclass(frozen=True, slots=True)
class Source:
    """A named list of files. `key_column` decides train or validation where there is one, else the text does."""

    name: str
    files: tuple[Path, ...]
    column: str
    key_column: str | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """What one process reads in one go: of Parquet the row group `start`, of JSONL the lines that begin in
    the bytes [start, stop), of text every file. `num_bytes` is its weight in the progress display."""

    source: str
    files: tuple[Path, ...]
    column: str
    key_column: str | None
    start: int
    stop: int
    num_bytes: int


@dataclass(slots=True)
class Scan:
    """One entry per row of a unit: (n,) status, (n, 2) digest words, (n,) for validation?, (n,) UTF-8 bytes."""

    status: np.ndarray
    digests: np.ndarray
    validation: np.ndarray
    sizes: np.ndarray


# ---- finding files --------------------------------------------------------------------------------------------


def find_source(settings: SourceSettings) -> Source:
    """Resolve the paths and patterns of a source and look into each file's schema.

    Raises `UserError` for a path or pattern that matches nothing, a folder, an unknown extension, an
    unreadable file, and a column that a Parquet file or the first line of a JSONL file does not have.
    """
    files: dict[Path, None] = {}
    for pattern in settings.files:
        files.update(dict.fromkeys(_matches(settings.name, pattern)))
    for file in files:
        _check_file(settings, file)
    return Source(settings.name, tuple(files), settings.column)


def _matches(source: str, pattern: str) -> list[Path]:
    if Path(pattern).exists():
        found = [pattern]
    else:
        found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise UserError(
            f"prepare.sources {source!r}: files = {pattern!r} matches nothing (looked from {Path.cwd()}); "
            "give a path or pattern of existing files"
        )
    return [Path(name) for name in found]


def _check_file(settings: SourceSettings, file: Path) -> None:
    where = f"prepare.sources {settings.name!r}: {file}"
    if file.is_dir():
        raise UserError(f"{where} is a folder; name its files, for example {file}/*.parquet")
    if not file.name.endswith(EXTENSIONS):
        raise UserError(f"{where}: unknown extension; known are {', '.join(EXTENSIONS)}")
    if file.name.endswith(".txt"):
        columns = [settings.column]
    elif file.name.endswith(".parquet"):
        columns = _parquet_columns(file, settings.column)
    else:
        columns = _first_line_keys(file, settings.column)
    if settings.column not in columns:
        raise UserError(
            f"{where} has no column {settings.column!r}; it has {', '.join(map(repr, columns))}: "
            "set `column` of this source to the one that holds the text"
        )


def _parquet_columns(file: Path, column: str) -> list[str]:
    with _open_parquet(file) as parquet:
        schema = parquet.schema_arrow
    if column in schema.names:
        kind = schema.field(column).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        checks = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
        if not any(check(kind) for check in checks):
            raise UserError(f"{file}: column {column!r} holds {kind}, not text; set `column` to a text column")
    return list(schema.names)


def _first_line_keys(file: Path, column: str) -> list[str]:
    for _, line in _lines(file, 0, None):
        return list(_parse_line(file, 0, line))
    return [column]  # a file without lines lacks documents, not a column


def _open_parquet(file: Path) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: cannot be read as Parquet: {error}; make it whole or leave it out") from None


def corpus_hash(sources: Sequence[Source]) -> str:
    """SHA-256 over the sources' names, columns and file contents, in order. Reads every byte (about 1 GB/s)."""
    total = hashlib.sha256()
    for source in sources:
        total.update(f"{source.name}\0{source.column}\0{len(source.files)}\0".encode())
        for file in source.files:
            total.update(file.name.encode() + b"\0" + bytes.fromhex(hash_file(file)))
    return total.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal. Raises `UserError` if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


# ---- reading --------------------------------------------------------------------------------------------------


def plan_units(source: Source) -> list[Unit]:
    """Cut a source into units; depends on the files alone, never on how many processes read them."""
    units: list[Unit] = []
    texts: list[Path] = []
    for file in source.files:
        if file.name.endswith(".txt"):
            texts.append(file)
            continue
        for start, stop, num_bytes in _pieces(file):
            units.append(Unit(source.name, (file,), source.column, source.key_column, start, stop, num_bytes))
    for group, num_bytes in _group_by_size(texts):
        units.append(Unit(source.name, group, source.column, source.key_column, 0, 0, num_bytes))
    return units


def _pieces(file: Path) -> list[tuple[int, int, int]]:
    """(start, stop, weight in bytes) of each unit of a Parquet or JSONL file."""
    size = file.stat().st_size
    if file.name.endswith(".parquet"):
        with _open_parquet(file) as parquet:
            metadata = parquet.metadata
            weights = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
        return [(group, group + 1, weight) for group, weight in enumerate(weights)]
    if file.name.endswith(".gz"):
        return [(0, 0, size)]
    return [(start, start + UNIT_BYTES, min(UNIT_BYTES, size - start)) for start in range(0, size, UNIT_BYTES)]


def _group_by_size(files: Sequence[Path]) -> Iterator[tuple[tuple[Path, ...], int]]:
    group: list[Path] = []
    num_bytes = 0
    for file in files:
        group.append(file)
        num_bytes += file.stat().st_size
        if num_bytes >= UNIT_BYTES:
            yield tuple(group), num_bytes
            group, num_bytes = [], 0
    if group:
        yield tuple(group), num_bytes


def read_unit(unit: Unit) -> Iterator[tuple[str | bytes | None, str | None]]:
    """Every row of a unit as (text, key), in file order. None is a null; bytes are text that is not UTF-8.

    Raises `UserError` naming the file (and line) that cannot be read.
    """
    name = unit.files[0].name
    if name.endswith(".txt"):
        return ((_read_text(file), None) for file in unit.files)
    if name.endswith(".parquet"):
        return _read_row_group(unit)
    return _read_json_lines(unit)


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as UTF-8 text: {error}; convert it or leave it out") from None


def _read_row_group(unit: Unit) -> Iterator[tuple[str | bytes | None, str | None]]:
    columns = [unit.column] + ([unit.key_column] if unit.key_column else [])
    with _open_parquet(unit.files[0]) as parquet:
        try:
            for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[unit.start], columns=columns):
                texts = _to_texts(batch.column(unit.column))
                keys = batch.column(unit.key_column).to_pylist() if unit.key_column else [None] * len(texts)
                yield from zip(texts, keys, strict=True)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{unit.files[0]}: row group {unit.start} cannot be read: {error}") from None


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


def _read_json_lines(unit: Unit) -> Iterator[tuple[str | None, None]]:
    file = unit.files[0]
    for offset, line in _lines(file, unit.start, None if file.name.endswith(".gz") else unit.stop):
        value = _parse_line(file, offset, line).get(unit.column)
        if value is not None and not isinstance(value, str):
            raise UserError(
                f"{file}: line {_line_number(file, offset)}: {unit.column!r} is {type(value).__name__}, not text; "
                "set `column` to the one that holds the text"
            )
        yield value, None


def _lines(file: Path, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the non-blank lines that begin in the bytes [start, stop); offsets are uncompressed."""
    opener = gzip.open if file.name.endswith(".gz") else open
    try:
        with opener(file, "rb") as stream:
            offset = start
            if start:  # the line that straddles the start belongs to the unit before
                stream.seek(start - 1)
                offset += len(stream.readline()) - 1
            while stop is None or offset < stop:
                line = stream.readline()
                if not line:
                    return
                if line.strip():
                    yield offset, line
                offset += len(line)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read: {error}; make it whole or leave it out") from None


def _parse_line(file: Path, offset: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{file}: line {_line_number(file, offset)} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: line {_line_number(file, offset)} is a {type(value).__name__}, not a JSON object")
    return value


def _line_number(file: Path, offset: int) -> int:
    """From 1; counted only when an error needs it."""
    opener = gzip.open if file.name.endswith(".gz") else open
    with opener(file, "rb") as stream:
        return stream.read(offset).count(b"\n") + 1


# ---- judging --------------------------------------------------------------------------------------------------


def scan_unit(unit: Unit, validation_share: float) -> Scan:
    """Judge every row of a unit by itself (duplicates are found later, over all units)."""
    status, digests, validation, sizes = [], [], [], []
    for text, key in read_unit(unit):
        verdict, content = _judge(text)
        digest = hashlib.sha256(content).digest()
        status.append(verdict)
        digests.append(digest[:16])
        validation.append(is_validation(key, digest, validation_share))
        sizes.append(len(content))
    words = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
    return Scan(np.array(status, np.uint8), words, np.array(validation, bool), np.array(sizes, np.int64))


def _judge(text: str | bytes | None) -> tuple[int, bytes]:
    if text is None:
        return NULL, b""
    if isinstance(text, bytes):
        return INVALID_UNICODE, b""
    if not text.strip():
        return EMPTY, b""
    try:
        return KEPT, text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, as JSON allows
        return INVALID_UNICODE, b""


def is_validation(key: str | None, text_digest: bytes, validation_share: float) -> bool:
    """Whether a document is kept for validation: 64 bits of a hash, as a fraction, fall below the share."""
    digest = text_digest if key is None else hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[16:24], "little") < validation_share * 2**64


def mark_duplicates(scans: Sequence[Scan]) -> None:
    """Set DUPLICATE, over all scans in order, on every kept row whose digest a kept row before it has."""
    if not scans:
        return
    status = np.concatenate([scan.status for scan in scans])
    digests = np.concatenate([scan.digests for scan in scans])
    rows = np.flatnonzero(status == KEPT)
    order = np.lexsort((digests[rows, 1], digests[rows, 0]))  # stable: equal digests stay in reading order
    ordered = digests[rows[order]]
    repeats = np.flatnonzero((ordered[1:] == ordered[:-1]).all(axis=1)) + 1
    status[rows[order[repeats]]] = DUPLICATE
    start = 0
    for scan in scans:
        scan.status = status[start : start + len(scan.status)]
        start += len(scan.status)


def count_reasons(scans: Iterable[Scan]) -> dict[str, int]:
    """Rows read, kept, and dropped by reason. Every row is in exactly one of the last two."""
    counts = np.zeros(len(DROP_REASONS) + 1, np.int64)
    for scan in scans:
        counts += np.bincount(scan.status, minlength=len(counts))
    dropped = {name: int(counts[code]) for code, name in DROP_REASONS.items()}
    return {"read": int(counts.sum()), "kept": int(counts[KEPT]), **dropped}


def choose_sample(scans: Sequence[Scan], limit_bytes: int) -> list[np.ndarray]:
    """Rows of each unit, of the train split only, that together hold at most `limit_bytes` of text (at least one
    document). A larger corpus is sampled by digest: the same documents whatever their order."""
    rows = [np.flatnonzero((scan.status == KEPT) & ~scan.validation) for scan in scans]
    digests = np.concatenate([scan.digests[chosen, 0] for scan, chosen in zip(scans, rows, strict=True)])
    sizes = np.concatenate([scan.sizes[chosen] for scan, chosen in zip(scans, rows, strict=True)])
    order = np.argsort(digests, kind="stable")
    taken = np.zeros(len(order), bool)
    taken[order[np.cumsum(sizes[order]) <= limit_bytes]] = True
    taken[order[:1]] = True
    parts = np.split(taken, np.cumsum([len(chosen) for chosen in rows])[:-1])
    return [chosen[part] for chosen, part in zip(rows, parts, strict=True)]


# ---- the embedded corpus --------------------------------------------------------------------------------------

EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
TOPICS = "pydoc_data/topics.py"  # one dict literal: the language reference, topic by topic


def standard_library() -> list[tuple[str, bytes]]:
    """(path below the library's folder, content) of every module, sorted by path.

    Left out: tests, third-party packages, and the build's own settings (`config-*`, `_sysconfigdata*`), which
    differ from machine to machine. Raises `UserError` where Python came without its library as files.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    modules = []
    for file in folder.rglob("*.py"):
        path = file.relative_to(folder)
        private = path.parts[0].startswith(("config-", "_sysconfigdata"))
        if not private and EXCLUDED_FOLDERS.isdisjoint(path.parts):
            modules.append((path.as_posix(), file.read_bytes()))
    if len(modules) < 100:
        raise UserError(
            f"the embedded corpus needs Python's standard library as files, and {folder} has {len(modules)} modules; "
            "use a full Python, or name your own text in prepare.sources"
        )
    return sorted(modules)


def embedded_hash(modules: Sequence[tuple[str, bytes]]) -> str:
    total = hashlib.sha256()
    for path, content in modules:
        total.update(path.encode() + b"\0" + hashlib.sha256(content).digest())
    return total.hexdigest()


def write_embedded_corpus(
    directory: Path, modules: Sequence[tuple[str, bytes]]
) -> tuple[list[Source], dict[str, dict[str, int]]]:
    """Write code.parquet and docs.parquet (columns text, key = module path) into `directory`.

    A module's code, without its documentation strings, is one document; its documentation strings, each under
    its qualified name, are another; each topic of the language reference is one more. Returns the two sources
    and, per source, how many documents were left out by reason.
    """
    rows: dict[str, list[tuple[str, str]]] = {"code": [], "docs": []}
    dropped = {name: {"not_parsed": 0, "too_short": 0} for name in rows}
    for path, content in modules:
        documents = _documents_of(path, content)
        if documents is None:
            dropped["code"]["not_parsed"] += 1
            dropped["docs"]["not_parsed"] += 1
            continue
        for source, key, text in documents:
            if source == "docs" and len(text) < SHORTEST_DOCS_CHARACTERS:
                dropped["docs"]["too_short"] += 1
            else:
                rows[source].append((text, key))
    directory.mkdir(parents=True)
    sources = []
    for name, pairs in rows.items():
        file = directory / f"{name}.parquet"
        table = pyarrow.table({"text": [text for text, _ in pairs], "key": [key for _, key in pairs]})
        pyarrow.parquet.write_table(table, file, row_group_size=128)
        sources.append(Source(name, (file,), "text", "key"))
    return sources, dropped


def _documents_of(path: str, content: bytes) -> list[tuple[str, str, str]] | None:
    """(source, key, text) of a module's documents; None if it is not valid Python."""
    try:
        lines = iter(content.splitlines(keepends=True))
        encoding, _ = tokenize.detect_encoding(lambda: next(lines, b""))
        text = content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
        tree = ast.parse(text)
        if path == TOPICS:
            return [("docs", f"{path}#{topic}", prose) for topic, prose in _topics(tree).items()]
        documentation = module_documentation(tree, path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        documentation.encode("utf-8")
        return [("code", path, strip_docstrings(text, tree)), ("docs", path, documentation)]
    except (SyntaxError, ValueError):  # UnicodeError and null bytes are ValueErrors
        return None


def _topics(tree: ast.Module) -> dict[str, str]:
    assignments = [node for node in tree.body if isinstance(node, ast.Assign)]
    topics = ast.literal_eval(assignments[0].value) if assignments else {}
    return {str(name): prose.strip() for name, prose in topics.items()}


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def module_documentation(tree: ast.Module, name: str) -> str:
    """The documentation strings of a module, its classes and functions in source order, each below its name."""
    sections: list[str] = []

    def visit(node: ast.AST, qualified_name: str) -> None:
        if isinstance(node, _Documented):
            documentation = ast.get_docstring(node)
            if documentation and documentation.strip():
                sections.append(f"{qualified_name}\n\n{documentation.strip()}\n")
        for child in ast.iter_child_nodes(node):
            child_name = getattr(child, "name", None) if isinstance(child, _Documented) else None
            visit(child, f"{qualified_name}.{child_name}" if child_name else qualified_name)

    visit(tree, name)
    return "\n".join(sections)


def strip_docstrings(text: str, tree: ast.Module | None = None) -> str:
    """The source text without documentation strings; a body that held nothing else becomes `pass`.

    A documentation string that shares a line with code stays. `text` has "\\n" line ends.
    """
    tree = ast.parse(text) if tree is None else tree
    lines = text.encode("utf-8").split(b"\n")  # ast counts columns in UTF-8 bytes
    nodes = [node for node in ast.walk(tree) if isinstance(node, _Documented) and ast.get_docstring(node) is not None]
    for node in sorted(nodes, key=lambda node: node.body[0].lineno, reverse=True):
        first, last = node.body[0].lineno - 1, (node.body[0].end_lineno or 0) - 1
        indent = lines[first][: node.body[0].col_offset]
        if indent.strip() or lines[last][node.body[0].end_col_offset :].strip():
            continue
        rest = [indent + b"pass"] if len(node.body) == 1 and not isinstance(node, ast.Module) else []
        if not rest and last + 1 < len(lines) and not lines[last + 1].strip():
            last += 1
        lines[first : last + 1] = rest
    return b"\n".join(lines).decode("utf-8").lstrip("\n")
