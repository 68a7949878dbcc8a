"""`bigmodel check RUN.toml exact`: the engine is plain torch, and a planted difference is found and named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bigmodel.__main__ import app
from bigmodel.checks import exact, exact_rank
from bigmodel.checks.audit import Finding
from bigmodel.checks.exact_steps import Row, number_row
from tests.support.ranks import command, finish, run_ranks, start_ranks
from tests.support.tiny_run import write_run

Outcome = tuple[list[Finding], dict[str, list[Any]]]
FEW = ["training.steps=6"]


def with_json(run_file: Path, **changes: Any) -> None:
    """Change the run's DeepSpeed JSON."""
    path = run_file.with_name(f"{run_file.stem}-deepspeed.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def compared(job: exact_rank.Job, folder: Path, ranks: int = 2) -> Outcome:
    """Findings and report of a job whose reference lies in `folder`."""
    (folder / "job.json").write_text(json.dumps(job._asdict()))
    run_ranks(ranks, exact_rank.run, folder)
    report = exact.read_report(folder)
    return exact.findings(job, ranks, report), report


@pytest.fixture(scope="module")
def check(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """Compares a run of ZeRO 2 in fp32, whose steps in plain torch are done once, after a change of the engine's side:
    `changes` of its DeepSpeed configuration."""
    folder = tmp_path_factory.mktemp("exact")
    run_file = write_run(folder, shards, stage=2)
    job = exact.prepare(run_file, [*FEW, "training.ema_decay=0.9"], 2, folder, "cpu")

    def change(name: str, **changes: Any) -> Outcome:
        copy = shutil.copytree(folder, folder / name, ignore=shutil.ignore_patterns(name))
        return compared(job._replace(effective=job.effective | changes), copy)

    return change


def test_zero_2_is_plain_torch_and_each_stage_has_its_gradient_norm(check: Callable[..., Outcome]) -> None:
    (steps, norms), report = check("same")
    assert steps.holds, steps
    assert norms.holds, norms
    assert "6 steps under ZeRO 2 on 2 ranks" in steps.claim
    assert [row.what for row in report["rows"]] == [
        *("loss", "gradient norm", "loss", "gradient norm", "gradients", "movement of weights", "movement of averages")
    ]
    assert all(row.bound <= 1e-4 for row in report["rows"]), "the bounds are those of fp32"
    assert max(row.difference for row in report["rows"]) > 0, "two computations have been compared"
    own = [row.where for row in report["norms"] if row.what == "DeepSpeed's own norm"]
    ours = [row.where for row in report["norms"] if row.what == "gradient norm"]
    assert (ours, own) == (["ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3"], ["ZeRO 1", "ZeRO 2", "ZeRO 3"])


def test_a_wrong_clipping_of_the_engine_is_found_and_named(check: Callable[..., Outcome]) -> None:
    (steps, norms), report = check("clipped", gradient_clipping=0.1, wall_clock_breakdown=False)
    assert not steps.holds
    assert norms.holds, "the norm is that before clipping"
    assert report["keys"] == ["gradient_clipping"]
    assert "because of gradient_clipping = 0.1: with the default every row is within its bound" in steps.evidence
    broken = {row.what for row in report["rows"] if not row.holds}
    assert "movement of weights" in broken
    assert "gradients" not in broken


def test_sums_over_ranks_in_bf16_are_out_of_bounds_of_fp32_and_named(shards: Path, tmp_path: Path) -> None:
    run_file = write_run(tmp_path, shards, stage=3)
    for_four_ranks = {"train_batch_size": 4, "gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 1}
    with_json(run_file, communication_data_type="bf16", prescale_gradients=False, **for_four_ranks)
    job = exact.prepare(run_file, ["training.steps=2"], 2, tmp_path, "cpu")
    assert job.effective["gradient_accumulation_steps"] == 2, "the JSON is for four ranks, the check has two"
    (steps, norms), report = compared(job, tmp_path)
    assert not steps.holds
    assert not norms.holds
    assert report["keys"] == ["communication_data_type"]
    assert 'because of communication_data_type = "bf16"' in steps.evidence
    assert "gradients" in {row.what for row in report["rows"] if not row.holds}


def test_a_difference_that_no_key_explains_and_a_third_of_the_norm_are_said() -> None:
    job = exact_rank.Job("run.toml", [], 20, {"zero_optimization": {"stage": 2}}, {"2": {}, "3": {}}, [], [])
    norms = [(2, 1.6262), (3, 4.7373)]  # those of DeepSpeed's issue 7718
    report = {
        "rows": [Row("gradients", None, None, 0.3, 1e-5, "step 1, norm.weight")],
        "norms": [number_row("gradient norm", 4.7373, norm, 1e-6, f"ZeRO {stage}") for stage, norm in norms],
        "keys": [],
    }
    steps, same = exact.findings(job, 2, report)
    assert not steps.holds
    assert "gradients of step 1, norm.weight: 3.0e-01, bound 1.0e-05" in steps.evidence
    assert "it stays with the defaults of all other keys" in steps.evidence
    assert not same.holds
    assert "under ZeRO 2, 3" in same.claim
    assert "1.6262 to 4.7373" in same.evidence


def test_a_value_that_is_not_finite_is_out_of_every_bound() -> None:
    assert not number_row("loss", 2.0, float("nan"), 1e30, "step 2").holds


def test_the_command_prints_a_table_of_a_run_at_stage_0(shards: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run_file = write_run(tmp_path, shards, stage=0)
    changes = ["training.steps=3", "training.global_batch_size=1", "data.lanes=1"]
    options = [word for change in changes for word in ("--set", change)]
    done = CliRunner().invoke(app, ["check", str(run_file), "exact", *options])
    assert done.exit_code == 0, done.output
    assert "3 steps, fp32, adamw, ZeRO 0, 1 rank, micro-batches of 1 packed sequence" in done.output
    assert "gradient norm, ZeRO 3" in done.output
    assert "holds  exact: 3 steps under ZeRO 0 on 1 rank are those of plain torch in one process" in done.output


@pytest.mark.parametrize(
    ("changes", "overrides", "words"),
    [
        ({"gradient_clipping": "much"}, [], "run-deepspeed.json: gradient_clipping = "),
        ({}, ["training.precision=bf16"], "run-deepspeed.json: zero_optimization.stage = 0 with bf16"),
        ({}, ["model.hidden_size=65536", "model.num_layers=64"], "--set model.num_layers=2"),
        ({}, ["optimizer.learning_rate=1e300"], "the gradient norm is "),
    ],
)
def test_what_cannot_be_compared_ends_with_one_message_and_exit_code_2(
    shards: Path, tmp_path: Path, changes: dict[str, Any], overrides: list[str], words: str
) -> None:
    run_file = write_run(tmp_path, shards, stage=0)
    with_json(run_file, **changes)
    options = [word for change in overrides for word in ("--set", change)]
    codes = finish(start_ranks(1, command, ["check", str(run_file), "exact", *options], tmp_path / "printed"))
    printed = (tmp_path / "printed.0").read_text()
    assert codes == [2], printed
    assert words in printed
    assert "Traceback" not in printed
