"""A rank's record for the exporter of its node: a small file in shared memory.

In: plain values. Out: the same values, for any process of the node. Guarantees: a reader gets a complete record or none
(length and checksum come first), also if the rank was killed while writing; nothing remains on a disk. Cost: two system
calls and the JSON, about 30 microseconds. Imports neither torch nor prometheus_client.

    /dev/shm/bigmodel-UID-RUN-NODE-START/rank-N     RUN: a hash of the run directory; START: random, new at each start
"""

import glob
import hashlib
import json
import os
import shutil
import struct
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

HEADER = struct.Struct("<II")  # length and CRC-32 of the JSON that follows
TICKS = os.sysconf("SC_CLK_TCK")
_began: list[float] = []  # when a standby became a rank


def folder_of(run_directory: Path, node: int, start: str) -> Path:
    """The node's folder of one start of a run; made if it does not exist, readable only by this user."""
    folder = Path(_prefix(run_directory, node) + start)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def remove_stale(run_directory: Path, node: int, keep: Path) -> None:
    """Delete the folders of earlier starts of this run on this node, left when all processes were killed."""
    for folder in folders_of(run_directory, node):
        if folder != keep:
            shutil.rmtree(folder, ignore_errors=True)


def folders_of(run_directory: Path, node: int) -> list[Path]:
    """The existing folders of all starts of a run on this node."""
    return [Path(name) for name in glob.glob(glob.escape(_prefix(run_directory, node)) + "*")]


def _prefix(run_directory: Path, node: int) -> str:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
    run = hashlib.sha256(str(Path(run_directory).resolve()).encode()).hexdigest()[:12]
    return f"{memory}/bigmodel-{os.getuid()}-{run}-{node}-"


class RankRecord:
    """The record of this process. `write` replaces it."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._descriptor = os.open(folder / f"rank-{rank}", os.O_WRONLY | os.O_CREAT, 0o600)
        self._who = {"rank": rank, "pid": os.getpid(), "began": start_ticks(os.getpid())}

    def write(self, values: dict[str, Any]) -> None:
        text = json.dumps({**self._who, **values}).encode()
        os.pwrite(self._descriptor, HEADER.pack(len(text), zlib.crc32(text)) + text, 0)

    def close(self) -> None:
        os.close(self._descriptor)


def read_record(path: Path) -> dict[str, Any] | None:
    """The record; None if there is none or it is being written."""
    try:
        data = Path(path).read_bytes()
    except OSError:
        return None
    if len(data) < HEADER.size:
        return None
    length, checksum = HEADER.unpack_from(data)
    text = data[HEADER.size : HEADER.size + length]
    return json.loads(text) if len(text) == length and zlib.crc32(text) == checksum else None


def start_ticks(pid: int) -> int | None:
    """Start time of a process, in clock ticks since boot; None if it has ended or is a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def is_alive(record: dict[str, Any]) -> bool:
    """Whether the process that wrote the record still lives; a process that reuses its id has another start time."""
    return start_ticks(record["pid"]) == record["began"]


def begin_now() -> None:
    """A standby becomes a rank: its time of waiting is no time of the run."""
    _began.append(time.time())


def process_start_time() -> float:
    """Unix time of this process's start as a rank, exact to a hundredth of a second."""
    if _began:
        return _began[-1]
    ticks = start_ticks(os.getpid())
    assert ticks is not None, "this process has no start time"
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / TICKS)
