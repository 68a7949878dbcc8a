"""SIGTERM and SIGINT: finish the step, save, say how to go on.

The handler sets a flag that all ranks compare at the end of each step. It also starts a clock: where no step
ends in time (a rank is stuck in a collective), the process leaves by itself instead of waiting to be killed.
A second signal leaves at once.
"""

import os
import signal
import sys
import threading
from types import FrameType

from bigmodel.rundir import EXIT_FAILED

GRACE_SECONDS = 120.0  # from the signal to the end of the save; SLURM's and launchers' own limits are of this size


class StopFlag:
    """`requested` turns true at the first signal. Make one in the main thread, before the first step."""

    def __init__(self, grace_seconds: float = GRACE_SECONDS) -> None:
        self.requested = False
        self._grace_seconds = grace_seconds
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self._leave(f"second {signal.Signals(number).name}: leaving without saving")
        self.requested = True
        clock = threading.Timer(self._grace_seconds, self._leave, [f"no step ended within {self._grace_seconds:.0f} s"])
        clock.daemon = True
        clock.start()

    def _leave(self, reason: str) -> None:
        print(f"bigmodel: {reason}; the next start resumes from the last checkpoint", file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)
