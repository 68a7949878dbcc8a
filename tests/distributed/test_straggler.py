"""The rank that works longer than the others is named, with its lag, and the others' wait is communication."""

import time
from pathlib import Path

from bigmodel.config.settings import load_settings
from bigmodel.run_directory import read_json_lines
from tests.support.ranks import run_ranks
from tests.support.tiny_run import write_run

SLOW_RANK, SECONDS = 1, 0.2


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
    return loop.train(load_settings(run_file))


def test_the_slow_rank_is_named_and_the_other_one_waits_in_communication(tmp_path: Path, shards: Path) -> None:
    run_file = write_run(tmp_path, shards)
    run_ranks(2, train_with_a_slow_rank, run_file)
    steps = [line for line in read_json_lines(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"]
    assert len(steps) == 10
    for line in steps[1:]:  # told with the next step's loss
        assert line["slowest_rank"] == SLOW_RANK
        assert SECONDS * 0.6 < line["slowest_rank_lag_seconds"] < SECONDS * 3
    fast, slow = (eval(run_file.with_suffix(f".{rank}").read_text()) for rank in (0, 1))
    assert set(fast) == set(slow) == {"data", "forward", "backward", "communication", "optimizer", "checkpoint"}
    assert slow["forward"] - fast["forward"] > 10 * SECONDS * 0.6
    assert fast["communication"] - slow["communication"] > 10 * SECONDS * 0.6
