"""JSON: the texts of JSONL files, and of JSON files with one array or objects end to end.

In: a piece of a file and the wanted columns, nested ones by their dotted path. Out: the rows of the piece; a line or
value that is no object, or whose column is no text, is `Malformed`.

Guarantees: only the wanted columns decide: integers of any length, NaN and nesting of any depth in other fields are
read over; of repeated keys the last one counts, as in Python's json.

Costs: a line, or a value of an array. A compressed JSONL file cannot be cut: reading its last rows decompresses all
rows before them.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from bigmodel.data.prepare import compression
from bigmodel.data.prepare.records import MalformedRecord, record_text
from bigmodel.data.prepare.rows import (
    NO_CLASS,
    Format,
    LabelColumn,
    Located,
    Malformed,
    Piece,
    Record,
    Row,
    label_of,
    splits,
)

FIRST_RECORDS = 100  # of a file: the well-formed ones among them show its columns
FIRST_BYTES = 1 << 16  # of a line show whether it begins an array, which may be the whole file
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LONGEST_INTEGER = 1000  # digits; Python's int() refuses more than 4,300
LEVELS = 100  # of nesting, parsed at a time: Python's parser fails below 1,000
TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
SPACE = re.compile(r"[ \t\r\n]*")
LONGEST_LITERAL = 16  # characters: an error so near the end of what was read may be that of a value read in part


def _integer(digits: str) -> float:
    """A long integer becomes a float: nothing uses its value."""
    return int(digits) if len(digits) <= LONGEST_INTEGER else float(digits)


DECODER = json.JSONDecoder(parse_int=_integer)


def first_columns(file: str, form: Format, wanted: tuple[str, ...]) -> list[str]:
    """Names of the columns of the first records, and of the wanted ones inside a column of nulls; none if all these
    records are malformed."""
    is_null: dict[str, bool] = {}  # by column: whether it is null in all records
    for record in islice(_records(file, form), FIRST_RECORDS):
        for name, value in _dotted(record) if isinstance(record, dict) else ():
            is_null[name] = is_null.get(name, True) and value is None
    inside = [path for path in wanted if any(is_null.get(outer) for outer, inner in splits(path) if inner)]
    return list(is_null | dict.fromkeys(inside, True))


def _records(file: str, form: Format) -> Iterator[dict[str, Any] | str]:
    if form.kind == "json":
        return (record for record, _ in _values(file, form.compression))
    return (_parse_line(offset, line) for offset, line in _lines(file, form.compression, 0, None))


def _dotted(record: dict[str, Any], before: str = "", level: int = 0) -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        yield before + name, value
        if isinstance(value, dict) and level < LEVELS:
            yield from _dotted(value, f"{before}{name}.", level + 1)


# ---- single objects ---------------------------------------------------------------------------------------------


def paths_of_object(content: bytes) -> list[str]:
    """Dotted paths of the fields of a JSON object; none if it is none."""
    value = _parse_line(0, content)
    return [path for path, _ in _dotted(value)] if isinstance(value, dict) else []


def texts_of_object(content: bytes, columns: tuple[str, ...]) -> tuple[str | None, ...] | str:
    """The texts of a JSON object, or the reason why one is not text."""
    value = _parse_line(0, content)
    return value if isinstance(value, str) else _texts_of(value, columns)


# ---- lines ------------------------------------------------------------------------------------------------------


def read_lines(piece: Piece, columns: tuple[str, ...]) -> Iterator[Row]:
    """Rows of a JSONL file; blank lines are none."""
    for offset, line in _lines(piece.file, piece.format.compression, piece.start, piece.stop or None):
        value = _parse_line(offset, line)
        texts = value if isinstance(value, str) else _row_of(value, columns, piece.format.record)
        if not isinstance(texts, str):
            yield _located(texts, piece, f"byte {offset}", len(line), offset), None
        elif line.strip():
            yield Malformed(piece.file, f"byte {offset}", texts, len(line), offset), None


def _lines(file: str, how: str, start: int, stop: int | None) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that begin in the bytes [start, stop); offsets are uncompressed."""
    with compression.opened(file, how) as stream:
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
    most, piece = compression.BUFFER_BYTES, b""
    while not piece.endswith(b"\n") and (stop is None or offset < stop):
        piece = stream.readline(most if stop is None else min(most, stop - offset))
        if not piece:
            break
        offset += len(piece)
    return offset


def _parse_line(offset: int, line: bytes) -> dict[str, Any] | str:
    """The JSON object of a line, or the reason why it is none."""
    try:
        text = line.removeprefix(b"" if offset else BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error.reason}"
    try:
        return _object(_parse(text))
    except json.JSONDecodeError as error:
        size = len(text.rstrip())
        place = f" at character {error.pos + 1} of {size}" if error.pos < size else " at the end of the line: it is cut"
        return f"not valid JSON: {error.msg}{place if error.pos >= 0 else ''}"


def _object(value: Any) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else f"{_kind(value)}, not an object"


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {"dict": "an object", "list": "an array", "str": "a string"}
    return kinds.get(type(value).__name__, "a number")


def _parse(text: str) -> Any:
    """The value of a JSON text. A `JSONDecodeError` in deep nesting has the place -1."""
    try:
        return DECODER.decode(text)
    except RecursionError:
        pass
    try:
        return DECODER.decode(_shallow(text))
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(error.msg, text, -1) from None


def _shallow(text: str) -> str:
    """The same JSON with `null` for each value `LEVELS` deep. Raises `JSONDecodeError` if one of these is not JSON."""
    parts: list[list[str]] = [[]]  # of the text, and of each value around this place that becomes null
    depth = at = 0
    for token in TOKEN.finditer(text):
        parts[-1].append(text[at : token.start()])
        at = token.end()
        if token[0] in "[{":
            depth += 1
            if depth % LEVELS == 0:
                parts.append([])
        parts[-1].append(token[0])
        if token[0] in "]}":
            if depth % LEVELS == 0 and len(parts) > 1:
                DECODER.decode("".join(parts.pop()))
                parts[-1].append("null")
            depth -= 1
    return "".join(["".join(part) for part in parts] + [text[at:]])


def _row_of(value: dict[str, Any], columns: tuple[str, ...], record: Record | None) -> tuple[str | None, ...] | str:
    """The texts of a record, or the reason why it is malformed."""
    if record is None:
        return _texts_of(value, columns)
    try:
        return record_text([_walk(value, column) for column in record.columns], record)
    except MalformedRecord as reason:
        return str(reason)


def _located(
    texts: tuple[str | None, ...], piece: Piece, place: str, num_bytes: int, offset: int = -1
) -> tuple[str | None, ...]:
    """The texts; that of a supervised record knows its place."""
    if piece.format.record is None or texts[0] is None:
        return texts
    return (Located.at(texts[0], Malformed(piece.file, place, "", num_bytes, offset)),)


def _texts_of(value: dict[str, Any], columns: tuple[str, ...]) -> tuple[str | None, ...] | str:
    """The texts of a record, or the reason why one is not text."""
    texts = []
    for column in columns:
        text = _walk(value, column)
        if isinstance(column, LabelColumn):
            text = label_of(text)
            if text is None:
                return f"{column!r} {NO_CLASS}"
        if text is not None and not isinstance(text, str):
            return f"{column!r} is {_kind(text)}, not text"
        try:
            text is None or text.encode("utf-8")
        except UnicodeEncodeError:
            return f"{column!r} holds half of a surrogate pair, which UTF-8 cannot encode"
        texts.append(text)
    return tuple(texts)


def _walk(value: Any, path: str) -> Any:
    if isinstance(value, dict) and (whole := value.get(path)) is not None:
        return whole
    for name, rest in splits(path) if isinstance(value, dict) else ():
        if name in value:
            inner = _walk(value[name], rest) if rest else value[name]
            if inner is not None:
                return inner
    return None


def count_lines(file: str, offsets: list[int]) -> list[int]:
    """Number, from 1, of the line that begins at each of these rising uncompressed offsets. Reads the file once, up to
    the last offset."""
    numbers, at, number = [], 0, 1
    with compression.opened(file, compression.detect(file, compression.head_of(file))) as stream:
        for offset in offsets:
            while at < offset and (content := stream.read(min(offset - at, compression.BUFFER_BYTES))):
                number += content.count(b"\n")
                at += len(content)
            numbers.append(number)
    return numbers


# ---- values -----------------------------------------------------------------------------------------------------


def holds_lines(file: str, how: str) -> bool:
    """Whether a JSON file is one object per line; else it is one array, or objects over several lines."""
    with compression.opened(file, how) as stream:
        first = stream.readline(FIRST_BYTES).removeprefix(BYTE_ORDER_MARK)
        while first and not first.strip():
            first = stream.readline(FIRST_BYTES)
        if first.lstrip().startswith(b"["):
            return False
        text = (first + stream.readline()).strip() if not first.endswith(b"\n") else first.strip()
    try:
        _parse(text.decode("utf-8"))
    except UnicodeDecodeError:
        return True  # a malformed line
    except json.JSONDecodeError as error:  # at the end of the line: its object goes on in the next one
        return "Unterminated string" in error.msg or error.pos < len(text.decode("utf-8"))
    return True


def read_values(piece: Piece, columns: tuple[str, ...]) -> Iterator[Row]:
    """Rows of a JSON file: the elements of its array, or its objects."""
    for number, (value, num_bytes) in enumerate(_values(piece.file, piece.format.compression), 1):
        texts = value if isinstance(value, str) else _row_of(value, columns, piece.format.record)
        if isinstance(texts, str):
            yield Malformed(piece.file, f"value {number}", texts, num_bytes), None
        else:
            yield _located(texts, piece, f"value {number}", num_bytes), None


def _values(file: str, how: str) -> Iterator[tuple[dict[str, Any] | str, int]]:
    """(object or reason why it is none, bytes) of each value."""
    with compression.opened(file, how) as stream:
        for value, text in _split_values(_Window(stream)):
            try:
                yield _object(value), len(text.encode("utf-8"))
            except UnicodeEncodeError:
                yield "not UTF-8", len(text.encode("utf-8", "surrogateescape"))


def _split_values(window: "_Window") -> Iterator[tuple[Any, str]]:
    """(value, its JSON). Raises `OSError` for text that is not JSON, and cut or followed by other text."""
    if not window.skip("["):
        while window.character():
            yield window.value()
        return
    while not window.skip("]"):
        yield window.value()
        if not window.skip(",") and window.character() != "]":
            raise window.not_json("no comma or end after a value of its array")
    if window.character():
        raise window.not_json("its array is followed by other text")


class _Window:
    """The part of a text that is read and not yet parsed. Bytes that are not UTF-8 become surrogates."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text, self._at, self._passed, self._ended = "", 0, 0, False
        self._read()

    def _read(self) -> None:
        """As much again as is not parsed, so that a long value is parsed from its start only a few times."""
        block = self._stream.read(max(compression.BUFFER_BYTES, len(self._text) - self._at))
        self._ended = not block
        self._passed += self._at
        self._text, self._at = self._text[self._at :] + self._decoder.decode(block, self._ended), 0

    def character(self) -> str:
        """The next one that is no space; empty at the end."""
        while True:
            space = SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read()

    def skip(self, character: str) -> bool:
        found = self.character() == character
        self._at += found
        return found

    def value(self) -> tuple[Any, str]:
        """The next value and its JSON."""
        while True:
            try:
                value, end = self._parse()
                if end < len(self._text) - LONGEST_LITERAL or self._ended:  # else a number may go on
                    text, self._at = self._text[self._at : end], end
                    return value, text
            except json.JSONDecodeError as error:
                near_end = error.pos > len(self._text) - LONGEST_LITERAL or "Unterminated string" in error.msg
                if self._ended or not near_end:
                    self._at = max(error.pos, self._at)
                    raise self.not_json(error.msg) from None
            self._read()

    def _parse(self) -> tuple[Any, int]:
        try:
            return DECODER.raw_decode(self._text, self._at)
        except RecursionError:
            end = _end(self._text, self._at)
        if end < 0:
            raise json.JSONDecodeError("it does not end", self._text, len(self._text))
        return _parse(self._text[self._at : end]), end

    def not_json(self, reason: str) -> OSError:
        return OSError(f"not valid JSON: {reason} at character {self._passed + self._at + 1}")


def _end(text: str, start: int) -> int:
    """End of the object or array that starts here; -1: not in this text."""
    depth = 0
    for token in TOKEN.finditer(text, start):
        depth += (token[0] in "[{") - (token[0] in "]}")
        if depth == 0:
            return token.end()
    return -1
