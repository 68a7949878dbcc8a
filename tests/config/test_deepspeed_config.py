"""The effective DeepSpeed configuration: what the user wrote stays, "auto" is filled, contradictions are errors."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bigmodel.config.deepspeed_config import DEFAULTS, for_deepspeed, num_micro_batches, resolve_deepspeed
from bigmodel.config.settings import Settings, UserError, settings_from_table, to_toml_table
from bigmodel.training.optimizers.table import OPTIMIZERS

REPOSITORY = Path(__file__).resolve().parents[2]


def resolve(
    tmp_path: Path, config: dict[str, Any] | str, world_size: int = 1, **sections: dict[str, Any]
) -> tuple[dict[str, Any], Settings]:
    path = tmp_path / "mine.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    sections["training"] = {"deepspeed": str(path)} | sections.get("training", {})
    return resolve_deepspeed(Settings.model_validate(sections), world_size)


def refusal(tmp_path: Path, config: dict[str, Any] | str, world_size: int = 1, **sections: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        resolve(tmp_path, config, world_size, **sections)
    assert str(tmp_path / "mine.json") in str(caught.value)
    return str(caught.value)


def test_without_a_file_the_defaults_hold() -> None:
    effective, settings = resolve_deepspeed(Settings.model_validate({"training": {"global_batch_size": 8}}), 2)
    assert effective == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 4,
        "train_batch_size": 8,
        "zero_optimization": {"stage": 1, "overlap_comm": False},
        "bf16": {"enabled": True, "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "gradient_clipping": 1.0,
    }
    assert for_deepspeed(effective) == effective
    assert settings.training.global_batch_size == 8


def test_every_default_has_a_reason() -> None:
    assert all(reason for _, _, reason in DEFAULTS)


def test_what_the_user_wrote_is_never_altered(tmp_path: Path) -> None:
    mine = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000},
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "bf16"},
        "communication_data_type": "bf16",
        "gradient_clipping": 0.5,
        "wall_clock_breakdown": True,
        "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.8, 0.9], "torch_adam": True}},
    }
    effective, settings = resolve(tmp_path, mine, 2)
    derived = {"gradient_accumulation_steps": 2, "train_batch_size": 8}
    assert effective == mine | derived
    assert settings.optimizer.gradient_clipping == 0.5
    assert settings.optimizer.learning_rate == 0.001
    assert (settings.optimizer.beta1, settings.optimizer.beta2) == (0.8, 0.9)


def test_auto_is_filled_from_the_run_file_or_left_to_deepspeed(tmp_path: Path) -> None:
    mine = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
    }
    optimizer = {"learning_rate": 0.01, "gradient_clipping": 2.0}
    effective, _ = resolve(
        tmp_path, mine, 1, training={"global_batch_size": 3, "precision": "fp32"}, optimizer=optimizer
    )
    assert effective["train_batch_size"] == 3
    assert effective["gradient_accumulation_steps"] == 3
    assert effective["gradient_clipping"] == 2.0
    assert effective["bf16"]["enabled"] is False
    assert effective["fp16"] == {}
    assert effective["zero_optimization"] == {"stage": 3, "overlap_comm": False}
    assert effective["optimizer"]["params"] == {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("packs", "ranks", "at_once", "expected"),
    [(8, 1, 1, 8), (8, 2, 1, 4), (8, 2, 4, 1), (8, 3, 1, 3), (8, 3, 2, 2), (7, 2, 2, 2), (1, 4, 1, 1)],
)
def test_micro_batches_follow_from_packs_ranks_and_packs_at_once(
    packs: int, ranks: int, at_once: int, expected: int
) -> None:
    assert num_micro_batches(packs, ranks, at_once) == expected


def test_all_that_is_wrong_with_the_keys_is_told_at_once_and_so_are_all_contradictions(tmp_path: Path) -> None:
    keys = {"zero_optimisation": {"stage": 1}, "amp": {"enabled": True}, "compile": True, "bf16": {"enabled": True}}
    told = refusal(tmp_path, keys)
    assert len(told.splitlines()) == 4
    for words in ("zero_optimisation is not a key", "removed from DeepSpeed", "compile = true: remove the section"):
        assert words in told
    both = {"gradient_clipping": 0.5, "optimizer": {"type": "Lion", "params": {"lr": 0.1, "betas": [0.8, 0.9]}}}
    optimizer = {"gradient_clipping": 1.0, "kind": "adamw", "learning_rate": 0.2, "beta2": 0.9}
    told = refusal(tmp_path, both, optimizer=optimizer)
    assert [line.split(" = ")[0].strip() for line in told.splitlines()[1:]] == [
        "gradient_clipping",
        "optimizer.type",
        "optimizer.params.lr",
    ]


def test_a_step_that_does_not_divide_is_filled_with_empty_packs(tmp_path: Path) -> None:
    effective, _ = resolve(tmp_path, {"train_micro_batch_size_per_gpu": 2}, 3, training={"global_batch_size": 8})
    assert effective["gradient_accumulation_steps"] == 2
    assert effective["train_batch_size"] == 12


def test_fp16_lion_and_offload_bring_the_keys_that_deepspeed_wants(tmp_path: Path) -> None:
    mine = {"optimizer": {"type": "Lion"}, "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    effective, settings = resolve(tmp_path, mine, training={"precision": "fp16"})
    assert settings.optimizer.kind == "lion"
    assert effective["fp16"] == {"enabled": True}
    assert effective["bf16"]["enabled"] is False
    assert effective["zero_allow_untested_optimizer"] is True
    assert effective["zero_force_ds_cpu_optimizer"] is False
    del effective["optimizer"]  # it is ours
    assert for_deepspeed(effective) == effective, "DeepSpeed's own defaults differ"
    assert resolve(tmp_path, {"fp16": {"enabled": True}})[1].training.precision == "fp16"
    assert resolve(tmp_path, {"bf16": {"enabled": False}, "fp16": {"enabled": False}})[1].training.precision == "fp32"


def test_a_setting_of_the_json_that_the_optimizer_does_not_read_is_refused(tmp_path: Path) -> None:
    told = refusal(tmp_path, {"optimizer": {"type": "Lion", "params": {"eps": 1e-3}}})
    assert 'epsilon = 0.001 has no effect with kind = "lion"; leave it out or set kind = "adamw" or' in told
    told = refusal(tmp_path, {"optimizer": {"type": "Lion"}}, optimizer={"epsilon": 1e-3})
    assert 'epsilon = 0.001 has no effect with kind = "lion"' in told
    assert resolve(tmp_path, {"optimizer": {"type": "AdEMAMix"}})[1].optimizer.kind == "ademamix"


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ({"stage": 2}, 'zero_optimization.stage = 2 with optimizer.kind = "lion": it needs whole gradients'),
        (
            {"stage": 1, "offload_optimizer": {"device": "cpu"}},
            'zero_optimization.offload_optimizer.device = "cpu" with optimizer.kind = "lion": it needs whole gradients',
        ),
    ],
)
def test_an_optimizer_that_does_not_work_with_a_stage_or_an_offload_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero: dict[str, Any], words: str
) -> None:
    limited = dataclasses.replace(OPTIMIZERS["lion"], stages=(1,), offloads=(), limits="it needs whole gradients")
    monkeypatch.setitem(OPTIMIZERS, "lion", limited)
    assert words in refusal(tmp_path, {"zero_optimization": zero}, optimizer={"kind": "lion"})
    assert resolve(tmp_path, {"zero_optimization": {"stage": 1}}, optimizer={"kind": "lion"})


def test_what_could_not_be_run_here_passes_through(tmp_path: Path) -> None:
    zero = {"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": True, "zero_hpz_partition_size": 8}
    effective, _ = resolve(tmp_path, {"zero_optimization": zero})
    assert effective["zero_optimization"] == zero | {"overlap_comm": False}


def test_ranks_that_share_packs_have_more_micro_batches(tmp_path: Path) -> None:
    training = {"global_batch_size": 8, "sequence_parallel_ranks": 2}
    effective, _ = resolve(tmp_path, {}, 4, training=training)
    assert effective["gradient_accumulation_steps"] == 4
    assert effective["train_batch_size"] == 16, "DeepSpeed asserts that it is the product over all ranks"
    with pytest.raises(UserError, match=r"sequence_parallel_ranks = 2 does not divide the 3 rank"):
        resolve(tmp_path, {}, 3, training=training)
    assert 'write "auto"' in refusal(tmp_path, {"train_batch_size": 8}, 4, training=training)
    words = refusal(tmp_path, {"gradient_accumulation_steps": 8}, 4, training=training)
    assert "global_batch_size = 8 over 2 groups of 2 ranks" in words
    assert words.endswith("training.global_batch_size = 16")


@pytest.mark.parametrize(
    ("size", "sections", "said"),
    [
        (3, {}, "sequence_parallel_ranks = 3 does not fit model.num_heads = 4"),
        (2, {"training": {"tensor_parallel_ranks": 2}}, "tensor-parallel ranks share the positions already"),
        (2, {"model": {"num_mtp_modules": 1}}, "without MTP modules"),
    ],
)
def test_what_the_json_sets_has_to_fit_the_run_file(
    tmp_path: Path, size: int, sections: dict[str, Any], said: str
) -> None:
    model = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 96}
    words = refusal(
        tmp_path, {"sequence_parallel_size": size}, 12, **sections | {"model": model | sections.get("model", {})}
    )
    assert "with the settings of the run file: training.sequence_parallel_ranks" in words
    assert said in words


def test_ranks_that_share_experts_divide_all_and_partition_them_among_themselves(tmp_path: Path) -> None:
    sections = {"model": {"experts": {"count": 4}}, "training": {"expert_parallel_ranks": 2}}
    effective, _ = resolve(tmp_path, {"zero_optimization": {"stage": 2}}, 4, **sections)
    assert effective["gradient_accumulation_steps"] == 2, "each has sequences of its own"
    assert "expert_parallel_ranks = 2 does not divide the 3 ranks; choose" in refusal(tmp_path, {}, 3, **sections)
    resolve(tmp_path, {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1}}, 4, **sections)
    for name, value in (("zero_hpz_partition_size", "2"), ("zero_quantized_gradients", "true")):
        words = refusal(tmp_path, {"zero_optimization": {"stage": 3, name: json.loads(value)}}, 4, **sections)
        assert f"zero_optimization.{name} = {value} with training.expert_parallel_ranks = 2" in words
    for name in ("reduce_scatter", "contiguous_gradients"):
        words = refusal(tmp_path, {"zero_optimization": {"stage": 2, name: False}}, 4, **sections)
        assert f"zero_optimization.{name} = false with training.expert_parallel_ranks = 2" in words


@pytest.mark.parametrize("other", [{}, {"train_micro_batch_size_per_gpu": "auto"}])
def test_packed_sequences_at_once_follow_from_batch_and_accumulation_as_in_deepspeed(
    tmp_path: Path, other: dict[str, str]
) -> None:
    effective, settings = resolve(tmp_path, {"train_batch_size": 8, "gradient_accumulation_steps": 1} | other, 2)
    assert effective["train_micro_batch_size_per_gpu"] == 4
    assert settings.training.global_batch_size == 8
    words = refusal(tmp_path, {"train_batch_size": 8, "gradient_accumulation_steps": 3} | other, 2)
    assert "gradient_accumulation_steps = 3, but train_batch_size, which is training.global_batch_size = 8" in words
    assert words.endswith("or train_batch_size = 6")


def test_ranks_that_hpz_cannot_group_are_refused(tmp_path: Path) -> None:
    words = refusal(tmp_path, {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}, 4)
    assert words.endswith(
        "zero_hpz_partition_size = 3 does not divide the 4 ranks; write the number of ranks of a node"
    )


def test_an_unset_setting_follows_the_json(tmp_path: Path) -> None:
    mine = {"train_batch_size": 12, "bf16": {"enabled": False}, "gradient_clipping": 0}
    effective, settings = resolve(tmp_path, mine, 3)
    assert settings.training.global_batch_size == 12
    assert settings.training.precision == "fp32"
    assert settings.optimizer.gradient_clipping == 0.0
    assert effective["gradient_accumulation_steps"] == 4


CONTRADICTIONS: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    (
        {"bf16": {"enabled": True}},
        {"training": {"precision": "fp32"}},
        ["bf16.enabled = true", "training.precision", "fp32"],
    ),
    ({"bf16": {"enabled": False}}, {"training": {"precision": "bf16"}}, ["bf16.enabled = false", "training.precision"]),
    ({"fp16": {"enabled": False}}, {"training": {"precision": "fp16"}}, ["fp16.enabled = false", "training.precision"]),
    ({"optimizer": {"type": "Adam"}}, {"optimizer": {"kind": "muon"}}, ['type = "Adam"', "optimizer.kind"]),
    ({"gradient_clipping": 1}, {"optimizer": {"gradient_clipping": 0.5}}, ["gradient_clipping = 1", "= 0.5"]),
    (
        {"train_batch_size": 16},
        {"training": {"global_batch_size": 8}},
        ["train_batch_size = 16", "global_batch_size = 8"],
    ),
    (
        {"train_batch_size": 9},
        {"data": {"lanes": 4}, "training": {"global_batch_size": 9 - 1}},
        ["train_batch_size = 9"],
    ),
    (
        {"gradient_accumulation_steps": 3},
        {"training": {"global_batch_size": 8}},
        ["gradient_accumulation_steps = 3", "global_batch_size = 8", "2 ranks", "gives 4", "global_batch_size = 6"],
    ),
    ({"train_batch_size": 5}, {"training": {"global_batch_size": 5}}, ["train_batch_size = 5", "6 in total", '"auto"']),
    ({"optimizer": {"params": {"lr": 1e-3}}}, {"optimizer": {"learning_rate": 2e-3}}, ["params.lr = 0.001", "0.002"]),
    (
        {"optimizer": {"params": {"betas": [0.9, 0.99]}}},
        {"optimizer": {"beta2": 0.95}},
        ["betas[1] = 0.99", "beta2 = 0.95"],
    ),
    ({"optimizer": {"params": {"eps": 1e-6}}}, {"optimizer": {"epsilon": 1e-8}}, ["params.eps", "optimizer.epsilon"]),
    ({"optimizer": {"params": {"weight_decay": 0}}}, {"optimizer": {"weight_decay": 0.1}}, ["weight_decay = 0,"]),
]


@pytest.mark.parametrize(("mine", "sections", "parts"), CONTRADICTIONS)
def test_a_contradiction_names_both_sides_and_the_remedy(
    tmp_path: Path, mine: dict[str, Any], sections: dict[str, Any], parts: list[str]
) -> None:
    text = refusal(tmp_path, mine, 2, **sections)
    for part in parts:
        assert part in text
    assert "run file" in text or "training." in text


@pytest.mark.parametrize(
    ("optimizer", "given"),
    [({"kind": "lion"}, 'optimizer.kind = "lion"'), ({"l1_penalty": 0.1}, "optimizer.l1_penalty")],
)
def test_optimizers_that_deepspeed_does_not_know_are_allowed_unless_the_json_forbids_them(
    tmp_path: Path, optimizer: dict[str, Any], given: str
) -> None:
    forbids = {"zero_allow_untested_optimizer": False}
    assert f"zero_allow_untested_optimizer = false with {given}: DeepSpeed does not know this optimizer" in refusal(
        tmp_path, forbids, 2, optimizer=optimizer
    )


UNUSABLE: list[tuple[dict[str, Any] | str, list[str]]] = [
    ("{", ["not valid JSON", "line 1"]),
    ('{"bf16": {"enabled": true},}', ["not valid JSON"]),
    ("[1, 2]", ["a JSON list", "object"]),
    ('{"bf16": {}, "bf16": {}}', ["'bf16' occurs twice"]),
    ({"gradient_cliping": 1}, ["gradient_cliping", "did you mean gradient_clipping?"]),
    ({"zero_optimization": {"overlap_com": True}}, ["did you mean zero_optimization.overlap_comm?"]),
    ({"optimizer": {"params": {"learning_rate": 1}}}, ["optimizer.params.learning_rate"]),
    ({"zero_optimization": True}, ["zero_optimization = true", "object"]),
    ({"zero_optimization": {"stage": 4}}, ["stage = 4", "0, 1, 2 or 3"]),
    ({"zero_optimization": {"stage": 0}}, ["stage = 0 with bf16", "0.19.8", "stage 1"]),
    ({"data_types": {"grad_accum_dtype": "half"}}, ['grad_accum_dtype = "half"', '"fp32"']),
    ({"bf16": {"enabled": False}, "data_types": {"grad_accum_dtype": "bf16"}}, ["with fp32 weights"]),
    ({"bfloat16": {"enabled": True}}, ['old name of "bf16"']),
    ({"bf16": {"enabled": 1}}, ["bf16.enabled = 1", "true or false"]),
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, ["bf16.enabled and fp16.enabled", "choose one"]),
    ({"fp16": {"enabled": "yes"}}, ['fp16.enabled = "yes"', "true or false"]),
    ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}}, ["stage = 0 with fp16", "stage 1"]),
    ({"fp16": {"enabled": True, "auto_cast": True}}, ["fp16.auto_cast"]),
    ({"activation_checkpointing": {"partition_activations": True}}, ["training.activation_checkpointing"]),
    ({"optimizer": {"type": "Lamb"}}, ['optimizer.type = "Lamb"', "AdamW, Lion, Muon, Adafactor, AdEMAMix"]),
    ({"optimizer": {"params": {"adam_w_mode": False}}}, ["adam_w_mode"]),
    ({"optimizer": {"params": {"betas": 0.9}}}, ["betas = 0.9", "two numbers"]),
    ({"gradient_clipping": "1.0"}, ['gradient_clipping = "1.0"', "a number"]),
    ({"zero_optimization": True}, ['write {"stage": 1}']),
    ({"fp16": True}, ['fp16 = true must be an object {...}; write {"enabled": true}']),
    ({"optimizer": "Adam"}, ['write {"type": "AdamW"}']),
    *(({"optimizer": {"params": params}}, ["must be an object"]) for params in (0, "", [], False)),
    ({"fp16": {"enabled": True, "initial_scale_power": 64}}, ["a whole number of at least 0 and at most 62"]),
    ({"gradient_predivide_factor": 1e300}, ["gradient_predivide_factor = 1e+300"]),
    ({"gradient_clipping": -1}, ["gradient_clipping = -1", "at least 0"]),
    ({"train_micro_batch_size_per_gpu": 0}, ["train_micro_batch_size_per_gpu = 0", "at least 1"]),
    ({"train_micro_batch_size_per_gpu": 1.5}, ["a whole number"]),
    ({"elasticity": {"enabled": True}}, ["elasticity = ", "removed from DeepSpeed", "0.19.8", "any world size"]),
    ({"nebula": {"enabled": True}}, ["nebula = ", "removed from DeepSpeed"]),
    ({"zero_optimization": {"mics_shard_size": 2}}, ["mics_shard_size = 2: removed from DeepSpeed"]),
    ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, ["offload_optimizer", "stage >= 1"]),
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
        ["nvme_path = null", "absolute path"],
    ),
    (
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme", "nvme_path": "nvme"}}},
        ['nvme_path = "nvme"', "absolute path"],
    ),
    (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
        ["offload_param", "offload_optimizer alone"],
    ),
    ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["offload_param", "stage >= 3", "is 2"]),
    ({"zero_optimization": {"stage": 1, "zero_hpz_partition_size": 2}}, ["zero_hpz_partition_size", "is 1"]),
    ({"zero_optimization": {"cpu_offload": True}}, ["cpu_offload", "offload_optimizer"]),
    ({"managed_gradient_accumulation": False}, ["managed_gradient_accumulation = false"]),
    ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op", "mean"]),
]


@pytest.mark.parametrize(("mine", "parts"), UNUSABLE)
def test_a_file_that_cannot_be_used_says_why(tmp_path: Path, mine: dict[str, Any] | str, parts: list[str]) -> None:
    text = refusal(tmp_path, mine)
    for part in parts:
        assert part in text


def test_a_bound_of_1e30_is_no_bound_and_a_number_of_at_least_0(tmp_path: Path) -> None:
    assert resolve(tmp_path, {"gradient_clipping": 1e30})[1].optimizer.gradient_clipping == 1e30
    assert resolve(tmp_path, {"fp16": {"enabled": True, "loss_scale": 10**30}})[0]["fp16"]["loss_scale"] == 1e30


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    settings = Settings.model_validate({"training": {"deepspeed": str(tmp_path / "absent.json")}})
    with pytest.raises(UserError, match=r"absent\.json: no such file"):
        resolve_deepspeed(settings, 1)


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("zero0-fp32", 0),
        ("zero1", 1),
        ("zero2", 2),
        ("zero3", 3),
        ("zero2-offload", 2),
        ("zero3-offload-optimizer", 3),
        ("zero3-offload", 3),
        ("zero3-nvme", 3),
        ("zero3-hpz", 3),
    ],
)
def test_the_files_in_configs_resolve(name: str, stage: int) -> None:
    path = REPOSITORY / "configs" / "deepspeed" / f"{name}.json"
    effective, settings = resolve_deepspeed(Settings.model_validate({"training": {"deepspeed": str(path)}}), 2)
    assert effective["zero_optimization"]["stage"] == stage
    assert settings.training.precision == ("fp32" if stage == 0 else "bf16")


def test_resolving_imports_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys; from bigmodel.config.deepspeed_config import resolve_deepspeed; "
        "from bigmodel.config.settings import Settings; "
        "resolve_deepspeed(Settings(), 2); print({'torch', 'deepspeed'} & set(sys.modules))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=REPOSITORY, check=True
    )
    assert ran.stdout.strip() == "set()"


@pytest.mark.parametrize("kind", ["cosine", "wsd", "linear", "inverse_square_root", "constant"])
@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_settings_that_a_run_saved_can_be_read_again(kind: str, unit: str) -> None:
    schedule = {"kind": kind, "unit": unit, f"warmup_{unit}": 7, **({f"decay_{unit}": 9} if kind == "wsd" else {})}
    settings = Settings.model_validate({"schedule": schedule})
    assert settings_from_table(to_toml_table(settings), Path("settings.json")) == settings
