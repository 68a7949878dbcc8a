"""Settings of experts: what fits, and what is refused with which words."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bigmodel.config.parallel_settings import refuse_across_nodes
from bigmodel.config.sections import explain
from bigmodel.config.settings import ModelSettings, Settings, UserError
from bigmodel.config.start_folder import completed

EXPERTS = {"count": 4}
MASKED = {"objectives": [{"kind": "masked"}]}


def settings_of(experts: dict[str, Any] | None = None, **sections: Any) -> Settings:
    model = {"experts": EXPERTS | (experts or {})} | sections.pop("model", {})
    return Settings.model_validate({"model": model} | sections)


def test_an_encoder_may_have_experts() -> None:
    settings = settings_of({"first_dense_layers": 2}, model={"kind": "encoder", "num_layers": 6}, data=MASKED)
    assert settings.model.num_expert_layers == 4
    assert settings.model.expert_width == settings.model.intermediate_size
    assert settings_of({"width": 80}).model.expert_width == 80
    assert Settings().model.num_expert_layers == 0


def test_a_start_from_a_run_takes_its_experts(tmp_path: Path) -> None:
    def completed_with(model: dict[str, Any]) -> dict[str, Any]:
        return completed({"model": {"from": str(tmp_path)} | model}, tmp_path / "new.toml")["model"]

    experts = {"width": 48, "balance_weight": 0.25, "capacity_factor": 1.25, "min_capacity": 8}
    saved = ModelSettings(experts=EXPERTS | experts).model_dump(mode="json")
    (tmp_path / "settings.json").write_text(json.dumps({"data": {"directory": "data"}}))
    (tmp_path / "checkpoints/step-00000004").mkdir(parents=True)
    state = tmp_path / "checkpoints/step-00000004/state.json"
    state.write_text(json.dumps({"model": saved, "shapes": {"embedding.weight": [90, 768]}}))
    assert completed_with({})["experts"]["width"] == 48
    more = completed_with({"experts": {"count": 4, "balance_weight": 0.5}})["experts"]
    assert (more["count"], more["width"], more["balance_weight"]) == (4, 48, 0.5)
    other = completed_with({"experts": {"balance": "bias"}})["experts"]
    assert (other["balance"], "balance_weight" in other) == ("bias", False)
    assert (other["capacity_factor"], other["min_capacity"]) == (1.25, 8)
    assert "min_capacity" not in completed_with({"experts": {"capacity_factor": 0}})["experts"]
    with pytest.raises(UserError, match=r"new.toml: model.experts: not those of model.from .* leave them out"):
        completed_with({"experts": {"count": 8}})
    biased = ModelSettings(experts=EXPERTS | {"balance": "bias"}).model_dump(mode="json")
    state.write_text(json.dumps({"model": biased, "shapes": {"embedding.weight": [90, 768]}}))
    with pytest.raises(UserError, match=r"change only balance_weight, bias_rate, router_z_weight"):
        completed_with({"experts": {"balance": "none"}})
    dense = ModelSettings().model_dump(mode="json")
    state.write_text(json.dumps({"model": dense, "shapes": {"embedding.weight": [90, 768]}}))
    with pytest.raises(UserError, match=r"model.experts: not those of model.from"):
        completed_with({"experts": {"count": 4}})


@pytest.mark.parametrize(
    ("experts", "sections", "words"),
    [
        ({"per_token": 5}, {}, "model.experts.per_token = 5 exceeds model.experts.count = 4; lower it"),
        (
            {"first_dense_layers": 12},
            {},
            "first_dense_layers = 12 leaves no layer with experts of model.num_layers = 12",
        ),
        ({"count": 32_768}, {}, "model.experts.count = 32768"),
        ({"per_token": 1}, {}, "model.experts.per_token = 1 with normalize_weights = true: the weight of a token's"),
        ({"groups_per_token": 2}, {}, "model.experts.groups_per_token = 2 exceeds model.experts.groups = 1; lower it"),
        ({"groups": 3}, {}, "model.experts.groups = 3 with model.experts.count = 4: groups have equally many experts"),
        ({"groups": 4}, {}, "model.experts.groups = 4 with model.experts.count = 4: groups have equally many experts"),
        (
            {"groups": 2, "per_token": 3},
            {},
            "groups_per_token = 1 of model.experts.groups = 2 have 2 experts, and model.experts.per_token = 3; raise",
        ),
        ({}, {"model": {"gated": False}}, "model.gated = false with model.experts: experts are gated"),
        ({}, {"model": {"feed_forward_bias": True}}, "model.feed_forward_bias = true with model.experts"),
        (
            {},
            {"model": {"kind": "encoder_decoder"}, "data": {"source_sequence_length": 64}},
            'model.experts with model.kind = "encoder_decoder"',
        ),
        ({}, {"model": {"kind": "rnn"}}, "model.experts = "),
        ({}, {"lora": {"rank": 4}}, "lora.rank with model.experts: adapters of experts are not made; leave one"),
        ({}, {"distillation": {"teacher": "runs/one"}}, "distillation.teacher with model.experts"),
        ({}, {"classification": {"classes": ["a", "b"]}}, "classification.classes with model.experts"),
        ({}, {"pruning": {"kind": "magnitude"}}, "pruning.kind with model.experts"),
        ({}, {"training": {"scheduled_sampling": {}}}, "training.scheduled_sampling with model.experts"),
        ({}, {"model": {"mup_base_width": 256}}, "model.mup_base_width with model.experts"),
        ({}, {"training": {"compile": True}}, "training.compile with model.experts"),
        ({}, {"optimizer": {"kind": "adafactor"}}, 'optimizer.kind = "adafactor" with model.experts'),
        (
            {},
            {"training": {"expert_parallel_ranks": 3}},
            "training.expert_parallel_ranks = 3 does not divide model.experts.count = 4; choose a divisor",
        ),
    ],
)
def test_what_does_not_fit_is_refused(experts: dict[str, Any], sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        settings_of(experts, **sections)
    assert words in explain(refusal.value, Settings)


def test_ranks_share_experts_of_a_model_that_has_some() -> None:
    with pytest.raises(ValidationError, match=r"training.expert_parallel_ranks = 2 needs model.experts; set it to 1"):
        Settings.model_validate({"training": {"expert_parallel_ranks": 2}})


def test_ranks_of_several_nodes_share_experts_only_if_asked() -> None:
    training = {"expert_parallel_ranks": 4}
    refuse_across_nodes(settings_of(training=training), 8)
    refuse_across_nodes(Settings(), 1)
    with pytest.raises(UserError, match="expert_parallel_ranks = 4 with 2 ranks on a node: each layer would wait"):
        refuse_across_nodes(settings_of(training=training), 2)
    refuse_across_nodes(settings_of(training=training | {"expert_parallel_across_nodes": True}), 2)


def test_groups_of_ranks_hold_all_that_share_something() -> None:
    training = {"expert_parallel_ranks": 4, "sequence_parallel_ranks": 6}
    assert settings_of(training=training, data={"sequence_length": 6_144}).training.sharing_ranks == 12
    assert Settings().training.sharing_ranks == 1
