"""Real runs whose time goes elsewhere: to evaluations, saves that fail, a rank that hangs. The books say so."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from bigmodel.checks.audit import audit
from bigmodel.config.settings import load_settings
from bigmodel.metrics.run_accounting import RunAccounting
from bigmodel.run_directory import read_json_lines
from tests.metrics.test_recorder import samples, until
from tests.support.launched import ranks_of, steps_of, wait_for_step
from tests.support.ranks import finish, kill, run_ranks, start_ranks
from tests.support.tiny_run import write_run

REPOSITORY = Path(__file__).parents[2]
EVALUATION_SECONDS = 0.5
CLOCK_ERROR_SECONDS = 0.1  # a process's start is known in ticks, and a clock may be set while it runs
ROOM_BYTES = 200_000  # for any one file: less than a rank's share of a checkpoint
TIMEOUT_SECONDS = 5.0


def ledger_of(run: Path) -> RunAccounting:
    run_accounting = RunAccounting()
    for line in read_json_lines(run / "metrics.jsonl"):
        run_accounting.add(line)
    return run_accounting


def edited(run_file: Path, **changes: str) -> Path:
    text = run_file.read_text()
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    run_file.write_text(text)
    return run_file


# ---- evaluations --------------------------------------------------------------------------------------------------


def train_with_slow_evaluations(run_file: Path, dies_in: int, clock: str) -> int:
    """On a rank: train; time each evaluation by two clocks of our own; killed in the middle of evaluation `dies_in`.

    The clocks: the evaluation alone; and from before the end of the step until it is recorded.
    """
    from bigmodel.metrics.recorder import Metrics
    from bigmodel.training import loop

    rank = os.environ["RANK"]
    taken: list[tuple[float, float]] = []
    run_file.with_suffix(f".{clock}-began.{rank}").write_text(repr(time.time()))

    evaluate = loop.Validation.run

    def run(self, *arguments, **named):
        began = time.perf_counter()
        time.sleep(EVALUATION_SECONDS)
        if len(taken) + 1 == dies_in:
            os.kill(os.getpid(), signal.SIGKILL)
        found = evaluate(self, *arguments, **named)
        Watched.taken = time.perf_counter() - began
        return found

    class Watched(Metrics):
        taken = before = 0.0

        def lap(self) -> float:
            self.before = time.perf_counter()
            return super().lap()

        def record_evaluation(self, *arguments, **named) -> None:
            before = self.before
            super().record_evaluation(*arguments, **named)
            taken.append((self.taken, time.perf_counter() - before))
            run_file.with_suffix(f".{clock}.{rank}").write_text(repr(taken))

        def close(self, ending: str = "failed") -> None:
            phases = self._rank.samples("")["phase_seconds"]
            run_file.with_suffix(f".phases.{rank}").write_text(repr({phase: value for (_, phase), value in phases}))
            super().close(ending)

    loop.Validation.run, loop.Metrics = run, Watched
    return loop.train(load_settings(run_file))


def test_evaluations_take_what_an_independent_clock_says_and_the_books_close(tmp_path: Path, shards: Path) -> None:
    """Evaluated at steps 3, 6 and 9, saved at 5; killed in the third, so that the one at 6 is done again."""
    run_file = edited(
        write_run(tmp_path, shards),
        evaluation=("at_end = false", "at_end = false\nevery_steps = 3"),
        checkpoint=("every_steps = 4", "every_steps = 5"),
    )
    began = time.time()
    assert -signal.SIGKILL in finish(start_ranks(2, train_with_slow_evaluations, run_file, 3, "first"))
    run_ranks(2, train_with_slow_evaluations, run_file, 0, "second")
    ended = time.time()
    first, second = (eval(run_file.with_suffix(f".{clock}.0").read_text()) for clock in ("first", "second"))
    assert (len(first), len(second)) == (2, 2)
    run = tmp_path / "run"
    run_accounting = ledger_of(run)
    shortest, longest = (sum(one) for one in zip(*first, second[1], strict=True))
    assert shortest <= run_accounting.seconds["evaluation"] <= longest
    assert run_accounting.seconds["replay"] >= second[0][0]
    assert run_accounting.counts["evaluations"] == 3
    assert 0 < run_accounting.counts["evaluation_seconds"] <= shortest - 3 * EVALUATION_SECONDS
    for rank in (0, 1):
        shortest, longest = (
            sum(one) for one in zip(*eval(run_file.with_suffix(f".second.{rank}").read_text()), strict=True)
        )
        by_phase = eval(run_file.with_suffix(f".phases.{rank}").read_text())["evaluation"]
        assert shortest <= by_phase <= longest
    assert [finding for finding in audit(run) if not finding.holds] == []
    assert run_accounting.began is not None
    assert began - CLOCK_ERROR_SECONDS < run_accounting.began < eval(run_file.with_suffix(".first-began.0").read_text())
    assert run_accounting.time < ended


# ---- saves that fail ----------------------------------------------------------------------------------------------


def train_with_little_room(run_file: Path) -> int:
    """On a rank: train where no file may become larger than `ROOM_BYTES`: the system's own error, as of a full disk."""
    from bigmodel.training import loop

    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM_BYTES, resource.RLIM_INFINITY))
    with open(run_file.with_suffix(".printed"), "w", buffering=1) as printed, contextlib.redirect_stdout(printed):
        return loop.train(load_settings(run_file))


def test_failed_saves_are_on_the_page_while_the_run_goes_on_and_after_a_restart(tmp_path: Path, shards: Path) -> None:
    run_file = edited(
        write_run(tmp_path, shards),
        steps=("steps = 10", "steps = 100000"),
        checkpoint=("every_steps = 4", 'every_steps = 4\non_failure = "continue"'),
    )
    run = tmp_path / "run"

    def page() -> dict[str, float]:
        try:
            return samples((run / "metrics_endpoint").read_text().strip())
        except OSError:  # not there yet
            return {}

    def failures() -> float:
        return page().get("checkpoint_failures_total|disk_full", 0.0)

    ranks = start_ranks(1, train_with_little_room, run_file)
    try:
        until(lambda: failures() >= 2 or not ranks[0].is_alive(), "failed saves on the page", 60)
        found = page()
    finally:
        kill(ranks)
    assert found["checkpoint_failures_total|disk_full"] >= 2
    assert found["checkpoint_failures_total|io_error"] == found["checkpoints_total"] == 0
    assert found["steps_total"] > 8
    assert "last_checkpoint_step" not in found
    events = [event for event in read_json_lines(run / "events.jsonl") if event["event"] == "checkpoint_failed"]
    assert len(events) >= found["checkpoint_failures_total|disk_full"]
    assert (events[0]["step"], events[0]["reason"]) == (4, "disk_full")
    printed = run_file.with_suffix(".printed").read_text()
    assert "step 4: checkpoint not saved: rank 0 could not write" in printed
    assert "training continues" in printed
    before = ledger_of(run).counts["checkpoint_failures|disk_full"]
    ranks = start_ranks(1, train, run_file)
    try:
        until(lambda: page().get("checkpoints_total", 0) >= 1 or not ranks[0].is_alive(), "a save that succeeds", 60)
        found = page()
    finally:
        kill(ranks)
    assert found["checkpoint_failures_total|disk_full"] == before


def test_a_failed_save_that_ends_the_run_is_counted_too(tmp_path: Path, shards: Path) -> None:
    run_file = write_run(tmp_path, shards)
    assert finish(start_ranks(1, train_with_little_room, run_file)) == [1]
    run_accounting = ledger_of(tmp_path / "run")
    assert run_accounting.counts["checkpoint_failures|disk_full"] == 1
    assert run_accounting.last["end"]["ending"] == "failed"


def train(run_file: Path) -> int:
    from bigmodel.training import loop

    return loop.train(load_settings(run_file))


# ---- a rank that hangs --------------------------------------------------------------------------------------------


def test_a_run_that_hung_until_it_was_ended_lost_that_time_to_the_hang(tmp_path: Path, shards: Path) -> None:
    """First rank 1 stands still, and rank 0 tells how long it waited; then rank 0: the launcher saw the end."""
    run_file, run = write_run(tmp_path, shards), tmp_path / "run"
    hung = 0.0
    for stopped in (1, 0):
        launcher = launch(run_file, 100_000)
        try:
            wait_for_step(run, max(steps_of(run), default=0) + 30)
            ranks = ranks_of(run)
            ranks[stopped].send_signal(signal.SIGSTOP)
            began = time.time()
            assert psutil.wait_procs([ranks[1 - stopped]], timeout=100)[0], "the other rank waits for it still"
            hung += time.time() - began
            ranks[stopped].kill()  # as the launcher does after its grace
            words = launcher.communicate(timeout=60)[0]
        finally:
            launcher.kill()
        assert launcher.returncode == 1, words
    last = launch(run_file, max(steps_of(run)) + 5)
    assert last.wait(120) == 0
    run_accounting = ledger_of(run)
    assert 2 * TIMEOUT_SECONDS < run_accounting.seconds["hang"] < hung + 2.0  # and the step before
    assert run_accounting.counts["restarts|hang"] == 2
    assert [finding for finding in audit(run) if not finding.holds] == []


def launch(run_file: Path, steps: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "launcher", "local", str(run_file), "--ranks", "2", "--restarts", "0"]
    limits = f"training.collective_timeout_seconds={TIMEOUT_SECONDS}", "training.hang_seconds=0"  # no watch
    for setting in (f"training.steps={steps}", *limits):
        command += ["--set", setting]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
