"""A rank's log: what a rank prints stands in the run directory, and rank 0 is also seen where the run was started.

Takes a log's path, gives the two descriptors that a rank writes its standard output and error to: a launcher opens them
for a rank that it starts (`open_outputs`), and a trainer that nobody opened them for opens its own (`keep_log`). Output
of C libraries (NCCL's) is logged like Python's. What is also shown leads to a tee, this file run as a program, which
shows every byte at once and logs finished lines as plain text: no colours, and of a line that overwrote itself (a
progress bar) the last state only. A tee ends when the last process that writes to it has ended, however that
happened, so nothing is lost by kill -9 and none is left over. It ignores the signals that ask a run to stop, which
SLURM sends to every process of a step. Costs one sleeping process of 10 MB. Imports nothing of the project.
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

END_SECONDS = 5.0  # for a tee to end after its rank: a child of the rank's may still hold the other end
ARRANGED = {"BIGMODEL_OUTPUT_LOGGED": "1"}  # in a rank's environment: its starter has opened its outputs
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
CONTROL = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")  # ECMA-48: colours, cursor movements


def open_outputs(log: Path, shown: bool) -> tuple[int, int, list["subprocess.Popen[bytes]"]]:
    """Descriptors for a rank's standard output and error, which the caller closes, and the tees behind them.

    `shown`: to this process's own output and error as well. Raises `OSError` if the log cannot be written.
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
    """From here to its end, log what this process prints and go on showing it, unless its starter logs it (ARRANGED).

    Raises `OSError` if the log cannot be written.
    """
    if ARRANGED.items() <= os.environ.items():
        return
    shown = terminal_variables(os.environ)
    if os.isatty(0):
        shown.pop("COLUMNS", None)  # rich asks the terminal itself, also after it was resized
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(stream) for stream in (1, 2)]
    output, errors, tees = open_outputs(log, shown=True)
    os.environ.update(shown)
    redirect([output, errors])
    atexit.register(_show_the_rest, before, tees)


def _show_the_rest(before: list[int], tees: list["subprocess.Popen[bytes]"]) -> None:
    """At the end of a process, after a traceback: its tees end when it no longer writes to them."""
    sys.stdout.flush()
    sys.stderr.flush()
    redirect(before)
    wait_for(tees)


def redirect(descriptors: Sequence[int]) -> None:
    """Make them this process's standard output and error, and close them."""
    for stream, descriptor in zip((1, 2), descriptors, strict=True):
        os.dup2(descriptor, stream)
        os.close(descriptor)


def wait_for(tees: list["subprocess.Popen[bytes]"]) -> None:
    """Wait until everything is shown, if the ranks' last descendants let it."""
    for tee in tees:
        with suppress(subprocess.TimeoutExpired):
            tee.wait(END_SECONDS)


def terminal_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What makes rank 0 draw its progress bar although it writes to a tee: nothing but where that is a terminal."""
    if not os.isatty(1) or environment.get("TERM", "dumb") in ("dumb", "unknown"):
        return {}
    return {"FORCE_COLOR": "1", "COLUMNS": str(os.get_terminal_size(1).columns or 80)}


def plain(line: bytes) -> bytes:
    """A line as it stands in the end.

    >>> plain(b"\\r\\x1b[2Kstep 1\\r\\x1b[2Kstep 2\\x1b[0m\\r")
    b'step 2'
    """
    return CONTROL.sub(b"", line.rstrip(b"\r").rpartition(b"\r")[2])


def copy(log: Path) -> None:
    """From standard input to standard output and a log. Goes on with one of them when the other fails."""
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
    """A tee to a stream of ours, and the descriptor that feeds it."""
    theirs, ours = os.pipe()
    command = [sys.executable, "-IS", __file__, str(log)]
    process = subprocess.Popen(command, stdin=theirs, stdout=stream, start_new_session=True)
    os.close(theirs)
    return ours, process


if __name__ == "__main__":
    copy(Path(sys.argv[1]))
