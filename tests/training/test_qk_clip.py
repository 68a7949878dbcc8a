"""QK-clip: its scores and factors by dense torch, under every ZeRO stage, on 1 and 2 ranks, resumed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bigmodel.config.settings import DataSettings, Settings, UserError, settings_from_table
from bigmodel.distributed.world import ALONE
from bigmodel.model import transformer
from bigmodel.model.transformer import Attention, CrossAttention
from bigmodel.training.qk_clip import AttentionScores, head_factors, row_factors
from bigmodel.training.trained import choose_trained
from bigmodel.training.zero.engine import scale_rows
from tests.model.test_encoder_decoder import ONE_SIDE, PAIRS, TEXTS, TWO_SIDES
from tests.support import qk_clip_worker
from tests.support.dense_attention import dense_largest_products
from tests.support.engine_worker import settings_table
from tests.support.example_batches import batch_of, model_of
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.timeout(600)  # all ranks run in the first test's set-up
STEPS = 4
LIMIT = 2.5  # in the first step seven of eight heads exceed it, in others fewer
# Name -> ranks, stage, precision, settings.
CASES: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    "stage 0": (1, 0, "fp32", {"optimizer": {"kind": "muon", "joined_matrices": "parts"}}),
    "stage 1": (2, 1, "fp32", {"training": {"activation_checkpointing": "full", "ema_decay": 0.5}}),
    "stage 1, one rank": (1, 1, "fp32", {"training": {"ema_decay": 0.5}}),
    "stage 2": (2, 2, "fp32", {"optimizer": {"kind": "muon"}, "training": {"activation_checkpointing": "selective"}}),
    "stage 3": (2, 3, "fp32", {"optimizer": {"kind": "muon"}, "persistence": 100}),
    "offloaded": (2, 3, "fp32", {"zero": {"offload_optimizer": {"device": "cpu"}}}),
    "shared sequences": (2, 1, "fp32", {"training": {"sequence_parallel_ranks": 2}}),
    "gathered keys": (
        2,
        1,
        "fp32",
        {"training": {"sequence_parallel_ranks": 2, "sequence_parallel_method": "all_gather"}},
    ),
}
LOW = {
    "bf16 1": (2, 1, "bf16", {"optimizer": {"kind": "muon"}}),
    "bf16 2": (2, 2, "bf16", {}),
    "bf16 3": (2, 3, "bf16", {"optimizer": {"kind": "muon", "joined_matrices": "parts"}}),
}


def table_of(folder: Path, stage: int, precision: str, more: dict[str, Any]) -> dict[str, Any]:
    more = {name: dict(value) if isinstance(value, dict) else value for name, value in more.items()}
    table = settings_table(folder, stage, precision, 1, **more)
    table["model"] |= {"qk_norm": False, "attention_bias": "qkv"}
    table["optimizer"] |= {"qk_clip": LIMIT}
    return table


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("qk_clip")
    jobs: dict[int, dict[str, Any]] = {2: {}, 1: {}}
    for name, (ranks, *case) in CASES.items():
        jobs[ranks][name] = {"settings": table_of(folder, *case), "steps": STEPS}
    for name, (ranks, *case) in LOW.items():
        job = {"settings": table_of(folder, *case), "steps": STEPS, "save_at": 1, "skip_at": [1]}
        jobs[ranks][name] = job | {"checkpoints": str(folder / name)}
        jobs[ranks][f"{name} again"] = jobs[ranks][name] | {"resume": True}
    found: dict[str, Any] = {}
    for ranks in (2, 1):
        (folder / "jobs.json").write_text(json.dumps(list(jobs[ranks].values())))
        run_ranks(ranks, qk_clip_worker.rank, folder, timeout_seconds=280)
        found |= dict(zip(jobs[ranks], json.loads((folder / "results.json").read_text()), strict=True))
    return found | {
        f"{name} plain": qk_clip_worker.plain(jobs[CASES[name][0]][name]["settings"], STEPS) for name in CASES
    }


@pytest.mark.parametrize("name", CASES)
def test_under_every_stage_scores_and_weights_are_those_of_plain_torch(results, name: str) -> None:
    one, plain = results[name], results[f"{name} plain"]
    assert one["losses"] == pytest.approx(plain["losses"], rel=2e-5)
    np.testing.assert_allclose(one["largest"], plain["largest"], rtol=2e-4)
    assert one["score"] == pytest.approx([np.max(step) for step in one["largest"]], rel=1e-6)
    assert one["heads"] == [(np.array(step) > LIMIT).sum() for step in plain["largest"]]
    assert one["heads"][0] == 7
    for kind in ("weights", "averages") if one["averages"] else ("weights",):
        for parameter, weight in plain[kind].items():
            assert np.abs(np.array(one[kind][parameter]) - np.array(weight)).max() < 1e-4, f"{kind}: {parameter}"
    assert one["problems"] == []


def test_scores_and_factors_of_a_step_have_the_same_bits_on_any_number_of_ranks(results) -> None:
    """Before the first update, that is: afterwards sums of gradients differ in their order."""
    first = {name: results[name]["largest"][0] for name in CASES if name not in ("shared sequences", "gathered keys")}
    assert len({json.dumps(one) for one in first.values()}) == 1
    low = {name: results[name]["largest"][0] for name in LOW}
    assert len({json.dumps(one) for one in low.values()}) == 1


@pytest.mark.parametrize("name", LOW)
def test_the_forward_pass_has_the_scaled_masters_and_a_resume_repeats_every_bit(results, name: str) -> None:
    once, again = results[name], results[f"{name} again"]
    assert once["heads"][0] == 7
    assert once["problems"] == again["problems"] == []
    assert again["begun"] == once["saved"]
    for key in ("losses", "largest", "score"):
        assert again[key] == once[key][1:]
    assert again["digest"] == once["digest"]


@pytest.mark.parametrize("name", LOW)
def test_a_skipped_step_scales_nothing(results, name: str) -> None:
    assert results[name]["heads"][1] > 0
    before, after = results[name]["skipped"]
    assert before == after


def test_factors_are_those_of_the_example() -> None:
    queries, keys = head_factors(torch.tensor([400.0, 200.0, 50.0, 400.0]), 2, 100.0)
    assert queries.tolist() == pytest.approx([0.5**0.5 / 2, 0.5**0.5, 1, 0.25])
    assert keys.tolist() == pytest.approx([0.5**0.5, 1])


def test_a_head_with_keys_of_its_own_shares_the_factor_evenly() -> None:
    queries, keys = head_factors(torch.tensor([400.0, 90.0]), 2, 100.0)
    assert queries.tolist() == keys.tolist() == [0.5, 1.0]


@pytest.mark.parametrize("largest", [float("inf"), float("nan"), float("-inf"), -5.0, 0.0])
def test_a_head_without_a_finite_score_above_the_limit_stays(largest: float) -> None:
    queries, keys = head_factors(torch.tensor([largest, 100.0]), 1, 100.0)
    assert [*queries.tolist(), *keys.tolist()] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("columns", [1, 3, 7])
def test_every_range_of_a_matrix_is_scaled_as_the_whole(columns: int) -> None:
    whole, factors = torch.arange(1.0, 4 * columns + 1), torch.tensor([2.0, 3.0, 5.0, 7.0])
    wanted = (whole.view(4, columns) * factors[:, None]).flatten()
    for start in range(4 * columns + 1):
        for end in range(start, 4 * columns + 1):
            mine = whole[start:end].clone()
            scale_rows(mine, start, columns, factors)
            assert torch.equal(mine, wanted[start:end]), (start, end)


MODELS = {
    "decoder": ({}, TEXTS, ONE_SIDE),
    "one key head each, capped, biases": (
        {"num_kv_heads": 4, "attention_softcap": 0.5, "attention_bias": "all"}, TEXTS, ONE_SIDE,
    ),
    "one key head": ({"num_kv_heads": 1, "num_mtp_modules": 1}, TEXTS, ONE_SIDE),
    "cross": ({"kind": "encoder_decoder"}, PAIRS, TWO_SIDES),
    "mixed": ({"kind": "encoder_decoder", "source_attention": "mixed", "attention_bias": "qkv"}, PAIRS, TWO_SIDES),
    "relative bias": ({"kind": "encoder_decoder", "position_embedding": "relative_bias"}, PAIRS, TWO_SIDES),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS.keys())
def test_after_the_clip_no_score_of_the_same_inputs_exceeds_the_limit(case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer sees its inputs of before once more: with other scores, earlier layers send other ones."""
    changes, documents, data = case
    model, batch = model_of(**changes).train(), batch_of(documents, DataSettings(**data))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "query" in name or "key_value" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    settings = Settings.model_construct(optimizer=Settings().optimizer.model_copy(update={"qk_clip": 1e9}))
    scores, dense = AttentionScores(model, settings, ALONE), []
    inputs: dict[Any, Any] = {}
    for module in model.modules():
        if isinstance(module, (Attention, CrossAttention)):
            module.register_forward_pre_hook(lambda layer, given: inputs.setdefault(layer, given))
    measured = transformer.attention_and_largest

    def beside(q: Tensor, k: Tensor, v: Tensor, mask: Any, tiles: Any, scale: float | None, *rest: Any, **named: Any):
        dense.append(
            dense_largest_products(q.detach(), k.detach(), mask) * ((scale or q.shape[2] ** -0.5) * q.shape[2] ** 0.5)
        )
        return measured(q, k, v, mask, tiles, scale, *rest, **named)

    monkeypatch.setattr(transformer, "attention_and_largest", beside)
    scores.begin()
    model(batch)
    layers = {layer: name for name, layer in model.named_modules() if layer in inputs}
    assert (
        len(dense) == len(layers) == {"cross": 6, "relative bias": 6, "mixed": 4, "one key head": 3}.get(_id(case), 2)
    )
    before = {layer: layer.largest_Q.clone() for layer in layers}
    for found_Q in before.values():
        assert any(torch.allclose(found_Q, wanted_Q, rtol=1e-4) for wanted_Q in dense)
    limit = float(torch.cat([*before.values()]).quantile(0.5))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for layer, name in layers.items():
            for parameter, factor_R in row_factors(
                name, layer, *head_factors(before[layer], layer.num_kv_heads, limit)
            ).items():
                parameters[parameter].view(len(factor_R), -1).mul_(factor_R[:, None])
    scores.begin()
    for layer, given in inputs.items():
        layer(*given)
        torch.testing.assert_close(layer.largest_Q, before[layer].clamp(max=limit), rtol=1e-4, atol=1e-6)


def _id(case: Any) -> str:
    return next(name for name, one in MODELS.items() if one is case)


def test_compiled_blocks_measure_the_same_without_another_compilation() -> None:
    found = []
    for compiles in (False, True):
        model = model_of().train()
        settings = Settings.model_validate({"metrics": {"attention_scores": True}})
        if compiles:
            torch.compiler.reset()
            for block in model.blocks:
                block.forward = torch.compile(block.forward, backend="aot_eager", dynamic=False, fullgraph=True)
        scores = AttentionScores(model, settings, ALONE)
        for number, documents in enumerate((TEXTS, TEXTS[::-1])):
            with torch._dynamo.config.patch(error_on_recompile=number > 0):
                scores.begin()
                model(batch_of(documents, DataSettings(**ONE_SIDE))).backward()
                found.append(torch.stack([block.attention.largest_Q for block in model.blocks]))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


def test_a_run_that_does_not_ask_measures_nothing() -> None:
    model = model_of().train()
    scores = AttentionScores(model, Settings(), ALONE)
    scores.begin()
    model(batch_of(TEXTS, DataSettings(**ONE_SIDE)))
    assert model.blocks[0].attention.largest_Q is None
    assert scores.clip() == (None, None, None)


def test_evaluation_measures_nothing() -> None:
    model = model_of()
    scores = AttentionScores(model, Settings.model_validate({"metrics": {"attention_scores": True}}), ALONE)
    scores.begin()
    model.eval()(batch_of(TEXTS, DataSettings(**ONE_SIDE)))
    assert scores.clip() == (None, None, None)


def test_norms_of_queries_and_keys_are_refused() -> None:
    table = {"optimizer": {"qk_clip": 100}, "model": {"qk_norm": True}}
    with pytest.raises(UserError, match=r"optimizer\.qk_clip = 100 with model.qk_norm = true: the norm undoes"):
        settings_from_table(table, Path("run.toml"))


def test_frozen_weights_are_refused() -> None:
    settings = Settings.model_validate({"optimizer": {"qk_clip": 100}, "training": {"freeze": ["blocks.0"]}})
    model = model_of()
    choose_trained(model, settings)
    with pytest.raises(UserError, match=r"blocks.0.attention.query_key_value.weight is frozen \(training.freeze"):
        AttentionScores(model, settings, ALONE)


def test_a_model_without_attention_is_refused() -> None:
    settings = Settings.model_validate({"metrics": {"attention_scores": True}})
    with pytest.raises(UserError, match=r"metrics\.attention_scores = true: this model has no attention"):
        AttentionScores(torch.nn.Linear(2, 2), settings, ALONE)
