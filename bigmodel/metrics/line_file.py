"""metrics.jsonl on a disk that may be full: a line that cannot be written waits, and training goes on.

In: lines. Out: the same lines in the file, in order, none torn. A line that meets a full or read-only disk, or too many
open files, is counted and kept in memory until it can be written; this is told once, and once when it works again.
Beyond `MAX_WAITING` the oldest lines of steps are lost, which is told too. A file whose folder is gone is an error that
ends the run (`append_json_line`).
Cost of a line: as before; with lines that wait, one more try per line.
"""

import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from bigmodel.run_directory import append_json_line, record_event
from bigmodel.system_errors import remedy_for

MAX_WAITING = 20_000  # lines, 20 MB: at a second per step more than five hours


class LineFile:
    """Append lines with `add`; `close` tells what could not be written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: deque[dict[str, Any]] = deque()
        self._since = 0.0
        self.num_delayed = self._num_lost = 0  # lines that could not be written when they came; lost for ever

    def add(self, line: dict[str, Any]) -> None:
        self._waiting.append(line)
        try:
            self._write()
        except OSError as error:
            if len(self._waiting) == 1:
                self._since = time.time()
                remedy = remedy_for(error) or "repair its disk"
                self._tell(f"{error.strerror}; {remedy}; training goes on, and the lines wait in memory")
            self.num_delayed += 1
            if len(self._waiting) > MAX_WAITING:
                self._waiting.popleft()
                self._num_lost += 1

    def close(self) -> None:
        try:
            self._write()
        except OSError as error:
            self._tell(f"{error.strerror}; lines lost at its end: {len(self._waiting) + self._num_lost}")
        self._waiting.clear()

    def _write(self) -> None:
        """Write all lines that wait. Raises `OSError`."""
        while self._waiting:
            append_json_line(self._path, self._waiting[0])
            self._waiting.popleft()
        if self._since:
            self._say_that_it_works()

    def _say_that_it_works(self) -> None:
        seconds, lost, self._since, self._num_lost = time.time() - self._since, self._num_lost, 0.0, 0
        told = f"; lines lost: {lost}"
        print(f"bigmodel: {self._path} is written again after {seconds:.0f} s{told}", file=sys.stderr, flush=True)
        record_event(self._path.parent, "metrics_delayed", lines=self.num_delayed, lost=lost, seconds=round(seconds, 1))

    def _tell(self, text: str) -> None:
        print(f"bigmodel: {self._path} cannot be written: {text}", file=sys.stderr, flush=True)
