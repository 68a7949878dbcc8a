"""A rank dies: what the survivors save is the state of a step, to the last bit; or they say why there is none."""

import time
from pathlib import Path

import pytest
import torch

from bigmodel.run_directory import read_json_lines
from bigmodel.training.checkpoint import format as checkpoint
from tests.support.ranks import command, finish, run_ranks, start_ranks
from tests.support.tiny_run import write_run

CONSTANT = ("--set", 'schedule.kind="constant"')  # so that the rate does not depend on training.steps


def kill_one(run_file: Path, output: Path) -> tuple[list[int], str]:
    """Exit codes of two ranks, the second of which is killed after some steps, and what the first printed."""
    arguments = ["train", str(run_file), *CONSTANT, "--set", "training.steps=5000"]
    ranks = start_ranks(2, command, [*arguments, "--set", "checkpoint.every_steps=5000"], output)
    lines, deadline = run_file.with_suffix("") / "metrics.jsonl", time.monotonic() + 100
    while sum(line["kind"] == "step" for line in read_json_lines(lines)) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    ranks[1].kill()
    ranks[1].join()
    deadline = time.monotonic() + 60
    while ranks[0].is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    return finish(ranks), Path(f"{output}.0").read_text()


def test_survivors_save_their_last_step_and_it_is_that_of_the_undisturbed_run(tmp_path: Path, shards: Path) -> None:
    run_file = write_run(tmp_path, shards, stage=0)
    codes, printed = kill_one(run_file, tmp_path / "printed")
    assert codes == [1, -9]
    found = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    step = found.state["step"]
    assert f"step {step}: saved by a survivor in {found.path}; the next start resumes there" in printed
    (event,) = [line for line in read_json_lines(tmp_path / "run/events.jsonl") if line["event"] == "rescued"]
    assert (event["step"], event["rank"]) == (step, 0)
    told = [line["step"] for line in read_json_lines(tmp_path / "run/metrics.jsonl") if line["kind"] == "step"]
    assert told[-1] == step >= 4, "nothing is lost"

    undisturbed = write_run(tmp_path, shards, stage=0, name="undisturbed")
    run_ranks(2, command, ["train", str(undisturbed), *CONSTANT, "--set", f"training.steps={step}"], tmp_path / "other")
    expected = checkpoint.newest(tmp_path / "undisturbed" / "checkpoints")
    assert expected is not None
    assert expected.state == found.state
    assert expected.description["updates"] == found.description["updates"]
    for key in ("weight", "exp_avg", "exp_avg_sq"):
        ours, theirs = checkpoint.read_weights(found, key), checkpoint.read_weights(expected, key)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("stage", [1])
def test_survivors_say_that_the_state_of_a_sharded_run_is_not_whole(tmp_path: Path, shards: Path, stage: int) -> None:
    codes, printed = kill_one(write_run(tmp_path, shards, stage=stage), tmp_path / "printed")
    assert codes == [1, -9]
    assert "not saved by the survivors: under ZeRO 1 to 3 each rank holds a part of the state alone" in printed
    assert not (tmp_path / "run/checkpoints/step-00000004").exists()
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is None
