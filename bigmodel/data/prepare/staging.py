"""Staging: `<directory>.partial`, in which prepared data is made before it appears whole as `<directory>`.

Each combination of text, settings and versions has a folder of its own inside, named by 16 hexadecimal digits.

Guarantees: one process at a time works there; files of others are never deleted.
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
    """Lock the folder `partial` against other processes; the lock ends with this process, also by kill -9. The lock is
    a file beside the folder, because some network file systems lock only files open for writing."""
    path = partial.with_name(partial.name + ".lock")
    busy = "another process is preparing this data now; wait for it or stop it"
    with writable(partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115 - closed below
    with file:
        lock(file, str(partial), busy)
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise UserError(f"{partial}: {busy}")  # another run removed it between open and lock
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM acts as Ctrl-C. Only the main thread can set signals: in others this does nothing."""
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
    """Errors of writing the folder, except a full disk, become a `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise UserError(f"{partial}: cannot be written: {error.strerror}; choose another data.directory") from None


def foreign(partial: Path) -> list[str]:
    """Names in the folder that no preparation made."""
    entries = sorted(partial.iterdir()) if partial.is_dir() else [partial]
    return [entry.name for entry in entries if not (OURS.fullmatch(entry.name) and entry.is_dir())]


def folders_in(partial: Path) -> list[Path]:
    """Make the folder and list its contents. Raises `UserError` if it has files or folders of others."""
    with writable(partial):
        partial.mkdir(exist_ok=True)
    if names := foreign(partial):
        raise UserError(
            f"{partial}: holds files that no preparation made ({', '.join(names[:5])}); move them away, or choose "
            "another data.directory"
        )
    return sorted(partial.iterdir())


def put_in_place(made: Path, target: Path) -> None:
    """Sync every file and folder in `made` to disk, so that it survives a power cut, then rename it to `target`."""
    for folder, _, names in os.walk(made):
        for path in [*(Path(folder) / name for name in names), Path(folder)]:
            fsync_directory(path)  # opens read-only and syncs: works for files too
    os.rename(made, target)
    fsync_directory(target.parent)
