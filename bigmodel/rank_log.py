"""Logs of ranks: every rank's output goes to a file in the run directory; rank 0's is also shown in the terminal.

In: the path of a log. Out: two descriptors for a rank's standard output and error. A launcher opens them for the ranks
that it starts (`open_outputs`); a trainer started by something else opens its own (`keep_log`). Output of C libraries
(NCCL) is logged, too.

Output that is also shown goes through a tee process: this file run as a program. It shows every byte at once and logs
finished lines as plain text: without colours, and only the last state of a line that overwrites itself (a progress
bar). Guarantees: a tee ends after the last process that writes to it, however that ended: a kill -9 loses no output and
leaves no tee. It ignores stop signals, which SLURM sends to every process of a step. Costs one sleeping process of
10 MB. Imports nothing of the project.
"""

import atexit
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

END_SECONDS = 5.0  # longest wait for a tee after its rank ended: a child of the rank may still hold the pipe
ARRANGED = {"BIGMODEL_OUTPUT_LOGGED": "1"}  # in a rank's environment: a launcher logs its output
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
CONTROL = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")  # ECMA-48: colours, cursor movements


def open_outputs(log: Path, shown: bool) -> tuple[int, int, list["subprocess.Popen[bytes]"]]:
    """Descriptors for a rank's standard output and error, to be closed by the caller, and their tee processes.

    shown: also write to the output and error of this process. Raises `OSError` if the log cannot be written.
    """
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    if not shown:
        return file, os.dup(file), []
    os.close(file)
    output, tee = _start_tee(1, log)
    if os.path.sameopenfile(1, 2):  # one tee keeps the order
        return output, os.dup(output), [tee]
    errors, other = _start_tee(2, log)
    return output, errors, [tee, other]


def keep_log(log: Path) -> None:
    """Log and show all later output of this process, unless a launcher logs it already (ARRANGED).

    Raises `OSError` if the log cannot be written.
    """
    if ARRANGED.items() <= os.environ.items():
        return
    shown = terminal_variables(os.environ)
    if os.isatty(0):
        shown.pop("COLUMNS", None)  # rich asks the terminal itself, also after a resize
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(stream) for stream in (1, 2)]
    output, errors, tees = open_outputs(log, shown=True)
    os.environ.update(shown)
    redirect([output, errors])
    atexit.register(_show_the_rest, before, tees)


def _show_the_rest(before: list[int], tees: list["subprocess.Popen[bytes]"]) -> None:
    """At exit, after a traceback: stop writing to the tees, so that they end, and wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    redirect(before)
    wait_for(tees)


def redirect(descriptors: Sequence[int]) -> None:
    """Make the descriptors this process's standard output and error, and close them."""
    for stream, descriptor in zip((1, 2), descriptors, strict=True):
        os.dup2(descriptor, stream)
        os.close(descriptor)


def wait_for(tees: list["subprocess.Popen[bytes]"]) -> None:
    """Wait until everything is shown, at most END_SECONDS per tee."""
    for tee in tees:
        with suppress(subprocess.TimeoutExpired):
            tee.wait(END_SECONDS)


def terminal_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that make rank 0 draw its progress bar through a tee; empty if standard output is no terminal."""
    if not os.isatty(1) or environment.get("TERM", "dumb") in ("dumb", "unknown"):
        return {}
    return {"FORCE_COLOR": "1", "COLUMNS": str(os.get_terminal_size(1).columns or 80)}


def plain(line: bytes) -> bytes:
    """The final state of a line, as plain text.

    >>> plain(b"\\r\\x1b[2Kstep 1\\r\\x1b[2Kstep 2\\x1b[0m\\r")
    b'step 2'
    """
    return CONTROL.sub(b"", line.rstrip(b"\r").rpartition(b"\r")[2])


def copy(log: Path) -> None:
    """Copy standard input to standard output and a log. If one of them fails, the other continues."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    left = b""
    with open(log, "ab", buffering=0) as file:
        while data := os.read(0, 65536):
            with suppress(OSError):
                os.write(1, data)
            *lines, left = (left + data).split(b"\n")
            left = left[left.rfind(b"\r", 0, -1) + 1 :]  # the last byte may be half of \r\n
            with suppress(OSError):
                file.write(b"".join(plain(line) + b"\n" for line in lines))
        if left:
            file.write(plain(left) + b"\n")


def _start_tee(stream: int, log: Path) -> tuple[int, "subprocess.Popen[bytes]"]:
    """A tee process to our output (1) or error (2), and the descriptor of its input."""
    theirs, ours = os.pipe()
    command = [sys.executable, "-IS", __file__, str(log)]
    process = subprocess.Popen(command, stdin=theirs, stdout=stream, start_new_session=True)
    os.close(theirs)
    return ours, process


if __name__ == "__main__":
    copy(Path(sys.argv[1]))
