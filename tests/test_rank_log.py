"""A rank's log: everything is shown, the log is plain, no signal of a stop ends a tee, and none is left over."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bigmodel import rank_log


@pytest.fixture
def tee(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, rank_log.__file__, str(tmp_path / "log")]
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


LOGGED = """
import ctypes, os, sys
from pathlib import Path
from bigmodel.rank_log import keep_log
keep_log(Path(sys.argv[1]))
"""


def start(log: Path, program: str, **streams: int) -> "subprocess.Popen[bytes]":
    """A program whose first act is to log itself."""
    return subprocess.Popen([sys.executable, "-c", LOGGED + program, str(log)], **streams)


def copiers_of(log: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if rank_log.__file__ in (process.info["cmdline"] or []) and str(log) in process.info["cmdline"]
    ]


def wait_for_the_copiers_of(log: Path) -> None:
    deadline = time.monotonic() + 30
    while copiers_of(log):
        assert time.monotonic() < deadline, "a tee is left over"
        time.sleep(0.02)


def test_a_program_that_logs_itself_logs_what_c_prints_and_its_traceback(tmp_path: Path) -> None:
    program = "print('python'); os.write(1, b'C\\n'); os.system('echo child'); raise RuntimeError('the end')"
    process = start(tmp_path / "log", program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=30)
    logged = (tmp_path / "log").read_text()
    for word in ("python", "C", "child"):
        assert word in output.decode().split()
        assert word in logged.split()
    assert errors.endswith(b"RuntimeError: the end\n")
    assert errors.decode() in logged
    wait_for_the_copiers_of(tmp_path / "log")


def test_a_crash_during_the_imports_leaves_its_stack_in_the_log(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "import os, signal\ndef open_driver(): os.kill(os.getpid(), signal.SIGSEGV)\nopen_driver()\n"
    )
    run_file = tmp_path / "run.toml"
    run_file.write_text(f"run = {{ directory = '{tmp_path / 'run'}' }}\n")
    done = subprocess.run(
        [sys.executable, "-m", "bigmodel", "train", str(run_file)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGSEGV
    (log,) = (tmp_path / "run/logs").iterdir()
    for text in (done.stderr, log.read_text()):
        assert text.startswith("Fatal Python error: Segmentation fault\n")
        assert " in open_driver\n" in text


def test_a_program_whose_starter_logs_it_does_not_log_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in rank_log.ARRANGED.items():
        monkeypatch.setenv(name, value)
    process = start(tmp_path / "log", "print('shown')", stdout=subprocess.PIPE)
    assert process.communicate(timeout=30)[0] == b"shown\n"
    assert not (tmp_path / "log").exists()


def test_kill_9_loses_nothing_and_leaves_no_copier(tmp_path: Path) -> None:
    process = start(tmp_path / "log", "os.write(1, b'last words'); os.kill(os.getpid(), 9)", stdout=subprocess.PIPE)
    assert process.communicate(timeout=30)[0] == b"last words"
    assert process.returncode == -signal.SIGKILL
    wait_for_the_copiers_of(tmp_path / "log")
    assert (tmp_path / "log").read_text() == "last words\n"


def test_a_terminal_has_its_moving_line_and_the_log_its_last_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    main, terminal = pty.openpty()
    program = """
from bigmodel.metrics.progress import LiveLine
line = LiveLine(0, 3, enabled=True)
line.say("a line of its own")
for step in (1, 2, 3):
    line.update(step, 1.5, 1000.0)
line.close()
"""
    process = start(tmp_path / "log", program, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    try:
        while data := os.read(main, 65536):
            shown += data
    except OSError:  # Linux's word for the end of a terminal
        pass
    finally:
        os.close(main)
    assert process.wait(30) == 0
    assert b"\x1b[?25l" in shown, "a moving line hides the cursor"
    assert b"\x1b[?25h" in shown
    assert b"step 3/3" in shown
    logged = (tmp_path / "log").read_text()
    assert "a line of its own\n" in logged
    assert "step 3/3" in logged
    assert "\x1b" not in logged
