"""Temporary folders that are gone at the end of a command, however it ends short of kill -9."""

import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def undisturbed() -> Iterator[None]:
    """ENDING takes effect at the end of this block. For the start of a process: its number must reach the one who ends
    it."""
    came: list[int] = []
    heeded = [one for one in ENDING if signal.getsignal(one) != signal.SIG_IGN]
    before = {one: signal.signal(one, lambda number, frame: came.append(number)) for one in heeded}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        for number in came[:1]:
            signal.raise_signal(number)


@contextmanager
def scratch_folder(prefix: str = "bigmodel-", parent: Path | None = None) -> Iterator[Path]:
    """A new folder (in `parent`, or where temporary files go), deleted at the end.

    Python dies of SIGTERM and SIGHUP without leaving its `with` blocks. Inside of this one the first of ENDING raises
    SystemExit with the shell's code, 128 + signal; later ones cannot disturb the cleaning. For the main thread only.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        for one in before:
            signal.signal(one, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {one: signal.getsignal(one) for one in ENDING if signal.getsignal(one) != signal.SIG_IGN}
    try:
        for one in before:
            signal.signal(one, leave)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as name:
            yield Path(name)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
