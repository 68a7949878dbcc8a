"""A hanging rank is named, with its stack, and ended; ranks that only wait for it, or work, are not."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from bigmodel.config.settings import load_settings
from bigmodel.metrics.hang_watch import EARLY, MAX_LOOK_SECONDS, judge
from bigmodel.metrics.profiling import main_stack
from bigmodel.run_directory import read_json_lines
from tests.metrics.test_recorder import page
from tests.support.ranks import finish, start_ranks
from tests.support.tiny_run import write_run

HANGING_STEP = 8
HANG_SECONDS = 3.0  # longer than a rank of a busy machine has to wait for a processor
LAST_STEP = 12


def train_with_a_hanging_rank(run_file: Path, how: str) -> int:
    """On a rank: train; rank 1 hangs in its forward of a step. Output goes to `run_file`.N."""
    from bigmodel.training import loop

    class Engine(loop.Engine):
        def micro_batch(self, batch, num_labels, last):
            with self.phases("forward"):
                if self.world.rank == 1 and self.updates == HANGING_STEP - 1:
                    hang_here(how, run_file.with_suffix(""))
            return super().micro_batch(batch, num_labels, last)

    loop.Engine = Engine
    descriptor = os.open(f"{run_file}.{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    limits = f"training.hang_seconds={HANG_SECONDS}", "training.collective_timeout_seconds=60"
    return loop.train(load_settings(run_file, [*limits, f"training.steps={LAST_STEP}"]))


def hang_here(how: str, run_directory: Path) -> None:
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        began, last = time.monotonic(), {"sleeps": 100.0, "is late": 1.0}[how]
        while time.monotonic() < began + last or not is_told(run_directory):
            time.sleep(0.1)
        time.sleep(0.2)  # a page may be a tenth of a second old
        if not (run_directory / "page.txt").exists():  # the first micro-batch of the step
            endpoint = (run_directory / "metrics_endpoint").read_text().strip()
            (run_directory / "page.txt").write_text(page(endpoint))


def is_told(run_directory: Path) -> bool:
    return any(event["event"] == "rank_hangs" for event in read_json_lines(run_directory / "events.jsonl"))


def hang(folder: Path, shards: Path, how: str) -> tuple[list[int], list[dict[str, Any]], str]:
    """Exit codes, events, and the output of rank 0."""
    run_file = write_run(folder, shards)
    codes = finish(start_ranks(2, train_with_a_hanging_rank, run_file, how), 180.0)
    events = list(read_json_lines(folder / "run" / "events.jsonl"))
    return codes, events, (folder / "run.toml.0").read_text()


@pytest.mark.parametrize(("how", "why"), [("stopped", "was stopped (SIGSTOP"), ("sleeps", "hangs in forward")])
def test_a_hanging_rank_is_named_with_its_stack_and_killed(tmp_path: Path, shards: Path, how: str, why: str) -> None:
    codes, events, printed = hang(tmp_path, shards, how)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0  # its peer is gone
    (told,) = [event for event in events if event["event"] == "rank_hangs"]
    (ended,) = [event for event in events if event["event"] == "launch_ended"]
    assert (told["rank"], told["host"], told["phase"]) == (1, os.uname().nodename, "forward")
    assert told["step"] == HANGING_STEP
    limit = EARLY * told["limit_seconds"]  # of hang_seconds and ten usual steps, the longer
    assert limit <= told["seconds"] + 0.01 <= 2 * limit + MAX_LOOK_SECONDS  # a busy machine's second look
    assert any("in hang_here" in line for line in told["stack"])
    assert why in f"{told['how']} in forward"
    assert ended["cause"] == "hang"
    assert ended["detail"].startswith(f"rank 1 on {os.uname().nodename} ")
    assert f"in forward of step {HANGING_STEP}" in ended["detail"]
    assert "bigmodel: rank 1 on" in printed
    assert "rank 0 on" not in printed
    assert "in hang_here" in printed


def test_a_rank_that_goes_on_is_not_ended(tmp_path: Path, shards: Path) -> None:
    codes, events, printed = hang(tmp_path, shards, "is late")
    assert codes == [0, 0], printed
    kinds = [event["event"] for event in events if event["event"].startswith(("rank", "launch"))]
    assert kinds == ["rank_hangs", "rank_goes_on"]
    found = re.findall(r"rank_hangs{rank=\"(.)\"} (.*)", (tmp_path / "run/page.txt").read_text())
    assert found == [("0", "0.0"), ("1", "1.0")]
    assert re.search("the run ends in [1-9][0-9]* s unless it goes on", printed)


def frames(*lines: str) -> list[str]:
    return [f'  File "{line}' for line in lines]


def train_with_a_long_last_evaluation(run_file: Path) -> int:
    """On a rank: train; the evaluation after the last step takes five limits."""
    from bigmodel.training import loop

    loop.evaluate_at_end = lambda *arguments: time.sleep(5.0)
    return loop.train(
        load_settings(run_file, ["training.hang_seconds=1", f"training.steps={LAST_STEP}", "evaluation.at_end=true"])
    )


def test_the_evaluation_after_the_last_step_has_no_usual_length(tmp_path: Path, shards: Path) -> None:
    run_file = write_run(tmp_path, shards)
    assert finish(start_ranks(1, train_with_a_long_last_evaluation, run_file), 180.0) == [0]
    named = [event for event in read_json_lines(tmp_path / "run/events.jsonl") if event["event"] == "rank_hangs"]
    assert [event for event in named if event["step"] > LAST_STEP] == []  # a busy machine may be late before


@pytest.mark.parametrize(
    ("stack", "state", "how"),
    [
        (frames('m/torch/distributed/distributed_c10d.py", line 3 in all_reduce', 'loop.py", line 1'), "S", None),
        (frames('m/torch/_inductor/compile.py", line 3 in run', 'loop.py", line 1 in train'), "R", None),
        (frames('lib/pdb.py", line 3 in interaction', 'model.py", line 1 in forward'), "S", None),
        (
            frames('queue.py", line 3 in get', 'bigmodel/data/load/stream.py", line 1 in __next__'),
            "S",
            "waits for data",
        ),
        (frames('recorder.py", line 3 in record_step'), "D", "waits for a disk or a device (state D)"),
        (frames('model.py", line 3 in forward', 'loop.py", line 1 in train'), "R", "hangs"),
        ([], "S", None),
    ],
)
def test_what_a_rank_without_progress_does_follows_from_its_stack(stack: list[str], state: str, how: str) -> None:
    finding = judge(stack, state)
    assert (finding.how if finding else None) == how
    assert not finding or (finding.patience < 10) == (how == "hangs")  # data and disks have their own limits


def test_the_main_thread_is_the_last_of_a_dump() -> None:
    dump = 'Thread 0x1 (most recent call first):\n  File "a.py", line 1 in read\n\nCurrent thread 0x2 (most recent call'
    dump += ' first):\n  File "b.py", line 2 in wait\n  File "c.py", line 3 in <module>\n'
    assert main_stack(dump) == ['  File "b.py", line 2 in wait', '  File "c.py", line 3 in <module>']
    taken_by_another = dump.replace("Current thread", "thread").replace("Thread 0x1", "Current thread 0x1")
    assert main_stack(taken_by_another.replace("thread 0x2", "Thread 0x2")) == main_stack(dump)
