"""Restarts in place: the decision as a table, and real processes that die."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from bigmodel.launcher.record import Launch, bad_hosts, launches
from bigmodel.launcher.restart import Situation, decide, hosts_in_use
from bigmodel.launcher.watch import print_status, status
from bigmodel.run_directory import rank_zero, read_json_lines, record_event
from tests.support.launched import (
    LAUNCHER,
    assert_no_orphans,
    assert_same_training,
    ranks_of,
    recording,
    steps,
    steps_of,
    train_reference,
    until,
    wait_for_step,
)
from tests.support.tiny_run import write_run

REPOSITORY = Path(__file__).parents[2]


def ends(*found: tuple[str, int], **more: Any) -> list[Launch]:
    """Launches with these causes and steps, each of which made a step; `more` is of the last one."""
    last = len(found) - 1
    return [
        Launch(0, "ssh", "", 0, cause, "", step, **{"stepped": True, **(more if number == last else {})})
        for number, (cause, step) in enumerate(found)
    ]


AGAIN = [("failed", 7), ("hang", 7), ("failed", 7)]


@pytest.mark.parametrize(
    ("history", "more", "restart", "wait", "reason"),
    [
        (ends(("failed", 7)), {}, True, 0, "failed: it resumes from its last checkpoint"),
        (ends(("hang", 7)), {}, True, 0, "hang: it resumes"),
        (ends(("rewind", 7)), {}, True, 0, "rewind: it resumes"),
        (ends(("bad_device", 7)), {}, True, 0, "bad_device: it resumes"),  # no host is sure
        (ends(("user_error", 7)), {}, False, 0, "see the error message"),
        (ends(("finished", 9)), {}, False, 0, "the run is complete"),
        (ends(("stopped", 9)), {}, False, 0, "it was stopped"),
        (ends(("failed", 7)), {"stopping": True}, False, 0, "a stop was requested"),
        (ends(("failed", 7), stop_requested=True), {}, False, 0, "a stop was requested"),
        (ends(("failed", 7), stepped=False), {}, False, 0, "no step was made since the first start"),
        (ends(("failed", 7), ("failed", 7), stepped=False), {}, True, 5, "1 without a new step, of 2"),
        (ends(("failed", 7), reached=8), {}, True, 5, "1 without a new step"),  # it began at 8, from a checkpoint
        (ends(*AGAIN, ("failed", 3), anew=True), {}, True, 0, "it resumes"),  # --fresh: each step is new
        (
            ends(("failed", 7), ("failed", 3), anew=True, reached=3),
            {},
            True,
            5,
            "1 without a new step",
        ),  # it went back to 3
        (ends(*AGAIN), {}, False, 0, "restart.limit = 2 restarts in a row without a new step, at step 7"),
        (ends(*AGAIN, ("failed", 8)), {}, True, 0, "it resumes"),  # a step is progress
        (ends(*[("rewind", 7)] * 3), {}, False, 0, "restart.limit = 2"),
        (ends(("failed", 7)), {"bad": ["a"]}, True, 0, "a left out for a spare"),
        (ends(("failed", 7)), {"silent": ["b"]}, True, 0, "b left out for a spare"),
        (ends(("failed", 7)), {"silent": ["b", "c"]}, False, 0, "b does not answer, and no spare is left"),
        (ends(("bad_device", 7)), {"bad": ["b"], "silent": ["c"]}, True, 0, "b stays in use: no spare is left"),
        (ends(("failed", 7)), {"seconds_left": 59.0}, False, 0, "59 s are left before the time limit"),
        (ends(("failed", 7)), {"seconds_left": 61.0}, True, 0, "it resumes"),
    ],
)
def test_the_restart_policy(
    history: list[Launch], more: dict[str, Any], restart: bool, wait: float, reason: str
) -> None:
    decision = decide(Situation(history, ["a", "b", "c"], 2, **more), limit=2)
    assert (decision.restart, decision.wait_seconds) == (restart, wait)
    assert reason in decision.reason
    assert len(decision.hosts) == 2 * restart


def test_waits_grow_to_a_minute_and_a_limit_of_0_is_no_restart() -> None:
    waits = [decide(Situation(ends(*[("failed", 7)] * n), ["a"], 1), 99).wait_seconds for n in range(1, 8)]
    assert waits == [0, 5, 10, 20, 40, 60, 60]
    assert decide(Situation(ends(("failed", 7)), ["a"], 1), 0).reason == "restart.limit = 0"


def test_a_bad_host_stays_out_and_one_named_twice_without_a_spare_ends_the_run() -> None:
    first = decide(Situation(ends(("bad_device", 7)), ["a", "b", "c"], 2, ["a"]), 2)
    assert (first.hosts, first.excluded) == (("c", "b"), ("a",))
    later = [*ends(("bad_device", 7), excluded=("a",)), *ends(("failed", 8))]
    assert decide(Situation(later, ["a", "b", "c"], 2), 2).hosts == ("c", "b")
    later = [*ends(("bad_device", 7), excluded=("a",)), *ends(("bad_device", 8))]
    second = decide(Situation(later, ["a", "b", "c"], 2, ["c"]), 2)
    assert (second.hosts, second.excluded) == (("a", "b"), ("a", "c"))
    alone = [*ends(("bad_device", 7), excluded=("a",)), *ends(("bad_device", 8))]
    assert decide(Situation(alone, ["a"], 1, ["a"]), 2).reason == "a is named as bad again, and no spare is left"


def test_a_spare_takes_the_place_of_a_host_and_the_others_keep_theirs() -> None:
    assert hosts_in_use("abcd", 2, []) == ("a", "b")
    assert hosts_in_use("abcd", 2, ["b"]) == ("a", "c")
    assert hosts_in_use("abcd", 2, ["a", "c"]) == ("d", "b")
    assert hosts_in_use("abcd", 2, ["a", "b", "c"]) == ("d", "b")


def test_the_bad_host_has_the_launcher_s_name(tmp_path: Path) -> None:
    """The trainer names the machine; the launcher knows it by the address of the host file."""
    world = {"hosts": ["10.0.0.1", "10.0.0.2"], "node_of_rank": [0, 0, 1, 1]}
    (tmp_path / "launch.json").write_text(json.dumps(world))
    record_event(tmp_path, "launch", by="ssh", job="", restart=0)
    record_event(tmp_path, "bad_device", step=3, detail="", ranks=[3], hosts=["n2"])
    assert bad_hosts(tmp_path) == ["10.0.0.2"]
    record_event(tmp_path, "launch", by="ssh", job="", restart=0)
    assert bad_hosts(tmp_path) == []
    record_event(tmp_path, "bad_device", step=3, detail="", ranks=[1, 2], hosts=[])  # undecided
    assert bad_hosts(tmp_path) == []


# ---- real processes

# A trainee of one rank: its n-th start does the n-th thing, after a line of metrics.jsonl for its step.
PROGRAM = """
import sys, time
from functools import partial
from pathlib import Path
from bigmodel.launcher import local, restart
from bigmodel.launcher.record import record_launch, take_start
from bigmodel.launcher.topology import even_topology
here = Path(sys.argv[1])
trainee = '''
import json, os, pathlib, subprocess, sys, time
here = pathlib.Path(sys.argv[1])
(here / "starts").open("a").write(str(os.getpid()) + chr(10))
number = len((here / "starts").read_text().split())
step, code = json.loads(sys.argv[2])[number - 1]
if step:
    line = {"kind": "step", "step": step, "time": time.time()}
    (here / "metrics.jsonl").open("a").write(json.dumps(line) + chr(10))
if code == "wait":
    time.sleep(60)
if code == "forget":
    (here / "events.jsonl").unlink()
    code = 1
if code == "kill":
    os.kill(os.getpid(), 9)
if code == "cut off":  # a rank that the launcher cannot end holds the run directory until it is released
    holder = "import fcntl, os, sys, time; file = open(sys.argv[1], 'a'); fcntl.flock(file, 2); print(flush=True)"
    holder += chr(10) + "while not os.path.exists(sys.argv[1] + '.released'): time.sleep(0.05)"
    words = [sys.executable, "-c", holder, here / "lock"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    subprocess.Popen(words, start_new_session=True, **pipes).stdout.readline()
    code = 1
sys.exit(code)
'''
take_start(here)
restart.FIRST_WAIT_SECONDS, restart.ASK_SECONDS = float(sys.argv[3]), 0.1
restart.NODE_SECONDS = float(sys.argv[4])
def silent(hosts):
    return [host for host in hosts if (here / "gone").exists()]
def start(hosts, first, signals):
    topology = even_topology(hosts, 1, "127.0.0.1", 1)
    record_launch(here, topology, "local", launcher=True)
    return local.run([sys.executable, "-c", trainee, str(here), sys.argv[2]], topology, here / "logs", signals=signals)
sys.exit(restart.supervise(here, 2, ["here"], 1, start, float(sys.argv[4]), silent))
"""


def start(
    here: Path, plan: list[tuple[int, int | str]], wait: float = 0.1, held: float = 60.0
) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", PROGRAM, str(here), json.dumps(plan), str(wait), str(held)]
    return subprocess.Popen(words, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)


def decisions(here: Path) -> list[tuple[str, str]]:
    events = read_json_lines(here / "events.jsonl")
    return [(event["action"], event["reason"]) for event in events if event["event"] == "decided"]


def test_ranks_that_die_start_again_until_they_are_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    process = start(tmp_path, [(3, "kill"), (5, 1), (5, 4), (9, 0)])
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0, errors
    assert decisions(tmp_path) == [
        ("restart", "failed: it resumes from its last checkpoint"),
        ("restart", "failed: it resumes from its last checkpoint"),
        ("restart", "rewind: it resumes from its last checkpoint; 1 without a new step, of 2"),
        ("end", "the run is complete"),
    ]
    assert errors.count("launcher: restart") == 3
    assert [launch.cause for launch in launches(read_json_lines(tmp_path / "events.jsonl"))] == [
        "failed", "failed", "rewind", "finished"
    ]  # fmt: skip
    print_status(status(tmp_path))
    shown = capsys.readouterr().out
    assert "decision    end: the run is complete" in shown
    assert "at step 5: rewind: it resumes from its last checkpoint; 1 without a new step, of 2" in shown
    assert "after failed (rank 0 of 1 was killed by SIGKILL" in shown
    assert "at step 3: failed: it resumes" in shown


@pytest.mark.parametrize(
    ("plan", "code", "starts", "reason"),
    [
        ([(3, 2)], 2, 1, "see the error message"),
        ([(3, 3)], 3, 1, "it was stopped"),
        ([(0, 1)], 1, 1, "no step was made since the first start: see the error above"),
        ([(3, 5), (3, 5), (3, 5)], 5, 3, "restart.limit = 2 restarts in a row without a new step, at step 3"),
        ([(3, 1), (0, 2)], 2, 2, "see the error message"),
    ],
    ids=["user error", "stopped", "never a step", "no progress", "user error later"],
)
def test_what_a_restart_would_not_help_ends_with_its_own_code(
    tmp_path: Path, plan: list[tuple[int, int | str]], code: int, starts: int, reason: str
) -> None:
    process = start(tmp_path, plan)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == code, errors
    assert len((tmp_path / "starts").read_text().split()) == starts
    assert decisions(tmp_path)[-1] == ("end", reason)


def test_without_the_record_of_its_starts_a_run_is_not_restarted_and_this_is_said(tmp_path: Path) -> None:
    record_event(tmp_path, "launch", by="local", job="", restart=0)
    process = start(tmp_path, [(3, 1), (5, "forget")])
    errors = process.communicate(timeout=60)[1]
    assert errors.splitlines()[-1].partition(": ")[2] == (
        f"{tmp_path}/events.jsonl was moved or deleted while the run wrote to it; without it no restart is decided: "
        f"start again, and the run resumes from its newest checkpoint, if {tmp_path} still has one"
    )


def test_a_signal_before_a_restart_ends_it(tmp_path: Path) -> None:
    process = start(tmp_path, [(3, 1), (3, 1), (9, 0)], wait=600)
    until(lambda: len(decisions(tmp_path)) == 2, lambda: str(decisions(tmp_path)), 100)  # after the second one
    assert status(tmp_path)["state"] == "restarting"
    subprocess.run([*LAUNCHER, "stop", str(tmp_path)], check=True, timeout=60, stdout=subprocess.DEVNULL)
    process.communicate(timeout=60)
    assert process.returncode == 3
    assert decisions(tmp_path)[-1] == ("end", "stopped before the restart")


def test_a_rank_killed_by_a_stop_in_vain_is_not_restarted(tmp_path: Path) -> None:
    process = start(tmp_path, [(3, "wait"), (9, 0)])
    until(lambda: (tmp_path / "metrics.jsonl").exists(), lambda: "no step", 30)
    process.send_signal(signal.SIGTERM)  # it does not save
    process.communicate(timeout=30)
    assert len((tmp_path / "starts").read_text().split()) == 1


def test_a_restart_waits_for_a_rank_0_that_was_cut_off_and_still_holds_the_run_directory(tmp_path: Path) -> None:
    process = start(tmp_path, [(3, "cut off"), (9, 0)])
    until(lambda: bool(decisions(tmp_path)), lambda: "no end", 30)
    time.sleep(0.5)
    assert len((tmp_path / "starts").read_text().split()) == 1
    (tmp_path / "lock.released").touch()
    errors = process.communicate(timeout=60)[1]
    assert (process.returncode, len((tmp_path / "starts").read_text().split())) == (0, 2), errors


def test_a_rank_0_that_was_cut_off_and_does_not_end_ends_the_run(tmp_path: Path) -> None:
    process = start(tmp_path, [(3, "cut off"), (9, 0)], held=0.3)
    errors = process.communicate(timeout=60)[1]
    (tmp_path / "lock.released").touch()
    assert (process.returncode, len((tmp_path / "starts").read_text().split())) == (1, 1), errors
    assert f"launcher: no restart: rank 0 of the last start still holds {tmp_path}/lock after" in errors
    assert [action for action, _ in decisions(tmp_path)] == ["restart", "end"]


def test_a_host_that_does_not_answer_and_has_no_spare_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "gone").touch()
    process = start(tmp_path, [(3, 1), (9, 0)])
    waiting = ("wait", "here does not answer, and no spare is left: waiting for it")
    until(lambda: decisions(tmp_path) == [waiting], lambda: str(decisions(tmp_path)), 30)
    assert status(tmp_path)["state"] == "restarting"
    (tmp_path / "gone").unlink()
    errors = process.communicate(timeout=60)[1]
    assert (process.returncode, [action for action, _ in decisions(tmp_path)]) == (0, ["wait", "restart", "end"]), (
        errors
    )

    (tmp_path / "gone").touch()
    (tmp_path / "starts").unlink()
    process = start(tmp_path, [(12, 1), (15, 0)], held=0.3)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "launcher: no restart: here does not answer, and no spare is left\n" in errors


# `launch local`, with standbys at once instead of after a minute.
LAUNCHES = """
from bigmodel.launcher import standby
from bigmodel.launcher.__main__ import application
standby.AFTER_SECONDS = 0
application()
"""


def test_a_run_with_a_killed_rank_goes_on_by_itself_and_equals_the_undisturbed_run(
    tmp_path: Path, shards: Path
) -> None:
    """Its standbys become the ranks."""
    (tmp_path / "reference").mkdir()
    reference = train_reference(tmp_path / "reference", shards, ranks_per_node=2)
    run_file, run = write_run(tmp_path, shards), tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHES, "local", str(run_file), "--ranks", "2", *steps()],
        env={**os.environ, **recording(dict(os.environ)), "RECORDED_STEP_SECONDS": "0.1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_step(run, 9)
    token = json.loads((run / "incarnation.json").read_text())["token"]
    ranks = ranks_of(run)
    waiting = {one.pid for one in psutil.Process(process.pid).children()} - {one.pid for one in ranks.values()}
    ranks[1].send_signal(signal.SIGKILL)
    until(lambda: max(steps_of(run)) > 20, lambda: "no restart", 100)
    assert rank_zero(run)[0] in waiting
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 0, output
    assert "rank 1 of 2 was killed by SIGKILL" in output
    assert "launcher: restart: failed: it resumes from its last checkpoint" in output
    assert "resuming at step" in output
    assert json.loads((run / "incarnation.json").read_text())["token"] != token
    assert_same_training(run, reference)
    assert_no_orphans(run)
