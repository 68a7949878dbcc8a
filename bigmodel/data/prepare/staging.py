"""Partial: the folder in which prepared data is made before it appears whole, `<directory>.partial`.

Each way of making it has a folder of its own inside, named by 16 hexadecimal digits. Guarantees: one process at a time
works there, and what was put there by others is never deleted.
"""

import contextlib
import errno
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from bigmodel.config.settings import UserError
from bigmodel.run_directory import fsync_directory, lock

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OURS = re.compile("[0-9a-f]{16}")


def partial_of(directory: Path) -> Path:
    return directory.with_name(directory.name + ".partial")


@contextlib.contextmanager
def claimed(partial: Path) -> Iterator[None]:
    """Hold the folder `partial` against other processes; the lock ends with this one, kill -9 included. It is on a
    file beside the folder: some network file systems lock only what is open for writing."""
    path = partial.with_name(partial.name + ".lock")
    busy = "another process is preparing this data now; wait for it or stop it"
    with writable(partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115 - closed below
    with file:
        lock(file, str(partial), busy)
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise UserError(f"{partial}: {busy}")  # another run removed it between our open and our lock
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does. Signals belong to the main thread: elsewhere nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def writable(partial: Path) -> Iterator[None]:
    """What keeps the folder from being written, but for a full disk, becomes a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise UserError(f"{partial}: cannot be written: {error.strerror}; choose another data.directory") from None


def foreign(partial: Path) -> list[str]:
    """Names in the folder that are not ours."""
    entries = sorted(partial.iterdir()) if partial.is_dir() else [partial]
    return [entry.name for entry in entries if not (OURS.fullmatch(entry.name) and entry.is_dir())]


def folders_in(partial: Path) -> list[Path]:
    """Make the folder, and list what is in it. Raises `UserError` where something is that we did not put there."""
    with writable(partial):
        partial.mkdir(exist_ok=True)
    if names := foreign(partial):
        raise UserError(
            f"{partial}: holds what no preparation put there ({', '.join(names[:5])}); move it away, or choose another "
            "data.directory"
        )
    return sorted(partial.iterdir())


def put_in_place(made: Path, target: Path) -> None:
    """Rename, once every file and folder in `made` would survive a power cut."""
    for folder, _, names in os.walk(made):
        for path in [*(Path(folder) / name for name in names), Path(folder)]:
            fsync_directory(path)  # opens read-only and syncs: right for files as well
    os.rename(made, target)
    fsync_directory(target.parent)
