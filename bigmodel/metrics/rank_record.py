"""What a rank leaves for the exporter of its node: one small record in memory shared by the node's processes.

Takes plain values, gives them to any reader. Guarantees: a reader sees a record whole or not at all (length and
checksum before it), also of a rank that was killed while it wrote; nothing is left on a disk. Costs two system calls
and the JSON, about 30 microseconds. Imports neither torch nor prometheus_client.

    /dev/shm/bigmodel-UID-RUN-NODE-START/rank-N     RUN: a hash of the run directory; START: a new word at each start
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


def folder_of(run_directory: Path, node: int, start: str) -> Path:
    """The node's folder of one start of a run, made if need be; nobody else may read it."""
    folder = Path(_prefix(run_directory, node) + start)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def remove_stale(run_directory: Path, node: int, keep: Path) -> None:
    """Delete what earlier starts of this run left on this node when all of their processes were killed."""
    for folder in folders_of(run_directory, node):
        if folder != keep:
            shutil.rmtree(folder, ignore_errors=True)


def folders_of(run_directory: Path, node: int) -> list[Path]:
    """Of all starts of a run on this node that left one."""
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
    """The record, or None where there is none or it is being written right now."""
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
    """When a process began, in clock ticks since the machine's start; None if it has ended, also as a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def is_alive(record: dict[str, Any]) -> bool:
    """Whether the very process that wrote the record still lives: numbers are used again, beginnings are not."""
    return start_ticks(record["pid"]) == record["began"]


def process_start_time() -> float:
    """Unix time at which this process began, to a hundredth of a second."""
    ticks = start_ticks(os.getpid())
    assert ticks is not None, "this process lives"
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / TICKS)
