"""Compression of whole files: recognized by the first bytes, read as one stream.

In: a file (local or in a store). Out: its content, decompressed.

Guarantees: all members, frames or streams of a file are read, in order. A file that is cut, damaged or followed by
other bytes raises `UserError` with its name and the reason, so it is never read as a shorter one. Zero bytes after a
member of gzip, bz2 or xz are padding, as gzip(1) has it.

Costs: one block of 1 MB, decompressed; a frame of zstd up to 128 MiB more, its window.
"""

import bz2
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyarrow

from bigmodel.config.settings import UserError
from bigmodel.data.store import files

BUFFER_BYTES = 1 << 20  # per read: a remote store answers each read separately
BLOCK_BYTES = 1 << 16  # compressed, decompressed in one go
HEAD_BYTES = 16  # of a file show its compression
# The two of bz2: its first block, or the end of an empty stream. zstd may begin with a frame to be skipped.
MAGIC = re.compile(
    rb"(?P<gzip>\x1f\x8b\x08)|(?P<bz2>BZh[1-9](?:1AY&SY|\x17rE8P\x90))|(?P<xz>\xfd7zXZ\0)"
    rb"|(?P<zstd>\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)|(?P<lz4>\x04\x22\x4d\x18)"
)
NOT_READ = {
    b"\xff\x06\0\0sNaPpY": "a snappy stream",
    b"\x02\x21\x4c\x18": "lz4's legacy format",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
}
WINDOW = "requires too much memory"  # in pyarrow's message
TRAILING = re.compile("Unknown frame descriptor|frameType_unknown")  # in pyarrow's messages


def detect(file: str, head: bytes) -> str:
    """Compression of a file by its first bytes; empty: none. Raises `UserError` for one that is not read."""
    for magic, what in NOT_READ.items():
        if head.startswith(magic):
            raise UserError(f"{file}: is {what}, which is not read here; recompress it, for example with zstd")
    found = MAGIC.match(head)
    return (found.lastgroup or "") if found else ""


def head_of(file: str) -> bytes:
    with files.readable(file), files.open_file(file) as stream:
        return stream.read(HEAD_BYTES)


@contextmanager
def opened(file: str, how: str = "") -> Iterator[io.BufferedReader]:
    """The file's content, decompressed; errors inside become a `UserError` with its name."""
    with files.readable(file), files.open_file(file) as stream:
        try:
            yield io.BufferedReader(READERS[how](stream) if how else stream, BUFFER_BYTES)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            if WINDOW in str(error):
                raise UserError(
                    f"{file}: its zstd window (`zstd --long`) is above 128 MiB, the most that pyarrow reads; "
                    "recompress it: zstd -d --long=31 < FILE | zstd > NEW"
                ) from None
            if how and TRAILING.search(str(error)):
                raise OSError(_trailing(how)) from None
            raise error if isinstance(error, (OSError, EOFError)) else OSError(str(error)) from None


def _trailing(how: str) -> str:
    return f"its {how} data are followed by bytes that are none"


class _Members(io.RawIOBase):
    """Compressed members end to end, with zero bytes after each as padding. Python's own readers of bz2 and xz take a
    damaged second member for the end of the file; pyarrow's of gzip refuses padding."""

    def __init__(self, how: str, start: Callable[[], Any], stream: pyarrow.NativeFile) -> None:
        """`start`: makes a decompressor with `decompress`, `eof` and `unused_data`."""
        self._how, self._start, self._stream = how, start, io.BufferedReader(stream, BUFFER_BYTES)
        self._decompressor: Any = None  # None: between members
        self._rest = b""  # read, not yet given to a decompressor
        self._ready = memoryview(b"")
        self._members = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._rest or self._stream.read(BLOCK_BYTES)
            if not block and self._decompressor:
                raise EOFError(f"its {self._how} data end too early")
            if not block:
                return 0
            self._decompress(block)
        number = min(len(buffer), len(self._ready))
        buffer[:number], self._ready = self._ready[:number], self._ready[number:]
        return number

    def _decompress(self, block: bytes) -> None:
        self._rest = b""
        begins = not self._decompressor
        if begins:
            block = block.lstrip(b"\0")
            if not block:
                return
            self._decompressor = self._start()
            self._members += 1
        try:
            self._ready = memoryview(self._decompressor.decompress(block))
        except (OSError, zlib.error, lzma.LZMAError):
            if begins and self._members > 1 and not MAGIC.match(block):
                raise OSError(_trailing(self._how)) from None
            raise
        if self._decompressor.eof:
            self._rest, self._decompressor = self._decompressor.unused_data, None


# By compression: from the stored stream to the content.
READERS: dict[str, Callable[[pyarrow.NativeFile], Any]] = {
    "gzip": partial(_Members, "gzip", partial(zlib.decompressobj, 16 + zlib.MAX_WBITS)),
    "bz2": partial(_Members, "bz2", bz2.BZ2Decompressor),
    "xz": partial(_Members, "xz", partial(lzma.LZMADecompressor, lzma.FORMAT_XZ)),
    "zstd": partial(pyarrow.CompressedInputStream, compression="zstd"),
    "lz4": partial(pyarrow.CompressedInputStream, compression="lz4"),
}
