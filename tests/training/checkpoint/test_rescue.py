"""A rank dies: what the survivors save is the state of a step, to the last bit; or they say why there is none."""

import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bigmodel.config.settings import Settings
from bigmodel.distributed.world import ALONE
from bigmodel.run_directory import read_json_lines
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.checkpoint.rescue import Rescue
from tests.support.ranks import command, finish, run_ranks, start_ranks
from tests.support.tiny_run import write_run
from tools.torture import Weights

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
    assert (
        "not saved by the survivors: each rank holds a part of the state alone (ZeRO 1 to 3, shared parameters)"
        in printed
    )
    assert "bigmodel: another rank has ended: connection " in printed.splitlines()[-1]
    assert "loop.py:" in printed.splitlines()[-1]
    assert "Traceback" not in printed
    assert not (tmp_path / "run/checkpoints/step-00000004").exists()
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is None


class Replica(Weights):
    """All state on one rank, as at ZeRO 0."""

    holds_all = True

    def held(self, name: str) -> dict[str, tuple[int, torch.Tensor]]:
        return self.owned(name)


def test_where_the_first_rank_cannot_save_its_state_another_survivor_does(tmp_path: Path, capsys) -> None:
    """The first one is often the rank whose device failed. A third one finds the step saved."""
    settings = Settings.model_validate({"run": {"directory": str(tmp_path)}})
    for rank in (1, 0, 2):
        replica = Replica(7)
        if rank == 1:
            replica.state["odd"]["weight"].view(-1)[2] = math.nan
        rescue = Rescue(replica, settings, replace(ALONE, rank=rank, size=3), 1, "", "tiny-0a1b2c3d")
        rescue.step_ends(7, lambda: {"step": 7})
        rescue.on_exit(RuntimeError, RuntimeError("a peer died"), None)
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(": step 7: ")[0] for line in told] == ["bigmodel (rank 1)", "bigmodel (rank 0)"]
    assert "not saved by the survivors: checkpoint of step 7 refused" in told[0]
    assert "saved by a survivor in" in told[1]
    found = checkpoint.newest(tmp_path / "checkpoints")
    assert found is not None
    assert found.state["step"] == 7
