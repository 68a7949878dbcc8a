"""The DeepSpeed JSON that a run really uses, and the settings that agree with it.

Takes `Settings` and the world size; reads the user's JSON file (`training.deepspeed`), or starts from nothing.
Gives the effective configuration and the settings. Guarantees: a key that the user wrote is never altered, `"auto"`
is filled, an absent key gets a default from `DEFAULTS`, and where JSON and run file say different things about the
same matter there is an error that names both. Where only the JSON says it, the settings follow the JSON.
Imports neither torch nor deepspeed. Written against DeepSpeed 0.19.8.
"""

import copy
import difflib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigmodel.config import Settings, UserError, num_micro_batches

VERSION = "0.19.8"
AUTO = "auto"

# Every key that DeepSpeed 0.19.8 reads and that can make sense here.
TOP_LEVEL_KEYS = frozenset(
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation "  # noqa: SIM905
    "optimizer scheduler zero_optimization bf16 fp16 torch_autocast data_types gradient_clipping "
    "communication_data_type seq_parallel_communication_data_type prescale_gradients gradient_predivide_factor "
    "gradient_allreduce_op disable_allgather zero_allow_untested_optimizer zero_force_ds_cpu_optimizer "
    "steps_per_print wall_clock_breakdown memory_breakdown dump_state disable_python_gc vocabulary_size "
    "dataloader_drop_last log_level timers comms_logger flops_profiler tensorboard wandb csv_monitor comet "
    "activation_checkpointing aio checkpoint datastates compile autotuning data_efficiency hybrid_engine pipeline "
    "tensor_parallel expert_parallel sequence_parallel_size use_data_before_expert_parallelism "
    "weight_quantization".split()
)
ZERO_KEYS = frozenset(
    "stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce "  # noqa: SIM905
    "allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights "
    "elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size cpu_offload cpu_offload_param "
    "cpu_offload_use_pin_memory stage3_prefetch_bucket_size stage3_param_persistence_threshold "
    "stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance "
    "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save "
    "stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential "
    "ignore_unused_parameters legacy_stage1 round_robin_gradients parameter_alignment zero_hpz_partition_size "
    "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear "
    "pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks "
    "save_muon_momentum_buffer_in_memory leaf_module prefetch_bucket_size param_persistence_threshold "
    "model_persistence_threshold max_live_parameters max_reuse_distance gather_16bit_weights_on_model_save "
    "module_granularity_threshold use_all_reduce_for_fetch_params allgather_sequential".split()
)
SECTIONS = ("zero_optimization", "bf16", "fp16", "data_types", "optimizer")

# Gone from DeepSpeed since 0.19.7 or 0.19.8; a leftover key would be refused there with less to go on.
REMOVED = {
    "elasticity": "set training.packs_per_step; a run here resumes at any world size",
    "nebula": "checkpoints are bigmodel's own",
    "compression_training": "remove the section",
    "amp": 'use training.precision = "bf16"',
    "quantize_training": "remove the section",
    "sparse_gradients": "remove the key",
    "eigenvalue": "remove the section",
    "sparse_attention": "remove the section; attention is packed and causal here",
    "graph_harvesting": "remove the key",
    "curriculum_learning": "remove the section; the order of documents is [data]'s",
    "progressive_layer_drop": "remove the section",
    "zero_optimization.mics_shard_size": "remove the key",
    "zero_optimization.mics_hierarchical_params_gather": "remove the key",
    "zero_optimization.zeropp_loco_param": "remove the key",
}

# Tried on two gloo ranks with the op (async_io) built for CPUs: 0.19.8 stopped in a forward pass, "param 16 already
# assigned swap buffer id 31", and without prefetch in a gather.
WEIGHTS_ON_NVME = (
    'use "cpu", or offload_optimizer alone; with DeepSpeed\'s ' + VERSION + " the forward pass fails with weights there"
)


def _device(section: Any) -> Any:
    """Where an offload section puts things."""
    return section.get("device", "none") if isinstance(section, dict) else section


# Known to DeepSpeed but not to this system: silently ignoring or half honouring them would be a silent mistake.
# (path, is it in use?, remedy)
NOT_OFFERED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("scheduler", bool, "describe the learning rate in [schedule] of the run file (kind, warmup_steps, decay_steps)"),
    ("fp16.auto_cast", bool, "remove the key; batches hold no floating-point numbers"),
    ("fp16.fp16_master_weights_and_grads", bool, "remove the key; master weights are fp32"),
    ("torch_autocast.enabled", bool, "use bf16 or fp32; autocast is not offered"),
    ("activation_checkpointing", bool, "remove the section; set training.activation_checkpointing in the run file"),
    ("checkpoint", bool, "remove the section; checkpoints are bigmodel's own, see [checkpoint] of the run file"),
    ("datastates", bool, "remove the section; checkpoints are bigmodel's own"),
    ("data_efficiency", bool, "remove the section; data is read and ordered by [data] of the run file"),
    ("pipeline", bool, "remove the section; pipeline parallelism is not offered"),
    ("tensor_parallel", bool, "remove the section; tensor parallelism is not offered"),
    ("expert_parallel", bool, "remove the section; mixture of experts is not offered"),
    (
        "sequence_parallel_size",
        lambda value: value != 1,
        "remove the key; set training.sequence_parallel_ranks in the run file",
    ),
    ("hybrid_engine", bool, "remove the section; it serves reinforcement learning"),
    ("compile", bool, "remove the section; DeepCompile is not offered"),
    ("autotuning", bool, "remove the section; autotuning is not offered"),
    ("weight_quantization", bool, "remove the section; it serves inference"),
    ("managed_gradient_accumulation", lambda value: value is not True, "remove the key; the engine sets the boundary"),
    ("gradient_allreduce_op", lambda value: value != "mean", 'use "mean"; the exact loss counts on it'),
    ("bf16.bf16_master_weights_and_grads", bool, "remove the key; master weights are fp32"),
    ("bf16.bf16_optimizer_states", bool, "remove the key; moments are fp32"),
    ("bf16.immediate_grad_update", bool, "remove the key; it is not offered yet"),
    ("zero_optimization.compute_grad_norm", lambda value: value is not True, "remove the key; the norm is always used"),
    ("zero_optimization.offload_param", lambda value: _device(value) == "nvme", WEIGHTS_ON_NVME),
    ("zero_optimization.offload_optimizer.ratio", lambda value: value != 1, "remove it; all or nothing is offloaded"),
    ("zero_optimization.cpu_offload", bool, 'write "offload_optimizer": {"device": "cpu"} instead'),
    ("zero_optimization.cpu_offload_param", bool, 'write "offload_param": {"device": "cpu"} instead'),
    ("zero_optimization.zenflow", bool, "remove it; ZenFlow is not offered"),
)

# What an absent or "auto" key becomes, and why.
DEFAULTS: tuple[tuple[str, Callable[[Settings], Any], str], ...] = (
    ("train_micro_batch_size_per_gpu", lambda s: 1, "one pack of data.pack_tokens positions is one sample"),
    ("zero_optimization.stage", lambda s: 1, "partitions the moments, costs no extra communication"),
    ("zero_optimization.overlap_comm", lambda s: False, "its data race is open upstream (DeepSpeed issue 5545)"),
    ("bf16.enabled", lambda s: s.training.precision == "bf16", "training.precision"),
    ("bf16.check_grad_overflow", lambda s: False, "0.19.8 skips steps by itself; here all ranks decide together"),
    ("data_types.grad_accum_dtype", lambda s: "fp32", "bf16 sums lose 5% of the gradient at 256 micro-batches"),
    ("communication_data_type", lambda s: "fp32", "the sum over ranks is a sum like any other"),
    ("gradient_clipping", lambda s: s.optimizer.gradient_clipping, "0.19.8 turned its own default from off to 1.0"),
)

# The user's optimizer section is compared with [optimizer]; the optimizers are torch's and ours, whatever its flags.
OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "lion": "lion", "muon": "muon", "adafactor": "adafactor"}
OPTIMIZER_FLAGS = {"torch_adam", "adam_w_mode", "fused", "legacy_fusion", "bias_correction"}  # they change no result


def resolve_deepspeed(settings: Settings, world_size: int) -> tuple[dict[str, Any], Settings]:
    """The effective DeepSpeed configuration for `world_size` ranks, and settings that agree with it.

    Raises `UserError` naming the JSON file, the key, its value and the remedy: for a file that cannot be read, an
    unknown, removed or not offered key, and for anything that contradicts the run file.
    """
    assert world_size >= 1, f"world size {world_size}"
    source = _Source(settings.training.deepspeed)
    config = source.read()
    source.refuse_unusable(config)
    settings = _settle(config, settings, source)
    for path, default, _reason in DEFAULTS:
        _fill(config, path, default(settings))
    if settings.training.precision == "fp16":
        _fill(config, "fp16.enabled", True)
    if settings.optimizer.kind != "adamw":
        _fill(config, "zero_allow_untested_optimizer", True)  # tests compare it with plain torch
    if _device(_get(config, "zero_optimization.offload_optimizer")) in ("cpu", "nvme"):
        _fill(config, "zero_force_ds_cpu_optimizer", False)  # DeepSpeed's own needs a C++ compiler
    _settle_batch(config, settings, world_size, source)
    _fill_optimizer(config, settings)
    _drop_auto(config)
    _refuse_impossible_sums(config, source)
    return config, settings


def agree(settings: Settings) -> Settings:
    """What the run file and its DeepSpeed JSON say together, for commands that know no number of ranks.

    Raises `UserError` as `resolve_deepspeed` does, but for what depends on that number.
    """
    source = _Source(settings.training.deepspeed)
    config = source.read()
    source.refuse_unusable(config)
    return _settle(config, settings, source)


def state_folder(effective: dict[str, Any]) -> Path | None:
    """Where the optimizer's state lies in files (`offload_optimizer.device = "nvme"`); None where it is in memory."""
    offload = _get(effective, "zero_optimization.offload_optimizer")
    return Path(offload["nvme_path"]) if _device(offload) == "nvme" else None


def for_deepspeed(effective: dict[str, Any]) -> dict[str, Any]:
    """What DeepSpeed itself is given, a copy: state in files is our own doing (bigmodel/training/mapped.py), and to it
    an offload to the CPU.
    """
    config = copy.deepcopy(effective)
    if state_folder(effective):
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return config


def packs_per_micro_batch(effective: dict[str, Any]) -> int:
    """How many packs a rank runs forward and backward at once."""
    return effective["train_micro_batch_size_per_gpu"]


@dataclass(frozen=True)
class _Source:
    """Where the JSON came from, which every message names; what is found wrong is told together where it can be."""

    path: Path | None
    problems: list[str] = field(default_factory=list)

    def error(self, text: str) -> UserError:
        """What to raise for something after which nothing further can be looked at."""
        self.problems.append(text)
        name = self.path or "the default DeepSpeed configuration"
        if len(self.problems) == 1:
            return UserError(f"{name}: {text}")
        return UserError(f"{name}:" + "".join(f"\n  {problem}" for problem in self.problems))

    def raise_problems(self) -> None:
        if self.problems:
            raise self.error(self.problems.pop())

    def read(self) -> dict[str, Any]:
        if self.path is None:
            return {}
        try:
            config = json.loads(self.path.read_text(encoding="utf-8"), object_pairs_hook=self._once)
        except FileNotFoundError:
            raise self.error("no such file; training.deepspeed is relative to the run file") from None
        except json.JSONDecodeError as error:
            raise self.error(f"not valid JSON: {error} (comments and trailing commas are not JSON)") from None
        except (OSError, UnicodeDecodeError) as error:
            raise self.error(f"cannot be read as text: {error}") from None
        if not isinstance(config, dict):
            raise self.error(f"holds a JSON {type(config).__name__}; a DeepSpeed configuration is an object {{...}}")
        return config

    def _once(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise self.error(f"{name!r} is written twice in one object; keep one of them")
        return dict(pairs)

    def refuse_unusable(self, config: dict[str, Any]) -> None:
        """Unknown, removed, misplaced and not offered keys, all at once."""
        self._refuse_unknown(config, TOP_LEVEL_KEYS, "")
        for section in SECTIONS:
            if not isinstance(config.get(section, {}), dict):
                raise self.error(f"{section} = {config[section]!r} must be an object {{...}}")
        self._refuse_unknown(config.get("zero_optimization", {}), ZERO_KEYS, "zero_optimization.")
        for path, in_use, remedy in NOT_OFFERED:
            value = _get(config, path)
            if value is not None and value != AUTO and in_use(value):
                self.problems.append(f"{path} = {json.dumps(value)}: {remedy}")
        self.raise_problems()

    def _refuse_unknown(self, section: dict[str, Any], known: Iterable[str], prefix: str) -> None:
        for key in section:
            path = prefix + key
            if path in REMOVED:
                self.problems.append(f"{path} was removed from DeepSpeed (gone in {VERSION}); {REMOVED[path]}")
            elif path == "bfloat16":
                self.problems.append('"bfloat16" is the old name of "bf16"; rename it')
            elif key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
                hint = f"; did you mean {prefix}{near[0]}?" if near else ""
                self.problems.append(f"{path} is not a key that DeepSpeed {VERSION} knows{hint}")

    def number(
        self, config: dict[str, Any], path: str, kind: type[int] | type[float], least: float
    ) -> int | float | None:
        """The number at `path`, None where it is absent or "auto"."""
        value = _get(config, path)
        if value is None or value == AUTO:
            return None
        wanted = int if kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted) or value < least:
            what = "a whole number" if kind is int else "a number"
            raise self.error(f'{path} = {json.dumps(value)} must be {what} of at least {least} (or "auto")')
        return value

    def contradiction(self, path: str, value: Any, setting: str, other: Any) -> None:
        self.problems.append(
            f"{path} = {json.dumps(value)}, but the run file has {setting} = {json.dumps(other)}; "
            'make them equal, or write "auto" in the JSON to follow the run file'
        )


def _settle(config: dict[str, Any], settings: Settings, source: _Source) -> Settings:
    """Compare each matter that both files may decide. An unset setting follows the JSON."""
    settings = _settle_precision(config, settings, source)
    clipping = source.number(config, "gradient_clipping", float, 0)
    if clipping is not None:
        path = "optimizer.gradient_clipping"
        settings = _agree(settings, path, float(clipping), "gradient_clipping", clipping, source)
    batch = source.number(config, "train_batch_size", int, 1)
    if batch is not None:
        settings = _agree(settings, "training.packs_per_step", batch, "train_batch_size", batch, source)
        if batch % settings.data.lanes:
            raise source.error(
                f"train_batch_size = {batch} is not a multiple of data.lanes = {settings.data.lanes} in the run file; "
                "a step takes the same number of packs from every lane"
            )
    settings = _settle_optimizer(config, settings, source)
    source.raise_problems()
    return settings


def _settle_precision(config: dict[str, Any], settings: Settings, source: _Source) -> Settings:
    """bf16.enabled and fp16.enabled against training.precision; both false means fp32."""
    enabled: dict[str, bool] = {}
    for kind in ("bf16", "fp16"):
        value = _get(config, f"{kind}.enabled")
        if value is not None and value != AUTO:
            if not isinstance(value, bool):
                raise source.error(f'{kind}.enabled = {json.dumps(value)} must be true, false or "auto"')
            enabled[kind] = value
    on = [kind for kind, value in enabled.items() if value]
    if len(on) == 2:
        raise source.error("bf16.enabled and fp16.enabled are both true; choose one")
    if on:
        return _agree(settings, "training.precision", on[0], f"{on[0]}.enabled", True, source)
    for kind in enabled:
        if settings.training.precision == kind or (kind == "bf16" and settings.training.precision != "fp16"):
            settings = _agree(settings, "training.precision", "fp32", f"{kind}.enabled", False, source)
    return settings


def _settle_optimizer(config: dict[str, Any], settings: Settings, source: _Source) -> Settings:
    section = config.get("optimizer", {})
    kind = section.get("type", AUTO)
    if kind != AUTO:
        if str(kind).lower() not in OPTIMIZERS:
            raise source.error(f"optimizer.type = {json.dumps(kind)}; AdamW, Lion, Muon and Adafactor are offered")
        settings = _agree(settings, "optimizer.kind", OPTIMIZERS[str(kind).lower()], "optimizer.type", kind, source)
    parameters = section.get("params", {})
    if parameters == AUTO:
        return settings
    if not isinstance(parameters, dict):
        raise source.error(f"optimizer.params = {json.dumps(parameters)} must be an object {{...}}")
    if parameters.get("adam_w_mode") is False:
        raise source.error("optimizer.params.adam_w_mode = false means L2 instead of decoupled decay; remove the key")
    names = {"lr": "learning_rate", "eps": "epsilon", "weight_decay": "weight_decay", "momentum": "momentum"}
    source._refuse_unknown(parameters, {"betas", *names} | OPTIMIZER_FLAGS, "optimizer.params.")
    for key, setting in names.items():
        value = source.number(config, f"optimizer.params.{key}", float, 0)
        if value is not None:
            path = f"optimizer.params.{key}"
            settings = _agree(settings, f"optimizer.{setting}", float(value), path, value, source)
    return _settle_betas(parameters.get("betas"), settings, source)


def _settle_betas(betas: Any, settings: Settings, source: _Source) -> Settings:
    if betas is None or betas == AUTO:
        return settings
    numbers = isinstance(betas, list) and len(betas) == 2 and all(type(beta) in (int, float) for beta in betas)
    if not numbers or not all(0 <= beta < 1 for beta in betas):
        raise source.error(f"optimizer.params.betas = {json.dumps(betas)} must be two numbers from 0 to below 1")
    for index, beta in enumerate(betas):
        path = f"optimizer.params.betas[{index}]"
        settings = _agree(settings, f"optimizer.beta{index + 1}", float(beta), path, beta, source)
    return settings


def _agree(settings: Settings, setting: str, meant: Any, path: str, value: Any, source: _Source) -> Settings:
    """Settings in which `setting` is `meant`; a problem where the run file explicitly says something else."""
    section_name, name = setting.split(".")
    section = getattr(settings, section_name)
    now = getattr(section, name)
    if now == meant:
        return settings
    if name in section.model_fields_set:
        source.contradiction(path, value, setting, now)
        return settings
    return settings.model_copy(update={section_name: section.model_copy(update={name: meant})})


def _settle_batch(config: dict[str, Any], settings: Settings, world_size: int, source: _Source) -> None:
    """Micro-batches follow from packs, ranks and packs per micro-batch; what the user wrote must equal that."""
    packs = settings.training.packs_per_step
    per_micro_batch = source.number(config, "train_micro_batch_size_per_gpu", int, 1)
    assert isinstance(per_micro_batch, int), "filled before"
    sharing = settings.training.sequence_parallel_ranks
    if world_size % sharing:
        raise UserError(
            f"training.sequence_parallel_ranks = {sharing} does not divide the {world_size} rank(s); choose a divisor"
        )
    places = world_size // sharing
    micro_batches = num_micro_batches(packs, places, per_micro_batch)
    ranks = f"{world_size} rank(s)" if sharing == 1 else f"{places} group(s) of {sharing} ranks"
    derived = f"packs_per_step = {packs} over {ranks} with {per_micro_batch} pack(s) each time"
    written = source.number(config, "gradient_accumulation_steps", int, 1)
    if written is not None and written != micro_batches:
        raise source.error(
            f"gradient_accumulation_steps = {written}, but the run file's training.{derived} makes {micro_batches}; "
            f'write "auto" in the JSON, or training.packs_per_step = {written * per_micro_batch * places}'
        )
    multiplied = per_micro_batch * micro_batches * world_size
    batch = source.number(config, "train_batch_size", int, 1)
    if batch is not None and sharing > 1:
        raise source.error(
            f"train_batch_size = {batch} with training.sequence_parallel_ranks = {sharing}: DeepSpeed counts each rank "
            'as one that has packs of its own; write "auto"'
        )
    if batch is not None and batch != multiplied:
        raise source.error(
            f"train_batch_size = {batch} does not divide: training.{derived} makes {micro_batches} micro-batch(es), "
            f'in all {multiplied}; write "auto" in the JSON, and empty packs will fill the step'
        )
    _fill(config, "gradient_accumulation_steps", micro_batches)
    _fill(config, "train_batch_size", multiplied)


def _fill_optimizer(config: dict[str, Any], settings: Settings) -> None:
    section = config.get("optimizer")
    if section is None:
        return
    optimizer = settings.optimizer
    values = {
        "lr": optimizer.learning_rate,
        "betas": [optimizer.beta1, optimizer.beta2],
        "eps": optimizer.epsilon,
        "weight_decay": optimizer.weight_decay,
    }
    if section.get("type") == AUTO:
        section["type"] = {"adamw": "AdamW"}.get(optimizer.kind, optimizer.kind.capitalize())
    if section.get("params") == AUTO:
        section["params"] = values
    for key, value in values.items():
        if section.get("params", {}).get(key) == AUTO:
            section["params"][key] = value


def _refuse_impossible_sums(config: dict[str, Any], source: _Source) -> None:
    stage = config["zero_optimization"]["stage"]
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise source.error(f"zero_optimization.stage = {json.dumps(stage)} must be 0, 1, 2 or 3")
    sums = config["data_types"]["grad_accum_dtype"]
    if sums not in ("fp32", "bf16"):
        raise source.error(f'data_types.grad_accum_dtype = {json.dumps(sums)} must be "fp32" (right) or "bf16" (less)')
    low = next((kind for kind in ("bf16", "fp16") if config.get(kind, {}).get("enabled")), None)
    if low != "bf16" and sums != "fp32":
        raise source.error(
            f'data_types.grad_accum_dtype = {json.dumps(sums)} with {low or "fp32"} weights; write "fp32"'
        )
    zero = config["zero_optimization"]
    for name, least in (("offload_optimizer", 1), ("offload_param", 3), ("zero_hpz_partition_size", 3)):
        if zero.get(name) and _device(zero[name]) not in ("none", 1) and stage < least:
            raise source.error(f"zero_optimization.{name} needs zero_optimization.stage >= {least}, and it is {stage}")
    nvme_path = _get(zero, "offload_optimizer.nvme_path")
    if _device(zero.get("offload_optimizer")) == "nvme" and not (isinstance(nvme_path, str) and nvme_path[:1] == "/"):
        raise source.error(
            f"zero_optimization.offload_optimizer.nvme_path = {json.dumps(nvme_path)} must be the absolute path of a "
            "folder on a local disk, for the optimizer's state"
        )
    if stage == 0 and low:
        raise source.error(
            f"zero_optimization.stage = 0 with {low}: DeepSpeed {VERSION} cannot add gradients up in fp32 there; "
            'use stage 1 (the same on one rank), or training.precision = "fp32"'
        )


def _get(config: dict[str, Any], path: str) -> Any:
    """The value at a dotted path; None where any part of the path is missing."""
    value: Any = config
    for name in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def _fill(config: dict[str, Any], path: str, value: Any) -> None:
    """Put `value` where the user wrote nothing or "auto"."""
    *sections, name = path.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    if config.get(name, AUTO) == AUTO:
        config[name] = copy.deepcopy(value)


def _drop_auto(config: dict[str, Any]) -> None:
    """An "auto" that nothing here decides becomes DeepSpeed's own default."""
    for key in [key for key, value in config.items() if value == AUTO]:
        del config[key]
    for value in config.values():
        if isinstance(value, dict):
            _drop_auto(value)
