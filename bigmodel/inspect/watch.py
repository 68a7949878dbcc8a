"""`bigmodel watch RUN ...`: a view of runs in the terminal, which goes on while they do.

In: run directories, which are only read. Out: a frame each second; with no terminal one frame, and the end. Keys: q,
arrows. Ctrl-C ends it, too. Guarantees: the terminal is as before, however it ends, kill -9 apart; Ctrl-Z works. Cost:
below 1% of a core after the first frame (benchmarks/README.md, "The view in the terminal").
"""

import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live

from bigmodel.inspect.watch_frame import frame
from bigmodel.inspect.watched_run import WatchedRun

SECONDS = 1.0  # between two frames
ALONE_HEIGHT = 40  # lines of the frame where there is no terminal
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP, signal.SIGWINCH)
KEYS = {"\x1b[A": -1, "\x1b[D": -1, "\x1bOA": -1, "\x1bOD": -1, "k": -1}
KEYS |= {"\x1b[B": 1, "\x1b[C": 1, "\x1bOB": 1, "\x1bOC": 1, "j": 1}  # arrows, as a terminal sends them in either mode


def watch(directories: Sequence[Path], status: Callable[[Path], Mapping[str, Any]]) -> None:
    """status: of the launcher, as plain values. Raises `UserError` for a directory that is not of a run."""
    runs = [WatchedRun(directory, status) for directory in directories]
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal or not sys.stdout.isatty():
        for run in runs:
            run.poll()
        for number, run in enumerate(runs):
            height = ALONE_HEIGHT + 3 * len(runs)
            for line in frame([run] if number else runs, 0, console.width, height, keys=False):
                console.print(line, no_wrap=True)
        return
    chosen, number = 0, signal.SIGTSTP
    while number == signal.SIGTSTP:
        with Terminal() as terminal, Live(console=console, screen=True, auto_refresh=False) as live:
            chosen, number = _show(runs, chosen, terminal, live)
        if number == signal.SIGTSTP:
            os.kill(os.getpid(), signal.SIGSTOP)  # until fg
    if number in (signal.SIGTERM, signal.SIGHUP):  # ends by it, now that the terminal is as before
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _show(runs: Sequence[WatchedRun], chosen: int, terminal: "Terminal", live: Live) -> tuple[int, int]:
    """Show frames until a key or a signal ends it. Returns the chosen run, and the signal; 0: the key q."""
    while True:
        for run in runs:
            run.poll()
        live.update(Group(*frame(runs, chosen, *live.console.size, keys=True)), refresh=True)
        keys, numbers = terminal.wait(SECONDS)
        for number in numbers:
            if number != signal.SIGWINCH:
                return chosen, number
        for key in keys:
            if key in ("q", "Q", ""):
                return chosen, 0
            chosen = (chosen + KEYS.get(key, 0)) % len(runs)


class Terminal:
    """Keys one by one and without echo, and signals beside them, until the end of the block."""

    def __init__(self) -> None:
        self._keyboard = sys.stdin.fileno() if sys.stdin and sys.stdin.isatty() else None

    def __enter__(self) -> "Terminal":
        self._reads, self._writes = os.pipe()
        os.set_blocking(self._reads, False)
        os.set_blocking(self._writes, False)
        self._wakes = signal.set_wakeup_fd(self._writes, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        if self._keyboard is not None:
            self._mode = termios.tcgetattr(self._keyboard)
            tty.setcbreak(self._keyboard)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._keyboard is not None:
            with suppress(termios.error):  # the terminal is gone
                termios.tcsetattr(self._keyboard, termios.TCSADRAIN, self._mode)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakes)
        os.close(self._reads)
        os.close(self._writes)

    def wait(self, seconds: float) -> tuple[list[str], list[int]]:
        """Keys ("": no more come) and signals, after `seconds` or as soon as there are any."""
        sources = [self._reads] if self._keyboard is None else [self._reads, self._keyboard]
        ready, _, _ = select.select(sources, [], [], seconds)
        numbers = list(os.read(self._reads, 1024)) if self._reads in ready else []
        keys: list[str] = []
        if self._keyboard in ready:
            assert self._keyboard is not None, "no keyboard is ready that was not asked"
            try:
                keys = split_keys(os.read(self._keyboard, 1024).decode(errors="replace"))
            except OSError:  # the terminal is gone
                keys = [""]
        return keys, numbers


def split_keys(text: str) -> list[str]:
    r"""What was typed, key by key; [""] for the end of input.

    >>> split_keys("q\x1b[Aj")
    ['q', '\x1b[A', 'j']
    """
    keys: list[str] = []
    while text:
        length = 3 if text[:2] in ("\x1b[", "\x1bO") else 1
        keys.append(text[:length])
        text = text[length:]
    return keys or [""]
