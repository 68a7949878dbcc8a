"""Guarantee 4: killed at any instant, a run resumes and retraces the uninterrupted one, bitwise."""

import hashlib
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bigmodel.checks.runs import num_ranks, short_run
from bigmodel.config.settings import load_settings
from bigmodel.run_directory import read_json_lines
from bigmodel.training.checkpoint import format as checkpoint
from tests.support.ranks import finish, kill, run_ranks, start_ranks
from tests.support.tiny_run import write_run

CASES = [(stage, precision, "", "") for stage in (1, 3) for precision in ("fp32", "bf16")]
CASES += [(1, "bf16", "bias", ""), (3, "fp32", "loss", "")]  # balance of experts
CASES += [(3, "bf16", "", "all_gather"), (2, "fp32", "", "tensors")]
SHARED = {
    "": "",
    "ulysses": "sequence_parallel_ranks = 2",
    "all_gather": 'sequence_parallel_ranks = 2\nsequence_parallel_method = "all_gather"',
    "tensors": "tensor_parallel_ranks = 2",
    "experts": "expert_parallel_ranks = 2",
}


def share(run_file: Path, by: str) -> Path:
    """Its ranks share packed sequences, matrices or experts, a key of `SHARED`."""
    sharing = r"\n(sequence|tensor|expert)_parallel_\w+ = .*"
    text = re.sub(sharing, "", run_file.read_text())
    run_file.write_text(text.replace("\nsteps = 10", f"\nsteps = 10\n{SHARED[by]}"))
    return run_file


def train(run_file: Path, fault: str = "") -> int:
    """On a rank: train a run file; `fault` names where the save kills this process."""
    from bigmodel.training import loop

    if fault:
        os.environ["BIGMODEL_FAULT"] = fault
    return loop.train(load_settings(run_file))


def steps(run_file: Path) -> list[dict]:
    lines = read_json_lines(run_file.with_suffix("") / "metrics.jsonl")
    return [line for line in lines if line["kind"] == "step"]


def learned(run_file: Path) -> list[tuple]:
    """What training computed, exactly; not the seconds."""
    names = ("step", "loss", "gradient_norm", "learning_rate", "targets", "positions", "documents", "padding")
    names += ("expert_loads",)
    return [tuple(line[name] for name in names) for line in steps(run_file)]


def final_state(run_file: Path) -> dict[str, str]:
    """Hashes of the last checkpoint's weights and optimizer state."""
    folder = run_file.with_suffix("") / "checkpoints" / "step-00000010"
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


def started_at(run_file: Path) -> list[int]:
    return [
        line["step"] for line in read_json_lines(run_file.with_suffix("") / "events.jsonl") if line["event"] == "start"
    ]


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run file of an uninterrupted run of this precision and stage, trained once."""
    trained: dict[tuple, Path] = {}

    def train_once(precision: str = "fp32", stage: int = 1, balance: str = "", by: str = "") -> Path:
        case = precision, stage, balance, by
        if case not in trained:
            folder = tmp_path_factory.mktemp("whole")
            run_file = share(write_run(folder, shards, precision, stage, name="whole", balance=balance), by)
            run_ranks(2, train, run_file)
            trained[case] = run_file
        return trained[case]

    return train_once


@pytest.mark.parametrize(("stage", "precision", "balance", "by"), CASES)
def test_a_run_killed_at_a_random_instant_retraces_the_uninterrupted_one(
    shards: Path, tmp_path: Path, undisturbed: Callable[..., Path], stage: int, precision: str, balance: str, by: str
) -> None:
    whole = undisturbed(precision, stage, balance, by)
    broken = share(write_run(tmp_path, shards, precision, stage, name="broken", balance=balance), by)
    ranks = start_ranks(2, train, broken)
    last = random.randint(5, 8)  # the checkpoint is that of step 4; the kill falls into steps 6 to 9
    while not (done := steps(broken)) or done[-1]["step"] < last:
        assert all(rank.is_alive() for rank in ranks), "the run ended before it could be killed"
        time.sleep(0.001)
    time.sleep(random.uniform(0, done[-1]["step_seconds"]))
    kill(ranks)
    published = max([0, *checkpoint.steps(broken.with_suffix("") / "checkpoints")])
    run_ranks(2, train, broken)
    assert started_at(broken) == [0, published]  # saves are asynchronous: on a slow disk step 4 may not be there yet
    assert published in (0, 4, 8)
    assert learned(broken) == learned(whole)
    assert len(learned(whole)) == 10
    assert final_state(broken) == final_state(whole) != {}


@pytest.mark.parametrize("point", ["rank-1-wrote", "before-rename"])
def test_a_run_killed_inside_a_save_resumes_from_the_one_before(
    shards: Path, tmp_path: Path, undisturbed: Callable[..., Path], point: str
) -> None:
    whole, broken = undisturbed(), write_run(tmp_path, shards, name="broken")
    codes = finish(start_ranks(2, train, broken, f"{point}@8"))
    assert -9 in codes, codes
    run_ranks(2, train, broken)
    assert started_at(broken) == [0, 4]
    assert learned(broken) == learned(whole)
    assert final_state(broken) == final_state(whole) != {}


@pytest.mark.parametrize(("first", "second", "ranks"), [("tensors", "ulysses", 2), ("all_gather", "", 1)])
def test_a_run_of_ranks_that_share_goes_on_with_others_as_the_same_run(
    shards: Path, tmp_path: Path, undisturbed: Callable[..., Path], first: str, second: str, ranks: int
) -> None:
    """Killed in the second save, continued by another method or number of ranks. Evaluation is not shared."""
    whole, shared = undisturbed(), share(write_run(tmp_path, shards, name="shared"), first)
    shared.write_text(shared.read_text().replace("at_end = false", "at_end = true\nevery_steps = 5"))
    assert -9 in finish(start_ranks(2, train, shared, "rank-1-wrote@8"))
    run_ranks(ranks, train, share(shared, second))
    assert started_at(shared) == [0, 4]
    for one, two in zip(learned(whole), learned(shared), strict=True):
        assert one[3:] == two[3:]
        assert two[1:3] == pytest.approx(one[1:3], rel=1e-4)


def test_ranks_that_share_experts_train_the_same_run_and_one_rank_goes_on(
    shards: Path, tmp_path: Path, undisturbed: Callable[..., Path]
) -> None:
    """Killed in the second save, and continued by one rank that holds all experts."""
    whole, shared = undisturbed("fp32", 3, "loss"), write_run(tmp_path, shards, name="shared", balance="loss")
    shared.write_text(shared.read_text().replace("at_end = false", "at_end = true\nevery_steps = 5"))
    assert -9 in finish(start_ranks(2, train, share(shared, "experts"), "rank-1-wrote@8"))
    run_ranks(1, train, share(shared, ""))
    assert started_at(shared) == [0, 4]
    for one, two in zip(learned(whole), learned(shared), strict=True):
        assert one[3:8] == two[3:8]  # learning rate, targets, positions, documents, padding
        assert two[1:3] == pytest.approx(one[1:3], rel=1e-4)
        assert two[8]["largest"] == pytest.approx(one[8]["largest"], rel=0.02)  # rounding may move a token


def test_a_run_moves_to_another_number_of_ranks_with_the_same_batches(
    shards: Path, tmp_path: Path, undisturbed: Callable[..., Path]
) -> None:
    whole, moved = undisturbed(), write_run(tmp_path, shards, name="moved")
    finish(start_ranks(2, train, moved, "rank-1-wrote@8"))
    run_ranks(1, train, moved)
    assert started_at(moved) == [0, 4]
    for one, two in zip(learned(whole), learned(moved), strict=True):
        assert one[3:7] == two[3:7]  # learning rate, targets, positions, documents
        assert two[1] == pytest.approx(one[1], rel=1e-4)


def test_a_check_keeps_away_from_the_run_and_its_store(tmp_path: Path) -> None:
    """Its short runs would else go on from the run's own checkpoints, and leave theirs for the run to go on from."""
    run_file = tmp_path / "run.toml"
    run_file.write_text(
        "[checkpoint]\nremote = 's3://bucket/run'\nhours_between_failures = 8.0\n"
        "[metrics]\nport = 9000\nwriters = ['wandb']\n[training]\nsequence_parallel_ranks = 4\n"
    )
    settings = load_settings(run_file, short_run(load_settings(run_file), tmp_path / "check", 10, 4))
    assert settings.run.directory == tmp_path / "check"
    assert (settings.checkpoint.remote, settings.checkpoint.hours_between_failures) == ("", 0.0)
    assert (settings.metrics.port, settings.metrics.writers) == (0, [])
    assert num_ranks(settings) == 4


def test_a_check_takes_runs_that_are_evaluated(tmp_path: Path) -> None:
    """Its short runs are not; settings without effect, or that need evaluations, would end them."""
    (tmp_path / "best.toml").write_text(
        "[evaluation]\nevery_steps = 5\n[checkpoint]\nkeep_best = 'loss'\n[training]\nearly_stop = { patience = 2 }\n"
    )
    for run_file in [*Path("configs").glob("tiny*.toml"), tmp_path / "best.toml"]:
        evaluation = load_settings(run_file, short_run(load_settings(run_file), tmp_path / "check", 10, 4)).evaluation
        assert not evaluation.at_end
        assert evaluation.every_steps > 10
