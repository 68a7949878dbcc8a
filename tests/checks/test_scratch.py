"""A command that ends by a signal leaves no folder behind, and no process."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.tiny_run import write_run

REPOSITORY = Path(__file__).parents[2]
PROGRAM = """
import time
from bigmodel.checks.scratch import scratch_folder
with scratch_folder("mine-") as folder:
    (folder / "inside").write_text("")
    print("ready", flush=True)
    time.sleep(60)
"""


def start(words: list[str], temporary: Path) -> "subprocess.Popen[str]":
    environment = {**os.environ, "TMPDIR": str(temporary)}
    return subprocess.Popen(
        [sys.executable, *words], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_temporary_folder_goes_with_the_process_that_a_signal_ends(number: signal.Signals, tmp_path: Path) -> None:
    process = start(["-c", PROGRAM], tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert [file.name for file in tmp_path.glob("mine-*/*")] == ["inside"]
    process.send_signal(number)
    assert process.communicate(timeout=20)[0] == ""
    assert process.returncode == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_is_ended_leaves_neither_its_folder_nor_its_ranks(tmp_path: Path, shards: Path) -> None:
    run_file, temporary = write_run(tmp_path, shards), tmp_path / "temporary"
    temporary.mkdir()
    process = start(["-m", "bigmodel", "check", str(run_file), "resume"], temporary)
    deadline = time.monotonic() + 60
    while not list(temporary.glob("bigmodel-*/whole/rank-1.txt")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    assert process.communicate(timeout=20)[0] == ""  # its ranks write elsewhere
    assert process.returncode == 128 + signal.SIGTERM
    assert list(temporary.glob("bigmodel-*")) == []
    assert [line for line in commands() if str(run_file) in line] == []


def commands() -> list[str]:
    """The command lines of all processes."""
    return [words.replace("\0", " ") for words in map(read, Path("/proc").glob("[0-9]*/cmdline"))]


def read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:  # it has ended
        return ""


def test_no_other_file_makes_temporary_folders() -> None:
    files = [path for folder in ("bigmodel", "launcher", "tools") for path in (REPOSITORY / folder).rglob("*.py")]
    makers = [path.name for path in files if re.search(r"\b(TemporaryDirectory|mkdtemp)\b", path.read_text())]
    assert makers == ["scratch.py"]
