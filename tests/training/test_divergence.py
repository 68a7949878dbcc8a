"""A run that diverged: when it began, and which checkpoints are from before."""

import json
import math
from pathlib import Path

import pytest

from bigmodel.config.settings import Settings, UserError
from bigmodel.distributed.world import ALONE
from bigmodel.training.divergence import began, good_and_suspect, refuse_smallest_scale
from tests.support.ranks import command, finish, start_ranks
from tests.support.tiny_run import write_run

BAD, ORDINARY = (math.nan, True), (2.0, False)


def steps(*runs: tuple[int, tuple[float, bool]]) -> list[dict]:
    """Records of steps: for each (number, (loss, skipped))."""
    told = [pair for number, pair in runs for _ in range(number)]
    return [
        {"step": number, "loss": loss + 0.01 * math.sin(number), "skipped": skipped}
        for number, (loss, skipped) in enumerate(told, start=1)
    ]


@pytest.mark.parametrize(
    ("told", "first"),
    [
        (steps((9, ORDINARY), (10, BAD)), 10),
        (steps((10, BAD)), 1),
        (steps((1, ORDINARY), (10, (5.7, True))), 2),  # a loss that is finite beside a gradient that is not
        (steps((50, ORDINARY), (3, BAD), (20, ORDINARY), (10, BAD)), 74),  # the first three did no harm
        (steps((50, ORDINARY), (20, (9.0, False)), (10, BAD)), 51),  # the loss had left its range before
        (steps((50, ORDINARY), (1, (9.0, False)), (40, ORDINARY), (10, BAD)), 92),  # a spike that came back
        (steps((50, ORDINARY), (5, (math.inf, True)), (300, (9.0, False)), (10, BAD)), 51),
    ],
)
def test_a_divergence_begins_where_the_run_left_its_course_for_good(told: list[dict], first: int) -> None:
    assert began(told) == first


def test_a_checkpoint_of_the_weights_that_the_first_bad_step_could_not_use_is_suspect() -> None:
    assert good_and_suspect([4, 8, 9, 12], 10) == ([4, 8], [9, 12])
    assert good_and_suspect([1, 2], 2) == ([], [1, 2])


def test_fp16_at_its_smallest_loss_scale_gives_the_same_advice(tmp_path: Path) -> None:
    lines = [{**line, "kind": "step"} for line in steps((9, ORDINARY), (3, BAD))]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for step in (4, 8, 12):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    settings = Settings.model_validate({"run": {"directory": tmp_path}})
    with pytest.raises(UserError, match=r"smallest loss scale, 1: .*bf16.*began at step 10; .*step-00000008: remove"):
        refuse_smallest_scale(1.0, settings, ALONE)


def train(run_file: Path, *changes: str) -> tuple[int, str]:
    """Train on one rank; gives the exit code and what was printed."""
    output = run_file.with_suffix(".printed")
    arguments = ["train", str(run_file), *(word for change in changes for word in ("--set", change))]
    (code,) = finish(start_ranks(1, command, arguments, output))
    return code, Path(f"{output}.0").read_text()


def test_a_run_that_diverged_names_the_newest_checkpoint_from_before(tmp_path: Path, shards: Path) -> None:
    run_file, checkpoints = write_run(tmp_path, shards), tmp_path / "run" / "checkpoints"
    kept = "checkpoint.keep=3"
    assert train(run_file, "training.steps=8", kept)[0] == 0
    code, printed = train(run_file, "training.steps=40", kept, "optimizer.learning_rate=1e30")
    assert code == 2
    assert "Traceback" not in printed
    for words in (
        "10 steps in a row up to step 19 had no finite loss or gradient: the run diverged; it began at step 10",
        f"the newest checkpoint from before is {checkpoints / 'step-00000008'}",
        f"remove the later ones from {checkpoints} (steps 12, 16, saved after it began)",
        "lower optimizer.learning_rate = 1e+30 and start again",
    ):
        assert words in printed


def test_a_run_that_diverged_at_once_is_told_to_start_over(tmp_path: Path, shards: Path) -> None:
    """The same run is told at its start what its lanes leave unread."""
    changes = ("training.steps=14", "schedule.warmup_steps=0", "optimizer.learning_rate=1e30")
    code, printed = train(write_run(tmp_path, shards), *changes, "data.max_epochs={news=1, letters=1}")
    assert code == 2
    assert "it began at step 2, and no checkpoint from before is left (4, 8 in " in printed
    assert "lower optimizer.learning_rate = 1e+30 and start over with --fresh" in printed
    assert "of the data cannot be reached: data.max_epochs ends the run with the lane" in printed
