"""metrics.jsonl on a disk that is full, then read-only, then well again: a real file system of 32 kB, in a mount
namespace of its own; and a run that meets the system's limit of a file's size, which is as a full disk."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bigmodel.checks.audit import audit
from bigmodel.config.settings import load_settings
from bigmodel.run_directory import read_json_lines
from tests.support.ranks import finish, start_ranks
from tests.support.tiny_run import write_run

REPOSITORY = Path(__file__).parents[2]
PROGRAM = """
import os, subprocess, sys
from pathlib import Path
from bigmodel.metrics.line_file import LineFile
from bigmodel.run_directory import read_json_lines, record_event

disk = Path(sys.argv[1])
def mount(*options):
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(disk)], check=True)
mount("-o", "size=32k")
file, steps = LineFile(disk / "metrics.jsonl"), iter(range(1, 1000))
def add(number):
    for _ in range(number):
        file.add({"step": next(steps), "more": "x" * 100})
def written():
    return [line["step"] for line in read_json_lines(disk / "metrics.jsonl")]
add(5)
(disk / "ballast").write_bytes(bytes(24576))
add(95)
before = written()
assert 5 < len(before) < 80, before
assert file.num_delayed == 100 - len(before)
record_event(disk, "not_recorded")  # must not raise: a run goes on
(disk / "ballast").unlink()
add(1)
assert written() == list(range(1, 102))
mount("-o", "remount,ro")
add(3)
record_event(disk, "not_recorded")
mount("-o", "remount,rw")
add(1)
assert written() == list(range(1, 106))
events = list(read_json_lines(disk / "events.jsonl"))
assert [(event["event"], event["lost"]) for event in events] == [("metrics_delayed", 0)] * 2, events
mount("-o", "remount,ro")
add(2)
file.close()
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare (util-linux) is not installed: no full disk")
def test_lines_wait_for_room_and_none_is_lost_or_torn(tmp_path: Path) -> None:
    inside = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*inside, "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here, in a namespace: no full disk")
    command = [*inside, sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    file, events = tmp_path / "metrics.jsonl", tmp_path / "events.jsonl"
    waits = "training goes on, and the lines wait in memory"
    read_only = "mount its file system read-write (dmesg says why the kernel has changed it), or move run.directory"
    assert done.stderr.splitlines() == [
        f"bigmodel: {file} cannot be written: No space left on device; free some space, or raise the quota; {waits}",
        f"bigmodel: {events}: No space left on device; not recorded: not_recorded; free some space, or raise the quota",
        f"bigmodel: {file} is written again after 0 s; lines lost: 0",
        f"bigmodel: {file} cannot be written: Read-only file system; {read_only}; {waits}",
        f"bigmodel: {events}: Read-only file system; not recorded: not_recorded; {read_only}",
        f"bigmodel: {file} is written again after 0 s; lines lost: 0",
        f"bigmodel: {file} cannot be written: Read-only file system; {read_only}; {waits}",
        f"bigmodel: {file} cannot be written: Read-only file system; lines lost at its end: 2",
    ]


STEPS = 80


def train_on_a_disk_that_fills(run_file: Path) -> int:
    """On a rank: train; when there are some lines no file may grow beyond their size, until a save has failed."""
    from bigmodel.training import loop

    run, errors = run_file.with_suffix(""), run_file.with_suffix(".errors")

    def seen(name: str, word: bytes) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return word in (run / name).read_bytes()
        return False

    def fill() -> None:
        while not seen("metrics.jsonl", b'"step": 5'):
            time.sleep(0.002)
        room = os.path.getsize(run / "metrics.jsonl") + 700  # a line may be cut
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        while not (b"cannot be written" in errors.read_bytes() and seen("events.jsonl", b"checkpoint_failed")):
            time.sleep(0.002)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    with open(errors, "w", buffering=1) as printed, contextlib.redirect_stderr(printed):
        threading.Thread(target=fill, daemon=True).start()
        return loop.train(load_settings(run_file))


def test_a_run_goes_on_while_the_disk_is_full_and_all_its_numbers_are_there_in_the_end(
    tmp_path: Path, shards: Path
) -> None:
    run_file, run = write_run(tmp_path, shards), tmp_path / "run"
    text = run_file.read_text().replace("steps = 10", f"steps = {STEPS}")
    run_file.write_text(text.replace("every_steps = 4", 'every_steps = 4\non_failure = "continue"'))
    assert finish(start_ranks(1, train_on_a_disk_that_fills, run_file)) == [0]
    lines = list(read_json_lines(run / "metrics.jsonl"))
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, STEPS + 1))
    assert lines[-1]["ending"] == "finished"
    assert [finding for finding in audit(run) if not finding.holds] == []
    assert (run / f"checkpoints/step-{STEPS:08d}").is_dir(), "the last save had room"
    events = [event for event in read_json_lines(run / "events.jsonl") if event["event"] == "metrics_delayed"]
    assert [event["lost"] for event in events] == [0]
    said = run_file.with_suffix(".errors").read_text()
    assert said.count("cannot be written: File too large; free some space") == said.count("is written again") == 1
