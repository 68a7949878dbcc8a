"""Lines of a file that another process appends to. Imports nothing of the project.

In: a path, which need not exist yet. Out: the complete lines since the last call. Guarantees: each byte is read once; a
line half-written is left for the next call; a file that was replaced or cut short is read again from its beginning.
Memory: `chunk_bytes`, or the longest line.
"""

import os
from collections.abc import Iterator
from pathlib import Path

CHUNK_BYTES = 1 << 18  # lines stay in a core's cache while they are read


class GrowingFile:
    """`lines` gives what is new. `was_replaced`: whether the last call began anew; the caller forgets what it has."""

    def __init__(self, path: Path, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._path, self._chunk_bytes = path, chunk_bytes
        self._offset = 0
        self._identity = (0, 0)  # device and inode
        self.was_replaced = False

    def has_more(self) -> bool:
        """Whether a call of `lines` reads anything. Sets `was_replaced`. A file that is gone counts as replaced."""
        try:
            found = os.stat(self._path)
        except OSError:
            identity, size = (0, 0), 0
        else:
            identity, size = (found.st_dev, found.st_ino), found.st_size
        self.was_replaced = self._offset > 0 and (identity != self._identity or size < self._offset)
        self._identity = identity
        if self.was_replaced:
            self._offset = 0
        return size > self._offset

    def lines(self) -> Iterator[bytes]:
        """The lines since the last call, without their ends; call `has_more` before. Nothing where reading fails."""
        for block in self.blocks():
            yield from block.split(b"\n")[:-1]

    def blocks(self) -> Iterator[bytes]:
        """The same lines with their ends, many at once."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                rest = b""
                while chunk := file.read(self._chunk_bytes):
                    text = rest + chunk
                    end = text.rfind(b"\n") + 1
                    rest = text[end:]
                    self._offset += end
                    if end:
                        yield text[:end]
        except OSError:
            return
