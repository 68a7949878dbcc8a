"""The best checkpoint and the early end: as decided, on all ranks, and the same after a kill."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from bigmodel.config.settings import Settings, UserError
from bigmodel.evaluation.evaluate import Evaluation
from bigmodel.run_directory import read_json_lines
from bigmodel.training.best import Judge
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.checkpoint.saver import FAULT_VARIABLE
from tests.support.ranks import command, finish, run_ranks, start_ranks
from tests.support.tiny_run import write_run

EVALUATED = {"every_steps": 10}


def evaluation(nats: float) -> Evaluation:
    return Evaluation(nats, 1, None, 0.0)


def judge(state: dict[str, Any] | None = None, keep: str = "loss", **stop: Any) -> Judge:
    table = {"evaluation": EVALUATED, "checkpoint": {"keep_best": keep}, "training": {"early_stop": stop or None}}
    return Judge(Settings.model_validate(table), state or {})


def seen(losses: list[float], **stop: Any) -> tuple[list[int], int]:
    """The steps that were the best so far, and the step of the early end; resumed from its state after each."""
    one, best = judge(**stop), []
    for step, loss in enumerate(losses, 1):
        one.see(step, evaluation(loss))
        best += [step] if one.is_best(step) else []
        if one.stops:
            return best, step
        one = judge(json.loads(json.dumps(one.state())), **stop)
    return best, 0


def test_the_run_ends_after_as_many_evaluations_without_a_better_one() -> None:
    assert seen([3.0, 2.5, 2.6, 2.5], patience=2) == ([1, 2], 4)
    assert seen([3.0, 2.5, 2.6, 2.4, 2.4], patience=2) == ([1, 2, 4], 0)
    assert seen([3.0, 2.5, 2.6, 2.5]) == ([1, 2], 0)


def test_less_than_min_delta_is_not_better_for_the_end_but_for_the_best_checkpoint() -> None:
    assert seen([3.0, 2.95, 2.92], patience=2, min_delta=0.1) == ([1, 2, 3], 3)
    assert seen([3.0, 2.95, 2.85], patience=2, min_delta=0.1) == ([1, 2, 3], 0)


def test_the_reason_of_an_early_end_names_the_min_delta_that_losses_fell_short_of() -> None:
    one = judge(patience=2, min_delta=0.1)
    for step, loss in enumerate([3.0, 2.95, 2.92], 1):
        one.see(step, evaluation(loss))
    assert one.stops
    assert one.reason.startswith("no better loss than 3 of step 1, by more than min_delta = 0.1, in 2 evaluations (")


def test_what_is_not_finite_is_never_better() -> None:
    assert seen([float("nan"), float("inf"), 2.0, float("nan")], patience=3) == ([3], 0)
    assert seen([float("nan")] * 3, patience=3) == ([], 3)


def test_more_patience_lets_a_run_that_ended_go_on_and_another_metric_begins_anew() -> None:
    one = judge(patience=1)
    one.see(10, evaluation(2.0))
    one.see(20, evaluation(3.0))
    assert one.stops
    assert one.reason == "no better loss than 2 of step 10 in 1 evaluation (training.early_stop.patience = 1)"
    assert judge(one.state(), patience=1).stops
    assert not judge(one.state(), patience=2).stops
    assert not judge(one.state(), metric="bits_per_byte", patience=1).stops
    assert judge(one.state()).lacks(30)
    assert not judge(one.state()).lacks(20)


@pytest.mark.parametrize("metric", ["macro_f1", "balanced_accuracy"])
def test_a_measure_of_classes_is_refused_before_a_run_without_classes(metric: str) -> None:
    for changes, name in (
        ({"keep": metric}, "checkpoint.keep_best"),
        ({"metric": metric}, "training.early_stop.metric"),
    ):
        with pytest.raises(
            ValueError, match=rf'{name} = "{metric}" is a measure of classes: set classification.classes'
        ):
            judge(**changes)
    judge(keep="accuracy", metric="accuracy")  # of the next token


# Whole runs.

CHANGES = [
    "training.steps=40", "evaluation.every_steps=2", "evaluation.sequences=6", "checkpoint.every_steps=7",
    "checkpoint.keep=1", "checkpoint.keep_best=loss", "optimizer.learning_rate=0.3", "schedule.kind=constant",
    "training.early_stop={ patience = 3, min_delta = 0.01 }",
]  # fmt: skip


def killed(point: str, arguments: list[str], output: Path) -> int:
    os.environ[FAULT_VARIABLE] = point
    return command(arguments, output)


def events(run: Path) -> list[str]:
    return [line["event"] for line in read_json_lines(run / "events.jsonl")]


def evaluations(run: Path) -> dict[int, float]:
    lines = read_json_lines(run / "metrics.jsonl")
    return {line["step"]: line["nats_per_token"] for line in lines if line["kind"] == "evaluation"}


@pytest.mark.timeout(300)
def test_a_run_ends_early_with_its_best_checkpoint_also_after_a_kill(tmp_path: Path, shards: Path) -> None:
    changes = [part for change in CHANGES for part in ("--set", change)]
    train = ["train", str(write_run(tmp_path, shards)), *changes]
    run, other = tmp_path / "run", tmp_path / "other"
    run_ranks(2, command, train, tmp_path / "printed")
    printed = (tmp_path / "printed.0").read_text()
    scored = evaluations(run)
    best, last = min(scored, key=lambda step: scored[step]), max(scored)
    assert best < last < 40
    assert f"step {last}: the run ends early: no better loss than" in printed
    assert events(run) == ["start", "stopped_early", "finished"]
    assert checkpoint.steps(run / "checkpoints") == [best, last]
    assert checkpoint.of_run(run, best=True).state["step"] == best
    assert checkpoint.of_run(run).state["step"] == last

    # Killed in the save of the best step, after its evaluation, on one rank: the same decisions.
    train += ["--set", f"run.directory={other}"]
    codes = finish(start_ranks(2, killed, f"rank-0-half@{best}", train, tmp_path / "printed"))
    assert -signal.SIGKILL in codes
    assert best not in checkpoint.steps(other / "checkpoints")
    run_ranks(1, command, train, tmp_path / "printed")
    assert evaluations(other)[last] == pytest.approx(scored[last], rel=1e-3)
    assert checkpoint.steps(other / "checkpoints") == [best, last]
    run_ranks(1, command, train, tmp_path / "printed")
    assert f"resuming at step {last}" in (tmp_path / "printed.0").read_text()
    assert checkpoint.steps(other / "checkpoints") == [best, last]
    run_ranks(1, command, ["evaluate", str(other), "--best"], tmp_path / "printed")
    assert (tmp_path / "printed.0").read_text().startswith(f"step {best}: ")
    # As where a run has resumed on a new machine from checkpoint.remote, which fetches only the newest.
    (other / "checkpoints" / f"step-{best:08d}").rename(tmp_path / "best")
    with pytest.raises(UserError, match=rf"step-{best:08d}: --best: the best checkpoint is not here; copy this folder"):
        checkpoint.of_run(other, best=True)
