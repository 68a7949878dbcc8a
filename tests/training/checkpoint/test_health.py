"""Healthy checkpoints: who gets the mark, what stays, where a run goes back to; numbers that are not finite."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bigmodel.config.settings import Settings, UserError
from bigmodel.distributed.world import ALONE, start_world
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.checkpoint.failures import NotFiniteError
from bigmodel.training.checkpoint.finite import not_finite
from bigmodel.training.checkpoint.health import go_back, is_healthy, last_good, mark, newest_healthy, record_divergence
from bigmodel.training.checkpoint.saver import Saver
from tests.support.ranks import finish, start_ranks
from tools.torture import Weights


def saver_of(run: Path, world: Any = ALONE, **values: Any) -> Saver:
    return Saver(run / "checkpoints", Settings.model_validate({"checkpoint": values}), world, run="tiny-0a1b2c3d")


def train(saver: Saver, steps: Sequence[int], off_since: int = 0) -> None:
    """Steps in a row; from step `off_since` on the run is off its course."""
    for step in steps:
        left = off_since if off_since and step >= off_since else 0
        list(saver.step(Weights(step), step, 0.0, False, lambda step=step: {"step": step}, left_course=left))


def kept(run: Path) -> list[int]:
    return checkpoint.steps(run / "checkpoints")


def healthy(run: Path) -> list[int]:
    return [step for step in kept(run) if is_healthy(checkpoint.path_of(run / "checkpoints", step))]


def test_a_checkpoint_is_healthy_after_ten_steps_on_course_or_when_the_next_is_published(tmp_path: Path) -> None:
    saver = saver_of(tmp_path / "ten", every_steps=20, keep=3, asynchronous=False)
    train(saver, range(1, 30))
    assert healthy(tmp_path / "ten") == []
    train(saver, [30])
    assert healthy(tmp_path / "ten") == [20]
    saver = saver_of(tmp_path / "next", every_steps=4, keep=3, asynchronous=False)
    train(saver, range(1, 8))
    assert healthy(tmp_path / "next") == []
    train(saver, [8])
    assert (kept(tmp_path / "next"), healthy(tmp_path / "next")) == ([4, 8], [4])


def test_a_checkpoint_of_finite_weights_that_no_step_could_use_is_never_healthy_and_the_healthy_one_stays(
    tmp_path: Path,
) -> None:
    """Saved at 12 and from then on off course since step 13, as with weights of 5e29; more and more is saved."""
    saver = saver_of(tmp_path, every_steps=4, keep=2, asynchronous=False)
    train(saver, range(1, 41), off_since=13)
    assert kept(tmp_path) == [8, 36, 40]
    assert healthy(tmp_path) == [8]
    train(saver, range(41, 49))  # it came back by itself
    assert (kept(tmp_path), healthy(tmp_path)) == ([44, 48], [44])


def test_where_nothing_has_the_mark_the_newest_from_before_stays(tmp_path: Path) -> None:
    """Checkpoints of versions without marks."""
    earlier = saver_of(tmp_path, keep=2)
    for step in (4, 8):
        earlier.save(Weights(step), {"step": step})
    train(saver_of(tmp_path, every_steps=4, keep=1, asynchronous=False), range(9, 25), off_since=10)
    assert (kept(tmp_path), healthy(tmp_path)) == ([8, 24], [])


def test_one_checkpoint_is_kept_where_one_is_asked_for_as_soon_as_it_is_healthy(tmp_path: Path) -> None:
    saver = saver_of(tmp_path, every_steps=20, keep=1, asynchronous=False)
    train(saver, range(1, 50))
    assert kept(tmp_path) == [20, 40]
    train(saver, [50])
    assert kept(tmp_path) == [40]


def test_a_restart_goes_on_proving_the_checkpoint_it_resumed(tmp_path: Path) -> None:
    train(saver_of(tmp_path, every_steps=20, asynchronous=False), range(1, 25))
    train(saver_of(tmp_path, every_steps=20, asynchronous=False), range(21, 31))
    assert healthy(tmp_path) == [20]


# --- back


def diverged(run: Path, remote: str = "") -> None:
    """Checkpoints 4, 8, 12 and 16, of which 4 and 8 are healthy; off course since step 11."""
    saver = saver_of(run, keep=9, remote=remote)
    for step in (4, 8, 12, 16):
        saver.save(Weights(step), {"step": step})
        saver.close()
    for step in (4, 8):
        mark(checkpoint.path_of(run / "checkpoints", step))


def test_the_start_after_a_divergence_resumes_from_the_newest_healthy_checkpoint_and_says_so(tmp_path: Path) -> None:
    diverged(tmp_path)
    found, problem = record_divergence(tmp_path / "checkpoints", 11)
    assert (found.last_good, found.suspect, problem) == (8, [12, 16], "")
    reader, told = checkpoint.newest(tmp_path / "checkpoints"), []
    assert reader is not None
    assert reader.state["step"] == 8, "export and generate take no weights from after a divergence"
    assert kept(tmp_path) == [4, 8, 12, 16], "a reader changes nothing"
    owner = checkpoint.newest(tmp_path / "checkpoints", ALONE, told.append)
    assert owner is not None
    assert (owner.state["step"], kept(tmp_path)) == (8, [4, 8])
    assert told == [
        "the run diverged at step 11: it resumes from the newest healthy checkpoint, of step 8; those of steps 12, 16 "
        "are set aside as step-....diverged"
    ]
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert (event["event"], event["step"], event["set_aside"]) == ("went_back", 8, [12, 16])
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("*.diverged")) == [
        "step-00000012.diverged",
        "step-00000016.diverged",
    ]
    assert go_back(tmp_path / "checkpoints") == "", "once"
    saver = saver_of(tmp_path, every_steps=4, asynchronous=False)
    train(saver, range(9, 17))  # 12 is healthy again
    assert [path.name for path in (tmp_path / "checkpoints").glob("*.diverged")] == ["step-00000016.diverged"]
    train(saver, range(17, 21))
    assert list((tmp_path / "checkpoints").glob("*.diverged")) == []


def test_a_checkpoint_is_from_before_only_if_a_good_step_has_used_it(tmp_path: Path) -> None:
    diverged(tmp_path)
    directory = tmp_path / "checkpoints"
    mark(checkpoint.path_of(directory, 12))
    assert [last_good(directory, first) for first in (14, 13, 9, 5)] == [12, 8, 4, 0]
    (checkpoint.path_of(directory, 8) / "state.json").write_bytes(b"{")
    assert newest_healthy(directory, 12) == 4, "a mark on a damaged checkpoint counts for nothing"


def test_the_store_gives_no_checkpoint_from_after_a_divergence_until_it_is_saved_anew(tmp_path: Path) -> None:
    remote = f"file://{tmp_path / 'store'}"
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    diverged(here, remote)
    record_divergence(here / "checkpoints", 11, remote)
    for run in (here, elsewhere):  # the second has lost its disk
        found = checkpoint.newest(run / "checkpoints", ALONE, lambda line: None, remote)
        assert found is not None
        assert found.state["step"] == 8
    saver = saver_of(here, remote=remote)
    saver.save(Weights(12), {"step": 12, "again": True})
    saver.close()
    found = checkpoint.newest(tmp_path / "third" / "checkpoints", ALONE, remote=remote)
    assert found is not None
    assert found.state == {"step": 12, "again": True}


def test_a_run_whose_last_good_checkpoint_is_gone_does_not_go_on_from_a_bad_one(tmp_path: Path) -> None:
    diverged(tmp_path)
    record_divergence(tmp_path / "checkpoints", 11)
    os.rename(tmp_path / "checkpoints/step-00000008", tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"step-00000008 is gone: the run diverged at step 11.*put it back"):
        checkpoint.newest(tmp_path / "checkpoints", ALONE)
    assert kept(tmp_path) == [4, 12, 16]


# --- finite


def save_with_nan(run: Path, key: str) -> int:
    """On two ranks: steps 4 and 8; in step 8 rank 1 has one number that is not finite."""
    world = start_world(timeout_seconds=20)
    saver = saver_of(run, world, on_failure="continue")
    saver.save(Weights(4, world=world), {"step": 4})
    weights = Weights(8, world=world)
    if world.rank == 1:
        weights.state["odd"][key].view(-1)[9] = math.nan
    saver.begin(weights, {"step": 8})
    try:
        saver.finish(must=False)
    except NotFiniteError as error:
        (run / f"told.{world.rank}").write_text(str(error))
        return error.exit_code
    return 0


@pytest.mark.parametrize("key", ["weight", "exp_avg_sq"])
def test_a_number_that_is_not_finite_is_refused_by_all_ranks_with_its_rank_and_tensor(tmp_path: Path, key: str) -> None:
    """Also with checkpoint.on_failure = "continue"; exit code 1, because starting again may help."""
    assert finish(start_ranks(2, save_with_nan, tmp_path, key)) == [1, 1]
    told = {(tmp_path / f"told.{rank}").read_text() for rank in (0, 1)}
    assert len(told) == 1
    for words in (
        f"checkpoint of step 8 refused: rank 1: {key} of odd: 1 of 8 numbers not finite, the first is nan at 9",
        f"the next start resumes from {tmp_path / 'checkpoints/step-00000004'}",
        "the device or the memory of rank 1 is to be checked",
    ):
        assert words in next(iter(told))
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000004"]


def test_finite_numbers_whose_sum_overflows_are_finite() -> None:
    large = torch.full((4,), 3e38)
    assert not torch.isfinite(large.sum())
    assert not_finite({"weight.a@0": large}) == ""
    for value in (math.inf, -math.inf, math.nan):
        large[2] = value
        assert f"weight of a.b: 1 of 4 numbers not finite, the first is {value} at 12" == not_finite(
            {"exp_avg.a.b@10": torch.ones(3), "weight.a.b@10": large}
        )
