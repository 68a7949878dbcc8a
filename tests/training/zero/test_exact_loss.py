"""The same tokens over any number of ranks and micro-batches give the loss, gradient and update of plain torch."""

import math
from pathlib import Path
from typing import Any

import pytest

from bigmodel.config.settings import Settings
from tests.support.engine_worker import PACKS, launch, oracle, plain_evaluation, settings_table

STEPS = 2
STAGES = (0, 1, 2, 3)
SHARDED_AND_PRECISE = [(0, "fp32"), *((stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16"))]
PACKS_AT_ONCE = {1: {1: 6, 2: 3, 3: 2}, 2: {1: 3, 2: 2, 3: 1}}  # world size -> micro-batches -> packs in each

Jobs = dict[str, dict[str, Any]]


def exact_jobs(folder: Path, world_size: int) -> Jobs:
    """Every stage with 1, 2 and 3 micro-batches; the gradient is clipped (its norm is about 1.5)."""
    table = settings_table(folder, 0, "fp32", 1)
    seen = oracle(Settings.model_validate(table), STEPS, folder / "oracle.safetensors")
    assert all(step["norm"] > 1.2 for step in seen), "the clipping at 1.0 must be at work"
    return {
        f"zero{stage} in {count}": {
            "settings": settings_table(folder, stage, "fp32", packs),
            "steps": STEPS,
            "oracle": str(folder / "oracle.safetensors"),
            "evaluate_at": [0],
            "seen": seen,
        }
        for stage in STAGES
        for count, packs in PACKS_AT_ONCE[world_size].items()
    }


def other_jobs(folder: Path) -> Jobs:
    """Tied embeddings, no clipping, bf16 sums, and what a skipped step leaves behind."""
    jobs: Jobs = {}
    for name, other in (
        ("tied", {"tied": True}),
        ("unclipped", {"clipping": 0.0}),
        (
            "cycled",
            {"schedule": {"kind": "one_cycle", "rise_steps": 2, "lowest_rate": 1e-3, "beta1_range": (0.5, 0.8)}},
        ),
    ):
        table = settings_table(folder, 0, "fp32", 1, **other)
        path = folder / f"{name}.safetensors"
        seen = oracle(Settings.model_validate(table), STEPS, path)
        for stage in (1, 3):
            table = settings_table(folder, stage, "fp32", 2, **other)
            jobs[f"{name} zero{stage}"] = {"settings": table, "steps": STEPS, "oracle": str(path), "seen": seen}
    table = settings_table(folder, 1, "bf16", 1)
    seen = oracle(Settings.model_validate(table), 1, folder / "bf16.safetensors", packs_at_once=1)
    for stage in (1, 2, 3):
        table = settings_table(folder, stage, "bf16", 1)
        path = str(folder / "bf16.safetensors")
        jobs[f"bf16 zero{stage}"] = {"settings": table, "steps": 1, "oracle": path, "seen": seen}
    for stage, precision in SHARDED_AND_PRECISE:
        table = settings_table(folder, stage, precision, 2)
        jobs[f"skipped zero{stage} {precision}"] = {
            "settings": table, "steps": 3, "skip_at": [1], "bad_ranks": [0, 1], "evaluate_at": [2]
        }  # fmt: skip
        jobs[f"absent zero{stage} {precision}"] = {"settings": table, "steps": 3, "leave_out": [1]}
    return jobs


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Jobs]:
    """world size -> name -> the job and what came of it, from one launch per world size."""
    found = {}
    for world_size in (1, 2):
        folder = tmp_path_factory.mktemp(f"world{world_size}")
        jobs = exact_jobs(folder, world_size) | (other_jobs(folder) if world_size == 2 else {})
        outcome = launch(list(jobs.values()), world_size, folder)
        found[world_size] = {name: jobs[name] | one for name, one in zip(jobs, outcome, strict=True)}
    return found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_gradients_and_norm_are_those_of_plain_torch(results, world_size: int, stage: int, micro_batches: int) -> None:
    one = results[world_size][f"zero{stage} in {micro_batches}"]
    assert one["micro_batches"] == micro_batches
    assert len(one["gradient_errors"]) == STEPS
    assert max(one["gradient_errors"]) < 1e-5
    for loss, norm, seen in zip(one["losses"], one["norms"], one["seen"], strict=True):
        assert loss == pytest.approx(seen["loss"], rel=1e-6)
        assert norm == pytest.approx(seen["norm"], rel=1e-6)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_updates_and_clipping_are_those_of_plain_torch(results, world_size: int, stage: int) -> None:
    for micro_batches in (1, 2, 3):
        one = results[world_size][f"zero{stage} in {micro_batches}"]
        assert one["updates"] == STEPS
        assert one["exp_avg_error"] < 1e-5, "the first moment is linear in the clipped gradient"
        assert one["weight_error"] < 1e-5


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("kind", ["tied", "unclipped", "cycled"])
def test_tied_embeddings_no_clipping_and_a_changing_beta1_are_exact_too(results, kind: str, stage: int) -> None:
    one = results[2][f"{kind} zero{stage}"]
    assert max(one["gradient_errors"]) < 1e-5
    assert one["norms"] == pytest.approx([seen["norm"] for seen in one["seen"]], rel=1e-6)
    assert one["exp_avg_error"] < 1e-5
    assert one["weight_error"] < 1e-5


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_gradients_of_micro_batches_are_added_up_in_fp32(results, stage: int) -> None:
    """bf16 sums of 6 gradients would be wrong by 2e-3; the same bf16 gradients added in fp32 are right to 1e-6."""
    one = results[2][f"bf16 zero{stage}"]
    assert one["micro_batches"] == PACKS // 2
    assert one["gradient_errors"][0] < 1e-5
    assert one["norms"][0] == pytest.approx(one["seen"][0]["norm"], rel=1e-6)


@pytest.mark.parametrize(("stage", "precision"), SHARDED_AND_PRECISE)
def test_a_skipped_step_leaves_the_state_bitwise_as_if_it_had_not_been(results, stage: int, precision: str) -> None:
    skipped = results[2][f"skipped zero{stage} {precision}"]
    absent = results[2][f"absent zero{stage} {precision}"]
    assert not math.isfinite(skipped["skipped_norm"])
    assert skipped["updates"] == absent["updates"] == 2
    assert skipped["losses"] == absent["losses"]
    assert skipped["digest"] == absent["digest"]


@pytest.mark.parametrize(("stage", "precision"), SHARDED_AND_PRECISE)
def test_a_gradient_that_is_not_finite_on_one_rank_is_so_for_all(results, stage: int, precision: str) -> None:
    """First on rank 0, then on rank 1: the verdict rests on a sum, and no number added to NaN or inf is finite."""
    assert results[2][f"skipped zero{stage} {precision}"]["taken_for_finite"] == [False, False]


def test_an_evaluation_is_that_of_plain_torch_without_dropout(results) -> None:
    for stage in STAGES:
        one = results[1][f"zero{stage} in 1"]
        assert one["shapes"] == [[], [PACKS * 24], [PACKS * 24, 67]]
        wanted = plain_evaluation(Settings.model_validate(one["settings"]))
        assert one["evaluated"] == pytest.approx([wanted, wanted], rel=1e-6)
        assert one["training"], "dropout is on again"


def test_an_evaluation_between_steps_changes_nothing(results) -> None:
    """The runs with a skipped step evaluate before step 2, those without do not; their ends are equal above."""
    evaluating = [one for name, one in results[2].items() if name.startswith("skipped")]
    assert len(evaluating) == 7
    assert all(one["training"] and "evaluated" in one for one in evaluating)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_state_is_read_and_written_to_the_last_bit(results, world_size: int, stage: int) -> None:
    assert results[world_size][f"zero{stage} in 1"]["keeps_signed_zeros"]
