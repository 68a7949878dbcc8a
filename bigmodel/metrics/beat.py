"""The beat of a rank: where it is and how far, in 32 bytes of shared memory that the exporter of its node reads.

In: the phase at each change, the step at each end of one. Out: a `Pulse`. A beat that stands still is the first sign of
a hanging rank (bigmodel/metrics/hang_watch.py). Cost: 0.3 microseconds per change of phase, no system call.

    /dev/shm/bigmodel-UID-RUN-NODE-START/beat-N     four doubles: changes, phase, step, time of the step's end
"""

import mmap
import os
import struct
import time
from pathlib import Path
from typing import NamedTuple

PHASES = ("", "data", "forward", "backward", "communication", "optimizer", "evaluation", "checkpoint")
FIELDS = struct.Struct("4d")
NUMBERS = {name: float(number) for number, name in enumerate(PHASES)}


class Pulse(NamedTuple):
    """The state of a beat. phase: "" between two phases. step: steps done in this start and before; step_ended: when
    the last one ended, on the node's monotonic clock, 0 before the first."""

    changes: float
    phase: str
    step: int
    step_ended: float


class Beat:
    """The beat of this process."""

    def __init__(self, folder: Path, rank: int, step: int) -> None:
        """step: steps done before this start. Raises `OSError` if the memory is full: a later write cannot fail."""
        descriptor = os.open(_file(folder, rank), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, FIELDS.size)  # else a full memory is a SIGBUS at the first write
            self._memory = memoryview(mmap.mmap(descriptor, FIELDS.size)).cast("d")
        finally:
            os.close(descriptor)
        self._memory[2] = step

    def enter(self, phase: str) -> None:
        self._memory[1] = NUMBERS.get(phase, 0.0)
        self._memory[0] += 1.0

    def step_done(self, step: int) -> None:
        self._memory[3] = time.monotonic()
        self._memory[2] = step
        self._memory[0] += 1.0


def read_beat(folder: Path, rank: int) -> Pulse | None:
    """The state of a rank's beat; None if it has none."""
    try:
        changes, phase, step, ended = FIELDS.unpack(_file(folder, rank).read_bytes())
    except (OSError, struct.error):
        return None
    return Pulse(changes, PHASES[int(phase)], int(step), ended)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"beat-{rank}"
