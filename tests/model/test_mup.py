"""muP (`model.mup_base_width`): at the base nothing changes; with width, activations keep their size in training."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bigmodel.checks.plain_torch import alone
from bigmodel.config.settings import ModelSettings, Settings
from bigmodel.data.load.batch import Batch
from bigmodel.kernels.linear_distillation import Divergence
from bigmodel.model.init import init_weights
from bigmodel.model.lora import add_adapters
from bigmodel.model.teacher import Teacher
from bigmodel.model.transformer import Transformer
from bigmodel.training.optimizers.groups import build_optimizer, parameter_groups
from tests.model.test_class_head import CLASSES, DATA, batch_for
from tests.system.test_guarantee_leak import VOCABULARY, make_batch

WIDTHS = (64, 128, 256)
BASE = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2}


def settings_of(width: int, model: dict[str, Any], optimizer: dict[str, Any], **sections: Any) -> Settings:
    sizes = BASE | {"hidden_size": width, "intermediate_size": width}
    table = {"model": sizes | model, "optimizer": {"learning_rate": 0.02} | optimizer}
    return Settings.model_validate(table | sections)


def batch_of(settings: Settings) -> Batch:
    return batch_for(settings) if settings.classification.classes else make_batch()


def trained(settings: Settings, steps: int = 4, teacher: Teacher | None = None) -> Transformer:
    model, batch = Transformer(settings.model, VOCABULARY), batch_of(settings)
    add_adapters(model, settings.lora)
    init_weights(model, 3)
    model.teacher = teacher
    if settings.lora.rank:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora." in name)
    optimizer = alone(build_optimizer(model, settings.optimizer), settings.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = settings.optimizer.learning_rate * group["rate_factor"]
    for _ in range(steps):
        optimizer.zero_grad()
        (model(batch) / batch.num_labels).backward()
        optimizer.step()
    return model


def growth(
    model: dict[str, Any],
    optimizer: dict[str, Any],
    widths: Sequence[int] = WIDTHS,
    teacher: Teacher | None = None,
    **sections: Any,
) -> dict[str, float]:
    """How much what training has changed in an activation grows from the smallest width to the largest one."""
    changes: dict[str, list[float]] = {}
    for width in widths:
        settings = settings_of(width, model, optimizer, **sections)
        before, after = (activations(trained(settings, steps, teacher), batch_of(settings)) for steps in (0, 4))
        for name, values in after.items():
            changes.setdefault(name, []).append(float((values - before[name]).abs().mean()))
    return {name: sizes[-1] / sizes[0] for name, sizes in changes.items()}


@torch.no_grad()
def activations(model: Transformer, batch: Batch) -> dict[str, torch.Tensor]:
    last, views, source = model.trunk(*model.embed(batch), batch)
    found = {"states": last, "logits": model(batch, "logits")}
    for block in model.extra_blocks:
        found["states of the next token"] = block(last, views[block.kind], batch.dropout_seeds, source)
    return found


@pytest.mark.parametrize(
    "optimizer",
    [{}, {"kind": "lion", "learning_rate": 0.005}, {"kind": "muon", "learning_rate": 0.05}],
    ids=lambda changes: changes.get("kind", "adamw"),
)
def test_changes_of_activations_do_not_grow_with_width(optimizer: dict[str, Any]) -> None:
    """The coordinate check of Yang et al. 2022: width times 4, four updates."""
    with_mup = growth({"mup_base_width": 64, "mup_base_head_dim": 16}, optimizer)
    without = growth({}, optimizer)
    for name in ("states", "logits"):
        assert 0.6 < with_mup[name] < 1.5, (name, with_mup, without)
        assert without[name] > 1.4 * with_mup[name], (name, with_mup, without)


LORA = {"rank": 4, "alpha": 16, "targets": ["all-linear"]}
MUON = {"kind": "muon", "learning_rate": 0.05}
HEAD = {"classes": CLASSES}


@pytest.mark.parametrize(
    ("model", "optimizer", "sections", "least"),
    [
        ({"num_mtp_modules": 1}, {}, {}, 2.0),
        ({}, {}, {"lora": LORA}, 1.4),
        ({}, MUON, {"lora": LORA}, 1.1),
        ({}, {"learning_rate": 0.004}, {"classification": HEAD, "data": DATA}, 1.4),
        ({"kind": "encoder"}, {"learning_rate": 0.004}, {"classification": HEAD | {"head": "bert"}, "data": DATA}, 1.4),
    ],
    ids=["mtp", "lora", "lora, muon", "class head", "bert's head"],
)
def test_changes_do_not_grow_with_width_in_modules_and_adapters(
    model: dict[str, Any], optimizer: dict[str, Any], sections: dict[str, Any], least: float
) -> None:
    """least: how much faster they grow without muP."""
    with_mup = growth(model | {"mup_base_width": 64, "mup_base_head_dim": 16}, optimizer, (64, 256), **sections)
    without = growth(model, optimizer, (64, 256), **sections)
    assert len(with_mup) == (3 if "num_mtp_modules" in model else 2)
    for name, ratio in with_mup.items():
        assert 0.4 < ratio < 1.5, (name, with_mup, without)
        assert without[name] > least * ratio, (name, with_mup, without)


def test_changes_do_not_grow_with_width_under_a_teacher() -> None:
    body = Transformer(settings_of(64, {}, {}).model, VOCABULARY)
    init_weights(body, 9)
    taught = Teacher(body, VOCABULARY, Divergence(0.9, 1.0))
    with_mup = growth({"mup_base_width": 64, "mup_base_head_dim": 16}, {}, (64, 256), taught)
    assert taught.take() > 0
    without = growth({}, {}, (64, 256), taught)
    for name, ratio in with_mup.items():
        assert 0.6 < ratio < 1.5, (name, with_mup, without)
        assert without[name] > 1.4 * ratio, (name, with_mup, without)


@pytest.mark.parametrize(
    ("optimizer", "of_a"),
    [({}, 1 / 4), ({"kind": "lion"}, 1 / 4), (MUON, 1 / 4), (MUON | {"matrix_scale": "original"}, 1 / 2)],
)
def test_rates_of_adapters_fall_where_their_inputs_grow(optimizer: dict[str, Any], of_a: float) -> None:
    settings = settings_of(256, {"mup_base_width": 64}, optimizer, lora=LORA)
    model = Transformer(settings.model, VOCABULARY)
    add_adapters(model, settings.lora)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in parameter_groups(model, settings.optimizer):
        for parameter in group["params"]:
            if ".lora." in names[id(parameter)]:
                expected = of_a if names[id(parameter)].endswith(".a.weight") else 1.0
                assert group["rate_factor"] == expected, names[id(parameter)]


def test_initial_class_logits_do_not_grow_with_width() -> None:
    sizes = []
    for width in (64, 256):
        settings = settings_of(width, {"mup_base_width": 64}, {}, classification=HEAD | {"head": "bert"}, data=DATA)
        model = trained(settings, 0)
        sizes.append((model.head.weight.std().item(), model.head.dense.weight.std().item()))
    (small, inside), (large, inside_large) = sizes
    assert large == pytest.approx(small / 4, rel=0.2)
    assert inside_large == pytest.approx(inside / 2, rel=0.05)


def test_at_the_base_nothing_changes() -> None:
    plain, base = (
        trained(settings_of(32, model, {}), 2) for model in ({}, {"mup_base_width": 32, "mup_base_head_dim": 8})
    )
    for name, weight in plain.named_parameters():
        assert torch.equal(weight, base.get_parameter(name)), name


@pytest.mark.parametrize(
    ("optimizer", "factor"),
    [
        ({"kind": "adamw"}, 1 / 4),
        ({"kind": "lion"}, 1 / 4),
        ({"kind": "ademamix"}, 1 / 4),
        ({"kind": "muon"}, 1 / 2),
        ({"kind": "muon", "matrix_scale": "original"}, 1.0),
    ],
)
def test_rates_of_matrices_in_blocks_fall_and_rate_times_decay_is_that_of_the_base(
    optimizer: dict[str, Any], factor: float
) -> None:
    settings = settings_of(256, {"mup_base_width": 64}, {"weight_decay": 0.1} | optimizer)
    model = Transformer(settings.model, VOCABULARY)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["rate_factor"], group["weight_decay"])
        for group in parameter_groups(model, settings.optimizer)
        for parameter in group["params"]
    }
    assert found["embedding.weight"] == found["norm.weight"] == found["blocks.1.attention_norm.weight"] == (1.0, 0.0)
    assert found["head.weight"] == (1.0, 0.1)
    for name in ("attention.query_key_value", "attention.output", "feed_forward.gate_up", "feed_forward.down"):
        assert found[f"blocks.1.{name}.weight"] == pytest.approx((factor, 0.1 / factor)), name


def test_scores_are_scaled_by_the_size_of_a_head_and_logits_by_the_width() -> None:
    wide = ModelSettings(**BASE, hidden_size=256, mup_base_width=64, mup_base_head_dim=16)
    assert wide.resolved_attention_scale == pytest.approx(math.sqrt(16) / 64)
    assert wide.resolved_logit_scale == 0.25
    assert ModelSettings(**BASE, hidden_size=256, mup_base_width=64).resolved_attention_scale is None
    t5 = wide.model_copy(update={"attention_scale": 1.0, "logit_scale": 0.5})
    assert (t5.resolved_attention_scale, t5.resolved_logit_scale) == (pytest.approx(0.5), 0.125)


TWO_SIDES = {"kind": "encoder_decoder", "encoder_hidden_size": 128, "separate_embeddings": True}


@pytest.mark.parametrize(
    ("model", "optimizer", "words"),
    [
        ({}, {"kind": "adafactor"}, "optimizer.kind = 'adafactor': muP has no rule for it; use one of adamw, lion"),
        ({}, {"l1_penalty": 0.1}, "with optimizer.l1_penalty: muP has no rule .* leave one of them out"),
        ({"position_embedding": "sinusoidal"}, {}, 'position_embedding = "sinusoidal": .*choose another'),
        (TWO_SIDES, {}, "one base width holds for both sides; give the encoder the hidden_size"),
    ],
)
def test_what_has_no_rule_is_refused(model: dict[str, Any], optimizer: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings_of(64, {"mup_base_width": 32} | model, optimizer)


def test_a_recurrent_model_has_no_rule() -> None:
    with pytest.raises(ValueError, match=r"mup_base_width = 32 has no effect .*muP is defined for the matrices"):
        ModelSettings(kind="lstm", num_layers=1, hidden_size=32, mup_base_width=32)
