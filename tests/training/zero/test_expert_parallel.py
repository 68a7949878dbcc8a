"""Ranks that share experts: the loss, gradient and update of one rank, and checkpoints that move."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.settings import Settings, UserError
from bigmodel.distributed.world import ALONE, end_world, start_world
from bigmodel.metrics.phases import Phases
from bigmodel.model.experts import Experts
from bigmodel.training.zero.engine import Engine, creation, forget_groups
from bigmodel.training.zero.expert_parallel import ExpertParallel
from tests.support.engine_worker import launch, micro_batches_of, new_model, num_targets_of, settings_table
from tests.support.exactness import BALANCED, failures, job_of, with_sequence, with_shared_experts
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.timeout(600)  # all jobs run in the first test's set-up
Jobs = dict[str, dict[str, Any]]
CASE = {"optimizer": "adamw", "activation_checkpointing": "none", "offload": "none", "packs_at_once": 1, "ema": 0.9}
CASE |= {
    "precision": "fp32",
    "persistence": 0,
    "groups": False,
    "tied": True,
    "experts": "balanced by loss",
    "stage": 1,
}
STEPS = 3
# By number of ranks: degree, sequences shared by so many, and what differs from CASE.
EXACT: dict[int, list[tuple[int, int, dict[str, Any]]]] = {
    2: [
        (2, 1, {"stage": 0}),
        (2, 1, {"stage": 1, "activation_checkpointing": "full", "groups": True, "experts": "with a capacity"}),
        (2, 1, {"stage": 2, "activation_checkpointing": "selective", "experts": "balanced by bias"}),
        (2, 1, {"stage": 1, "precision": "bf16"}),
        (2, 1, {"stage": 2, "precision": "fp16"}),
        (2, 1, {"stage": 0, "optimizer": "muon"}),
        (2, 1, {"stage": 2, "optimizer": "muon", "offload": "optimizer to cpu", "packs_at_once": 3}),
        (2, 1, {"stage": 3, "persistence": 100, "activation_checkpointing": "full"}),
        (2, 1, {"stage": 3, "precision": "bf16", "offload": "optimizer and weights to cpu"}),
    ],
    4: [
        (2, 1, {"stage": 0}),
        (4, 1, {"stage": 1}),
        (2, 1, {"stage": 2, "precision": "bf16"}),
        (2, 2, {"stage": 1}),
        (2, 1, {"stage": 3, "optimizer": "muon", "activation_checkpointing": "selective"}),
        (4, 2, {"stage": 3}),
    ],
}
CLIPPED: list[tuple[int, str, dict[str, Any]]] = [(stage, "fp32", {}) for stage in (0, 1, 2, 3)]
CLIPPED += [(1, "bf16", {}), (2, "fp32", {"offload_optimizer": {"device": "cpu"}})]
# Rows of each expert on either rank; the first rank holds the first two experts.
LOADS = [([3, 0, 0, 2], [0, 0, 0, 4]), ([0, 0, 3, 2], [0, 0, 0, 4]), ([0, 0, 0, 0], [5, 0, 0, 0]), ([0] * 4, [0] * 4)]


def whole_experts(experts: int = 4) -> Experts:
    settings = Settings.model_validate({"model": {"hidden_size": 8, "num_heads": 2, "experts": {"count": experts}}})
    layer = Experts(settings.model, experts, 5).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return layer


def rows_of(rank: int, of_rank: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows by expert, the last of no expert, and their offsets."""
    loads = torch.tensor(of_rank)
    rows = torch.randn(int(loads.sum()) + 1, 8, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    return rows.requires_grad_(), torch.cat([torch.zeros(1), loads.cumsum(0)]).int()


def keep_a_part_of_what_is_filled(rank: int) -> None:
    with creation({"zero_optimization": {"stage": 0}}, sharing=2) as made_whole:
        weight = whole_experts().down
    part = torch.arange(80.0 * rank, 80.0 * rank + 80).double()
    for factor in (1, 10):  # initial weights, then those of a start
        with made_whole(weight), torch.no_grad():
            assert len(weight) == 4
            assert factor == 1 or torch.equal(weight[2 * rank :][:2].flatten(), part)
            weight.copy_(factor * torch.arange(weight.numel()).view_as(weight))
        assert torch.equal(weight.flatten(), factor * part), "the rest is gone"
    norm = torch.nn.Parameter(torch.ones(4, 3))
    with made_whole(norm):
        assert norm.shape == (4, 3)
    assert norm.shape == (4, 3)


def share_uneven_loads(_: Path) -> None:
    world = start_world(timeout_seconds=60)
    keep_a_part_of_what_is_filled(world.rank)
    whole, shared = whole_experts(), torch.nn.ModuleList([whole_experts()])
    layer, phases = shared[0], Phases(world.device)
    experts = ExpertParallel(shared, 2, world.rank, phases)
    experts.connect(None)
    for loads in LOADS:
        whole.zero_grad(), layer.zero_grad()
        everywhere = [rows_of(rank, loads[rank]) for rank in range(2)]
        wanted = [whole(rows, offsets) for rows, offsets in everywhere]
        sum((out.square().sum() for out in wanted), torch.zeros(())).backward()
        rows, offsets = rows_of(world.rank, loads[world.rank])
        found = layer(rows, offsets)
        found.square().sum().backward()
        mine = slice(2 * world.rank, 2 * world.rank + 2)
        assert torch.equal(found, wanted[world.rank]), "a row's result depends on its own values"
        assert not found[-1].any(), "a row of no expert"
        assert torch.allclose(rows.grad, everywhere[world.rank][0].grad, rtol=1e-14)
        for name, parameter in layer.named_parameters():
            assert torch.allclose(parameter.grad, whole.get_parameter(name).grad[mine], rtol=1e-14), (loads, name)
    assert experts.slices["0.down"] == ((4, 8, 5), ((80 * world.rank, 80, 80, 1),))
    seconds = phases.take()
    assert seconds.keys() == {"exchange"}
    assert seconds["exchange"] > 0
    end_world()


def test_a_layer_is_that_of_one_rank_also_where_an_expert_or_a_rank_gets_no_row(tmp_path: Path) -> None:
    run_ranks(2, share_uneven_loads, tmp_path)


def clip_over_all_parts(tables: list[dict[str, Any]]) -> None:
    """A rank sees the gradients of its experts, or parts of matrices, only. A huge epsilon makes Adam's update the
    gradient."""
    world = start_world(timeout_seconds=60)
    for table in tables:
        forget_groups()
        effective, settings = resolve_deepspeed(Settings.model_validate(table), world.size)
        engine = Engine(new_model(settings, effective), settings, effective, world)
        before = {name: engine.whole(name, "weight") for name in engine.trained()}
        sharing = settings.training.ranks_per_sequence
        batches = micro_batches_of(0, world.rank // sharing, world.size // sharing, 1)
        for batch in batches:
            engine.micro_batch(batch, num_targets_of(0), batch is batches[-1])
        assert engine.gradient_norm() > 0.1
        engine.update(1e6)
        moved = [(engine.whole(name, "weight") - old).double().square().sum() for name, old in before.items()]
        assert float(sum(moved)) ** 0.5 == pytest.approx(1e6 * 0.01 / 1e4, rel=3e-5), (table["training"], effective)
    end_world()


def test_gradients_are_clipped_by_the_norm_over_all_experts_and_parts_of_matrices(tmp_path: Path) -> None:
    """A norm of one rank's experts would be 2e-4 lower here."""
    optimizer = {"epsilon": 1e4, "weight_decay": 0.0}
    experts = {"experts": BALANCED["balanced by loss"], "training": {"expert_parallel_ranks": 2}}
    tensors = {"vocabulary_multiple": 2, "training": {"tensor_parallel_ranks": 2}}
    tables = [
        settings_table(tmp_path, stage, kind, 1, zero=dict(zero), optimizer=optimizer, clipping=0.01, **shared)
        for shared in (experts, tensors)
        for stage, kind, zero in CLIPPED
        if stage < 3 or shared is experts
    ]
    run_ranks(2, clip_over_all_parts, tables, timeout_seconds=240)


def test_experts_that_are_all_frozen_are_not_shared(tmp_path: Path) -> None:
    training = {"expert_parallel_ranks": 2, "freeze": ["blocks.*.feed_forward.experts"]}
    table = settings_table(tmp_path, 1, "fp32", 1, experts=BALANCED["balanced by loss"], training=training)
    effective, settings = resolve_deepspeed(Settings.model_validate(table), 2)
    with pytest.raises(UserError, match=r"training.freeze = .* no expert is trained; set expert_parallel_ranks to 1"):
        Engine(new_model(settings), settings, effective, ALONE)


def exact_jobs(ranks: int, folder: Path) -> Jobs:
    jobs = {}
    for degree, sharing, changes in EXACT[ranks]:
        job = with_sequence(job_of(CASE | changes, folder, STEPS), sharing)
        jobs[f"{ranks} ranks, {degree} share, {sharing} a sequence, {changes}"] = with_shared_experts(job, degree)
    return jobs


def moving(folder: Path, degree: int, stage: int, **job: Any) -> dict[str, Any]:
    exact = with_shared_experts(job_of(CASE | {"stage": stage}, folder, STEPS), degree)
    return {"settings": exact["settings"], "checkpoints": str(folder / "moving"), **job}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Four ranks save, two and one go on, at other degrees and stages."""
    folder = tmp_path_factory.mktemp("experts")
    found: Jobs = {}
    for ranks, more in (
        (
            4,
            {
                "whole": moving(folder, 2, 1, steps=4, save_at=2, evaluate_at=[1]),
                "again": moving(folder, 2, 1, steps=4, resume=True),
                "wider": moving(folder, 4, 0, steps=2, resume=True),
                "to stage 3": moving(folder, 2, 3, steps=2, resume=True),
            },
        ),
        (2, {"to 2": moving(folder, 2, 3, steps=4, resume=True, save_at=3)}),
        (1, {"to 1": moving(folder, 1, 1, steps=4, resume=True)}),
    ):
        jobs = {**exact_jobs(ranks, folder), **more} if ranks > 1 else more
        outcome = launch(list(jobs.values()), ranks, folder)
        found |= {name: jobs[name] | one for name, one in zip(jobs, outcome, strict=True)}
    return found


@pytest.mark.parametrize("ranks", EXACT)
def test_loss_gradient_norm_and_update_are_those_of_plain_torch_on_one_rank(results: Jobs, ranks: int) -> None:
    jobs = {name: job for name, job in results.items() if name.startswith(f"{ranks} ranks")}
    assert len(jobs) == len(EXACT[ranks])
    assert {name: found for name, job in jobs.items() if (found := failures(job))} == {}


def test_shared_experts_resume_bitwise(results: Jobs) -> None:
    whole, again = results["whole"], results["again"]
    assert again["first"] == 2
    assert again["loaded"] == whole["saved"]
    assert again["losses"] == whole["losses"][2:]
    assert again["digest"] == whole["digest"] != whole["saved"]


def test_a_checkpoint_of_shared_experts_goes_on_at_any_number_of_ranks_degree_and_stage(results: Jobs) -> None:
    saved = results["whole"]["saved"]
    for name in ("wider", "to stage 3", "to 2"):
        assert results[name]["loaded"] == saved, name
    assert results["to 1"]["first"] == 3
    assert results["to 1"]["loaded"] == results["to 2"]["saved"]
    assert results["to 1"]["losses"][-1] == pytest.approx(results["whole"]["losses"][-1], rel=1e-5)
