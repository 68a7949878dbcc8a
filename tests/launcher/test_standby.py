"""Standbys: which process becomes a rank at a restart. A whole run with them: tests/launcher/test_restart.py."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bigmodel.launcher import standby
from bigmodel.launcher.standby import Program, Standbys

# Prints its place; a standby (one more argument) waits for its order first, as a trainer does.
TRAINEE = """
import json, os, socket, sys
if "--standby" in sys.argv:
    order, descriptors, *_ = socket.recv_fds(socket.socket(fileno=int(sys.argv[-1])), 1 << 16, 2)
    if not order:
        os._exit(0)
    os.dup2(descriptors[0], 1)
    os.environ.update(json.loads(order))
print(os.environ["MASTER_PORT"], "--standby" in sys.argv, sorted(os.sched_getaffinity(0)))
"""


@pytest.fixture
def standbys(monkeypatch: pytest.MonkeyPatch) -> Iterator[Standbys]:
    monkeypatch.setattr(standby, "AFTER_SECONDS", 0.0)
    made = Standbys()
    yield made
    made.close()


def program(port: int = 1, *more: str, **variables: str) -> Program:
    words = [sys.executable, "-S", "-c", TRAINEE, *more]
    return Program(words, {**os.environ, "MASTER_PORT": str(port), **variables}, frozenset([0]))


def printed(standbys: Standbys, one: Program, file: Path) -> tuple[int, str]:
    """The process of rank 0, and what it prints."""
    with open(file, "w") as output:
        process = standbys.start(0, one, output.fileno(), output.fileno())
    process.wait(60)
    return process.pid, file.read_text()


def waiting_processes() -> list[int]:
    """The standbys of this process, which may have other children."""
    children = psutil.Process().children()
    return [
        child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE and "--standby" in child.cmdline()
    ]


def test_a_standby_becomes_the_rank_at_its_new_port(standbys: Standbys, tmp_path: Path) -> None:
    assert printed(standbys, program(1, "--fresh"), tmp_path / "first")[1] == "1 False [0]\n"
    standbys.prepare()
    standbys.prepare()
    (waiting,) = set(waiting_processes())
    assert printed(standbys, program(2), tmp_path / "second") == (waiting, "2 True [0]\n")
    assert printed(standbys, program(3), tmp_path / "third")[1] == "3 False [0]\n"  # none was made since


@pytest.mark.parametrize("change", ["command", "variable", "sources", "dead"])
def test_a_standby_of_something_else_is_ended(
    standbys: Standbys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    printed(standbys, program(), tmp_path / "first")
    standbys.prepare()
    (waiting,) = waiting_processes()
    if change == "sources":
        package = tmp_path / "package"
        package.mkdir()
        (package / "new.py").touch()
        monkeypatch.setattr(standby.bigmodel, "__file__", str(package / "__init__.py"))
    if change == "dead":
        psutil.Process(waiting).kill()
        psutil.wait_procs([psutil.Process(waiting)], 60)
    one = program(2, *(["--more"] * (change == "command")), **({"NEW": "1"} if change == "variable" else {}))
    assert printed(standbys, one, tmp_path / "second")[1] == "2 False [0]\n"
    assert waiting not in waiting_processes()


def test_none_is_made_in_the_first_minute_and_all_end_with_the_launcher(
    standbys: Standbys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed(standbys, program(), tmp_path / "first")
    monkeypatch.setattr(standby, "AFTER_SECONDS", 60.0)
    standbys.prepare()
    assert waiting_processes() == []
    monkeypatch.setattr(standby, "AFTER_SECONDS", 0.0)
    standbys.prepare()
    (waiting,) = waiting_processes()
    standbys.close()
    assert not psutil.pid_exists(waiting)


def test_a_standby_dies_with_a_killed_launcher() -> None:
    source = f"""
import os, sys, time
from bigmodel.launcher import standby
standby.AFTER_SECONDS = 0
standbys = standby.Standbys()
one = standby.Program([sys.executable, "-c", {TRAINEE!r}], {{**os.environ, "MASTER_PORT": "1"}}, frozenset())
standbys.start(0, one, 2, 2).wait()
standbys.prepare()
print("ready", flush=True)
time.sleep(60)
"""
    launcher = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "ready\n"
    (waiting,) = psutil.Process(launcher.pid).children()
    launcher.kill()
    launcher.communicate()
    assert waiting.wait(60) is None
