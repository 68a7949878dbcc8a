"""The copier between a rank and its log: everything is shown, the log is plain, and no signal of a stop ends it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bigmodel.launcher import output


@pytest.fixture
def copier(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
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
    copier: "subprocess.Popen[bytes]", tmp_path: Path, pieces: list[bytes], logged: str
) -> None:
    for piece in pieces:
        copier.stdin.write(piece)
        copier.stdin.flush()
        assert os.read(copier.stdout.fileno(), 1000) == piece
    copier.stdin.close()
    assert copier.wait(10) == 0
    assert (tmp_path / "log").read_text(errors="replace") == logged


def test_a_copier_outlives_the_signals_of_a_stop_and_a_lost_terminal(
    copier: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    copier.stdin.write(b"begin\n")
    copier.stdin.flush()
    assert copier.stdout.readline() == b"begin\n"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        copier.send_signal(number)
    copier.stdout.close()
    copier.stdin.write(b"end\n")
    copier.stdin.close()
    assert copier.wait(10) == 0
    assert (tmp_path / "log").read_text() == "begin\nend\n"
