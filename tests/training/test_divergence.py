"""A run that diverged: when it began, and which checkpoints are from before."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bigmodel.config.settings import Settings, UserError
from bigmodel.distributed.world import ALONE
from bigmodel.training.divergence import Course, began, refuse_smallest_scale
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


@pytest.mark.parametrize(
    ("told", "since"),
    [
        (steps((50, ORDINARY), (5, BAD)), 51),
        (steps((50, ORDINARY), (5, BAD), (1, ORDINARY)), 0),
        (steps((50, ORDINARY), (999, (9.0, False))), 51),
        (steps((50, ORDINARY), (1000, (9.0, False))), 0),  # a new course
        (steps((50, ORDINARY), (1000, (9.0, False)), (3, BAD)), 1051),
        (steps((50, ORDINARY), (2000, BAD)), 51),
    ],
)
def test_a_run_is_off_its_course_until_a_step_is_ordinary_or_a_thousand_are_alike(told: list[dict], since: int) -> None:
    course = Course()
    for line in told:
        course.see(line["step"], line["loss"], line["skipped"])
    assert course.first == since


def test_a_restart_knows_from_the_metrics_whether_it_is_on_course(tmp_path: Path) -> None:
    lines = [{"kind": "step", **line} for line in steps((50, ORDINARY), (5, BAD), (5, ORDINARY))]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert [Course.resumed(tmp_path, step).first for step in (50, 52, 55, 60)] == [0, 51, 51, 0]
    assert Course.resumed(tmp_path / "new", 0).first == 0


def test_fp16_at_its_smallest_loss_scale_gives_the_same_advice(tmp_path: Path) -> None:
    lines = [{**line, "kind": "step"} for line in steps((9, ORDINARY), (3, BAD))]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for step in (4, 8, 12):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    settings = Settings.model_validate({"run": {"directory": tmp_path}})
    with pytest.raises(UserError, match=r"smallest loss scale, 1: .*bf16.*began at step 10; .*step-00000008 and sets"):
        refuse_smallest_scale(1.0, settings, ALONE)


def train(run_file: Path, *changes: str) -> tuple[int, str]:
    """Train on one rank; gives the exit code and what was printed."""
    output = run_file.with_suffix(".printed")
    arguments = ["train", str(run_file), *(word for change in changes for word in ("--set", change))]
    (code,) = finish(start_ranks(1, command, arguments, output))
    return code, Path(f"{output}.0").read_text()


def test_a_run_that_diverged_names_its_newest_healthy_checkpoint_and_resumes_from_it(
    tmp_path: Path, shards: Path
) -> None:
    """At step 8 there are 4, which is healthy, and 8. Later 12 and 16 hold finite weights of 1e30, of no use."""
    run_file, checkpoints = write_run(tmp_path, shards), tmp_path / "run" / "checkpoints"
    assert train(run_file, "training.steps=8")[0] == 0
    code, printed = train(run_file, "training.steps=40", "optimizer.learning_rate=1e30")
    assert code == 2
    assert "Traceback" not in printed
    for words in (
        "10 steps in a row up to step 19 had no finite loss or gradient: the run diverged; it began at step 10",
        f"the next start resumes from the newest healthy checkpoint from before, {checkpoints / 'step-00000004'} and "
        f"sets the later ones of {checkpoints} aside (steps 12, 16)",
        "lower optimizer.learning_rate = 1e+30 and start again",
    ):
        assert words in printed
    code, printed = train(run_file, "training.steps=16")
    assert code == 0
    assert (
        "the run diverged at step 10: it resumes from the newest healthy checkpoint, of step 4; those of steps 12, 16 "
        "are set aside as step-....diverged"
    ) in printed
    assert "resuming at step 4" in printed
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "step-00000012",
        "step-00000016",
        "step-00000016.diverged",
    ]


def test_a_run_that_diverged_at_once_is_told_to_start_over(tmp_path: Path, shards: Path) -> None:
    """The same run is told at its start what its lanes leave unread."""
    changes = ("training.steps=14", "schedule.warmup_steps=0", "optimizer.learning_rate=1e30")
    code, printed = train(write_run(tmp_path, shards), *changes, "data.max_epochs={news=1, letters=1}")
    assert code == 2
    assert "it began at step 2, and no checkpoint from before is left (4, 8 in " in printed
    assert "lower optimizer.learning_rate = 1e+30 and start over with --fresh" in printed
    assert "of the data cannot be reached: data.max_epochs ends the run with the lane" in printed


def train_with_a_broken_weight(arguments: list[str], output: Path) -> int:
    """On a rank: after the sixth update a master weight of rank 1 is not finite, as by a fault of its memory; the
    forward pass sees it after the seventh."""
    from bigmodel.training.zero.engine import Engine

    real = Engine.update

    def update(self: Engine, *given: Any, **named: Any) -> None:
        real(self, *given, **named)
        if self.updates == 6 and self.world.rank == 1:
            held = [self.held(name) for name in self.names() if "norm" in name]
            next(one for one in held if "weight" in one)["weight"][1][5] = math.nan

    Engine.update = update  # type: ignore[method-assign]
    return command(arguments, output)


def test_a_state_that_is_broken_is_named_with_its_rank_and_not_blamed_on_the_learning_rate(
    tmp_path: Path, shards: Path
) -> None:
    run_file = write_run(tmp_path, shards, stage=1)
    arguments = ["train", str(run_file), "--set", "training.steps=40"]
    assert finish(start_ranks(2, train_with_a_broken_weight, arguments, tmp_path / "printed")) == [1, 1]
    printed = (tmp_path / "printed.0").read_text()
    for words in (
        "step 8: no finite loss or gradient, because the state itself is broken: rank 1: weight of ",
        "numbers not finite, the first is nan at ",
        "the next start resumes from the newest healthy checkpoint from before, ",
        "step-00000004: check the device and the memory of rank 1",
    ):
        assert words in printed
    assert "Traceback" not in printed
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "broken_state"]
    assert (event["step"], event["ranks"]) == (8, [1])
