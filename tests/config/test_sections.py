"""A setting without effect is refused with the reason; what is declared beside a field is what really reads it."""

import typing
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigmodel.config.augmentation_settings import NoiseSettings
from bigmodel.config.data_settings import DataSettings, ObjectiveSettings
from bigmodel.config.sections import SET, UNSET, ReadBy, Section, condition_of, setting
from bigmodel.config.settings import OptimizerSettings, Settings, UserError, settings_from_table, to_toml_table
from bigmodel.data.objectives.examples import Examples
from bigmodel.data.objectives.noise_table import NOISES
from bigmodel.data.objectives.table import OBJECTIVES
from bigmodel.launcher.cluster import Cluster, load_cluster
from bigmodel.training.deepspeed_rates import DEEPSPEED_RATES
from bigmodel.training.learning_rate import SCHEDULES, Clock
from bigmodel.training.optimizers.table import OPTIMIZERS
from tests.support.example_batches import VOCABULARY, fragment_of, text
from tests.training.optimizers.test_optimizers import model, optimizer_alone

SIDES = {"source_sequence_length": 4096}
BUCKETS = {"position_embedding": "relative_bias"}
MASKED = {"objectives": [{"kind": "masked"}]}
SOURCE = {"sources": [{"name": "web", "files": ["a.jsonl"]}]}
GIVEN = {"tokenizer": "t.json"}
WORDS = {"tokenizer_model": "word"}
FALLING, CYCLE, RISING = {"kind": "deepspeed_linear"}, {"kind": "one_cycle"}, {"kind": "range_test"}
MANY_TOKENS = {"unit": "tokens", "warmup_tokens": 1000}
TWO = {"kind": "encoder_decoder"}
PRUNED = {"kind": "magnitude"}
LINEAR, LLAMA3, YARN = ({"kind": kind, "factor": 4.0} for kind in ("linear", "llama3", "yarn"))
REWINDS = {"policy": "rewind"}
LENGTH = {"original_max_position_embeddings": 512}

NAMED = {"name": "a", "files": ["a.jsonl"]}
DROPS, DENOISED = {"kind": "drop_tokens"}, {"kind": "denoising"}
DROPPED, SAMPLED = {"kind": "bpe_dropout"}, {"kind": "unigram_sampling"}

# By the path of the setting: a value, siblings with which it has no effect, what is said, siblings with which it has.
CASES: dict[str, tuple[Any, dict[str, Any], str, dict[str, Any]]] = {
    "prepare.embedded": ("pairs", SOURCE, "with sources = [{", {}),
    "prepare.vocabulary": (500, {"tokenizer": "t.json"}, 'with tokenizer = "t.json" (it has its own', {}),
    "prepare.tokenizer_model": ("word", GIVEN, 'with tokenizer = "t.json" (it has its own model)', {}),
    "prepare.words": ("whitespace", {}, 'with tokenizer_model = "bpe"', WORDS),
    "prepare.lowercase": (True, {}, 'set tokenizer_model = "word"', WORDS),
    "prepare.min_frequency": (5, {}, 'set tokenizer_model = "word"', WORDS),
    "prepare.dropped_characters_share": (0.1, {}, "without tokenizer (a trained tokenizer has tokens", GIVEN),
    "prepare.bpe_dropout": ("off", {}, "without tokenizer (a trained tokenizer has none); leave it out", GIVEN),
    "prepare.chat_template": ("c.jinja", SOURCE, "no source has a messages_column", {"embedded": "chats"}),
    "prepare.segmentation": ({"kind": "bpe_dropout"}, {}, 'with content = "tokens"', {"content": "text"}),
    "prepare.segmentation.dropout": (0.2, {"kind": "unigram_sampling"}, 'set kind = "bpe_dropout"', DROPPED),
    "prepare.segmentation.alpha": (0.5, {"kind": "bpe_dropout"}, 'set kind = "unigram_sampling"', SAMPLED),
    "prepare.sources.0.tag": ("<BT> ", NAMED, "without target_column", NAMED | {"target_column": "t"}),
    "prepare.sources.0.split_by": ("target", NAMED, "without target_column", NAMED | {"target_column": "t"}),
    "prepare.sources.0.prompt_column": ("p", NAMED | {"target_column": "t"}, 'with target_column = "t"', NAMED),
    "prepare.sources.0.messages_column": ("m", NAMED | {"prompt_column": "p"}, 'with prompt_column = "p"', NAMED),
    "prepare.sources.0.weight_column": ("w", NAMED, "only chats and responses", NAMED | {"prompt_column": "p"}),
    "prepare.malformed_share": (0.1, {}, "without sources; leave it out or set sources", SOURCE),
    "prepare.workers": (3, {"scheduler": "tcp://a:1"}, 'with scheduler = "tcp://a:1"', {}),
    "data.max_source_length": (9, {}, "without source_sequence_length", SIDES),
    "data.sentinels": (7, {"objectives": [{"kind": "prefix"}]}, "no objective needs special tokens", MASKED),
    "data.first_sentinel": (200, {"objectives": [{"kind": "prefix"}]}, "no objective needs special tokens", MASKED),
    "data.mask_token": (7, {"objectives": [{"kind": "prefix"}]}, "no objective needs special tokens", MASKED),
    "data.bidirectional_prefix": (False, SIDES, "with source_sequence_length = 4096 (an encoder reads", {}),
    "data.fixed_target_tokens": (9, {}, "without source_sequence_length", SIDES),
    "data.masked_decoder_share": (0.1, {}, "without source_sequence_length", SIDES),
    "data.dropped_decoder_share": (0.1, {}, "without source_sequence_length", SIDES),
    "data.mix_exponent": (0.3, {"mix": {"a": 1.0}}, 'with mix = {"a": 1.0} (mix names the shares)', {}),
    "data.class_exponent": (0.0, {"class_mix": {"a": 1.0, "b": 2.0}}, "(class_mix names the shares)", {}),
    "data.cache_bytes": (9, {}, "without remote; leave it out or set remote", {"remote": "s3://a"}),
    "data.objectives.0.ahead": (2, {"kind": "prefix"}, 'with kind = "prefix"; leave it out or set', {"kind": "causal"}),
    "data.objectives.0.prefix_share": (0.3, {"kind": "ul2"}, 'set kind = "prefix"', {"kind": "prefix"}),
    "data.objectives.0.spm_share": (0.3, {"kind": "causal"}, "fill_in", {"kind": "fill_in_the_middle"}),
    "data.objectives.0.density": (0.3, {"kind": "causal"}, '"span_corruption" or "masked"', {"kind": "masked"}),
    "data.objectives.0.mean_span": (4.0, {"kind": "masked"}, '"span_corruption"', {"kind": "span_corruption"}),
    "data.objectives.0.noise": ([{"kind": "infill"}], {"kind": "prefix"}, 'set kind = "denoising"', DENOISED),
    "data.objectives.0.noise.0.share": (0.2, {"kind": "permute_tokens"}, '"drop_tokens" or "infill"', DROPS),
    "data.objectives.0.noise.0.window": (4, DROPS, 'set kind = "permute_tokens"', {"kind": "permute_tokens"}),
    "data.objectives.0.noise.0.mean_span": (2.0, DROPS, 'set kind = "infill"', {"kind": "infill"}),
    "data.augmentation.0.share": (0.2, {"kind": "permute_sentences"}, 'set kind = "mask_tokens"', DROPS),
    "data.augmentation.0.window": (4, DROPS, 'set kind = "permute_tokens"', {"kind": "permute_tokens"}),
    "data.augmentation.0.mean_span": (2.0, DROPS, 'set kind = "infill"', {"kind": "infill"}),
    **{
        f"model.encoder_{name}": (value, {}, 'with kind = "decoder"; leave it out or set kind = "encoder_decoder"', TWO)
        for name, value in (("num_layers", 2), ("hidden_size", 768), ("num_heads", 12), ("num_kv_heads", 6))
    },
    "model.encoder_intermediate_size": (96, {"kind": "encoder"}, 'with kind = "encoder"', TWO),
    "model.source_attention": ("mixed", {}, 'with kind = "decoder"', TWO),
    "model.separate_embeddings": (True, {"kind": "encoder"}, 'set kind = "encoder_decoder"', TWO),
    "model.peepholes": (
        True,
        {"kind": "gru"},
        'with kind = "gru"; leave it out or set kind = "lstm"',
        {"kind": "lstm"},
    ),
    "model.backpropagation_tokens": (9, {}, 'with kind = "decoder"', {"kind": "rnn"}),
    "model.relative_buckets": (16, {}, 'with position_embedding = "rotary"', BUCKETS),
    "model.relative_distance": (256, {}, 'set position_embedding = "relative_bias"', BUCKETS),
    "model.num_mtp_modules": (1, {"kind": "encoder"}, "(a module is a further block of a transformer's decoder)", {}),
    "model.mtp_loss_weight": (0.5, {}, "without num_mtp_modules", {"num_mtp_modules": 1}),
    "model.rope_theta": (5e5, BUCKETS, 'with position_embedding = "relative_bias"', {}),
    "model.full_attention_every": (2, {}, "without sliding_window", {"sliding_window": 8}),
    "model.sliding_rope_theta": (100.0, {}, "without sliding_window", {"sliding_window": 8, "full_attention_every": 2}),
    "model.first_full_attention": (
        1,
        {"sliding_window": 8},
        "without full_attention_every",
        {"sliding_window": 8, "full_attention_every": 2},
    ),
    "model.max_positions": (4096, {}, 'set position_embedding = "learned"', {"position_embedding": "learned"}),
    "model.vectors_absent": ("model", {}, "without vectors; leave it out or set vectors", {"vectors": "glove.txt"}),
    "model.norm_bias": (False, {}, 'set norm = "layer"', {"norm": "layer"}),
    "model.zero_centered_norm": (True, {"norm": "layer"}, 'set norm = "rms"', {}),
    "model.qk_norm_over": ("all_heads", {}, "set qk_norm = true", {"qk_norm": True}),
    "model.mup_base_head_dim": (32, {}, "without mup_base_width", {"mup_base_width": 64}),
    "model.rotary_fraction": (0.5, BUCKETS, 'with position_embedding = "relative_bias"', {}),
    "model.rope_scaling": ({"kind": "linear", "factor": 2.0}, BUCKETS, 'with position_embedding = "relative_bias"', {}),
    "model.rope_scaling.original_max_position_embeddings": (512, LINEAR, 'with kind = "linear"', LLAMA3),
    "model.rope_scaling.low_freq_factor": (2.0, LINEAR, 'set kind = "llama3"', LLAMA3 | LENGTH),
    "model.rope_scaling.high_freq_factor": (8.0, YARN | LENGTH, 'set kind = "llama3"', LLAMA3 | LENGTH),
    "model.rope_scaling.beta_fast": (16.0, LINEAR, 'set kind = "yarn"', YARN | LENGTH),
    "model.rope_scaling.beta_slow": (2.0, LLAMA3 | LENGTH, 'set kind = "yarn"', YARN | LENGTH),
    "model.rope_scaling.truncate": (False, LINEAR, 'set kind = "yarn"', YARN | LENGTH),
    "model.rope_scaling.attention_factor": (1.5, LLAMA3 | LENGTH, 'set kind = "yarn"', YARN | LENGTH),
    "model.experts.balance_weight": (0.5, {"count": 4, "balance": "bias"}, 'set balance = "loss"', {"count": 4}),
    "model.experts.bias_rate": (0.1, {"count": 4}, 'set balance = "bias"', {"count": 4, "balance": "bias"}),
    "model.experts.min_capacity": (8, {"count": 4}, "set capacity_factor", {"count": 4, "capacity_factor": 1.0}),
    "lora.alpha": (8.0, {}, "without rank; leave it out or set rank", {"rank": 4}),
    "lora.rslora": (True, {}, "without rank; leave it out or set rank", {"rank": 4}),
    "lora.dropout": (0.1, {}, "without rank; leave it out or set rank", {"rank": 4}),
    "lora.targets": (["q_proj"], {}, "without rank; leave it out or set rank", {"rank": 4}),
    "distillation.weight": (0.3, {}, "without teacher; leave it out or set teacher", {"teacher": "big"}),
    "distillation.temperature": (2.0, {}, "without teacher; leave it out or set teacher", {"teacher": "big"}),
    "distillation.top_k": (9, {}, "without teacher; leave it out or set teacher", {"teacher": "big"}),
    "distillation.direction": ("reverse", {}, "without teacher; leave it out or set teacher", {"teacher": "big"}),
    "distillation.precision": ("bf16", {}, "without teacher; leave it out or set teacher", {"teacher": "big"}),
    "pruning.sparsity": (0.8, {"kind": "2:4"}, "(2:4 is half of the weights)", PRUNED),
    "pruning.initial_sparsity": (
        0.1,
        {},
        'with kind = "none"; leave it out or set kind = "magnitude" or "2:4"',
        PRUNED,
    ),
    "pruning.begin_step": (9, {}, 'with kind = "none"', PRUNED),
    "pruning.end_step": (9, {}, 'with kind = "none"', PRUNED),
    "pruning.every_steps": (9, {}, 'with kind = "none"', PRUNED),
    "pruning.targets": (["head"], {}, 'with kind = "none"', PRUNED),
    "optimizer.beta1": (0.8, {"kind": "adafactor"}, 'with kind = "adafactor"', {}),
    "optimizer.beta2": (0.8, {"kind": "adafactor"}, 'with kind = "adafactor"', {"kind": "lion"}),
    "optimizer.epsilon": (1e-3, {"kind": "lion"}, 'with kind = "lion"; leave it out or set', {"kind": "adafactor"}),
    "optimizer.momentum": (0.8, {}, '= 0.8 has no effect with kind = "adamw"; leave it out or set', {"kind": "muon"}),
    "optimizer.beta2_decay": (-0.5, {}, 'set kind = "adafactor"', {"kind": "adafactor"}),
    "optimizer.update_clipping": (2.0, {"kind": "muon"}, 'set kind = "adafactor"', {"kind": "adafactor"}),
    "optimizer.least_scale": (0.1, {}, 'set kind = "adafactor"', {"kind": "adafactor"}),
    "optimizer.alpha": (8.0, {}, 'set kind = "ademamix"', {"kind": "ademamix"}),
    "optimizer.beta3": (0.9, {"kind": "lion"}, 'set kind = "ademamix"', {"kind": "ademamix"}),
    "optimizer.ema_warmup_steps": (9, {}, 'set kind = "ademamix"', {"kind": "ademamix"}),
    "optimizer.matrix_scale": ("original", {}, 'set kind = "muon"', {"kind": "muon"}),
    "optimizer.joined_matrices": ("parts", {}, 'set kind = "muon"', {"kind": "muon"}),
    "optimizer.adamw_rate_factor": (0.5, {}, 'set kind = "muon"', {"kind": "muon"}),
    "schedule.unit": ("tokens", CYCLE, 'with kind = "one_cycle"; leave it out or set kind = "cosine" or', {}),
    "schedule.initial_ratio": (0.1, CYCLE, 'with kind = "one_cycle"', {"kind": "deepspeed_cosine"}),
    "schedule.warmup": ("log", {}, 'with kind = "cosine"', FALLING),
    "schedule.total_steps": (9, {"kind": "deepspeed_constant"}, 'set kind = "deepspeed_linear"', FALLING),
    "schedule.lowest_rate": (1e-5, {"kind": "deepspeed_cosine"}, 'with kind = "deepspeed_cosine"', FALLING),
    "schedule.rise_steps": (9, FALLING, 'set kind = "one_cycle" or "range_test"', CYCLE),
    "schedule.fall_steps": (9, RISING, 'set kind = "one_cycle"', CYCLE),
    "schedule.rise_stairs": (9, RISING, 'set kind = "one_cycle"', CYCLE),
    "schedule.fall_stairs": (9, {}, 'set kind = "one_cycle"', CYCLE),
    "schedule.decay_rate": (0.5, FALLING, 'set kind = "one_cycle"', CYCLE),
    "schedule.decay_interval": (9, FALLING, 'set kind = "one_cycle"', CYCLE),
    "schedule.beta1_range": ((0.8, 0.9), RISING, 'set kind = "one_cycle"', CYCLE),
    "schedule.growth": (2.0, CYCLE, 'set kind = "range_test"', RISING),
    "schedule.staircase": (True, CYCLE, 'set kind = "range_test"', RISING),
    "schedule.warmup_steps": (5, MANY_TOKENS, 'with unit = "tokens"; leave it out or set unit = "steps"', {}),
    "schedule.decay_steps": (5, {"kind": "linear"}, 'with kind = "linear"', {"kind": "wsd"}),
    "schedule.warmup_tokens": (5, {}, 'with unit = "steps"; leave it out or set unit = "tokens"', {"unit": "tokens"}),
    "schedule.decay_tokens": (5, {"kind": "wsd"}, 'set unit = "tokens"', MANY_TOKENS | {"kind": "wsd"}),
    "schedule.final_ratio": (0.5, {"kind": "constant"}, 'with kind = "constant"', {"kind": "wsd"}),
    "metrics.project": (
        "mine",
        {"writers": ["csv"]},
        "only the writers wandb, comet and mlflow",
        {"writers": ["comet"]},
    ),
    "metrics.group": ("small", {"writers": ["comet"]}, "only the writer wandb", {"writers": ["wandb"]}),
    "classification.pooling": ("mean", {}, "without classes; leave it out or set classes", {"classes": ["a", "b"]}),
    "classification.head": ("bert", {}, "without classes; leave it out or set classes", {"classes": ["a", "b"]}),
    "classification.weights": ("balanced", {}, "without classes; leave it", {"classes": ["a", "b"]}),
    "classification.focal_gamma": (2.0, {}, "without classes; leave it out or set classes", {"classes": ["a", "b"]}),
    "metrics.team": ("us", {}, "only the writers wandb, comet and mlflow have projects", {"writers": ["wandb"]}),
    "training.spikes.left_out_steps": (5, {}, 'with policy = "note"; leave it out or set policy = "rewind"', REWINDS),
    "training.spikes.max_rewinds": (1, {"policy": "skip"}, 'set policy = "rewind"', REWINDS),
    "training.scheduled_sampling.steps": (9, {"schedule": "constant"}, 'set schedule = "linear"', {}),
    "training.scheduled_sampling.k": (0.9, {}, 'with schedule = "linear"', {"schedule": "exponential"}),
    "data.target_ahead": (2, {}, "without source_sequence_length", SIDES),
    "evaluation.tasks_every_steps": (5, {}, "without tasks", {"tasks": ["arc_easy"]}),
    "evaluation.tasks_limit": (5, {}, "without tasks", {"tasks": ["arc_easy"]}),
    "evaluation.sequences": (5, {}, "without every_steps (the end uses all)", {"every_steps": 10}),
}
CLUSTER_CASES = {
    "hosts": ("n[1-4]", {"ssh": {"hostfile": "/hosts"}}, 'with ssh.hostfile = "/hosts"', {}),
    "container.mounts": (["/a:/a"], {}, "without image", {"image": "a"}),
    "container.python": ("python3.12", {}, "without image", {"image": "a"}),
    "container.workdir": ("/b", {}, "without image; leave it out or set image", {"image": "a"}),
    "requeue.no_progress_limit": (5, {"limit": 0}, "without limit", {"limit": 3}),
    "restart.standby": (False, {"limit": 0}, "without limit", {"limit": 3}),
    "restart.spare_nodes": (1, {"limit": 0}, "without limit", {"limit": 3}),
}


def declared(root: type[Section], path: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Path and section of every field that was declared with a condition."""
    for name, field in root.model_fields.items():
        if condition_of(root, name):
            yield f"{path}{name}", root
        inside = [one for one in (field.annotation, *typing.get_args(field.annotation)) if isinstance(one, type)]
        for one in inside:
            if issubclass(one, Section):
                is_list = typing.get_origin(field.annotation) is list
                yield from declared(one, f"{path}{name}.{'0.' if is_list else ''}")


def table_with(path: str, value: Any, siblings: dict[str, Any]) -> dict[str, Any]:
    """A table in which the setting has that value, among these siblings."""
    *sections, name = path.split(".")
    table: Any = siblings | {name: value}
    for section in reversed(sections):
        table = [table] if section == "0" else {section: table}
    if path.startswith("prepare.segmentation."):
        table["prepare"]["content"] = "text"
    return table


def fitting(table: dict[str, Any]) -> dict[str, Any]:
    """A whole run file around what a case is about: data and model must fit each other."""
    data, model_table = table.get("data", {}), table.get("model", {})
    for objective in data.get("objectives", []):
        objective.setdefault("kind", "denoising")  # a case of its noise
    if any(one["kind"] == "masked" for one in data.get("objectives", [])):
        return {"model": {"kind": "encoder"}} | table
    if "class_exponent" in data:
        return {"classification": {"classes": ["a", "b"]}} | table
    if "source_sequence_length" in data:
        return {"model": TWO} | table
    needed = {"encoder_decoder": SIDES, "encoder": MASKED}.get(model_table.get("kind", ""), {})
    return {"data": needed} | table if needed else table


def load(path: str, value: Any, siblings: dict[str, Any]) -> Any:
    table = fitting(table_with(path, value, siblings))
    return settings_from_table(table, Path("run.toml"))


def test_every_declared_setting_has_a_case() -> None:
    assert sorted(path for path, _ in declared(Settings)) == sorted(CASES)
    assert sorted(path for path, _ in declared(Cluster)) == sorted(CLUSTER_CASES)


@pytest.mark.parametrize("path", CASES)
def test_a_setting_without_effect_is_refused_with_the_reason(path: str) -> None:
    value, without, words, with_ = CASES[path]
    with pytest.raises(UserError) as caught:
        load(path, value, without)
    assert str(caught.value).startswith(f"run.toml: {path} = ")
    assert " has no effect" in str(caught.value)
    assert words in str(caught.value)
    load(path, value, with_)


@pytest.mark.parametrize("path", CLUSTER_CASES)
def test_so_is_one_of_a_cluster_file(path: str) -> None:
    value, without, words, with_ = CLUSTER_CASES[path]
    assert Cluster.model_validate(table_with(path, value, with_))
    with pytest.raises(ValueError, match="has no effect") as caught:
        Cluster.model_validate(table_with(path, value, without))
    assert words in str(caught.value)


def test_a_cluster_file_is_named_and_all_complaints_are_told(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text('[container]\npython = "p"\nworkdir = "/w"\n')
    with pytest.raises(UserError) as caught:
        load_cluster(file)
    lines = str(caught.value).splitlines()
    assert [line.partition(" = ")[0] for line in lines] == [f"{file}: container.python", "container.workdir"]


@pytest.mark.parametrize("path", CASES)
def test_what_a_run_saved_is_read_again(path: str) -> None:
    """All defaults, and what an earlier version accepted."""
    value, without, _, with_ = CASES[path]
    settings = load(path, value, with_)
    assert settings_from_table(to_toml_table(settings), Path("settings.json")) == settings
    assert settings_from_table(fitting(table_with(path, value, without)), Path("settings.json"), saved=True)


def test_the_default_is_never_refused() -> None:
    assert settings_from_table({"optimizer": {"kind": "lion", "epsilon": 1e-8, "momentum": 0.95}}, Path("run.toml"))


def test_every_form_of_a_condition() -> None:
    class Inner(Section):
        file: str = ""

    class Example(Section):
        kind: str = "a"
        inner: Inner = Inner()
        one: int = setting(0, only_with={"kind": ("a", "b"), "inner.file": SET}, description="of a and b")
        two: int = setting(0, only_with={"is_odd": True}, why="only an odd one has two")
        three: int = setting(0, only_with={"inner.file": UNSET}, ge=0)
        four: int = setting(0, only_with={"kind": ReadBy({"x": OPTIMIZERS["lion"]})})

        @property
        def is_odd(self) -> bool:
            return self.kind == "odd"

    assert Example(kind="b", one=1, inner={"file": "f"})
    assert Example(kind="odd", two=1, three=1)
    for values, words in (
        ({"one": 1}, "one = 1 has no effect without inner.file; leave it out or set inner.file"),
        ({"one": 1, "kind": "c"}, 'one = 1 has no effect with kind = "c"; leave it out or set kind = "a" or "b"'),
        ({"two": 1}, "two = 1 has no effect: only an odd one has two; leave it out"),
        ({"three": 1, "inner": {"file": "f"}}, 'three = 1 has no effect with inner.file = "f"; leave one of them out'),
        ({"four": 1}, 'four = 1 has no effect with kind = "a"; leave it out'),
    ):
        with pytest.raises(ValueError, match="has no effect") as caught:
            Example.model_validate(values)
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="greater than or equal"):
        Example(three=-1)


# ---- the declarations against what reads the settings -----------------------------------------------------------


ALWAYS = {  # these have an effect with every kind
    OptimizerSettings: {
        "kind",
        "learning_rate",
        "weight_decay",
        "l1_penalty",
        "gradient_clipping",
        "qk_clip",
        "layer_decay",
        "groups",
    },
    ObjectiveSettings: {"kind", "share"},
    NoiseSettings: {"kind"},
}


@pytest.mark.parametrize(
    ("section", "table"),
    [(OptimizerSettings, OPTIMIZERS), (ObjectiveSettings, OBJECTIVES), (NoiseSettings, NOISES)],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_a_table_says_of_each_setting_which_kinds_read_it(section: type[Section], table: dict[str, Any]) -> None:
    """A new field that nobody declares, or that no row reads, is found here."""
    read = {name for row in table.values() for name in row.reads}
    assert read == set(section.model_fields) - ALWAYS[section]
    for name in read:
        condition = condition_of(section, name)
        assert condition is not None
        assert condition.others == {"kind": ReadBy(table)}


OTHER = {  # another value of every optimizer setting that a row may read
    "beta1": 0.5,
    "beta2": 0.5,
    "epsilon": 1e-1,
    "momentum": 0.3,
    "matrix_scale": "original",
    "joined_matrices": "parts",
    "adamw_rate_factor": 0.3,
    "beta2_decay": -0.3,
    "update_clipping": 1.01,
    "least_scale": 0.9,
    "alpha": 50.0,
    "beta3": 0.3,
    "ema_warmup_steps": 50,
}


def after_updates(kind: str, **values: Any) -> torch.Tensor:
    settings = OptimizerSettings.model_construct(**(OptimizerSettings(kind=kind).__dict__ | values))
    net = model(tied=False)
    optimizer = optimizer_alone(net, settings)
    for group in optimizer.param_groups:
        group["lr"] *= group["rate_factor"]
    for step in range(3):
        for number, parameter in enumerate(net.parameters()):
            generator = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = (1 + 5 * step) * torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_reads_what_its_row_says_and_nothing_else(kind: str) -> None:
    plain = after_updates(kind)
    assert set(OTHER) == set(OptimizerSettings.model_fields) - ALWAYS[OptimizerSettings]
    changing = {name for name, value in OTHER.items() if not torch.equal(after_updates(kind, **{name: value}), plain)}
    assert changing == set(OPTIMIZERS[kind].reads)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_an_objective_reads_what_its_row_says_and_nothing_else(kind: str) -> None:
    other = {"ahead": 3, "prefix_share": 0.8, "spm_share": 1.0, "density": 0.4, "mean_span": 9.0}
    other |= {"noise": [NoiseSettings(kind="drop_tokens")]}
    assert set(other) == set(ObjectiveSettings.model_fields) - ALWAYS[ObjectiveSettings]
    documents = [text(length) for length in (20, 41, 60)]

    def made(**values: Any) -> list[Any]:
        objective = ObjectiveSettings.model_construct(**(ObjectiveSettings(kind=kind).__dict__ | values))
        data = DataSettings(max_document_length=200, sequence_length=200)
        examples = Examples(data.model_copy(update={"objectives": [objective]}), 1, VOCABULARY)
        examples.kinds_of_tokens = np.zeros(VOCABULARY, np.uint8)  # each text is one sentence
        pieces = [
            fragment_of(row, one, examples, n) for row, one in enumerate(documents) for n in range(examples.pairs)
        ]
        return [np.concatenate(examples.make(piece, documents[piece.row])[:3]).tolist() for piece in pieces]

    assert {name for name, value in other.items() if made(**{name: value}) != made()} == set(OBJECTIVES[kind].reads)


def test_every_field_of_the_schedule_is_always_used_or_declared() -> None:
    section = Settings.model_fields["schedule"].annotation
    assert {name for name in section.model_fields if not condition_of(section, name)} == {"kind"}
    assert {*SCHEDULES, *DEEPSPEED_RATES} == set(typing.get_args(section.model_fields["kind"].annotation))
    near_the_end = Clock(done=95, warmup=1, decay=50, total=100)
    falling = {kind for kind, rate in SCHEDULES.items() if rate(near_the_end, 0.2) != rate(near_the_end, 0.9)}
    assert falling | {"deepspeed_cosine"} == set(condition_of(section, "final_ratio").others["kind"])
    decaying = {kind for kind, rate in SCHEDULES.items() if rate(near_the_end, 0.2) != rate(Clock(95, 1, 7, 100), 0.2)}
    for name in ("decay_steps", "decay_tokens"):
        assert decaying == {condition_of(section, name).others["kind"]}


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("model.num_experts", "set model.experts.count"),
        ("model.experts.n_routed_experts", "set model.experts.count"),
        ("model.experts.num_experts_per_tok", "set model.experts.per_token"),
        ("model.moe_router_topk", "set model.experts.per_token"),
        ("model.experts.n_shared_experts", "set model.experts.shared"),
        ("model.experts.moe_intermediate_size", "set model.experts.width"),
        ("training.context_parallel_size", "set training.sequence_parallel_ranks"),
        ("training.pipeline_model_parallel_size", "bigmodel has no pipeline parallelism; see docs/model-parallel.md"),
        ("training.tensor_model_parallel_size", "did you mean 'tensor_parallel_ranks'?"),
        ("training.expert_model_parallel_size", "did you mean 'expert_parallel_ranks'?"),
    ],
)
def test_what_other_systems_call_a_setting_names_ours(name: str, remedy: str) -> None:
    table: dict[str, Any] = {"model": {"experts": {"count": 4}}, "training": {}}
    *sections, key = name.split(".")
    reduce(dict.__getitem__, sections, table)[key] = 2
    with pytest.raises(UserError) as caught:
        settings_from_table(table, Path("run.toml"))
    assert str(caught.value).endswith(f"{name}: unknown setting; {remedy}")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"optimizer": {"kind": "adam"}}, "optimizer.kind = 'adam': input should be 'adamw', 'lion'"),
        ({"optimizer": {"kind": "ademamx"}}, "did you mean 'ademamix'?"),
        ({"data": {"objectives": [{"kind": "casual"}]}}, "data.objectives.0.kind = 'casual': input should be 'causal'"),
    ],
)
def test_an_unknown_kind_names_those_of_the_table(table: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        settings_from_table(table, Path("run.toml"))
    assert words in str(caught.value)
