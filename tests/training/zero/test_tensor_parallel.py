"""Tensor-parallel ranks: the loss, gradient and update of one rank, and checkpoints that move."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.huggingface import write_config
from bigmodel.config.settings import Settings, UserError, settings_from_table
from bigmodel.data.load.batch import Batch, tensors_of
from bigmodel.distributed.world import World, end_world, start_world
from bigmodel.generation.prompts import pack
from bigmodel.inspect.memory import LiveBytes
from bigmodel.metrics.phases import Phases
from bigmodel.model.huggingface.weights import names_of, to_theirs
from bigmodel.model.init import init_weights
from bigmodel.model.recurrent.model import build_model
from bigmodel.planning.parameters import held_of, parameters_of
from bigmodel.training import start
from bigmodel.training.exact_start import write_exactly
from bigmodel.training.trained import size_of
from bigmodel.training.zero.engine import Engine, forget_groups
from bigmodel.training.zero.tensor_parallel import TensorParallel, build_parts
from tests.support import exactness
from tests.support.engine_worker import batch_of, launch, new_model, oracle, settings_table
from tests.support.ranks import run_ranks
from tests.training.test_trained import run_of

pytestmark = pytest.mark.timeout(600)  # all jobs run in the first test's set-up
Jobs = dict[str, dict[str, Any]]
STEPS = 3
MODEL = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 4, "intermediate_size": 40}
MODEL |= {"vocabulary_multiple": 4, "attention_dropout": 0.1, "embedding_dropout": 0.05, "stochastic_depth": 0.1}
SHARED_KEYS = MODEL | {"num_kv_heads": 2, "qk_norm": True, "norm_placement": "sandwich"}
BIASED = MODEL | {"attention_bias": "all", "feed_forward_bias": True, "norm": "layer", "num_mtp_modules": 1}
BERT = MODEL | {"position_embedding": "learned", "max_positions": 64, "embedding_norm": True, "norm_placement": "post"}
BERT |= {"norm": "layer", "attention_bias": "all", "feed_forward_bias": True, "gated": False, "num_token_types": 2}
BERT |= {"kind": "encoder"}
MASKED = {"objectives": [{"kind": "masked"}]}
T5 = MODEL | {"gated": False, "position_embedding": "relative_bias", "logit_softcap": 5.0}
FULL, SELECTIVE = ({"activation_checkpointing": kind} for kind in ("full", "selective"))
SMOOTHED = {"z_loss": 0.01, "label_smoothing": 0.1}
# By number of ranks: degree, ZeRO stage, packed sequences at once, and what differs.
Case = tuple[int, int, int, dict[str, Any]]
EXACT: dict[int, dict[str, Case]] = {
    2: {
        "keys shared by heads": (2, 0, 1, {"model": SHARED_KEYS, "tied": True, "clipping": 0.1}),
        "biases": (2, 1, 2, {"model": BIASED, "training": SMOOTHED | SELECTIVE, "clipping": 0.1}),
        "relative bias": (2, 2, 3, {"model": T5, "training": FULL, "clipping": 0.1}),
        "muon": (2, 2, 1, {"model": SHARED_KEYS, "optimizer": {"kind": "muon"}, "tied": True}),
        "ZeRO 3": (2, 3, 1, {"model": BIASED, "training": SMOOTHED, "tied": True, "clipping": 0.1}),
        "ZeRO 3, recomputed": (2, 3, 2, {"model": T5, "training": FULL}),
        "encoder, muon, ZeRO 0": (2, 0, 3, {"model": BERT, "optimizer": {"kind": "muon"}, "data": MASKED}),
    },
    4: {
        "of 2": (2, 1, 1, {"training": {"freeze": ["blocks.0.attention", "embedding"]}}),
        "of 4": (4, 2, 3, {"model": MODEL | {"num_mtp_modules": 1}, "training": {"ema_decay": 0.9}}),
        "of 2, ZeRO 3, small weights kept whole": (
            2,
            3,
            1,
            {"model": SHARED_KEYS, "optimizer": {"kind": "muon"}, "training": {"ema_decay": 0.9}, "persistence": 1000},
        ),
        "of 2, ZeRO 3, frozen": (2, 3, 1, {"training": SELECTIVE | {"freeze": ["blocks.0.attention", "embedding"]}}),
        "of 4, ZeRO 3": (4, 3, 3, {"tied": True}),
        "of 4, ZeRO 0": (4, 0, 1, {"tied": True}),
    },
}
LOW: list[dict[str, Any]] = [
    {"stage": 1, "precision": "bf16", "tied": True},
    {"stage": 2, "precision": "fp16", "offload": "optimizer to cpu", "tied": False},
    {"stage": 3, "precision": "bf16", "offload": "optimizer and weights to cpu", "tied": True},
]


def job_of(folder: Path, degree: int, stage: int, packs: int, more: dict[str, Any]) -> dict[str, Any]:
    """The job of `tests.support.engine_worker`, with what one process of plain torch finds."""
    more = {key: value.copy() if isinstance(value, dict) else value for key, value in more.items()}
    data = more.pop("data", {})
    table = settings_table(folder, stage, "fp32", packs, **{"model": MODEL} | more)
    table["data"] = table["data"] | data
    settings = Settings.model_validate(table)
    path = folder / f"plain-{len(list(folder.glob('plain-*')))}.safetensors"
    job = {"seen": oracle(settings, STEPS, path), "oracle": str(path)}
    table["training"]["tensor_parallel_ranks"] = degree
    return job | {"settings": table, "steps": STEPS, "allowed": {}, "evaluate_at": [0]}


def low_precision(folder: Path, **changes: Any) -> dict[str, Any]:
    case = {"optimizer": "adamw", "activation_checkpointing": "none", "offload": "none", "packs_at_once": 3}
    case |= {"ema": 0.0, "persistence": 0, "groups": True, "tensors": 2}
    return exactness.job_of(case | changes, folder, STEPS)


def moving(folder: Path, degree: int, stage: int, **job: Any) -> dict[str, Any]:
    training = {"tensor_parallel_ranks": degree, "ema_decay": 0.9}
    table = settings_table(folder, stage, "fp32", 1, model=MODEL, training=training)
    return {"settings": table, "checkpoints": str(folder / "moving"), "steps": 4, **job}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Four ranks save, two and one go on, at other degrees and stages."""
    folder = tmp_path_factory.mktemp("tensors")
    found: Jobs = {}
    more = {
        4: {
            "whole": moving(folder, 2, 1, save_at=2),
            "again": moving(folder, 2, 1, resume=True),
            "wider": moving(folder, 4, 0, steps=2, resume=True),
            "whole, ZeRO 3": moving(folder, 2, 3, resume=True, save_at=3),
            "again, ZeRO 3": moving(folder, 2, 3, resume=True),
        },
        2: {"to 2": moving(folder, 1, 2, steps=5, resume=True, save_at=4)}
        | {f"2 ranks: {one['precision']}, {one['stage']}": low_precision(folder, **one) for one in LOW},
        1: {"to 1": moving(folder, 1, 1, steps=5, resume=True)},
    }
    for ranks, others in more.items():
        jobs = {f"{ranks} ranks: {name}": job_of(folder, *case) for name, case in EXACT.get(ranks, {}).items()}
        jobs |= others
        outcome = launch(list(jobs.values()), ranks, folder)
        found |= {name: jobs[name] | one for name, one in zip(jobs, outcome, strict=True)}
    return found


@pytest.mark.parametrize("ranks", EXACT)
def test_loss_gradient_norm_and_update_are_those_of_plain_torch_on_one_rank(results: Jobs, ranks: int) -> None:
    jobs = {name: job for name, job in results.items() if name.startswith(f"{ranks} ranks")}
    assert len(jobs) == len(EXACT[ranks]) + (len(LOW) if ranks == 2 else 0)
    assert {name: found for name, job in jobs.items() if (found := exactness.failures(job))} == {}


def test_frozen_parts_keep_their_bits(results: Jobs) -> None:
    assert results["4 ranks: of 2"]["frozen_changed"] == []


def test_evaluation_during_training_is_whole(results: Jobs) -> None:
    ours = results["4 ranks: of 4, ZeRO 0"]
    assert ours["shapes"] == [[], [24], [24, 68]]
    assert ours["evaluated"][0] == pytest.approx(ours["evaluated"][1], rel=1e-6)
    assert ours["training"]


@pytest.mark.parametrize("stage", ["", ", ZeRO 3"])
def test_tensor_parallel_ranks_resume_bitwise(results: Jobs, stage: str) -> None:
    whole, again = results[f"whole{stage}"], results[f"again{stage}"]
    assert again["first"] == (3 if stage else 2)
    assert again["loaded"] == whole["saved"]
    assert again["losses"] == whole["losses"][-len(again["losses"]) :]
    assert again["digest"] == whole["digest"] != whole["saved"]


def test_a_checkpoint_goes_on_at_any_number_of_ranks_degree_and_stage(results: Jobs) -> None:
    whole, at_3 = results["whole"], results["whole, ZeRO 3"]
    assert results["wider"]["loaded"] == at_3["loaded"] == whole["saved"]
    assert at_3["losses"] == pytest.approx(whole["losses"][2:], rel=1e-5)
    assert results["to 2"]["loaded"] == at_3["saved"]
    assert results["to 1"]["first"] == 4
    assert results["to 1"]["loaded"] == results["to 2"]["saved"]
    assert results["to 1"]["losses"][-1] == pytest.approx(results["to 2"]["losses"][-1], rel=1e-5)


@pytest.mark.parametrize("model", [SHARED_KEYS, BIASED, T5], ids=["shared keys", "biased", "t5"])
def test_the_plan_knows_the_parts_of_a_rank(model: dict[str, Any]) -> None:
    settings = Settings.model_validate({"model": model, "training": {"tensor_parallel_ranks": 2}})
    cut = build_model(settings.model, 68)
    tensors = TensorParallel(cut, 2, 1, Phases(torch.device("cpu")))
    planned = {one.name: one.shape for one in held_of(parameters_of(settings, 68), settings)}
    assert planned == {name: tuple(one.shape) for name, one in cut.named_parameters()}
    assert sum(map(size_of, cut.parameters())) == sum(one.numel for one in parameters_of(settings, 68))
    assert all(
        tensors.slices[name].numel == one.numel() for name, one in cut.named_parameters() if name in tensors.slices
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_start_holds_the_parts_of_a_rank_and_one_whole_parameter(tied: bool) -> None:
    settings = Settings.model_validate({"model": BIASED | {"num_layers": 20, "tied_embeddings": tied}})
    whole = build_model(settings.model, 68)
    init_weights(whole, 5)
    for rank in range(4):
        with LiveBytes() as bytes_:
            model, made_whole = build_parts(lambda: build_model(settings.model, 68), 4, rank)
        assert bytes_.live - 4 == bytes_of(model) < bytes_of(whole) / 3  # and a number of the head
        with LiveBytes() as bytes_:
            for _ in range(2):  # initial weights, then those of a start
                init_weights(model, 5, made_whole)
        largest = 4 * max(map(size_of, model.parameters()))
        assert bytes_.peak < bytes_of(model) + 3 * largest < bytes_of(whole) / 2  # random numbers, and the new part
        tensors = TensorParallel(model, 4, rank, Phases(torch.device("cpu")))
        wanted = dict(whole.named_parameters())
        for name, one in model.named_parameters():
            if name in tensors.slices:
                flat = tensors.slices[name].take(wanted[name].detach().flatten(), 0, one.numel())
                assert torch.equal(one.flatten(), flat), name
            else:
                assert torch.equal(one, wanted[name]), name


def begin_from(tables: list[dict[str, Any]]) -> None:
    """A folder's weights, with two rows for new tokens, are on ranks that share them those of one rank."""
    world = start_world(timeout_seconds=300)
    for table in tables:
        forget_groups()
        effective, settings = resolve_deepspeed(settings_from_table(table, Path("run.toml")), world.size)
        alone = settings.model_copy(
            update={"training": settings.training.model_copy(update={"tensor_parallel_ranks": 1})}
        )
        wanted = dict(start.new_model(alone, {"zero_optimization": {"stage": 0}}, 68, True).named_parameters())
        with LiveBytes() as bytes_:
            model = start.new_model(settings, effective, 68, True)
        assert bytes_.live < 0.7 * sum(one.nbytes for one in wanted.values())
        engine = Engine(model, settings, effective, world)
        if settings.training.precision == "bf16":
            assert not all(torch.equal(engine.whole(name, "weight"), one) for name, one in wanted.items())
            write_exactly(engine, settings)
        assert engine.names() == list(wanted)
        for name, one in wanted.items():
            assert torch.equal(engine.whole(name, "weight"), one), (settings.model.start_folder, name)
    end_world()


def test_a_run_begins_with_the_weights_of_a_folder_and_of_another_run(tmp_path: Path) -> None:
    settings = Settings.model_validate({"model": MODEL | {"num_kv_heads": 2}}).model
    model = build_model(settings, 66)
    init_weights(model, 8)
    folders = [tmp_path / "fp32", tmp_path / "bf16"]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(write_config("llama", settings, 66, 64)))
        theirs = to_theirs(names_of("llama", settings), dict(model.named_parameters()))
        low = {name: one.to(torch.bfloat16 if folder.name == "bf16" else torch.float32) for name, one in theirs.items()}
        save_file({name: one.contiguous() for name, one in low.items()}, folder / "model.safetensors")
    run, _ = run_of(tmp_path)
    cases = [(folders[0], "bf16", 1), (folders[1], "fp32", 0), (run, "bf16", 2)]
    tables = []
    for folder, precision, stage in cases:
        table = settings_table(tmp_path, stage, precision, 1, training={"tensor_parallel_ranks": 2})
        tables.append(table | {"model": {"from": str(folder), "vocabulary_multiple": 4}})
    run_ranks(2, begin_from, tables, timeout_seconds=500)


def bytes_of(model: torch.nn.Module) -> int:
    return sum(one.untyped_storage().nbytes() for one in model.parameters())


def evaluate_other_batches(table: dict[str, Any]) -> None:
    """Each rank has documents of its own, of lengths that 2 does not divide."""
    world = start_world(timeout_seconds=60)
    alone = Settings.model_validate(table | {"training": table["training"] | {"tensor_parallel_ranks": 1}})
    effective, settings = resolve_deepspeed(Settings.model_validate(table), world.size)
    model, whole = new_model(settings, effective), new_model(alone).eval()
    engine = Engine(model, settings, effective, world)
    prompt, batch = pack([list(range(3, 10 + 4 * world.rank))]), batch_of(world.rank, range(2 + world.rank))
    with torch.no_grad():
        for one, output in (
            (prompt, "logits"),
            (batch, "predictions"),
            (batch, "loss_per_position"),
            (batch, "loss_sum"),
        ):
            wanted, found = whole(one, output), engine.forward(one, output)
            assert found.shape == wanted.shape, output
            assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5), output
    batch = batch_of(0, range(1))
    odd = replace(batch, **{field: value[:23] for field, value in tensors_of(batch).items() if len(value) == 24})
    odd = replace(odd, cu_seqlens=odd.cu_seqlens.clamp(max=23))
    model.train()
    sums = world.sum_([float(model(odd))])
    assert sums[0] == pytest.approx(float(new_model(alone)(odd)), rel=1e-6)
    others = 2 * 2 * 12 * 32 * 4  # 2 first products of 2 blocks, positions of the other rank, channels, bytes
    assert live_bytes(alone, world, batch, recomputes=True) - live_bytes(alone, world, batch) == others
    end_world()


def live_bytes(settings: Settings, world: World, batch: Batch, recomputes: bool = False) -> int:
    """What a forward pass keeps for the backward."""
    model = new_model(settings)
    TensorParallel(model, 2, world.rank, Phases(world.device), recomputes).connect(None)
    with LiveBytes() as bytes_:
        loss = model(batch)
        assert loss.requires_grad
        return bytes_.live


def test_each_rank_evaluates_its_own_batches_of_any_length(tmp_path: Path) -> None:
    training = {"tensor_parallel_ranks": 2}
    table = settings_table(tmp_path, 1, "fp32", 1, model=SHARED_KEYS | {"logit_softcap": 5.0}, training=training)
    run_ranks(2, evaluate_other_batches, table)


def test_a_vocabulary_that_ranks_cannot_divide_is_refused() -> None:
    settings = Settings.model_validate({"model": {key: MODEL[key] for key in ("hidden_size", "num_heads")}})
    with pytest.raises(UserError, match=r"= 2 does not divide the 67 rows .* set model.vocabulary_multiple = 2"):
        TensorParallel(build_model(settings.model, 67), 2, 0, Phases(torch.device("cpu")))
