"""SIGTERM, SIGUSR1 (sent by SLURM before a time limit) and SIGINT: finish the step, save, say how to resume.

A Python handler runs only between two bytecodes of the main thread, so never while that thread waits in a collective
for a hanging rank. Therefore C's signal handler wakes a thread through a pipe. The thread ends the process if the step
or the save takes too long, and at once on a second signal.

SIGSEGV, SIGBUS, SIGABRT, SIGFPE and SIGILL: the stacks of Python and C go to standard error, the rank's log; during the
imports before (`bigmodel/__main__.py`) only those of Python.
"""

import faulthandler
import os
import select
import signal
import sys
import threading
from types import FrameType

import torch

from bigmodel.run_directory import EXIT_FAILED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
GRACE_SECONDS = 120.0  # limit from the signal to the beginning of the save; a step is far shorter
SAVE_SECONDS = 900.0  # limit for the save after that


def show_stacks_of_crashes() -> None:
    """Print the stacks when this process crashes: Python's of all threads, then C's.

    faulthandler's handler is the last one set, so the first to run: it needs no memory, and a crash inside of malloc
    can make torch's wait for ever. Then the watch for hanging ranks ends the process.
    """
    faulthandler.disable()
    torch._C._set_print_stack_traces_on_fatal_signal(True)
    faulthandler.enable(2)


class StopFlag:
    """`requested` becomes true at the first signal. Make one in the main thread, when all ranks have met."""

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
        """Call this at the end of the step: the longer limit of the save begins; a second signal still ends it."""
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
            f"bigmodel: {reason}: exiting; the next start resumes from the last checkpoint", file=sys.stderr, flush=True
        )
        os._exit(EXIT_FAILED)


def _wait_for_signal(woken: int, seconds: float | None) -> bool:
    """Whether one of SIGNALS came in time; C's handler writes the number of each signal into the pipe."""
    while select.select([woken], [], [], seconds)[0]:
        if any(number in SIGNALS for number in os.read(woken, 64)):
            return True
    return False
