"""Every key of DeepSpeed has a row in the table; every value is checked; keys of other systems are answered."""

import json
from pathlib import Path
from typing import Any

import pytest

from bigmodel.config.deepspeed_config import for_deepspeed, resolve_deepspeed
from bigmodel.config.deepspeed_foreign import REASONS, SETTINGS, answer
from bigmodel.config.deepspeed_json import Source, without_effect
from bigmodel.config.deepspeed_keys import KEYS, REMOVED
from bigmodel.config.deepspeed_row import IDLE, OURS, REFUSED, SETTING, USED, Key
from bigmodel.config.deepspeed_values import ANYTHING, FLAG, OBJECT, TEXT
from bigmodel.config.settings import Settings, UserError
from tests.support.deepspeed_schema import write_schema
from tests.support.ranks import run_ranks
from tools import write_deepspeed_keys


def nested(path: str, value: Any) -> Any:
    """{"a": {"b": value}} for "a.b"."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def problems(config: Any) -> list[str]:
    source = Source(None)
    source.check(config)
    return source.problems


def test_every_key_that_the_installed_deepspeed_reads_has_a_row(tmp_path: Path) -> None:
    run_ranks(1, write_schema, tmp_path / "schema.json")
    read, removed = json.loads((tmp_path / "schema.json").read_text())
    assert {"gradient_clipping", "aio.block_size", "fp16.hysteresis", "zero_optimization.zenflow.offload"} <= set(read)
    known = set(KEYS) | {f"{path}.{name}" for path, key in KEYS.items() for name in key.inside.split()}
    assert set(read) - known == set(), "give them a row in bigmodel/config/deepspeed_keys.py"
    assert set(removed) == set(REMOVED)


def test_the_page_of_all_keys_is_current() -> None:
    page = write_deepspeed_keys.PAGE.read_text(encoding="utf-8")
    assert page == write_deepspeed_keys.page(), "run python -m tools.write_deepspeed_keys"


def test_every_row_says_what_becomes_of_the_key() -> None:
    assert {key.fate for key in KEYS.values()} == {USED, SETTING, OURS, IDLE, REFUSED}
    assert all(key.note for key in KEYS.values() if key.fate != USED)


def wrong_values(key: Key) -> list[Any]:
    if key.value is OBJECT:
        return [True, "auto", [1]]
    values: list[Any] = [{"a": 1}, [1], 1.5e300, float("nan"), *([] if key.nullable else [None])]
    return [*values, *([] if key.value is TEXT else ["1e8"]), *([] if key.value is FLAG else [True, -1])]


def test_a_value_of_a_wrong_type_is_told_with_the_right_one() -> None:
    checked = {path: key for path, key in KEYS.items() if key.value is not ANYTHING}
    assert len(checked) > 100
    for path, key in checked.items():
        for value in wrong_values(key):
            told = [one for one in problems(nested(path, value)) if one.startswith(f"{path} = ")]
            assert f"must be {key.value.words}" in "".join(told), f"{path} = {value!r}: {told}"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("gradient_clipping", None, 'gradient_clipping = null must be a number of at least 0 (or "auto"); or remove'),
        ("communication_data_type", "fp64", 'communication_data_type = "fp64" must be "fp32", "bf16" or "fp16"'),
        ("zero_optimization.reduce_bucket_size", "5e8", '(or "auto"); write 500000000 without quotes'),
        ("zero_optimization.reduce_bucket_size", -1, "must be a whole number of at least 1"),
        ("zero_optimization.reduce_bucket_size", 0.5, "must be a whole number of at least 1"),
        ("zero_optimization.allgather_bucket_size", 7, "must be an even number of at least 0"),
        ("zero_optimization.overlap_comm", "True", "must be true or false (or \"auto\"); write true without quotes"),
        ("fp16.initial_scale_power", 128, "of at least 0 and at most 62"),
        ("fp16.loss_scale", float("inf"), "must be a number of at least 0"),
        ("log_level", "loud", 'must be "debug", "info", "warning", "error" or "critical"'),
        ("bf16", None, "bf16 = null must be an object {...}; or remove the key"),
        ("zero_optimization.stage", True, "must be 0, 1, 2 or 3"),
        ("train_batch_size", 10**400, "must be a whole number of at least 1"),
        ("zero_optimization.offload_optimizer.device", "disk", 'must be "none", "cpu" or "nvme"'),
        ("optimizer.typ", "AdamW", "did you mean optimizer.type?"),
        ("comet.api_key", "k3y", "comet.api_key = ...: remove it from the file"),
        ("zero_optimization.offload_param.device", "NVMe", "offload_optimizer alone"),
        ("zero_force_ds_cpu_optimizer", True, "remove the key; optimizers are"),
        ("zero_optimization.leaf_module", {"names": ["blocks"]}, "gathered together without it"),
        ("torch_autocast", {"enabled": True}, "torch_autocast.enabled = true"),
        ("flops_profiler", {"enabled": True, "profile_step": 1}, "bigmodel profile RUN trace"),
        ("zero_optimization.zenflow", {"topk_ratio": 0.1}, "ZenFlow is not offered"),
        ("checkpoint.load_universal", True, "at any stage and number of ranks"),
    ],
)  # fmt: skip
def test_what_a_value_needs_is_said_in_our_words(path: str, value: Any, said: str) -> None:
    (told,) = problems(nested(path, value))
    assert said in told


@pytest.mark.parametrize(
    "config",
    [
        {"zero_optimization": {"reduce_bucket_size": 5e8, "offload_param": None, "overlap_comm": None}},
        {"activation_checkpointing": {}, "communication_data_type": None, "steps_per_print": None},
        {"activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False}},
        {"data_efficiency": {"enabled": False, "data_sampling": {"num_workers": 4}}},
        {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": False}}}},
        {"elasticity": {"enabled": False, "max_train_batch_size": 2000}, "sparse_gradients": False},
        {"amp": {"enabled": "auto", "opt_level": "auto"}, "autotuning": {"enabled": False, "fast": True}},
        {"zero_optimization": {"zenflow": {"enabled": False}, "leaf_module": {}, "cpu_offload": False}},
        {"comet": {"enabled": False, "online": True, "workspace": "mine"}},
        {"tensor_parallel": {"autotp_size": 1}, "compile": {"deepcompile": False}, "pipeline": {}},
        {"flops_profiler": {"enabled": False, "profile_step": 1}, "weight_quantization": {"enabled": False}},
        {"comet": {"enabled": False, "online": False}, "zero_optimization": {"offload_optimizer": {"ratio": 1.0}}},
        {"checkpoint": {"tag_validation": "Warn", "load_universal": False}, "hybrid_engine": {"enabled": False}},
        {"data_types": {"grad_accum_dtype": "FP32"}, "gradient_allreduce_op": "mean"},
    ],
)
def test_what_asks_for_nothing_is_accepted_and_kept_from_deepspeed(config: dict[str, Any]) -> None:
    assert problems(config) == []
    settings = Settings.model_validate({})
    given = for_deepspeed(config | {"zero_optimization": config.get("zero_optimization", {})})
    assert set(given) <= {"zero_optimization", "data_types", "communication_data_type"}
    assert set(given["zero_optimization"]) <= {"reduce_bucket_size", "offload_optimizer"}
    assert given["zero_optimization"].get("offload_optimizer", {}) == {}
    assert settings.metrics.writers == []


def test_monitors_become_writers_in_the_run_directory(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    mine = {
        "tensorboard": {"enabled": True, "output_path": "logs/", "job_name": "first"},
        "wandb": {"enabled": True, "project": "tongues", "group": "small", "team": None},
        "csv_monitor": {"enabled": False, "output_path": "", "job_name": "second"},
        "zero_optimization": {"stage": 2},
    }
    path.write_text(json.dumps(mine))
    table = {"training": {"deepspeed": str(path)}, "metrics": {"writers": ["csv", "wandb"]}}
    effective, settings = resolve_deepspeed(Settings.model_validate(table), 1)
    assert settings.metrics.writers == ["csv", "wandb", "tensorboard"]
    assert (settings.metrics.project, settings.metrics.group, settings.metrics.team) == ("tongues", "small", "")
    assert not {"tensorboard", "wandb", "csv_monitor"} & set(for_deepspeed(effective)), "its own monitors would start"
    ignored = list(without_effect(effective))
    assert [one.split(" (")[0] for one in ignored] == [
        "tensorboard.output_path", "tensorboard.job_name", "csv_monitor.job_name"
    ]  # fmt: skip
    assert "in the run directory" in ignored[0]
    table["metrics"] |= {"project": "other"}
    with pytest.raises(UserError, match=r'wandb.project = "tongues", but the run file has metrics.project = "other"'):
        resolve_deepspeed(Settings.model_validate(table), 1)


def test_the_settings_named_for_keys_of_other_systems_exist() -> None:
    for name, setting in SETTINGS.items():
        section, key = setting.partition(" ")[0].split(".")
        assert key in type(getattr(Settings(), section)).model_fields, f"{name}: {setting}"
    assert not set(SETTINGS) & set(REASONS)
    assert not (set(SETTINGS) | set(REASONS)) & set(KEYS), "DeepSpeed knows them"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("pipe-parallel-size", "pipeline parallelism is not offered"),
        ("pipe_parallel_size", "pipeline parallelism is not offered"),
        ("tensor_model_parallel_size", "training.tensor_parallel_ranks"),
        ("num-layers", "set model.num_layers in the run file"),
        ("micro-batch-size", 'write "train_micro_batch_size_per_gpu"'),
        ("seq-length", "set data.sequence_length in the run file"),
        ("batch-size", 'write "train_micro_batch_size_per_gpu"'),
        ("rampup_batch_size", "set training.batch_ramp in the run file"),
        ("attention-dropout", "set model.attention_dropout in the run file"),
        ("data-impl", "makes shards"),
        ("is-pipe-parallel", "pipeline parallelism is not offered"),
        ("normalization", "set model.norm in the run file"),
        ("reset-attention-mask", "documents of a pack never see each other"),
        ("loss-scale", 'write it inside "fp16"'),
        ("no-weight-tying", "set model.tied_embeddings (the opposite) in the run file"),
    ],
)
def test_keys_of_neox_and_megatron_get_an_answer(key: str, said: str) -> None:
    (told,) = problems({key: 1})
    assert told.startswith(f"{key} is not a key of DeepSpeed; ")
    assert said in told
    assert answer("gradient_cliping") == ""


@pytest.mark.parametrize("key", ["sparse_attentions", "curriculum_learnin", "my_normalization", "expert_paralel"])
def test_a_key_that_is_refused_or_means_something_else_is_no_remedy_for_an_unknown_one(key: str) -> None:
    assert problems({key: 1}) == [f"{key} is not a key that DeepSpeed 0.19.8 knows"]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_text_beyond_what_python_reads_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        Source(path).read()
