r"""Files of word vectors: Word2Vec's text and binary form, fastText's .vec, GloVe's text, each also compressed.

In: a file. Out: its vectors, one after another.

    Word2Vec, text     "2 3\nthe 0.1 0.2 0.3\ncat ..."          number of words and of channels first
    Word2Vec, binary   "2 3\nthe " + 12 bytes + "cat " ...      fp32, little endian; a line end may follow each
    GloVe, text        "the 0.1 0.2 0.3\ncat ..."               no first line

Guarantees: the format is told by the content. A file that is cut, longer or shorter than its first line says, with a
line of another length, or with a number that is none, not finite or beyond fp32, raises `UserError` with file, line and
reason, and is never read as a shorter one; only GloVe's form, which has no first line, may be cut between two lines
unnoticed. Numbers of words that nobody asked for are counted, not read. Words are compared as bytes: a file of any
encoding is read; a byte order mark is passed over.

Costs: a block of the file; memory does not grow with the file. A core reads 4 million words of 300 channels a minute
from text, 16 million from binary. gensim's reader loads all vectors into memory, stops at the number of the first line,
and reads GloVe's form only where told so.
"""

import hashlib
import io
import re
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from bigmodel.config.user_error import UserError
from bigmodel.data.prepare import compression

BLOCK_BYTES = 1 << 20
HEAD_BYTES = 1 << 12  # tell text from binary
MAX_WORD_BYTES = 1 << 16
NUMBER_BYTES = 64  # longest number in a text
LONGEST_FIRST_LINE = 1 << 22
BINARY = "Word2Vec, binary"
HEADER = re.compile(rb"[ \t]*(\d{1,18})[ \t]+(\d{1,18})[ \t]*\r?\n")
CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
FRACTION = re.compile(rb"[+-]?\d*\.\d+(e[+-]?\d+)?", re.IGNORECASE)
BLANK = b" \t\r\n"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
AGAIN = "fetch or write it again"
SHOWN_EVERY_SECONDS = 10.0

Say = Callable[[str], None]


@dataclass
class WordVectors:
    """A file of vectors while it is read. `channels`: of a vector. `count`: vectors read. After the last one, `sha256`
    is the hash of the uncompressed content."""

    file: str
    form: str
    channels: int
    _stream: "_Stream"
    _stated: int | None  # number of vectors in the first line
    count: int = 0

    def read(self, wanted: Container[bytes]) -> Iterator[tuple[bytes, np.ndarray]]:
        """Words that are wanted with their vectors (channels,) fp32, in the order of the file, repeated words too."""
        yield from self._read_binary(wanted) if self.form == BINARY else self._read_text(wanted)
        if self._stated is not None and self.count != self._stated:
            raise UserError(
                f"{self.file}: its first line says {self._stated:,} vectors, and there are {self.count:,}: it is cut, "
                f"or the line is wrong; {AGAIN}"
            )

    @property
    def sha256(self) -> str:
        return self._stream.digest.hexdigest()

    def _read_text(self, wanted: Container[bytes]) -> Iterator[tuple[bytes, np.ndarray]]:
        longest = MAX_WORD_BYTES + NUMBER_BYTES * self.channels
        while line := self._stream.line(longest):
            if not line.endswith(b"\n") and len(line) == longest:
                raise self._broken("is too long for a word and its vector")
            row = line.rstrip(BLANK)
            if not row:
                continue
            word, numbers = self._cut(row)
            self.count += 1
            if word in wanted:
                yield word, self._parse(numbers)

    def _cut(self, row: bytes) -> tuple[bytes, bytes]:
        """Word and numbers of a line. A word of GloVe may hold spaces: the last fields are the numbers."""
        if row.count(b" ") == self.channels and b"  " not in row and b"\t" not in row:
            word, _, numbers = row.partition(b" ")
            return word, numbers
        fields = row.rsplit(None, self.channels)
        if len(fields) <= self.channels or FRACTION.fullmatch(fields[0].rpartition(b" ")[2]):
            found = len(row.split()) - 1
            raise self._broken(f"has {found} numbers, and a vector has {self.channels}")
        return fields[0], b" ".join(fields[1:])

    def _parse(self, numbers: bytes) -> np.ndarray:
        try:
            vector = np.array([float(number) for number in numbers.split(b" ")], np.float64)
        except ValueError:
            raise self._broken(f"has no number where one should be: {_shown(numbers)}") from None
        return self._finite(vector)

    def _finite(self, vector: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            narrow = vector.astype(np.float32)
        if not np.isfinite(narrow).all():
            raise self._broken("has a number that is not finite in fp32")
        return narrow

    def _read_binary(self, wanted: Container[bytes]) -> Iterator[tuple[bytes, np.ndarray]]:
        size = 4 * self.channels
        while self._stated is None or self.count < self._stated:
            word = self._stream.word()
            if word is None:
                return
            self.count += 1
            content = self._stream.take(size)
            if len(content) < size:
                raise self._broken("ends inside its vector: the file is cut")
            if word in wanted:
                yield word, self._finite(np.frombuffer(content, "<f4"))
        if self._stream.take(BLOCK_BYTES).strip(BLANK):
            raise UserError(
                f"{self.file}: has more than the {self._stated:,} vectors of {self.channels} channels that its first "
                f"line says; {AGAIN}"
            )

    def _broken(self, what: str) -> UserError:
        place = f"vector {self.count}" if self.form == BINARY else f"line {self._stream.lines}"
        return UserError(f"{self.file}: {place} {what}; {AGAIN}")


@contextmanager
def open_vectors(file: str, say: Say = lambda line: None) -> Iterator[WordVectors]:
    """Raises `UserError` for a file that is missing, unreadable or none of these formats. `say`: for progress, every
    ten seconds."""
    how = compression.detect(file, compression.head_of(file))
    with compression.opened(file, how) as content:
        stream = _Stream(content, file, say)
        if stream.peek(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK:
            stream.take(len(BYTE_ORDER_MARK))
        head = stream.peek(HEAD_BYTES)
        header = HEADER.match(head)
        if header:
            count, channels = map(int, header.groups())
            stream.line(len(header[0]))
            form = "Word2Vec, text" if _is_text(head[len(header[0]) :], channels) else BINARY
            yield WordVectors(file, form, _positive(file, channels), stream, count)
            return
        while b"\n" not in head and not stream.is_whole(len(head)) and len(head) < LONGEST_FIRST_LINE:
            head = stream.peek(2 * len(head))
        first = head.partition(b"\n")[0].split()
        if len(first) < 2 or not _is_text(head[:HEAD_BYTES], len(first) - 1) or not _is_number(first[-1]):
            raise _no_vectors(file)
        yield WordVectors(file, "GloVe", _positive(file, _num_numbers(first)), stream, None)


def _num_numbers(fields: list[bytes]) -> int:
    """The numbers at the end of a line, its word apart."""
    count = 0
    while count < len(fields) - 1 and _is_number(fields[-1 - count]):
        count += 1
    return count


def _positive(file: str, channels: int) -> int:
    if not channels:
        raise UserError(f"{file}: its first line says vectors of 0 channels; {AGAIN}")
    return channels


def _no_vectors(file: str) -> UserError:
    return UserError(
        f"{file}: is no file of word vectors: its first line must be the numbers of words and channels (Word2Vec), or "
        "a word and its numbers (GloVe)"
    )


def _is_text(head: bytes, channels: int) -> bool:
    """Whether vectors are written as text: UTF-8 without control characters, or a first line of numbers."""
    line, end, _ = head.partition(b"\n")
    numbers, wanted = (line.split()[1:], channels) if end else (line.split()[1:-1], min(channels, 2))
    if len(numbers) >= wanted and all(map(_is_number, numbers[-wanted:])):
        return True
    try:
        head[: len(head) - 4].decode() if len(head) > 4 else head.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data" and not CONTROL.search(head)
    return not CONTROL.search(head)


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _shown(numbers: bytes) -> str:
    wrong = next(number for number in numbers.split(b" ") if not _is_number(number))
    return repr(wrong[:20].decode(errors="replace"))


@dataclass
class _Stream:
    """A file in blocks: lines, words that end with a space, and bytes. Counts lines and hashes what is read."""

    content: io.BufferedReader
    file: str
    say: Say
    lines: int = 0
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    _buffer: bytes = b""
    _place: int = 0
    _read: int = 0
    _ended: bool = False
    _said: float = field(default_factory=time.monotonic)

    def peek(self, size: int) -> bytes:
        self._fill(size)
        return self._buffer[self._place : self._place + size]

    def is_whole(self, size: int) -> bool:
        """Whether nothing follows the next `size` bytes."""
        self._fill(size + 1)
        return len(self._buffer) - self._place <= size

    def take(self, size: int) -> bytes:
        taken = self.peek(size)
        self._place += len(taken)
        return taken

    def line(self, longest: int) -> bytes:
        """The next line with its end, or `longest` bytes of it; empty at the end."""
        end = self._find(b"\n", longest)
        self.lines += 1
        return self.take(longest if end < 0 else end + 1)

    def word(self) -> bytes | None:
        """The next word, without the space after it, and without line ends before it; None at the end."""
        while self.peek(1) in (b"\n", b"\r"):
            self._place += 1
        end = self._find(b" ", MAX_WORD_BYTES)
        if end >= 0:
            return self.take(end + 1)[:-1]
        if self.peek(1):
            raise UserError(
                f"{self.file}: has no word where one should be: it is cut, or its first line says a wrong number of "
                f"channels; {AGAIN}"
            )
        return None

    def _find(self, mark: bytes, within: int) -> int:
        """Bytes before the next mark; -1: it is not within so many bytes."""
        found = self._buffer.find(mark, self._place, self._place + within)
        if found < 0 and len(self._buffer) - self._place < within and not self._ended:
            self._fill(within)
            found = self._buffer.find(mark, self._place, self._place + within)
        return found - self._place if found >= 0 else -1

    def _fill(self, size: int) -> None:
        """Have `size` bytes ahead, unless the file ends before."""
        missing = size - (len(self._buffer) - self._place)
        if missing <= 0 or self._ended:
            return
        blocks = [self._buffer[self._place :]]
        while missing > 0:
            block = self.content.read(BLOCK_BYTES)
            if not block:
                self._ended = True
                break
            self.digest.update(block)
            self._read += len(block)
            missing -= len(block)
            blocks.append(block)
        self._buffer, self._place = b"".join(blocks), 0
        if time.monotonic() - self._said > SHOWN_EVERY_SECONDS:
            self._said = time.monotonic()
            self.say(f"{self.file}: {self._read / 1e9:.1f} GB of vectors read")
