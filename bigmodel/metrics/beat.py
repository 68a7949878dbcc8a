"""The beat of a rank: where it is and how far, in 32 bytes of shared memory that the exporter of its node reads.

In: the phase at each change, the step at each end of one. Out: a `Pulse`. A beat that stands still is the first sign of
a hanging rank (bigmodel/metrics/hang_watch.py). Cost: 0.3 microseconds per change of phase, no system call.

    /dev/shm/bigmodel-UID-RUN-NODE-START/beat-N     four doubles: changes, phase, step, seconds of the last step
"""

import mmap
import os
import struct
import time
from pathlib import Path
from typing import NamedTuple

PHASES = (
    "", "data", "forward", "backward", "communication", "optimizer", "evaluation", "checkpoint", "exchange",
)  # fmt: skip
FIELDS = struct.Struct("4d")
FIRST_STEPS = 2
NUMBERS = {name: float(number) for number, name in enumerate(PHASES)}


class Pulse(NamedTuple):
    """The state of a beat. phase: "" between two phases. step: steps done in this start and before; step_seconds: from
    the end before the last to the last, 0 in the first steps of a start, which compile and allocate."""

    changes: float
    phase: str
    step: int
    step_seconds: float


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
        self._ended, self._num_steps = 0.0, 0

    def enter(self, phase: str) -> None:
        self._memory[1] = NUMBERS.get(phase, 0.0)
        self._memory[0] += 1.0

    def step_done(self, step: int) -> None:
        before, self._ended = self._ended, time.monotonic()
        self._num_steps += 1
        if self._num_steps > FIRST_STEPS:
            self._memory[3] = self._ended - before
        self._memory[2] = step
        self._memory[0] += 1.0


def read_beat(folder: Path, rank: int) -> Pulse | None:
    """The state of a rank's beat; None if it has none."""
    try:
        changes, phase, step, seconds = FIELDS.unpack(_file(folder, rank).read_bytes())
    except (OSError, struct.error):
        return None
    return Pulse(changes, PHASES[int(phase)], int(step), seconds)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"beat-{rank}"
