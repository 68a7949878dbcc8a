"""SIGTERM, SIGUSR1 (which SLURM sends ahead of a time limit) and SIGINT: finish the step, save, say how to go on.

A Python handler runs only between two lines of Python, so never while the main thread waits in a collective for a
rank that hangs. A thread is therefore woken by the C handler itself: it gives the run a bounded time to end its step
and begin to save, and leaves at once on a second signal.
"""

import os
import select
import signal
import sys
import threading
from types import FrameType

from bigmodel.run_directory import EXIT_FAILED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GRACE_SECONDS = 120.0  # from the signal to the begin of the save; a step is far shorter
SAVE_SECONDS = 900.0  # for the save after that, at most


class StopFlag:
    """`requested` turns true at the first signal. Make one in the main thread, before the first step."""

    def __init__(self, grace_seconds: float = GRACE_SECONDS, save_seconds: float = SAVE_SECONDS) -> None:
        self.requested = False
        self._saving = threading.Event()
        woken, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, args=(woken, grace_seconds, save_seconds), daemon=True).start()

    def save_begins(self) -> None:
        """The step has ended: from here on the save has its own, longer time; a second signal ends it at once."""
        self._saving.set()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def _watch(self, woken: int, grace_seconds: float, save_seconds: float) -> None:
        _wait_for_signal(woken, None)
        if not _wait_for_signal(woken, grace_seconds):
            if not self._saving.is_set():
                self._leave(f"no step ended within {grace_seconds:.0f} s of the signal")
            if not _wait_for_signal(woken, save_seconds):
                self._leave(f"the save took more than {save_seconds:.0f} s after the signal")
        self._leave("a second signal")

    def _leave(self, reason: str) -> None:
        print(
            f"bigmodel: {reason}: leaving; the next start resumes from the last checkpoint", file=sys.stderr, flush=True
        )
        os._exit(EXIT_FAILED)


def _wait_for_signal(woken: int, seconds: float | None) -> bool:
    """Whether one of SIGNALS came within the time; the C handler writes each signal's number into the pipe."""
    while select.select([woken], [], [], seconds)[0]:
        if any(number in SIGNALS for number in os.read(woken, 64)):
            return True
    return False
