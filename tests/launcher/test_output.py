"""The tee between a rank and its log: everything is shown, the log is plain, and no signal of a stop ends it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bigmodel.launcher import output


@pytest.fixture
def tee(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, output.__file__, str(tmp_path / "log")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process


@pytest.mark.parametrize(
    ("pieces", "logged"),
    [
        ([b"one\ntw", b"o\n"], "one\ntwo\n"),
        ([b"no end"], "no end\n"),
        ([b"\r\x1b[2K1 of 2", b"\r\x1b[2K2 of 2", b"\r\x1b[2Ksaid\n2 of 2\n"], "said\n2 of 2\n"),
        ([b"windows\r", b"\n"], "windows\n"),
        ([b"\x1b[31mred\x1b[0m \xff\n"], "red \ufffd\n"),
    ],
    ids=["lines", "no end", "progress", "carriage returns", "colours"],
)
def test_everything_is_shown_and_the_log_is_plain(
    tee: "subprocess.Popen[bytes]", tmp_path: Path, pieces: list[bytes], logged: str
) -> None:
    for piece in pieces:
        tee.stdin.write(piece)
        tee.stdin.flush()
        assert os.read(tee.stdout.fileno(), 1000) == piece
    tee.stdin.close()
    assert tee.wait(10) == 0
    assert (tmp_path / "log").read_text(errors="replace") == logged


def test_a_copier_outlives_the_signals_of_a_stop_and_a_lost_terminal(
    tee: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    tee.stdin.write(b"begin\n")
    tee.stdin.flush()
    assert tee.stdout.readline() == b"begin\n"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        tee.send_signal(number)
    tee.stdout.close()
    tee.stdin.write(b"end\n")
    tee.stdin.close()
    assert tee.wait(10) == 0
    assert (tmp_path / "log").read_text() == "begin\nend\n"
