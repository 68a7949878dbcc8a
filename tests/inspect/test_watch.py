"""`bigmodel watch`: what it reads of runs that grow, its frames, and the terminal, which it leaves as it was."""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bigmodel.config.settings import MetricsSettings
from bigmodel.config.user_error import UserError
from bigmodel.inspect.growing_file import GrowingFile
from bigmodel.inspect.watch import split_keys
from bigmodel.inspect.watch_frame import frame
from bigmodel.inspect.watched_run import MOST_POINTS, STEP_LINE, LossCurve, Numbers, WatchedRun, without_others
from bigmodel.metrics.recorder import Metrics
from bigmodel.metrics.run_accounting import RunAccounting
from bigmodel.run_directory import append_json_line, read_json_lines, record_event, write_atomically, write_json
from tests.metrics.test_recorder import FACTS, STEPS, record_all

REPOSITORY = Path(__file__).parents[2]
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def running(directory: Path) -> Mapping[str, Any]:
    return {"state": "running", "hosts": ["node-1"], "ranks": 2}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two starts by the recorder: 40 steps, one of them with a pause, and steps 38 to 40 twice."""
    directory = tmp_path_factory.mktemp("recorded")
    for first in (0, 37):
        with Metrics(directory, MetricsSettings(), first, facts=FACTS) as metrics:
            for step in range(first + 1, 41):
                seconds = 60.0 if step == 30 else 0.5
                metrics.record_step(replace(STEPS[step % 3], step=step, step_seconds=seconds), {"forward": 0.25})
                metrics.spent("checkpoint")
            if not first:
                record_all(metrics)
    record_event(directory, "start", step=37, world_size=2)
    write_json(directory / "settings.json", {"training": {"steps": 80}, "checkpoint": {"every_steps": 16}})
    return directory


def test_lines_are_read_once_and_only_when_they_are_whole(tmp_path: Path) -> None:
    file = GrowingFile(tmp_path / "lines")
    assert not file.has_more()
    with open(tmp_path / "lines", "wb") as writer:
        writer.write(b"one\ntwo\nthr")
        writer.flush()
        assert file.has_more()
        assert list(file.lines()) == [b"one", b"two"]
        assert list(file.lines()) == []
        writer.write(b"ee\n")
        writer.flush()
        assert file.has_more()
        assert list(file.lines()) == [b"three"]
        assert not file.has_more()


@pytest.mark.parametrize("how", ["replaced", "cut", "gone"])
def test_a_file_that_was_replaced_is_begun_again(tmp_path: Path, how: str) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntwo\n")
    file = GrowingFile(path)
    assert file.has_more()
    assert len(list(file.lines())) == 2
    if how == "gone":
        path.unlink()
        assert not file.has_more()
        assert file.was_replaced
    elif how == "cut":
        path.write_bytes(b"new\n")
    else:
        write_atomically(path, "new\nlines\nthat are longer\n")
    if how != "gone":
        assert file.has_more()
        assert file.was_replaced
        assert next(iter(file.lines())) == b"new"


def test_every_step_of_the_recorder_is_read_without_json(recorded: Path) -> None:
    lines = (recorded / "metrics.jsonl").read_bytes().splitlines()
    steps = [line for line in lines if json.loads(line)["kind"] == "step"]
    assert len(steps) == 43
    assert all(STEP_LINE.match(line) for line in steps)


def test_the_seconds_by_cause_are_those_of_the_run_accounting(recorded: Path) -> None:
    run, expected = WatchedRun(recorded, running), RunAccounting()
    run.poll()
    for line in read_json_lines(recorded / "metrics.jsonl"):
        expected.add(line)
    assert run.numbers.accounting.seconds == expected.seconds
    assert expected.seconds["hang"] > 50
    assert min(expected.seconds[cause] for cause in ("skipped", "replay", "data", "compile", "checkpoint")) > 0
    assert run.numbers.accounting.counted == expected.counted
    assert run.step == list(read_json_lines(recorded / "metrics.jsonl"))[-2]


def test_steps_in_a_row_give_the_same_read_at_once_or_one_by_one(recorded: Path) -> None:
    lines = (recorded / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:25]
    lines = [line.replace(b'"skipped": true', b'"skipped": false') for line in lines]
    at_once, single = Numbers(), Numbers()
    at_once.add_block(b"".join(lines))
    for line in lines:
        single.add(line[:-1])
    assert at_once.accounting.seconds == single.accounting.seconds
    assert at_once.accounting.counted == single.accounting.counted
    assert at_once.accounting.time == single.accounting.time
    assert (at_once.curve.points, at_once.recent) == (single.curve.points, single.recent)
    assert (at_once.begun, at_once.newest_step()) == (single.begun, single.newest_step())


def test_steps_in_a_row_are_added_at_once_unless_one_is_repeated_skipped_or_long() -> None:
    def added(steps: list[float], laps: list[float]) -> dict[str, list[float]] | None:
        accounting = RunAccounting()
        accounting.add_step_seconds(3, 1.0, 1.0, 0.0, 0.0, False, {})
        return accounting.add_steps(steps, 9.0, laps, [0.25] * 3, [0.5] * 3, {"checkpoint": [0.0, 2.0, 1.0]})

    assert added([4, 5, 6], [1.0, 2.0, 0.5]) == {
        "productive": [1.25, 2.5, 2.5],
        "data": [0.25, 0.5, 0.75],
        "compile": [0.5, 1.0, 1.25],
        "checkpoint": [0.0, 2.0, 3.0],
    }
    assert added([3, 4, 5], [1.0, 2.0, 0.5]) is None
    assert added([4, 5, 5], [1.0, 2.0, 0.5]) is None
    assert added([4, 5, 6], [1.0, 2.0, 20.0]) is None


def test_a_damaged_line_is_left_out(tmp_path: Path, recorded: Path) -> None:
    whole = (recorded / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    odd = [b"\xff\x00\n", b"[]\n", b"{}\n", b'{"kind": "step"}\n', b"3\n", whole[1][:200] + b"\n"]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([*whole[:5], *odd, *whole[5:]]))
    run, same = WatchedRun(tmp_path, running), WatchedRun(recorded, running)
    run.poll()
    same.poll()
    assert run.numbers.accounting.seconds == same.numbers.accounting.seconds
    assert run.numbers.curve.points == same.numbers.curve.points


def test_the_curve_has_a_bounded_number_of_points_and_all_losses() -> None:
    curve = LossCurve()
    for step in range(1, 100_001):
        curve.add(step, float("nan") if step == 7 else float(step))
    points = curve.points
    assert MOST_POINTS // 2 <= len(points) <= MOST_POINTS
    assert (curve.first_step, points[-1][0]) == (1, 100_000)
    assert points[0] == (513, pytest.approx((513 * 514 / 2 - 7) / 512))


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 12), (200, 60)])
def test_a_frame_fits_the_terminal(recorded: Path, tmp_path: Path, width: int, height: int, keys: bool) -> None:
    runs = [WatchedRun(path, running) for path in [recorded] * 9 + [tmp_path]]
    for run in runs:
        run.poll()
    for chosen in (0, 8, 9):
        lines = frame(runs, chosen, width, height, keys)
        assert max(line.cell_len for line in lines) <= width
        assert (len(lines) == height) if keys else len(lines) <= height
        assert [line.plain.startswith(">") for line in lines].count(True) == 1


def test_a_frame_has_the_numbers_of_the_run(recorded: Path) -> None:
    run = WatchedRun(recorded, running)
    run.poll()
    text = "\n".join(line.plain for line in frame([run], 0, 80, 24, True))
    assert "running  2 ranks on node-1" in text
    assert "step 40 of 80  50.0%" in text
    assert "loss 2.500" in text
    assert f"{1012 / 0.5 / 1000:.1f}k tokens/s" in text
    assert f"MFU {6e6 / 0.5 / 1e9:.1%}" in text
    assert "next at step 48" in text
    assert "experts: the largest load is 2.00 times the mean, in layer 4" in text
    assert re.search(r"goodput \d+\.\d% of .*; lost: ", text)
    assert "⠁" <= max(text) <= "⣿"  # the curve


def test_the_table_says_not_started_in_whole_words_at_80_columns(tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        runs.append(WatchedRun(tmp_path / name, lambda directory: {"state": "not started yet"}))
    lines = [line.plain for line in frame(runs, 0, 80, 24, True)]
    assert sum(" not started " in line for line in lines[1:3]) == 2
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "a\x07", "a\rb", "\u202egnp.exe", "\x9b31m"])
def test_control_characters_of_a_run_do_not_reach_the_terminal(tmp_path: Path, text: str) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    record_event(directory, f"kind {text}", detail=f"[bold]{text}", step=text)
    status = {"state": f"lost {text}", "hosts": [text], "ranks": 1, "last_end": {"cause": "", "detail": text}}
    run = WatchedRun(directory, lambda directory: status)
    run.poll()
    lines = frame([run], 0, 80, 24, True)
    assert all(letter.isprintable() for line in lines for letter in line.plain)
    assert any("[bold]" in line.plain for line in lines)


def test_a_run_that_has_not_started_and_one_whose_files_are_damaged_are_shown(tmp_path: Path) -> None:
    def refuses(directory: Path) -> Mapping[str, Any]:
        raise UserError("settings.json: damaged")

    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "settings.json").write_text("{")
    record_event(tmp_path / "damaged", "start", step=0)
    runs = [WatchedRun(tmp_path / name, refuses) for name in ("new", "damaged")]
    for run in runs:
        run.poll()
    shown = ["\n".join(line.plain for line in frame([run], 0, 80, 24, True)) for run in runs]
    assert "not started yet" in shown[0]
    assert "settings.json: damaged" in shown[1]


def test_a_run_without_events_is_of_unknown_state_and_has_no_rate_before_its_first_step(
    recorded: Path, tmp_path: Path
) -> None:
    """As a copy of metrics.jsonl alone, cut behind its first start."""
    text = (recorded / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(text.splitlines(keepends=True)[0])
    run = WatchedRun(tmp_path, running)
    run.poll()
    shown = "\n".join(line.plain for line in frame([run, run], 0, 80, 24, True))
    assert "unknown" in shown
    assert not re.search("not started| 0 ", shown)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "picture.png").touch()
    with pytest.raises(UserError, match="not a run directory: it has none of metrics"):
        WatchedRun(tmp_path, running)


def test_a_pattern_may_find_more_than_runs(recorded: Path, tmp_path: Path) -> None:
    """As runs/* does beside `make monitor`: a discovery file, and Prometheus's own folder."""
    (tmp_path / "my").symlink_to(recorded)
    (tmp_path / "my.node-0.prometheus.json").write_text("[]")
    (tmp_path / "monitor").mkdir()
    (tmp_path / "monitor" / "prometheus.yml").touch()
    (tmp_path / "new").mkdir()
    run_file = tmp_path / "another.toml"
    run_file.touch()
    missing = tmp_path / "missing"  # a word mistyped is still an error
    assert without_others(sorted([*tmp_path.iterdir(), missing])) == [
        run_file,
        missing,
        tmp_path / "my",
        tmp_path / "new",
    ]
    alone = [tmp_path / "monitor"]
    assert without_others(alone) == alone


def test_without_a_terminal_one_frame_is_printed(recorded: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bigmodel", "watch", str(recorded), str(tmp_path / "none")]
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (answer.returncode, answer.stderr) == (
        2,
        f"bigmodel: {tmp_path / 'none'}: neither a run directory nor a run file\n",
    )
    answer = subprocess.run(command[:-1], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "step 40 of 80" in answer.stdout
    assert "\x1b" not in answer.stdout


def test_keys_are_split() -> None:
    assert split_keys("q\x1b[Aj\x1bOB") == ["q", "\x1b[A", "j", "\x1bOB"]
    assert split_keys("") == [""]


PROGRAM = """
import sys
from pathlib import Path
from bigmodel.inspect.watch import watch
for number in range(3):
    watch([Path(name) for name in sys.argv[1:]], lambda directory: {"state": f"showing {number}"})
    print(f"ended {number}", flush=True)
    sys.stdin.readline()
"""


class Screen:
    """The other end of a terminal: types keys, and reads what is shown."""

    def __init__(self, *arguments: str) -> None:
        self.ours, self.theirs = pty.openpty()
        os.set_blocking(self.ours, False)
        self.resize(24, 80)
        self.before = termios.tcgetattr(self.theirs)
        self.shown = ""
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "", "LINES": ""}
        ends = {"stdin": self.theirs, "stdout": self.theirs, "stderr": self.theirs}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            cwd=REPOSITORY,
            env=environment,
            **ends,  # type: ignore[call-overload]
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def resize(self, lines: int, columns: int) -> None:
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, keys: bytes) -> None:
        self.shown = ""
        os.write(self.ours, keys)

    def read(self) -> None:
        """Read what is there."""
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.ours, 1 << 16):
                self.shown += data.decode(errors="replace")

    def until(self, what: str, seconds: float = 30.0) -> str:
        """What was shown since the last key, with its control sequences, as soon as it has `what`."""
        deadline = time.monotonic() + seconds
        while what not in CONTROL.sub("", self.shown):
            assert time.monotonic() < deadline, f"waited {seconds} s for {what!r} in {self.shown!r}"
            self.read()
            time.sleep(0.02)
        return self.shown

    def is_as_before(self) -> bool:
        """Whether the mode is the old one, and the last words show the cursor and leave the second screen."""
        last = {mode: self.shown.rfind(f"\x1b[?{mode}") for mode in ("25h", "25l", "1049h", "1049l")}
        whole = last["25h"] > last["25l"] and last["1049l"] > last["1049h"]
        return whole and termios.tcgetattr(self.theirs) == self.before


@pytest.fixture
def screen(recorded: Path, tmp_path: Path) -> Iterator[Screen]:
    (tmp_path / "grows").mkdir()
    screen = Screen(str(recorded), str(tmp_path / "grows"))
    yield screen
    screen.process.kill()
    screen.process.wait()
    os.close(screen.ours)
    os.close(screen.theirs)


def test_in_a_terminal_it_follows_keys_size_and_run_and_leaves_all_as_it_was(
    screen: Screen, recorded: Path, tmp_path: Path
) -> None:
    screen.until("q quit, arrows choose a run")
    assert "step 40 of 80" in CONTROL.sub("", screen.shown)
    assert not termios.tcgetattr(screen.theirs)[3] & termios.ECHO

    screen.type(b"\x1b[B")  # down
    assert "step 40 of 80" not in CONTROL.sub("", screen.until("q quit"))
    line = next(one for one in read_json_lines(recorded / "metrics.jsonl") if one["kind"] == "step")
    append_json_line(tmp_path / "grows" / "metrics.jsonl", line | {"step": 77, "loss": 1.25})
    screen.until("loss 1.250")

    screen.shown = ""
    screen.resize(12, 50)
    screen.until("q quit")
    screen.type(b"\x1b[A")  # up
    shown = CONTROL.sub("", screen.until("step 40 of 80"))
    assert max(len(line) for line in shown.splitlines()) <= 50

    screen.type(b"q")
    screen.until("ended 0")
    assert screen.is_as_before()
    screen.type(b"\n")
    screen.until("showing 1")
    screen.type(b"\x03")  # Ctrl-C
    screen.until("ended 1")
    assert screen.is_as_before()
    screen.type(b"\n")
    screen.until("showing 2")
    screen.process.send_signal(signal.SIGTERM)
    assert screen.process.wait(30) == -signal.SIGTERM
    screen.read()
    assert screen.is_as_before()


def test_ctrl_z_leaves_the_terminal_and_fg_comes_back(screen: Screen) -> None:
    screen.until("q quit")
    screen.shown = ""
    screen.process.send_signal(signal.SIGTSTP)
    assert os.waitpid(screen.process.pid, os.WUNTRACED)[1] >> 8 == signal.SIGSTOP
    screen.read()
    assert screen.is_as_before()
    screen.shown = ""
    screen.process.send_signal(signal.SIGCONT)
    screen.until("q quit")
    assert not termios.tcgetattr(screen.theirs)[3] & termios.ECHO
