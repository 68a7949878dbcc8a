"""The effective DeepSpeed JSON of a run, and settings that agree with it.

In: `Settings`, world size, and the user's JSON file (`training.deepspeed`), if any. Out: the effective JSON and the
settings. Guarantees: a key that the user wrote is never changed; `"auto"` is filled; an absent key gets its default
from `DEFAULTS`; JSON and run file with different values are an error that names both; a value only in the JSON
becomes the setting. Imports neither torch nor deepspeed. Written against DeepSpeed 0.19.8.

    run file: [optimizer] learning_rate unset      JSON: "params": {"lr": 1e-3}      -> learning_rate = 1e-3
    run file: learning_rate = 3e-4                 JSON: "params": {"lr": "auto"}    -> lr = 3e-4
    run file: learning_rate = 3e-4                 JSON: "params": {"lr": 1e-3}      -> UserError
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigmodel.config.classification_settings import problem_of_classification
from bigmodel.config.deepspeed_json import Source, device_of, passed, value_at, written
from bigmodel.config.deepspeed_keys import VERSION
from bigmodel.config.deepspeed_optimizer import fill_optimizer, settle_optimizer
from bigmodel.config.deepspeed_row import AUTO
from bigmodel.config.deepspeed_schedule import fill_schedule, settle_schedule
from bigmodel.config.expert_settings import problem_beside_experts
from bigmodel.config.parallel_settings import problem_of_sharing, problem_of_tensor_parallel
from bigmodel.config.recurrent_settings import problem_beside_recurrent
from bigmodel.config.settings import Settings, num_micro_batches, problem_of_rates
from bigmodel.sizes import counted_noun
from bigmodel.training.optimizers.table import OPTIMIZERS

# Defaults of absent and "auto" keys, with the reason.
DEFAULTS: tuple[tuple[str, Callable[[Settings], Any], str], ...] = (
    ("train_micro_batch_size_per_gpu", lambda s: 1, "one packed sequence of data.sequence_length tokens is one sample"),
    ("zero_optimization.stage", lambda s: 1, "partitions the moments, costs no extra communication"),
    ("zero_optimization.overlap_comm", lambda s: False, "its data race is open upstream (DeepSpeed issue 5545)"),
    ("bf16.enabled", lambda s: s.training.precision == "bf16", "training.precision"),
    ("bf16.check_grad_overflow", lambda s: False, "0.19.8 skips steps by itself; here all ranks decide together"),
    ("data_types.grad_accum_dtype", lambda s: "fp32", "bf16 sums lose 5% of the gradient at 256 micro-batches"),
    ("communication_data_type", lambda s: "fp32", "the sum over ranks is a sum like any other"),
    ("gradient_clipping", lambda s: s.optimizer.gradient_clipping, "0.19.8 turned its own default from off to 1.0"),
)

# Keys of ZeRO++.
QUANTIZED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
ZEROPP = ("zero_hpz_partition_size", *QUANTIZED)

# A monitor of DeepSpeed -> our writer, and which of its keys are which settings of [metrics].
MONITORS: dict[str, tuple[str, dict[str, str]]] = {
    "tensorboard": ("tensorboard", {}),
    "wandb": ("wandb", {"project": "project", "group": "group", "team": "team"}),
    "csv_monitor": ("csv", {}),
    "comet": ("comet", {"project": "project", "workspace": "team"}),
}


def resolve_deepspeed(settings: Settings, world_size: int) -> tuple[dict[str, Any], Settings]:
    """The effective DeepSpeed configuration for `world_size` ranks, and settings that agree with it.

    Raises `UserError` with JSON file, key, value and remedy: for an unreadable file, for an unknown, removed or
    unsupported key, and for a contradiction to the run file.
    """
    assert world_size >= 1, f"world size {world_size}"
    source = Source(settings.training.deepspeed)
    config = source.read()
    source.check(config)
    settings = _settle(config, settings, source)
    _derive_micro_batch(config, settings, world_size)
    for path, default, _reason in DEFAULTS:
        _fill(config, path, default(settings))
    if settings.training.precision == "fp16":
        _fill(config, "fp16.enabled", True)
    if settings.optimizer.kind != "adamw" or settings.optimizer.has_penalty:
        _fill(config, "zero_allow_untested_optimizer", True)  # tests compare it with plain torch
    if device_of(value_at(config, "zero_optimization.offload_optimizer")) in ("cpu", "nvme"):
        _fill(config, "zero_force_ds_cpu_optimizer", False)  # DeepSpeed's own needs a C++ compiler
    if not source.tells_of("train_", "gradient_accumulation_steps", "sequence_parallel_size"):
        _settle_batch(config, settings, world_size, source)
    if not source.problems:
        fill_optimizer(config, settings)
        fill_schedule(config, settings)
    _drop_auto(config)
    if not source.tells_of("zero_optimization.stage", "zero_optimization ="):
        _refuse_combinations(config, settings, world_size, source)
    _refuse_limits(config, settings, source)
    for kind in ("expert", "tensor"):
        if getattr(settings.training, f"{kind}_parallel_ranks") > 1:
            _refuse_shared_parameters(kind, config, settings, world_size, source)
    source.raise_problems()
    return config, settings


def agree(settings: Settings) -> Settings:
    """Settings of the run file and its DeepSpeed JSON together, for commands without a number of ranks.

    Raises `UserError` as `resolve_deepspeed` does, except for keys that depend on the number of ranks.
    """
    source = Source(settings.training.deepspeed)
    config = source.read()
    source.check(config)
    settings = _settle(config, settings, source)
    source.raise_problems()
    return settings


def state_folder(effective: dict[str, Any]) -> Path | None:
    """Folder of the optimizer's state in files (`offload_optimizer.device = "nvme"`); None: it is in memory."""
    offload = value_at(effective, "zero_optimization.offload_optimizer")
    return Path(offload["nvme_path"]) if device_of(offload) == "nvme" else None


def for_deepspeed(effective: dict[str, Any]) -> dict[str, Any]:
    """The part of the configuration that DeepSpeed gets: not optimizer, scheduler and monitors, which are ours, nor
    what has no effect. State in files is our own (bigmodel/training/zero/mmap_state.py); DeepSpeed gets an offload to
    the CPU.
    """
    config = copy.deepcopy(passed(effective))
    if state_folder(effective):
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return config


def packs_per_micro_batch(effective: dict[str, Any]) -> int:
    """Packed sequences that a rank runs forward and backward at once."""
    return effective["train_micro_batch_size_per_gpu"]


def _settle(config: dict[str, Any], settings: Settings, source: Source) -> Settings:
    """Compare every value that both files may set. An unset setting follows the JSON."""
    settings = _settle_precision(config, settings, source)
    for path, setting, kind in (
        ("gradient_clipping", "optimizer.gradient_clipping", float),
        ("train_batch_size", "training.global_batch_size", int),
        ("sequence_parallel_size", "training.sequence_parallel_ranks", int),
    ):
        value = written(config, path)
        if value is not None:
            settings = source.agree(settings, setting, kind(value), path, value)
    batch = written(config, "train_batch_size")
    if batch is not None and batch % settings.data.lanes:
        source.problem(
            f"train_batch_size = {batch} is not a multiple of data.lanes = {settings.data.lanes} in the run file; "
            "a step takes the same number of packed sequences from every lane"
        )
    settings = _settle_monitors(config, settings, source)
    settings = settle_schedule(config, settings, source)
    settings = settle_optimizer(config, settings, source)
    if not source.problems and (problem := _problem_of_sections(settings)):
        source.problem(f"with the settings of the run file: {problem}")
    return settings


def _problem_of_sections(settings: Settings) -> str:
    """Why what may come from the JSON (optimizer, rates, ranks that share a sequence) does not fit the run file."""
    problems = [problem_of_rates, problem_of_tensor_parallel, problem_of_sharing, problem_beside_experts]
    if settings.model.is_recurrent:
        problems.append(problem_beside_recurrent)
    if settings.classification.classes:
        problems.append(problem_of_classification)
    return next((found for problem_of in problems if (found := problem_of(settings))), "")


def _settle_precision(config: dict[str, Any], settings: Settings, source: Source) -> Settings:
    """Compare bf16.enabled, fp16.enabled and data_types.param_dtype with training.precision; both false: fp32."""
    enabled = {kind: written(config, f"{kind}.enabled") for kind in ("bf16", "fp16")}
    on = [kind for kind, value in enabled.items() if value]
    if len(on) == 2:
        source.problem("bf16.enabled and fp16.enabled are both true; choose one")
    elif on:
        settings = source.agree(settings, "training.precision", on[0], f"{on[0]}.enabled", True)
    for kind in [kind for kind, value in enabled.items() if value is False and not on]:
        if settings.training.precision == kind or (kind == "bf16" and settings.training.precision != "fp16"):
            settings = source.agree(settings, "training.precision", "fp32", f"{kind}.enabled", False)
    path = "data_types.param_dtype"
    if written(config, path) not in (None, settings.training.precision):
        here = f"{path} = {json.dumps(written(config, path))}"
        source.contradiction(here, "training.precision", settings.training.precision)
    return settings


def _settle_monitors(config: dict[str, Any], settings: Settings, source: Source) -> Settings:
    """DeepSpeed's monitors become our writers, in addition to those of the run file."""
    for block, (writer, names) in MONITORS.items():
        if not written(config, f"{block}.enabled"):
            continue
        metrics = settings.metrics
        if writer not in metrics.writers:
            metrics = metrics.model_copy(update={"writers": [*metrics.writers, writer]})
            settings = settings.model_copy(update={"metrics": metrics})
        for key, setting in names.items():
            value = written(config, f"{block}.{key}")
            if value:
                settings = source.agree(settings, f"metrics.{setting}", value, f"{block}.{key}", value)
    return settings


def _derive_micro_batch(config: dict[str, Any], settings: Settings, world_size: int) -> None:
    """Packed sequences at once from train_batch_size and gradient_accumulation_steps, as in DeepSpeed, where it is not
    written and the other two are."""
    batch, steps = written(config, "train_batch_size"), written(config, "gradient_accumulation_steps")
    if batch is None or steps is None or settings.training.ranks_per_sequence > 1:
        return
    if batch % (steps * world_size) == 0:
        _fill(config, "train_micro_batch_size_per_gpu", batch // (steps * world_size))


def _settle_batch(config: dict[str, Any], settings: Settings, world_size: int, source: Source) -> None:
    """Compute the micro-batches per step from packs, ranks and packs per micro-batch; a written value must equal it."""
    packs = settings.training.global_batch_size
    per_micro_batch = config["train_micro_batch_size_per_gpu"]
    sharing = settings.training.ranks_per_sequence
    kind = "tensor" if settings.training.tensor_parallel_ranks > 1 else "sequence"
    if world_size % sharing:
        source.problem(
            f"training.{kind}_parallel_ranks = {sharing} does not divide the {counted_noun(world_size, 'rank')}; "
            "choose a divisor"
        )
        return
    places = world_size // sharing
    micro_batches = num_micro_batches(packs, places, per_micro_batch)
    ranks = counted_noun(world_size, "rank") if sharing == 1 else f"{counted_noun(places, 'group')} of {sharing} ranks"
    derived = f"global_batch_size = {packs} over {ranks} with {per_micro_batch} packed sequence(s) per micro-batch"
    steps, batch = written(config, "gradient_accumulation_steps"), written(config, "train_batch_size")
    if steps is not None and steps != micro_batches:
        fitting = steps * per_micro_batch * places
        remedy = f"train_batch_size = {fitting}" if batch else f"training.global_batch_size = {fitting}"
        whose = "train_batch_size, which is" if batch else "the run file's"
        source.problem(
            f"gradient_accumulation_steps = {steps}, but {whose} training.{derived} gives {micro_batches}; "
            f'write "auto" in the JSON, or {remedy}'
        )
    multiplied = per_micro_batch * micro_batches * world_size
    if batch is not None and sharing > 1:
        source.problem(
            f"train_batch_size = {batch} with training.{kind}_parallel_ranks = {sharing}: DeepSpeed would count each "
            'rank as a data-parallel one; write "auto"'
        )
    if batch is not None and batch != multiplied:
        source.problem(
            f"train_batch_size = {batch} does not divide: training.{derived} gives {micro_batches} micro-batch(es), "
            f'{multiplied} in total; write "auto" in the JSON: empty packed sequences then fill the step'
        )
    _fill(config, "gradient_accumulation_steps", micro_batches)
    _fill(config, "train_batch_size", multiplied)


def _refuse_combinations(config: dict[str, Any], settings: Settings, world_size: int, source: Source) -> None:
    """Values that are right by themselves and cannot go together."""
    zero = config["zero_optimization"]
    stage, precision, sums = zero["stage"], settings.training.precision, config["data_types"]["grad_accum_dtype"]
    if precision != "bf16" and sums != "fp32":
        source.problem(f'data_types.grad_accum_dtype = "{sums}" does not go with {precision} weights; write "fp32"')
    for name, least in (("offload_optimizer", 1), ("offload_param", 3), *((name, 3) for name in ZEROPP)):
        if zero.get(name) and device_of(zero[name]) not in ("none", 1) and stage < least:
            source.problem(f"zero_optimization.{name} needs zero_optimization.stage >= {least}; it is {stage}")
    nvme_path = value_at(zero, "offload_optimizer.nvme_path")
    if device_of(zero.get("offload_optimizer")) == "nvme" and not (isinstance(nvme_path, str) and nvme_path[:1] == "/"):
        source.problem(
            f"zero_optimization.offload_optimizer.nvme_path = {json.dumps(nvme_path)} must be the absolute path of a "
            "folder on a local disk; it will hold the optimizer's state"
        )
    offload = device_of(zero.get("offload_optimizer"))
    if settings.pruning.kind != "none" and offload in ("cpu", "nvme") and config["gradient_clipping"]:
        source.problem(
            f'pruning.kind = "{settings.pruning.kind}" with zero_optimization.offload_optimizer: DeepSpeed {VERSION} '
            "clips by a norm that holds the gradients of pruned weights; set optimizer.gradient_clipping = 0, or do "
            "not offload"
        )
    if stage == 0 and precision != "fp32":
        source.problem(
            f"zero_optimization.stage = 0 with {precision}: DeepSpeed {VERSION} cannot accumulate gradients in fp32 "
            'there; use stage 1 (the same on one rank), or training.precision = "fp32"'
        )
    hpz = zero.get("zero_hpz_partition_size", 1)
    if stage == 3 and hpz > 1 and world_size % min(hpz, world_size):
        ranks = counted_noun(world_size, "rank")
        source.problem(
            f"zero_optimization.zero_hpz_partition_size = {hpz} does not divide the {ranks}; "
            "write the number of ranks of a node"
        )
    scales = config.get("prescale_gradients", False) or config.get("gradient_predivide_factor", 1) != 1
    if scales and zero.get("reduce_scatter", True) and (stage > 1 or (stage == 1 and precision != "bf16")):
        source.problem(
            f"prescale_gradients or gradient_predivide_factor with zero_optimization.stage = {stage}: DeepSpeed "
            f"{VERSION} needs zero_optimization.reduce_scatter = false; or remove them, sums over ranks are in fp32"
        )
    kind = settings.optimizer.kind
    if config.get("zero_allow_untested_optimizer") is False and (kind != "adamw" or settings.optimizer.has_penalty):
        given = f'optimizer.kind = "{kind}"' if kind != "adamw" else "optimizer.l1_penalty"
        source.problem(
            f"zero_allow_untested_optimizer = false with {given}: DeepSpeed does not know this optimizer; remove the "
            "key, tests compare it with plain torch"
        )


def _refuse_limits(config: dict[str, Any], settings: Settings, source: Source) -> None:
    """Refuse ZeRO stages and offloads that the optimizer's row in the table excludes."""
    kind, zero = settings.optimizer.kind, config["zero_optimization"]
    row, offload = OPTIMIZERS[kind], device_of(zero.get("offload_optimizer"))
    if zero["stage"] not in row.stages:
        source.problem(f'zero_optimization.stage = {zero["stage"]} with optimizer.kind = "{kind}": {row.limits}')
    if offload not in ("none", None, *row.offloads):
        source.problem(
            f'zero_optimization.offload_optimizer.device = "{offload}" with optimizer.kind = "{kind}": {row.limits}'
        )


def _refuse_shared_parameters(
    kind: str, config: dict[str, Any], settings: Settings, world_size: int, source: Source
) -> None:
    """Refuse what does not go with ranks that share experts or, kind "tensor", matrices."""
    zero, size = config["zero_optimization"], getattr(settings.training, f"{kind}_parallel_ranks")
    if world_size % size and kind == "expert":  # `_settle_batch` has refused it of the other kind
        source.problem(
            f"training.expert_parallel_ranks = {size} does not divide the {counted_noun(world_size, 'rank')}; choose a "
            "divisor"
        )
    for name in ZEROPP:
        value = zero.get(name) or 0
        if value is True or value > 1:
            source.problem(
                f"zero_optimization.{name} = {json.dumps(value)} with training.{kind}_parallel_ranks = {size}: "
                f"DeepSpeed {VERSION} has no such partition of shared parameters; remove the key"
            )
    for name in ("reduce_scatter", "contiguous_gradients"):
        if zero.get(name) is False:
            source.problem(
                f"zero_optimization.{name} = false with training.{kind}_parallel_ranks = {size}: DeepSpeed {VERSION} "
                "needs it for shared parameters; remove the key"
            )


def _fill(config: dict[str, Any], path: str, value: Any) -> None:
    """Set an absent or "auto" key to `value`."""
    *sections, name = path.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    if config.get(name, AUTO) == AUTO:
        config[name] = copy.deepcopy(value)


def _drop_auto(config: dict[str, Any]) -> None:
    """Remove the remaining "auto" keys: DeepSpeed's own defaults apply."""
    for key in [key for key, value in config.items() if value == AUTO]:
        del config[key]
    for value in config.values():
        if isinstance(value, dict):
            _drop_auto(value)
