"""pip with one line of progress: `python tools/install.py LOG PIP_ARGUMENTS...`; called by the Makefile's set-up.

The output of pip goes to the log. On a terminal one line shows pip's current action and its time; elsewhere a line
appears every 20 s. If pip fails, the end of the log is shown and the exit code is pip's. Standard library only.
"""

import re
import shutil
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import IO

TERMINAL_SECONDS, PLAIN_SECONDS = 0.5, 20.0  # between two lines of progress
SHOWN_LINES = 25
STEP = re.compile(r"\s*((?:Collecting|Downloading|Building|Preparing|Installing) \S+(?: \([\d.]+ \wB\))?)")
SHARE = re.compile(r"PipOutput (\d+) of (\d+)$")  # of a download, in bytes: --progress-bar raw


class PipOutput:
    """The current action of pip, read from its output by a thread."""

    def __init__(self, output: IO[bytes], log: IO[bytes]) -> None:
        self.doing, self.share = "starting", ""
        self._output, self._log = output, log
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        for line in self._output:
            text = line.decode(errors="replace").rstrip()
            if share := SHARE.match(text):
                self.share = f", {100 * int(share[1]) // max(1, int(share[2]))}%"
                continue
            self._log.write(line)
            self._log.flush()
            if step := STEP.match(text):
                self.doing = "Installing" if step[1] == "Installing collected" else step[1]
                self.share = ""


def main() -> int:
    log, arguments = Path(sys.argv[1]), sys.argv[2:]
    if tuple(map(int, version("pip").split(".")[:2])) >= (24, 1):
        arguments = ["--progress-bar", "raw", *arguments]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *arguments]
    with open(log, "ab") as file:
        file.write(f"\n$ {' '.join(command)}\n".encode())
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout is not None
        try:
            show(PipOutput(process.stdout, file))
            code = process.wait()
        except KeyboardInterrupt:  # pip gets the signal too
            process.wait()
            print("\nset-up: stopped; the same command goes on", file=sys.stderr)
            return 130
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]
        print("\n".join(f"  | {line}" for line in lines), file=sys.stderr)
        print(f"set-up: pip failed; {log} has its whole output; the same command goes on", file=sys.stderr)
    return code


def show(progress: PipOutput) -> None:
    """Show pip's current action until it ends: in place on a terminal, else as a new line every 20 s."""
    terminal, started = sys.stderr.isatty(), time.monotonic()
    while True:
        progress.thread.join(TERMINAL_SECONDS if terminal else PLAIN_SECONDS)
        line = f"      {time.monotonic() - started:.0f} s"
        if progress.thread.is_alive():
            line += f": {progress.doing}{progress.share}"
        width = shutil.get_terminal_size().columns - 1
        print(
            f"\r\033[K{line[:width]}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True
        )
        if not progress.thread.is_alive():
            break
    if terminal:
        print(file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
