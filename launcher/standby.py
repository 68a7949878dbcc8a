"""Processes of ranks: a new one, or a standby, which has done its imports and becomes the rank at a restart.

In: command and environment of a rank. Out: its process. A standby is `bigmodel train ... --standby FD`, made a minute
after its rank's start; it waits at a socket for the new port and for the descriptors of its output
(bigmodel/training/standby.py). It is used only if nothing else has changed: command, environment, sources. Saves about
7 seconds of processor time per rank and restart, most of it imports of torch; costs 0.35 GB of memory per rank.
The kernel kills it with the launcher.
"""

import ctypes
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import bigmodel
from bigmodel.run_directory import EXIT_FAILED

AFTER_SECONDS = 60.0  # after the start of the ranks, whose own imports and compilers need the processors first
MAY_DIFFER = {"MASTER_PORT"}  # of a rank's variables, from one start to the next on the same machine
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Program:
    """What a rank is started with; processors: those that it is bound to, if any."""

    command: Sequence[str]
    environment: Mapping[str, str]
    processors: frozenset[int]


@dataclass
class _Standby:
    program: Program
    process: subprocess.Popen[bytes]
    orders: socket.socket
    sources: float


class Standbys:
    """Starts ranks, and keeps a standby for each of them. `close` ends those that wait."""

    def __init__(self) -> None:
        self._programs: dict[int, Program] = {}
        self._waiting: dict[int, _Standby] = {}
        self._began = 0.0

    def start(self, number: int, program: Program, output: int, errors: int) -> "subprocess.Popen[bytes]":
        """The process of a rank: its standby if there is one that fits, else a new one."""
        again = [word for word in program.command if word != "--fresh"]  # checkpoints are moved aside once
        self._programs[number], self._began = Program(again, program.environment, program.processors), time.monotonic()
        standby = self._waiting.pop(number, None)
        if standby and _becomes(standby, program, output, errors):
            return standby.process
        if standby:
            _end(standby)
        return spawn(program, output, errors)

    def prepare(self) -> None:
        """Make the standbys that are missing, once the time for it has come; call it again and again."""
        if time.monotonic() < self._began + AFTER_SECONDS:
            return
        try:
            for number in self._programs.keys() - self._waiting.keys():
                self._waiting[number] = _stand_by(self._programs[number])
        except OSError:  # no memory or descriptors for them: the ranks need them more
            self._began = math.inf

    def close(self) -> None:
        while self._waiting:
            _end(self._waiting.popitem()[1])


def spawn(program: Program, output: int, errors: int, descriptors: Sequence[int] = ()) -> "subprocess.Popen[bytes]":
    """A new process with its own process group; it inherits the descriptors, and dies with the launcher."""
    return subprocess.Popen(
        list(program.command),
        env=dict(program.environment),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        start_new_session=True,  # Ctrl-C in the terminal reaches only the launcher, which forwards it once
        preexec_fn=_before_program(os.getpid(), program.processors),
        pass_fds=descriptors,
    )


def _stand_by(program: Program) -> _Standby:
    ours, theirs = socket.socketpair()
    with theirs:
        words = [*program.command, "--standby", str(theirs.fileno())]
        waits = Program(words, program.environment, program.processors)
        process = spawn(waits, subprocess.DEVNULL, subprocess.DEVNULL, [theirs.fileno()])
    return _Standby(program, process, ours, _sources())


def _becomes(standby: _Standby, program: Program, output: int, errors: int) -> bool:
    """Order a standby to become the rank. False if it does not fit, or has died."""
    then, now = standby.program, program
    differing = {name for name, _ in set(then.environment.items()) ^ set(now.environment.items())}
    same = list(then.command) == list(now.command) and then.processors == now.processors and differing <= MAY_DIFFER
    if not same or standby.sources != _sources() or standby.process.poll() is not None:
        return False
    order = json.dumps({name: now.environment[name] for name in differing}).encode()
    try:
        with standby.orders as orders:
            socket.send_fds(orders, [order], [output, errors])
    except OSError:
        return False
    return True


def _end(standby: _Standby) -> None:
    standby.orders.close()
    standby.process.kill()
    standby.process.wait()


def _sources() -> float:
    """When the newest source file of the project was changed: a restart runs what is there then."""
    package = Path(bigmodel.__file__).parent
    try:
        return max(file.stat().st_mtime for room in (package, package / "kernels") for file in room.glob("**/*.py"))
    except OSError:  # one has just gone
        return time.time()


def _before_program(launcher: int, processors: frozenset[int]) -> Callable[[], None] | None:
    """A function for the child to run before the program: Linux will kill the child when the launcher dies, and run its
    threads on these processors.

    SIGKILL, not SIGTERM: a rank that waits for a dead peer would never act on SIGTERM. The run then loses the steps
    since its last checkpoint, as with any kill -9.
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # loaded before the fork: the child must not take locks

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:  # the launcher died between the fork and the line above
            os._exit(EXIT_FAILED)
        if processors:
            os.sched_setaffinity(0, processors)

    return ask
