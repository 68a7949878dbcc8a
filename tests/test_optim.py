"""Parameter groups, AdamW and the learning rate of each step."""

import math

import pytest
import torch

from bigmodel.config import OptimizerSettings, Settings
from bigmodel.model.transformer import Transformer
from bigmodel.training.optim import build_optimizer, parameter_groups
from bigmodel.training.schedule import SCHEDULES, learning_rate


def model(tied: bool) -> Transformer:
    table = {"layers": 1, "width": 8, "heads": 2, "key_value_heads": 1, "feed_forward_width": 12, "qk_norm": True}
    return Transformer(Settings.model_validate({"model": table | {"tied_embeddings": tied}}).model, vocabulary=11)


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_decay_and_norms_and_embeddings_do_not(tied: bool) -> None:
    net = model(tied)
    decayed, free = parameter_groups(net, OptimizerSettings(weight_decay=0.1))
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0.0
    assert {names[id(parameter)] for parameter in decayed["params"]} == {
        "blocks.0.attention.query_key_value.weight",
        "blocks.0.attention.output.weight",
        "blocks.0.feed_forward.gate_up.weight",
        "blocks.0.feed_forward.down.weight",
    } | (set() if tied else {"head.weight"})
    assert "embedding.weight" in {names[id(parameter)] for parameter in free["params"]}
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_adamw_takes_its_settings() -> None:
    settings = OptimizerSettings(learning_rate=0.02, beta1=0.8, beta2=0.7, epsilon=1e-3, weight_decay=0.3)
    adamw = build_optimizer(model(tied=True), settings)
    for group in adamw.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.8, 0.7), 1e-3)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.3, 0.0]


def test_one_update_is_that_of_the_paper() -> None:
    """weight 1, gradient 2, decay 0.5, rate 0.1: 1 * (1 - 0.05) - 0.1 * 2 / (2 + 0) = 0.85."""
    linear = torch.nn.Linear(1, 1, bias=False)
    linear.weight.data.fill_(1.0)
    adamw = build_optimizer(linear, OptimizerSettings(learning_rate=0.1, weight_decay=0.5, epsilon=1e-12))
    linear.weight.grad = torch.full((1, 1), 2.0)
    adamw.step()
    assert linear.weight.item() == pytest.approx(0.85, abs=1e-6)


def rates(steps: int, **schedule: object) -> list[float]:
    table = {"training": {"steps": steps}, "optimizer": {"learning_rate": 1.0}, "schedule": schedule}
    settings = Settings.model_validate(table)
    return [learning_rate(step, settings) for step in range(steps)]


def test_cosine_warms_up_and_falls_to_the_final_ratio() -> None:
    found = rates(8, kind="cosine", warmup_steps=4, final_ratio=0.2)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert found[5:] == pytest.approx([0.6, 0.2 + 0.8 * (1 - math.sqrt(0.5)) / 2, 0.2])


def test_wsd_warms_up_stays_and_decays() -> None:
    found = rates(10, kind="wsd", warmup_steps=2, decay_steps=4, final_ratio=0.0)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0])


def test_wsd_without_decay_stays() -> None:
    assert rates(4, kind="wsd", warmup_steps=0, decay_steps=0) == [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("kind", list(SCHEDULES))
def test_a_run_that_is_all_warm_up_ends_at_the_peak(kind: str) -> None:
    assert rates(3, kind=kind, warmup_steps=3) == pytest.approx([1 / 3, 2 / 3, 1.0])


@pytest.mark.parametrize("kind", list(SCHEDULES))
def test_the_learning_rate_depends_on_the_step_alone(kind: str) -> None:
    assert rates(20, kind=kind, warmup_steps=5)[13] == rates(20, kind=kind, warmup_steps=5)[13] > 0
