"""The rank that works longer than the others is named, with its lag, and the others' wait is communication."""

import os
import re
import statistics
import time
from pathlib import Path

from bigmodel.config.settings import load_settings
from bigmodel.metrics.slow_rank import SlowRank
from bigmodel.run_directory import read_json_lines
from tests.support.ranks import run_ranks
from tests.support.tiny_run import write_run

SLOW_RANK, SECONDS, STEPS = 1, 0.2, 32


def train_with_a_slow_rank(run_file: Path) -> int:
    """On a rank: train; the forward of rank 1 takes longer. Leaves what the rank's own record says at the end."""
    from bigmodel.metrics.recorder import Metrics
    from bigmodel.training import loop

    class Engine(loop.Engine):
        def micro_batch(self, batch, num_labels, last):
            if self.world.rank == SLOW_RANK and last:
                with self.phases("forward"):
                    time.sleep(SECONDS)
            return super().micro_batch(batch, num_labels, last)

    class Watched(Metrics):
        def close(self, ending: str = "failed") -> None:
            phases = self._rank.samples("")["phase_seconds"]
            seconds = {phase: value for (_, phase), value in phases}
            run_file.with_suffix(f".{self._seat.rank}").write_text(repr(seconds))
            super().close(ending)

    loop.Engine, loop.Metrics = Engine, Watched
    descriptor = os.open(f"{run_file}.{os.environ['RANK']}.printed", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    return loop.train(load_settings(run_file, [f"training.steps={STEPS}"]))


def test_the_slow_rank_is_named_and_the_other_one_waits_in_communication(tmp_path: Path, shards: Path) -> None:
    run_file = write_run(tmp_path, shards)
    run_ranks(2, train_with_a_slow_rank, run_file)
    steps = [line for line in read_json_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"]
    assert len(steps) == STEPS
    told = steps[1:]  # with the next step's loss
    assert sum(line["slowest_rank"] == SLOW_RANK for line in told) > 0.5 * len(told)  # a busy machine makes others slow
    assert SECONDS * 0.6 < statistics.median(line["slowest_rank_lag_seconds"] for line in told) < SECONDS * 20
    fast, slow = (eval(run_file.with_suffix(f".{rank}").read_text()) for rank in (0, 1))
    assert set(fast) == set(slow) == {"data", "forward", "backward", "communication", "optimizer", "checkpoint"}
    assert slow["forward"] - fast["forward"] > STEPS * SECONDS * 0.6
    assert fast["communication"] - slow["communication"] > STEPS * SECONDS * 0.6
    assert [line["slow_rank"] for line in steps[:20]] == [None] * 20, "too few steps to say so"
    assert steps[-1]["slow_rank"][0] == SLOW_RANK
    assert re.search(
        r"rank 1 on node 0 is slow: works \d+% longer than the others",
        run_file.with_name("run.toml.0.printed").read_text(),
    )


def test_a_rank_is_slow_by_its_own_work_over_many_steps() -> None:
    slow_rank = SlowRank()
    usual = [0.1, 0.11, 0.09]
    named = [slow_rank.see([0.0] * 3), *(slow_rank.see(usual) for _ in range(30))]
    assert named == [None] * 31
    assert slow_rank.see([0.1, 30.0, 0.09]) is None  # one pause
    for _ in range(200):
        slow_rank.see([0.1, 0.1, 0.15])
    assert slow_rank.now is not None
    assert (slow_rank.now.rank, round(slow_rank.now.excess, 1)) == (2, 0.5)
    assert slow_rank.words("rank 2 on b").startswith("rank 2 on b is slow: works ")
    for _ in range(200):
        slow_rank.see(usual)
    assert (slow_rank.now, slow_rank.words("rank 2")) == (None, "")
    alone = SlowRank()
    assert [alone.see([0.1]) for _ in range(50)] == [None] * 50


def test_a_rank_that_is_stopped_now_and_then_is_slow() -> None:
    slow_rank = SlowRank()
    for step in range(400):
        slow_rank.see([0.02, 0.02 + 0.4 * (step % 20 == 0)])
    assert slow_rank.now is not None
    assert slow_rank.now.rank == 1
