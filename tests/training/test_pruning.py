"""Pruning: schedule and masks by NumPy and torch's own functions; zeros that stay under every ZeRO stage."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils.prune import l1_unstructured
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.settings import PruningSettings, Settings, UserError, settings_from_table
from bigmodel.training.pruning import pruned_next, sparsity_at, targets_of
from tests.support import pruning_worker
from tests.support.engine_worker import settings_table
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.timeout(300)  # all ranks run in the first test's set-up
STEPS = 6
GRADUAL = {"kind": "magnitude", "sparsity": 0.8, "begin_step": 1, "end_step": 5, "every_steps": 2}
TWO_OF_FOUR = {"kind": "2:4", "begin_step": 1, "end_step": 5, "every_steps": 2}
AT_ONCE = {"kind": "magnitude", "sparsity": 0.6, "begin_step": 2, "end_step": 2, "every_steps": 1}
TIGHT = {"clipping": 0.2}  # every step is clipped
# Name -> ranks, stage, precision, pruning, settings.
CASES: dict[str, tuple[int, int, str, dict[str, Any], dict[str, Any]]] = {
    "stage 0": (1, 0, "fp32", TWO_OF_FOUR, {**TIGHT, "optimizer": {"kind": "muon"}}),
    "stage 1": (2, 1, "fp32", GRADUAL, TIGHT),
    "stage 2": (2, 2, "fp32", TWO_OF_FOUR, {"training": {"ema_decay": 0.9}}),
    "stage 3": (2, 3, "fp32", GRADUAL, {**TIGHT, "persistence": 1100}),
    "offloaded": (2, 2, "fp32", AT_ONCE, {"clipping": 0.0, "zero": {"offload_optimizer": {"device": "cpu"}}}),
}
LOW = {
    "bf16 1": (2, 1, "bf16", GRADUAL, TIGHT),
    "bf16 2": (2, 2, "bf16", TWO_OF_FOUR, {"optimizer": {"kind": "lion"}}),
    "bf16 3": (2, 3, "bf16", GRADUAL, TIGHT),
    "fp16 1": (2, 1, "fp16", GRADUAL, TIGHT),
}
MOVES = {"bf16 1": 3, "bf16 3": 2}  # saved by two ranks, resumed by one


def table_of(folder: Path, stage: int, precision: str, pruning: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    more = {name: dict(value) if isinstance(value, dict) else value for name, value in more.items()}
    return settings_table(folder, stage, precision, 2, **more) | {"pruning": pruning}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pruning")
    jobs: dict[int, dict[str, Any]] = {2: {}, 1: {}}
    for name, (ranks, *case) in CASES.items():
        jobs[ranks][name] = {"settings": table_of(folder, *case), "steps": STEPS}
    for name, (ranks, stage, precision, pruning, more) in LOW.items():
        table, where = table_of(folder, stage, precision, pruning, more), str(folder / name)
        jobs[ranks][name] = {"settings": table, "steps": STEPS, "save_at": 3, "checkpoints": where, "skip_at": [4]}
        jobs[ranks][f"{name} again"] = jobs[ranks][name] | {"resume": True}
        if name in MOVES:
            other = table_of(folder, MOVES[name], precision, pruning, more)
            jobs[1][f"{name} elsewhere"] = {"settings": other, "steps": 5, "checkpoints": where, "resume": True}
    found: dict[str, Any] = {}
    for ranks in (2, 1):
        (folder / "jobs.json").write_text(json.dumps(list(jobs[ranks].values())))
        run_ranks(ranks, pruning_worker.rank, folder)
        found |= dict(zip(jobs[ranks], json.loads((folder / "results.json").read_text()), strict=True))
    return found | {
        f"{name} plain": pruning_worker.plain(jobs[CASES[name][0]][name]["settings"], STEPS) for name in CASES
    }


def zeros_in(weights: dict[str, Any]) -> float:
    matrices = [np.array(weight) for weight in weights.values()]
    return sum(int((matrix == 0).sum()) for matrix in matrices) / sum(matrix.size for matrix in matrices)


@pytest.mark.parametrize("name", CASES)
def test_under_every_stage_pruned_training_is_that_of_plain_torch_with_masks_of_numpy(results, name: str) -> None:
    one, plain = results[name], results[f"{name} plain"]
    assert one["losses"] == pytest.approx(plain["losses"], rel=2e-5)
    assert one["norms"] == pytest.approx(plain["norms"], rel=1e-4)
    for matrix, weight in plain["weights"].items():
        ours, theirs = np.array(one["weights"][matrix]), np.array(weight)
        assert ((ours == 0) == (theirs == 0)).all(), matrix
        assert np.abs(ours - theirs).max() < 1e-4
    shares = [share or 0.0 for share in one["shares"]]
    assert shares == pytest.approx(plain["shares"], abs=2e-3)
    assert one["problems"] == []


@pytest.mark.parametrize("name", LOW)
def test_pruned_weights_are_zero_in_masters_and_forward_pass_and_a_resume_repeats_every_bit(results, name: str) -> None:
    once, again, elsewhere = results[name], results[f"{name} again"], results.get(f"{name} elsewhere")
    assert zeros_in(once["weights"]) == pytest.approx(0.5 if LOW[name][3]["kind"] == "2:4" else 0.8, abs=1e-3)
    assert once["problems"] == again["problems"] == []
    assert again["begun"] == once["saved"]
    assert again["digest"] == once["digest"]
    assert again["losses"] == once["losses"][3:]
    if elsewhere:
        assert elsewhere["begun"] == once["saved"]
        assert elsewhere["losses"][0] == pytest.approx(once["losses"][3], rel=1e-3)
        assert zeros_in(elsewhere["weights"]) == pytest.approx(0.8, abs=1e-3)


def test_every_stage_takes_norm_and_clipping_from_the_weights_that_are_left(results) -> None:
    """Stage 1 in bf16 holds gradients in another way."""
    one, three = results["bf16 1"], results["bf16 3"]
    assert one["norms"] == pytest.approx(three["norms"], rel=1e-6)
    for name, weight in one["weights"].items():
        assert np.abs(np.array(weight) - np.array(three["weights"][name])).max() < 1e-6


def test_the_average_of_the_weights_is_pruned_too(results) -> None:
    one = results["stage 2"]
    assert one["averages"].keys() == one["weights"].keys()
    for name, weight in one["weights"].items():
        assert ((np.array(weight) == 0) == (np.array(one["averages"][name]) == 0)).all()


@pytest.mark.parametrize("initial", [0.0, 0.25])
@pytest.mark.parametrize(("begin", "end", "every"), [(0, 40, 10), (3, 50, 7), (5, 5, 1), (0, 9, 100)])
def test_the_share_rises_by_the_cubic_curve(begin: int, end: int, every: int, initial: float) -> None:
    table = {"kind": "magnitude", "sparsity": 0.8, "initial_sparsity": initial}
    table |= {"begin_step": begin, "end_step": end, "every_steps": every}
    found = [sparsity_at(step, PruningSettings(**table)) for step in range(60)]
    assert found == pytest.approx([pruning_worker.sparsity_of(step, table) for step in range(60)])
    assert found == sorted(found)
    if (end, initial) == (40, 0.0):
        assert found[::10] == pytest.approx([0.0, 0.4625, 0.7, 0.7875, 0.8, 0.8])


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.83])
def test_the_smallest_of_a_matrix_are_those_of_torch(sparsity: float) -> None:
    layer = torch.nn.Linear(36, 20, bias=False)
    pruned = pruned_next(layer.weight.detach(), sparsity, "magnitude").view(20, 36)
    assert torch.equal(~pruned, l1_unstructured(layer, "weight", amount=sparsity).weight_mask.bool())


def test_of_four_weights_the_two_largest_stay_in_the_layout_of_sparse_tensor_cores() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    weight = layers[0].weight.detach().clone()
    pruned = weight.masked_fill(pruned_next(weight, 0.5, "2:4").view(64, 64), 0).half()
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(layers, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()
    assert torch.equal(pruned == 0, layers[0].weight == 0)
    for dense, fits in ((pruned, True), (weight.half(), False)):
        packed = sparse_semi_structured_from_dense_cutlass(dense)
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(*packed), dense) == fits


def test_equal_weights_go_by_position_and_zeros_count() -> None:
    assert pruned_next(torch.ones(2, 4), 0.5, "magnitude").tolist() == [True] * 4 + [False] * 4
    assert pruned_next(torch.ones(2, 4), 0.25, "2:4").tolist() == [True, True] + [False] * 6
    some = torch.tensor([[0.0, -0.0, 3.0, 1.0]])
    assert pruned_next(some, 0.5, "magnitude").tolist() == pruned_next(some, 0.5, "2:4").tolist() == [False] * 4
    assert pruned_next(some, 0.75, "magnitude").tolist() == [False, False, False, True]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "adapters": ({"pruning": AT_ONCE, "lora": {"rank": 2}}, r'kind = "magnitude" with lora.rank = 2: merged adapters'),
    "order": ({"pruning": AT_ONCE | {"begin_step": 3}}, r"pruning.end_step = 2 is before begin_step = 3; raise it"),
    "long": ({"pruning": GRADUAL, "training": {"steps": 4}}, r"pruning.end_step = 5 exceeds training.steps = 4"),
    "late": (
        {"pruning": {"kind": "2:4", "begin_step": 9}, "training": {"steps": 4}},
        r"begin_step = 9 exceeds training",
    ),
    "first": ({"pruning": TWO_OF_FOUR | {"initial_sparsity": 0.6}}, r"initial_sparsity = 0.6 exceeds the 0.5 of the"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_makes_no_sense_is_refused(name: str) -> None:
    table, complaint = BAD[name]
    with pytest.raises(UserError, match=complaint):
        settings_from_table(table, Path("run.toml"))


def test_without_an_end_half_of_the_run_prunes() -> None:
    settings = Settings.model_validate({"pruning": {"kind": "magnitude"}, "training": {"steps": 300}})
    assert settings.pruning.last_step == 150
    assert Settings().pruning.end_step is None


def test_offload_with_clipping_is_refused(tmp_path: Path) -> None:
    table = table_of(tmp_path, 2, "bf16", AT_ONCE, {"zero": {"offload_optimizer": {"device": "cpu"}}})
    with pytest.raises(UserError, match=r"clips by a norm that holds the gradients of pruned weights; set optimizer"):
        resolve_deepspeed(Settings.model_validate(table), 1)


SHAPES = {"embedding.weight": (9, 6), "blocks.0.up.weight": (9, 6), "blocks.1.up.weight": (9, 8), "norm.weight": (6,)}
FROZEN = {name for name in SHAPES if name != "blocks.0.up.weight"}
NO_TARGETS: dict[str, tuple[dict[str, Any], set[str], str]] = {
    "pattern": ({"targets": ["norm"]}, set(SHAPES), r'targets: "norm" matches no matrix; near names: '),
    "frozen": ({"targets": ["blocks.*"]}, FROZEN, r"blocks.0.up.weight is frozen \(training.freeze\) and could not"),
    "all frozen": ({}, {"embedding.weight"}, r"all hidden matrices are frozen; shorten training.freeze"),
    "odd": ({"kind": "2:4"}, set(SHAPES), r'"2:4": blocks.0.up.weight has 6 inputs, no multiple of 4; choose other'),
}


@pytest.mark.parametrize("name", NO_TARGETS)
def test_targets_that_cannot_be_pruned_are_refused(name: str) -> None:
    changes, trained, complaint = NO_TARGETS[name]
    with pytest.raises(UserError, match=complaint):
        targets_of(PruningSettings(**{"kind": "magnitude"} | changes), SHAPES, trained)


def test_hidden_matrices_are_pruned_and_others_if_they_are_named() -> None:
    given = PruningSettings(kind="magnitude")
    assert targets_of(given, SHAPES, set(SHAPES)) == ["blocks.0.up.weight", "blocks.1.up.weight"]
    assert targets_of(given, SHAPES, FROZEN) == ["blocks.1.up.weight"]
    named = PruningSettings(kind="2:4", targets=["blocks.1"])
    assert targets_of(named, SHAPES, set(SHAPES)) == ["blocks.1.up.weight"]
    assert targets_of(PruningSettings(kind="magnitude", targets=["embedding"]), SHAPES, set(SHAPES)) == [
        "embedding.weight"
    ]
