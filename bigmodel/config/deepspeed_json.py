"""The user's DeepSpeed JSON: read and checked, not yet completed.

In: the file of `training.deepspeed`. Out: its content. Guarantees: a key that DeepSpeed does not know, has removed, or
that is not supported here is an error with the remedy; all such keys are listed in one message.
Written against DeepSpeed 0.19.8; a test compares the tables with its source. Imports neither torch nor deepspeed.
"""

import difflib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigmodel.config.settings import UserError

VERSION = "0.19.8"
AUTO = "auto"

# Every key that DeepSpeed 0.19.8 reads and that makes sense here.
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

# Removed from DeepSpeed in 0.19.7 or 0.19.8. DeepSpeed refuses them too, without a remedy.
REMOVED = {
    "elasticity": "set training.global_batch_size; a run resumes at any world size",
    "nebula": "checkpoints are bigmodel's own",
    "compression_training": "remove the section",
    "amp": 'use training.precision = "bf16"',
    "quantize_training": "remove the section",
    "sparse_gradients": "remove the key",
    "eigenvalue": "remove the section",
    "sparse_attention": "remove the section; set model.sliding_window in the run file for local attention",
    "graph_harvesting": "remove the key",
    "curriculum_learning": "remove the section; [data] of the run file sets the order of documents",
    "progressive_layer_drop": "remove the section",
    "zero_optimization.mics_shard_size": "remove the key",
    "zero_optimization.mics_hierarchical_params_gather": "remove the key",
    "zero_optimization.zeropp_loco_param": "remove the key",
}

# Measured on two gloo ranks with the async_io op built for CPUs: 0.19.8 failed in a forward pass, "param 16 already
# assigned swap buffer id 31"; without prefetch it failed in a gather.
WEIGHTS_ON_NVME = (
    'use "cpu", or offload_optimizer alone; with DeepSpeed\'s ' + VERSION + " the forward pass fails with weights there"
)


def device_of(section: Any) -> Any:
    """The device of an offload section."""
    return section.get("device", "none") if isinstance(section, dict) else section


# Keys of DeepSpeed that are not supported here; ignoring them would be a silent mistake.
# (path, whether a value turns it on, remedy)
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
    ("gradient_allreduce_op", lambda value: value != "mean", 'use "mean"; the exact loss needs it'),
    ("bf16.bf16_master_weights_and_grads", bool, "remove the key; master weights are fp32"),
    ("bf16.bf16_optimizer_states", bool, "remove the key; moments are fp32"),
    ("bf16.immediate_grad_update", bool, "remove the key; it is not offered yet"),
    ("zero_optimization.compute_grad_norm", lambda value: value is not True, "remove the key; the norm is always used"),
    ("zero_optimization.offload_param", lambda value: device_of(value) == "nvme", WEIGHTS_ON_NVME),
    (
        "zero_optimization.offload_optimizer.ratio",
        lambda value: value != 1,
        "remove it; partial offload is not supported",
    ),
    ("zero_optimization.cpu_offload", bool, 'write "offload_optimizer": {"device": "cpu"} instead'),
    ("zero_optimization.cpu_offload_param", bool, 'write "offload_param": {"device": "cpu"} instead'),
    ("zero_optimization.zenflow", bool, "remove it; ZenFlow is not offered"),
)


@dataclass(frozen=True)
class Source:
    """The JSON's file, named in every message, and the problems found so far; they are raised together."""

    path: Path | None
    problems: list[str] = field(default_factory=list)

    def error(self, *last: str) -> UserError:
        """An error with all problems so far, and `last`, a problem that ends the check."""
        found, name = [*self.problems, *last], self.path or "the default DeepSpeed configuration"
        if len(found) == 1:
            return UserError(f"{name}: {found[0]}")
        return UserError(f"{name}:" + "".join(f"\n  {problem}" for problem in found))

    def raise_problems(self) -> None:
        if self.problems:
            raise self.error()

    def read(self) -> dict[str, Any]:
        if self.path is None:
            return {}
        try:
            config = json.loads(self.path.read_text(encoding="utf-8-sig"), object_pairs_hook=self._once)
        except FileNotFoundError:
            raise self.error("no such file; training.deepspeed is relative to the run file") from None
        except json.JSONDecodeError as error:
            raise self.error(f"not valid JSON: {error} (comments and trailing commas are not JSON)") from None
        except (OSError, UnicodeDecodeError) as error:
            raise self.error(f"cannot be read as text: {error}") from None
        if not isinstance(config, dict):
            raise self.error(
                f"contains a JSON {type(config).__name__}; a DeepSpeed configuration must be an object {{...}}"
            )
        return config

    def _once(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise self.error(f"{name!r} occurs twice in one object; keep one of them")
        return dict(pairs)

    def refuse_unusable(self, config: dict[str, Any]) -> None:
        """Raise for all unknown, removed, misplaced and unsupported keys at once."""
        self.refuse_unknown(config, TOP_LEVEL_KEYS, "")
        for section in SECTIONS:
            if not isinstance(config.get(section, {}), dict):
                raise self.error(f"{section} = {config[section]!r} must be an object {{...}}")
        self.refuse_unknown(config.get("zero_optimization", {}), ZERO_KEYS, "zero_optimization.")
        for path, in_use, remedy in NOT_OFFERED:
            value = value_at(config, path)
            if value is not None and value != AUTO and in_use(value):
                self.problems.append(f"{path} = {json.dumps(value)}: {remedy}")
        self.raise_problems()

    def refuse_unknown(self, section: dict[str, Any], known: Iterable[str], prefix: str) -> None:
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
        """The number at `path`; None if absent or "auto"."""
        value = value_at(config, path)
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


def value_at(config: dict[str, Any], path: str) -> Any:
    """The value at a dotted path; None if any part of the path is missing."""
    value: Any = config
    for name in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value
