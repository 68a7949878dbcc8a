"""The engine beyond plain updates: initial weights, recomputation, loss scaling, states that move, hpZ, 70 billion."""

import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.settings import ModelSettings, Settings, UserError
from bigmodel.distributed.world import start_world
from bigmodel.generation.prompts import pack
from bigmodel.metrics.phases import Phases
from bigmodel.model.transformer import Block, Transformer
from bigmodel.training.zero import ulysses
from bigmodel.training.zero.engine import Engine, evaluated
from bigmodel.training.zero.wrapping import wrap_blocks
from tests.support.engine_worker import (
    batch_of,
    launch,
    micro_batches_of,
    new_model,
    num_targets_of,
    oracle,
    settings_table,
)
from tests.support.exactness import BALANCED, FEW_STEPS, failures, job_of, with_sequence
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.timeout(600)  # all jobs run in the first test's set-up
Jobs = dict[str, dict[str, Any]]
STAGES = [(0, "fp32"), *((stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16", "fp16"))]
MOVING = {
    kind: {"optimizer": {"kind": kind}, "training": {"ema_decay": 0.8}} for kind in ("muon", "adafactor", "ademamix")
}
MOVING["muon"]["optimizer"]["joined_matrices"] = "parts"
MOVING |= {kind.replace(" ", "-"): {"experts": experts} for kind, experts in BALANCED.items()}
GRU = {"kind": "gru", "num_layers": 2, "hidden_size": 16, "backpropagation_tokens": 5}
KINDS = ("none", "selective", "full")  # of activation checkpointing
# Weights are freed at once, so a recomputation gathers those that the forward pass did not gather inside the block.
LITTLE = {"stage3_max_live_parameters": 100, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 10}
PLACEMENTS = ("pre", "post", "sandwich")  # of norms: what a block's backward begins with
HPZ = {"stage": 3, "optimizer": "adamw", "activation_checkpointing": "full", "offload": "none", "packs_at_once": 1}
HPZ |= {"precision": "fp32", "persistence": 0, "ema": 0.0, "groups": False, "tied": True}


def run(jobs: Jobs, world_size: int, folder: Path) -> Jobs:
    outcome = launch(list(jobs.values()), world_size, folder)
    return {name: jobs[name] | one for name, one in zip(jobs, outcome, strict=True)}


def initial(folder: Path) -> Jobs:
    return {
        f"initial {stage} {precision}": {"settings": settings_table(folder, stage, precision, 1), "steps": 0}
        for stage, precision in STAGES
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Jobs]:
    """One launch on two ranks, one on one, one on four."""
    folder = tmp_path_factory.mktemp("engine")
    jobs = initial(folder)
    for stage in (1, 3):
        for kind in KINDS:
            table = settings_table(folder, stage, "fp32", 2, training={"activation_checkpointing": kind})
            jobs[f"{kind} {stage}"] = {"settings": table, "steps": 2, "evaluate_at": [1]}
            for placement in PLACEMENTS:
                table = settings_table(
                    folder,
                    stage,
                    "fp32",
                    2,
                    training={"activation_checkpointing": kind},
                    draws=False,
                    norms={"norm_placement": placement},
                )
                jobs[f"{placement} {kind} {stage}"] = {"settings": table, "steps": 2, "evaluate_at": [1]}
            table = settings_table(folder, stage, "fp32", 2, training={"activation_checkpointing": kind}, model=GRU)
            jobs[f"recurrent {kind} {stage}"] = {"settings": table, "steps": 2, "evaluate_at": [1]}
            more: dict[str, Any] = {"experts": BALANCED["balanced by loss"]}
            table = settings_table(folder, stage, "fp32", 2, training={"activation_checkpointing": kind}, **more)
            jobs[f"experts {kind} {stage}"] = {"settings": table, "steps": 3}
    for kind in KINDS:
        table = settings_table(folder, 3, "fp32", 2, training={"activation_checkpointing": kind}, zero=LITTLE)
        jobs[f"little {kind}"] = {"settings": table, "steps": 3}
    sampled = {"scheduled_sampling": {"steps": 4, "share": 0.8, "choice": "drawn"}}
    whole = Settings.model_validate(settings_table(folder, 1, "fp32", 6, training=sampled))
    path = folder / "sampled.safetensors"
    seen = oracle(whole, FEW_STEPS, path)
    for stage, more in itertools.product((2, 3), ({}, {"activation_checkpointing": "full"})):
        table = settings_table(folder, stage, "fp32", 2, training=sampled | more)
        job = {"settings": table, "steps": FEW_STEPS, "oracle": str(path), "seen": seen, "allowed": {}}
        jobs[f"sampled {stage}{' again' if more else ''}"] = job
    for stage in (1, 2, 3):
        table = settings_table(folder, stage, "fp16", 3, fp16={"initial_scale_power": 28})
        where = str(folder / f"fp16-{stage}")
        lowest = settings_table(folder, stage, "fp16", 3, fp16={"initial_scale_power": 0})
        jobs[f"lowest {stage}"] = {"settings": lowest, "steps": 1}
        jobs[f"scaled {stage}"] = {"settings": table, "steps": 20, "save_at": 14, "checkpoints": where}
        jobs[f"scaled again {stage}"] = {"settings": table, "steps": 20, "resume": True, "checkpoints": where}
    for kind, stage in itertools.product(MOVING, (1, 3)):
        table, where = settings_table(folder, stage, "fp32", 3, **MOVING[kind]), str(folder / f"{kind}-{stage}")
        jobs[f"{kind} saved {stage}"] = {"settings": table, "steps": 6, "save_at": 3, "checkpoints": where}
        jobs[f"{kind} again {stage}"] = {"settings": table, "steps": 6, "resume": True, "checkpoints": where}
    for kind, (source, target) in itertools.product(MOVING, ((1, 3), (3, 2))):
        table = settings_table(folder, target, "fp32", 3, **MOVING[kind])
        where = {"resume": True, "checkpoints": str(folder / f"{kind}-{source}")}
        jobs[f"{kind} moved {source} to {target}"] = {"settings": table, "steps": 6, **where}
    for stage in (1, 2):
        case = HPZ | {
            "stage": stage,
            "precision": "bf16",
            "offload": "optimizer to cpu",
            "activation_checkpointing": "none",
        }
        jobs[f"offloaded {stage}"] = job_of(case, folder, steps=1)
    found = {2: run(jobs, 2, folder)}
    alone = initial(folder)
    for kind in MOVING:
        table = settings_table(folder, 0, "fp32", 6, **MOVING[kind])
        where = {"resume": True, "checkpoints": str(folder / f"{kind}-3")}
        alone[f"{kind} moved 3 to 0"] = {"settings": table, "steps": 6, **where}
    found[1] = run(alone, 1, folder)
    hpz = job_of(HPZ, folder, FEW_STEPS, zero_hpz_partition_size=2)
    where = {"checkpoints": str(folder / "muon-1"), "resume": True}
    table = settings_table(folder, 3, "fp32", 1, zero={"zero_hpz_partition_size": 2}, **MOVING["muon"])
    shared = {
        f"{ranks} share at {case['stage']}": with_sequence(job_of(case, folder, FEW_STEPS), ranks)
        for ranks, case in (
            (2, HPZ),
            (4, HPZ | {"stage": 1, "precision": "bf16"}),
            (2, HPZ | {"stage": 2, "experts": "balanced by loss"}),
        )
    }
    found[4] = run(shared | {"hpz": hpz, "muon moved 1 to hpz": {"settings": table, "steps": 6, **where}}, 4, folder)
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_initial_weights_are_the_same_at_any_stage_and_world_size(results, precision: str) -> None:
    digests = {
        results[size][f"initial {stage} {kind}"]["digest"]
        for size in (1, 2)
        for stage, kind in STAGES
        if kind == precision
    }
    assert len(digests) == 1


@pytest.mark.parametrize("stage", [2, 3])
def test_scheduled_sampling_on_two_ranks_is_plain_torch_on_one(results, stage: int) -> None:
    """Drawn predictions, a share that begins at 0, a rank with an empty micro-batch, with and without recomputation."""
    plain, again = results[2][f"sampled {stage}"], results[2][f"sampled {stage} again"]
    assert failures(plain) == []
    assert (again["losses"], again["norms"], again["digest"]) == (plain["losses"], plain["norms"], plain["digest"])


@pytest.mark.parametrize("stage", [1, 3])
def test_recomputing_activations_changes_no_bit(results, stage: int) -> None:
    """With dropout on, and an evaluation in between."""
    plain = results[2][f"none {stage}"]
    for kind in ("selective", "full"):
        one = results[2][f"{kind} {stage}"]
        assert (one["losses"], one["norms"], one["digest"]) == (plain["losses"], plain["norms"], plain["digest"])
        assert one["evaluated"] == plain["evaluated"]


@pytest.mark.parametrize("stage", [1, 3])
def test_recomputed_experts_are_those_of_the_forward_pass_and_are_counted_once(results, stage: int) -> None:
    """The digest covers the loads."""
    plain = results[2][f"experts none {stage}"]
    for kind in ("selective", "full"):
        one = results[2][f"experts {kind} {stage}"]
        assert (one["losses"], one["norms"], one["digest"]) == (plain["losses"], plain["norms"], plain["digest"])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_recomputing_changes_no_bit_without_dropout_either(results, placement: str) -> None:
    """The backward of a block then begins with a product, or with a norm, whose weights ZeRO has already gathered."""
    for stage in (1, 3):
        plain, *others = (results[2][f"{placement} {kind} {stage}"] for kind in KINDS)
        kept = ("losses", "norms", "digest", "evaluated")
        assert [[one[name] for name in kept] for one in others] == [[plain[name] for name in kept]] * 2


def test_recomputing_changes_no_bit_where_weights_are_gathered_again(results) -> None:
    plain, *others = (results[2][f"little {kind}"] for kind in KINDS)
    kept = ("losses", "norms", "digest")
    assert [[one[name] for name in kept] for one in others] == [[plain[name] for name in kept]] * 2


def test_recurrent_layers_train_alike_at_any_stage_with_and_without_recomputation(results) -> None:
    kept = ("losses", "norms", "digest", "evaluated")
    for stage in (1, 3):
        plain, *others = ([results[2][f"recurrent {kind} {stage}"][name] for name in kept] for kind in KINDS)
        assert others == [plain, plain]
    first, third = (results[2][f"recurrent none {stage}"] for stage in (1, 3))
    assert first["losses"] == pytest.approx(third["losses"], rel=1e-5)
    assert first["norms"] == pytest.approx(third["norms"], rel=1e-4)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        self.count += function is torch.ops.aten.mm.default
        return function(*arguments, **(named or {}))


def backward_of(kind: str) -> tuple[int, int]:
    """Bytes that the graph keeps between the passes (selective keeps some beside it), products in the backward."""
    table = {"model": {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 96}}
    settings = Settings.model_validate(table | {"training": {"activation_checkpointing": kind}})
    model = Transformer(settings.model, 67)
    wrap_blocks(model, settings, stage=1)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch_of(0, range(6)))
    with Products() as products:
        loss.backward()
    return sum(kept.values()), products.count


def test_full_keeps_least_and_selective_repeats_no_product() -> None:
    (kept, products), (some, as_many), (least, more) = map(backward_of, ("none", "selective", "full"))
    assert least < 0.8 * kept
    assert some < 0.8 * kept
    assert as_many == products > 0
    assert more == products + 3 * 3, "of a block's four products the last is not read by the backward"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_lowers_its_loss_scale_until_gradients_are_finite_and_resumes_there(results, stage: int) -> None:
    one, again = results[2][f"scaled {stage}"], results[2][f"scaled again {stage}"]
    skipped = one["skipped"]
    before = [step for step in skipped if step < 14]
    assert before == list(range(len(before))) != [], "the scale begins too high, and comes down"
    assert len(before) < 14, "before the save"
    assert one["loss_scale"] == 2.0 ** (28 - len(skipped))
    assert one["updates"] == 20 - len(skipped)
    assert (again["digest"], again["loss_scale"]) == (one["digest"], one["loss_scale"])
    assert one["losses"][-len(again["losses"]) :] == again["losses"] != []


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_loss_scale_of_1_is_the_smallest(results, stage: int) -> None:
    found = [results[2][f"{name} {stage}"] for name in ("lowest", "scaled")]
    assert [(one["loss_scale"] == 1.0, one["is_at_smallest_scale"]) for one in found] == [(True, True), (False, False)]


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("kind", list(MOVING))
def test_momentum_and_average_resume_bitwise(results, kind: str, stage: int) -> None:
    one, again = results[2][f"{kind} saved {stage}"], results[2][f"{kind} again {stage}"]
    assert again["loaded"] == one["saved"]
    assert again["losses"] == one["losses"][3:]
    assert again["digest"] == one["digest"]


@pytest.mark.parametrize(
    ("size", "name"),
    [
        *((2, f"{kind} moved {stages}") for kind in MOVING for stages in ("1 to 3", "3 to 2")),
        *((1, f"{kind} moved 3 to 0") for kind in MOVING),
        (4, "muon moved 1 to hpz"),
    ],
)
def test_momentum_and_average_move_to_any_stage_exactly(results, size: int, name: str) -> None:
    kind, _, source, *_ = name.split()
    moved, whole = results[size][name], results[2][f"{kind} saved {source}"]
    assert moved["loaded"] == whole["saved"]
    assert moved["losses"] == pytest.approx(whole["losses"][3:], rel=1e-5)


@pytest.mark.parametrize("name", ["2 share at 3", "2 share at 2", "4 share at 1"])
def test_ranks_that_share_a_pack_have_the_loss_and_gradient_of_one(results, name: str) -> None:
    """Four ranks as two pairs or as one group; key-value heads are 2, so four ranks repeat them."""
    assert failures(results[4][name]) == []


def test_hpz_on_four_ranks_is_plain_torch(results) -> None:
    assert failures(results[4]["hpz"]) == []


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_that_are_offloaded_are_added_up_in_fp32(results, stage: int) -> None:
    """As far from float64 as one process that adds bf16 gradients up in fp32, with three micro-batches a rank."""
    one = results[2][f"offloaded {stage}"]
    assert one["micro_batches"] == 3
    assert one["gradient_distances"][0] == pytest.approx(one["allowed"]["0"], rel=1e-6)


# --- replicas


def spoil_the_gradient_of_rank_1(folder: Path) -> None:
    """On a rank: the gradient norm at ZeRO 0, where the gradient is whole on each rank, after it was added up."""
    world = start_world(timeout_seconds=60)
    effective, settings = resolve_deepspeed(Settings.model_validate(settings_table(folder, 0, "fp32", 2)), world.size)
    model = new_model(settings, effective)
    engine = Engine(model, settings, effective, world)
    batches = micro_batches_of(0, world.rank, world.size, 2)
    for batch in batches:
        engine.micro_batch(batch, num_targets_of(0), batch is batches[-1])
    if world.rank == 1:
        gradient = next(model.parameters()).grad
        assert gradient is not None
        gradient[0] = math.nan
    (folder / f"{world.rank}.norm").write_text(str(engine.gradient_norm()))


def test_a_gradient_that_one_replica_spoils_after_the_sum_is_seen_by_all_ranks(tmp_path: Path) -> None:
    """Else one rank skips the step and the others do not, and they wait for each other in different collectives."""
    run_ranks(2, spoil_the_gradient_of_rank_1, tmp_path)
    assert [(tmp_path / f"{rank}.norm").read_text() for rank in (0, 1)] == ["nan", "nan"]


def train_alone(folder: Path) -> None:
    """On a rank: seconds of communication in two micro-batches and an update, by ZeRO stage."""
    world, seconds = start_world(timeout_seconds=60), {}
    for stage in (1, 2):
        table = settings_table(folder, stage, "fp32", 3)
        effective, settings = resolve_deepspeed(Settings.model_validate(table), world.size)
        engine = Engine(new_model(settings, effective), settings, effective, world)
        batches = micro_batches_of(0, world.rank, world.size, 3)
        engine.phases.take()
        for batch in batches:
            engine.micro_batch(batch, num_targets_of(0), batch is batches[-1])
        seconds[stage] = engine.phases.take().get("communication", 0.0)
    (folder / "seconds.json").write_text(json.dumps(seconds))


def test_a_gradient_of_one_rank_is_not_communicated(tmp_path: Path) -> None:
    """That it is exact: tests/training/zero/test_exact_loss.py."""
    run_ranks(1, train_alone, tmp_path)
    assert json.loads((tmp_path / "seconds.json").read_text()) == {"1": 0.0, "2": 0.0}


# --- too large for one rank


def build_in_shares(folder: Path) -> None:
    """On a rank: what is whole while a model is made under ZeRO-3, and while it is filled."""
    from bigmodel.model.init import init_weights
    from bigmodel.training.zero.engine import creation

    world, whole_sizes, blocks = start_world(timeout_seconds=60), [], []
    settings = Settings.model_validate(
        {"model": {"num_layers": 6, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2}}
    )
    make = Block.__init__

    def made(block: Block, *arguments: Any) -> None:
        blocks.append(block)
        whole_sizes.append(sum(p.numel() for one in blocks[:-1] for p in one.parameters()))
        make(block, *arguments)

    Block.__init__ = made
    with creation({"zero_optimization": {"stage": 3}, "train_batch_size": world.size}) as whole:
        model = Transformer(settings.model, 1000)
    counts = []

    def counting(parameter: torch.nn.Parameter) -> Any:
        counts.append(sum(p.numel() for p in model.parameters()))
        return whole(parameter)

    init_weights(model, 1, counting)
    facts = {
        "earlier blocks while one is made": max(whole_sizes),
        "others while one is filled": max(counts),
        "shares": sum(p.ds_tensor.numel() for p in model.parameters()),
        "model": sum(p.ds_numel for p in model.parameters()),
    }
    (folder / f"{world.rank}.json").write_text(json.dumps(facts))


def test_no_rank_ever_holds_the_whole_model_under_zero_3(tmp_path: Path) -> None:
    run_ranks(2, build_in_shares, tmp_path)
    for rank in (0, 1):
        facts = json.loads((tmp_path / f"{rank}.json").read_text())
        assert facts["model"] > 1_000_000
        assert facts["earlier blocks while one is made"] == 0
        assert facts["others while one is filled"] == 0
        assert facts["shares"] == pytest.approx(facts["model"] / 2, rel=1e-3)


def test_70_billion_parameters_counted_on_meta_tensors() -> None:
    """On 64 ranks: 2 bytes of weight, 4 of master, 8 of moments and 4 of gradient a parameter, and one block whole."""
    sizes = {"num_layers": 80, "hidden_size": 8192, "num_heads": 64, "num_kv_heads": 8, "intermediate_size": 28_672}
    with torch.device("meta"):
        model = Transformer(ModelSettings(**sizes), 128_256)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == pytest.approx(70.55e9, rel=1e-3)
    block = sum(p.numel() for p in model.blocks[0].parameters())
    largest = max(block, model.head.weight.numel())
    per_rank = (2 + 4 + 8 + 4) * parameters / 64 + 2 * largest
    assert per_rank < 24e9
    assert parameters * 2 > 140e9, "which no rank could hold whole"


def test_time_in_ulysses_exchanges_is_communication(monkeypatch) -> None:
    """Also in the backward pass: else a rank that waits for its peers would count as busy, and hide the slow one."""

    def wait(received: torch.Tensor, sent: torch.Tensor, group: Any) -> None:
        time.sleep(0.05)
        received.copy_(sent)

    monkeypatch.setattr(ulysses.dist, "all_to_all_single", wait)
    phases = Phases(torch.device("cpu"))
    x = torch.randn(4, 2, 3, requires_grad=True)
    for name in ("forward", "backward"):
        with phases(name):
            if name == "forward":
                y = ulysses.Exchange.apply(x, ulysses.Ranks(None, 2, phases), True)
            else:
                y.sum().backward()
        seconds = phases.take()
        assert seconds["communication"] >= 0.05 > seconds[name]
    assert (x.grad == 1).all()


class SimpleCall:
    """As much of DeepSpeed's engine as a forward takes."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __call__(self, *inputs: Any) -> torch.Tensor:
        return self.module(*inputs)


def test_every_layer_is_compiled_also_beyond_the_compilers_own_limit(monkeypatch) -> None:
    """Without dropout all layers share a graph; with it each has its own, of which torch allows 8 by default."""
    graphs, real = [], torch.compile

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **named: real(function, backend=count, **named))
    for dropout, expected in ((0.0, 1), (0.1, 9)):
        torch._dynamo.reset()
        graphs.clear()
        model = {"num_layers": 9, "hidden_size": 16, "num_heads": 2, "num_kv_heads": 2, "dropout": dropout}
        settings = Settings.model_validate({"training": {"compile": True}, "model": model})
        compiled = new_model(settings)
        wrap_blocks(compiled, settings, stage=1)
        compiled(batch_of(0, range(6)))
        compiled(batch_of(0, range(5, -1, -1)))  # other documents
        assert len(graphs) == expected
    engine, graphs[:] = SimpleCall(compiled), []
    for length in (5, 6):  # a text that grows
        evaluated(engine, pack([[1] * length]), "logits", compiled=True)
    assert graphs == []
    evaluated(engine, batch_of(0, range(6)), "loss_sum", compiled=True)
    assert len(graphs) == 1  # in evaluation nothing is dropped
    shared = settings.model_copy(
        update={"training": settings.training.model_copy(update={"sequence_parallel_ranks": 2})}
    )
    with pytest.raises(UserError, match="is not compiled"):
        wrap_blocks(new_model(settings), shared, stage=1)


def test_compile_is_refused_under_zero_3_and_changes_nothing_else(monkeypatch) -> None:
    settings = Settings.model_validate(
        {"training": {"compile": True}, "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4}}
    )
    with pytest.raises(UserError, match=r"training\.compile = true with ZeRO stage 3"):
        wrap_blocks(new_model(settings), settings, stage=3)
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **named: real(function, backend="aot_eager", **named))
    plain, compiled = new_model(settings), new_model(settings)
    wrap_blocks(compiled, settings, stage=1)
    losses = [model(batch_of(0, range(6))) for model in (plain, compiled)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for one, two in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, rtol=1e-4, atol=1e-5)
    assert math.isfinite(losses[1].item())
