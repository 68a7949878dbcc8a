"""Every key of DeepSpeed's JSON, and what becomes of it. A test compares the keys with those that DeepSpeed reads.

`docs/deepspeed-keys.md` is made from this table. Written against DeepSpeed 0.19.8. Imports neither torch nor deepspeed.
"""

from bigmodel.config.deepspeed_row import (
    Key,
    agrees,
    enabled_by,
    idle,
    only,
    ours,
    refused,
    unless_disabled,
    used,
    used_but,
)
from bigmodel.config.deepspeed_values import ANYTHING, FLAG, OBJECT, TEXT, TEXTS, choice, number, whole

VERSION = "0.19.8"

NO_SWAPPER = "DeepSpeed's swapper is not used; state is in memory-mapped files"
OWN_OPTIMIZERS = "optimizers are bigmodel's and torch's own"
NO_DATA = "data is read and ordered by [data] of the run file"
NO_CHECKPOINTS = "checkpoints are bigmodel's own and hold whole weights, see [checkpoint] of the run file"
RUN_DIRECTORY = "the files are in the run directory, which also names the run"
NO_MASTERS = "remove the key; master weights and moments are fp32"
# Measured on two gloo ranks with the async_io op built for CPUs: 0.19.8 failed in a forward pass, "param 16 already
# assigned swap buffer id 31"; without prefetch it failed in a gather.
WEIGHTS_ON_NVME = (
    'use "cpu", or offload_optimizer alone; with DeepSpeed\'s ' + VERSION + " the forward pass fails with weights there"
)
DTYPE = choice("fp32", "bf16", "fp16")

TOP_LEVEL = {
    "train_batch_size": agrees(whole(1), "training.global_batch_size; one sample is one packed sequence"),
    "train_micro_batch_size_per_gpu": used(
        whole(1),
        "packed sequences that a rank computes at once; follows from train_batch_size and gradient_accumulation_steps "
        "if both are written; else 1",
    ),
    "gradient_accumulation_steps": agrees(whole(1), "follows from global_batch_size and the number of ranks"),
    "managed_gradient_accumulation": refused("remove the key; the engine sets the boundary", only(True)),
    "gradient_clipping": agrees(number(0), "optimizer.gradient_clipping; 0: no clipping"),
    "sequence_parallel_size": ours(whole(1), "training.sequence_parallel_ranks (Ulysses)"),
    "data_parallel_size": refused("remove the key; it follows from the number of ranks", only()),
    "communication_data_type": used(DTYPE, "of sums over ranks; default fp32", nullable=True),
    "seq_parallel_communication_data_type": idle(DTYPE, "sequence parallelism is bigmodel's own", nullable=True),
    "prescale_gradients": used(FLAG, "only without reduce_scatter"),
    "gradient_predivide_factor": used(number(1e-9, 1e9), "only without reduce_scatter"),
    "gradient_allreduce_op": refused('use "mean"; the exact loss needs it', only("mean", "MEAN", "Mean")),
    "disable_allgather": idle(FLAG, f"DeepSpeed {VERSION} does not use it"),
    "zero_allow_untested_optimizer": used(FLAG, "true by default with another optimizer than AdamW, or an L1 penalty"),
    "zero_force_ds_cpu_optimizer": used_but(FLAG, True, f"remove the key; {OWN_OPTIMIZERS}"),
    "steps_per_print": idle(whole(1), "each step is in metrics.jsonl and on the terminal", nullable=True),
    "wall_clock_breakdown": used(FLAG, "prints times of forward, backward and step; waits for the device at each"),
    "memory_breakdown": used(FLAG, "prints the memory before and after forward, backward and step"),
    "dump_state": idle(FLAG, "deepspeed.json in the run directory has the configuration"),
    "disable_python_gc": used(FLAG),
    "log_level": used(choice("debug", "info", "warning", "error", "critical"), nullable=True),
    "vocabulary_size": idle(whole(1), "the tokenizer of the data gives it", nullable=True),
    "dataloader_drop_last": idle(FLAG, NO_DATA),
    "use_data_before_expert_parallelism": refused("remove the key; training.expert_parallel_ranks are neighbours"),
    "allgather_size": refused("remove the key; it belongs to an old format of zero_optimization", only()),
    "optimizer": ours(OBJECT, "[optimizer]"),
    "optimizer.type": ours(TEXT, "optimizer.kind"),
    "optimizer.params": ours(ANYTHING, "settings of [optimizer]; an unknown or contradicting one is an error"),
    "optimizer.legacy_fusion": idle(FLAG, OWN_OPTIMIZERS),
    "scheduler": ours(OBJECT, "[schedule]"),
    "scheduler.type": ours(TEXT, "schedule.kind"),
    "scheduler.params": ours(ANYTHING, "settings of [schedule]; an unknown or contradicting one is an error"),
    "bf16": used(OBJECT),
    "bf16.enabled": agrees(FLAG, "training.precision; true by default"),
    "bf16.check_grad_overflow": used(FLAG, "default false: all ranks decide together about a bad step"),
    "bf16.immediate_grad_update": refused("remove the key; it is not offered"),
    "bf16.bf16_master_weights_and_grads": refused(NO_MASTERS),
    "bf16.bf16_optimizer_states": refused(NO_MASTERS),
    "bfloat16": refused('rename it: "bfloat16" is the old name of "bf16"', only()),
    "fp16": used(OBJECT),
    "fp16.enabled": agrees(FLAG, "training.precision"),
    "fp16.auto_cast": refused("remove the key; batches hold no floating-point numbers"),
    "fp16.loss_scale": used(number(0), "0: dynamic"),
    "fp16.initial_scale_power": used(whole(0, 62)),  # from 64 on, DeepSpeed fails to multiply by a whole number
    "fp16.loss_scale_window": used(whole(1)),
    "fp16.hysteresis": used(whole(1)),
    "fp16.consecutive_hysteresis": used(FLAG),
    "fp16.min_loss_scale": used(whole(1)),
    "fp16.fp16_master_weights_and_grads": refused(NO_MASTERS),
    "torch_autocast": ours(OBJECT, "only where it is off"),
    "torch_autocast.enabled": refused("use bf16 or fp32; autocast is not offered"),
    "torch_autocast.dtype": idle(TEXT, "autocast is not offered", nullable=True),
    "torch_autocast.lower_precision_safe_modules": idle(TEXTS, "autocast is not offered", nullable=True),
    "data_types": used(OBJECT),
    "data_types.grad_accum_dtype": used(choice("fp32", "bf16"), "default fp32, which is exact", nullable=True),
    "data_types.param_dtype": agrees(DTYPE, "training.precision", nullable=True),
    "data_types.buffer_dtype": used(DTYPE, nullable=True),
    "data_types.keep_in_fp32_modules": used(TEXTS),
}  # fmt: skip

STAGE3 = {
    "prefetch_bucket_size": used(whole(0)),
    "param_persistence_threshold": used(whole(0)),
    "model_persistence_threshold": used(whole(0)),
    "max_live_parameters": used(whole(0)),
    "max_reuse_distance": used(whole(0)),
    "gather_16bit_weights_on_model_save": idle(FLAG, NO_CHECKPOINTS),
    "module_granularity_threshold": refused(
        f"remove the key; in DeepSpeed {VERSION} the backward pass failed here with modules fetched as a whole", only(0)
    ),
    "use_all_reduce_for_fetch_params": used(FLAG),
    "allgather_sequential": used(FLAG),
}
ZERO = {
    "": used(OBJECT),
    "stage": used(choice(0, 1, 2, 3), "default 1"),
    "contiguous_gradients": used(FLAG),
    "reduce_scatter": used(FLAG),
    "reduce_bucket_size": used(whole(1)),
    "use_multi_rank_bucket_allreduce": used(FLAG),
    "allgather_partitions": used(FLAG),
    "allgather_bucket_size": used(whole(0, multiple_of=2)),
    "overlap_comm": used(FLAG, "default false: its data race is open upstream (DeepSpeed issue 5545)", nullable=True),
    "compute_grad_norm": refused("remove the key; the norm is always used", only(True)),
    "load_from_fp32_weights": idle(FLAG, NO_CHECKPOINTS),
    "elastic_checkpoint": idle(FLAG, NO_CHECKPOINTS),
    "pipeline_loading_checkpoint": idle(FLAG, NO_CHECKPOINTS),
    "stage3_gather_fp16_weights_on_model_save": idle(FLAG, NO_CHECKPOINTS),
    "offload_param": used(OBJECT, "stage 3", nullable=True),
    "offload_param.device": used_but(choice("none", "cpu", "nvme"), "nvme", WEIGHTS_ON_NVME),
    "offload_param.pin_memory": used(FLAG),
    "offload_param.nvme_path": idle(TEXT, "weights cannot be on NVMe", nullable=True),
    "offload_param.buffer_count": idle(whole(0), "weights cannot be on NVMe"),
    "offload_param.buffer_size": idle(whole(0), "weights cannot be on NVMe"),
    "offload_param.max_in_cpu": idle(whole(0), "weights cannot be on NVMe"),
    "offload_optimizer": used(OBJECT, "stages 1 to 3", nullable=True),
    "offload_optimizer.device": used(choice("none", "cpu", "nvme"), "nvme: memory-mapped files in nvme_path"),
    "offload_optimizer.nvme_path": ours(TEXT, "an absolute path, for memory-mapped files", nullable=True),
    "offload_optimizer.pin_memory": used(FLAG),
    "offload_optimizer.buffer_count": idle(whole(0), NO_SWAPPER),
    "offload_optimizer.pipeline_read": idle(FLAG, NO_SWAPPER),
    "offload_optimizer.pipeline_write": idle(FLAG, NO_SWAPPER),
    "offload_optimizer.fast_init": idle(FLAG, NO_SWAPPER),
    "offload_optimizer.ratio": refused("remove it; partial offload is not supported", only(1, 1.0)),
    "offload_optimizer.super_offload": refused("remove it; SuperOffload brings its own optimizer"),
    "offload_optimizer.cpuadam_cores_perc": idle(number(0, 1), "it belongs to super_offload"),
    "zenflow": refused(
        "remove it; ZenFlow is not offered",
        unless_disabled,
        inside="topk_ratio select_strategy select_interval update_interval overlap_step offload auto_ratio "
        "full_warm_up_rounds pt_reserved_cores_perc steps_per_epoch",
    ),
    "sub_group_size": used(whole(0)),
    "cpu_offload": refused('write "offload_optimizer": {"device": "cpu"} instead'),
    "cpu_offload_param": refused('write "offload_param": {"device": "cpu"} instead'),
    "cpu_offload_use_pin_memory": refused('write "pin_memory": true inside offload_optimizer or offload_param instead'),
    "ignore_unused_parameters": used(FLAG),
    "legacy_stage1": idle(FLAG, f"DeepSpeed {VERSION} does not use it"),
    "round_robin_gradients": used(FLAG),
    "parameter_alignment": used(FLAG),
    "zero_hpz_partition_size": used(whole(0), "ranks of a node; stage 3"),
    "zero_quantized_weights": used(FLAG, "needs DeepSpeed's CUDA kernels; checked when the run starts"),
    "zero_quantized_nontrainable_weights": used(FLAG, "needs DeepSpeed's CUDA kernels; checked when the run starts"),
    "zero_quantized_gradients": used(FLAG, "needs DeepSpeed's CUDA kernels; checked when the run starts"),
    "memory_efficient_linear": used(FLAG),
    "override_module_apply": used(FLAG),
    "log_trace_cache_warnings": used(FLAG),
    "enable_sanity_checks": used(FLAG),
    "save_muon_momentum_buffer_in_memory": idle(FLAG, NO_SWAPPER),
    "leaf_module": refused("remove it; the experts of a layer are gathered together without it",
                           inside="classes names name_suffixes"),
} | {prefix + name: key for name, key in STAGE3.items() for prefix in ("stage3_", "")}  # fmt: skip

MONITORS = {
    "tensorboard": ours(OBJECT, 'the writer "tensorboard" of metrics.writers'),
    "tensorboard.enabled": ours(FLAG, 'adds "tensorboard" to metrics.writers'),
    "tensorboard.output_path": idle(TEXT, RUN_DIRECTORY),
    "tensorboard.job_name": idle(TEXT, RUN_DIRECTORY),
    "wandb": ours(OBJECT, 'the writer "wandb" of metrics.writers; stays offline, `wandb sync` uploads'),
    "wandb.enabled": ours(FLAG, 'adds "wandb" to metrics.writers'),
    "wandb.project": ours(TEXT, "metrics.project"),
    "wandb.group": ours(TEXT, "metrics.group", nullable=True),
    "wandb.team": ours(TEXT, "metrics.team", nullable=True),
    "csv_monitor": ours(OBJECT, 'the writer "csv" of metrics.writers'),
    "csv_monitor.enabled": ours(FLAG, 'adds "csv" to metrics.writers'),
    "csv_monitor.output_path": idle(TEXT, RUN_DIRECTORY),
    "csv_monitor.job_name": idle(TEXT, RUN_DIRECTORY),
    "comet": ours(OBJECT, 'the writer "comet" of metrics.writers; stays offline, `comet upload` uploads'),
    "comet.enabled": ours(FLAG, 'adds "comet" to metrics.writers'),
    "comet.project": ours(TEXT, "metrics.project", nullable=True),
    "comet.workspace": ours(TEXT, "metrics.team", nullable=True),
    "comet.samples_log_interval": idle(whole(1), "every step is written"),
    "comet.api_key": refused("remove it from the file, a run records its files; set COMET_API_KEY for `comet upload`"),
    "comet.experiment_name": idle(TEXT, RUN_DIRECTORY, nullable=True),
    "comet.experiment_key": idle(TEXT, RUN_DIRECTORY, nullable=True),
    "comet.online": refused("remove it; the writer stays offline, `comet upload` uploads"),
    "comet.mode": idle(choice("get", "create", "get_or_create"), "a resumed run continues its experiment",
                       nullable=True),
}  # fmt: skip

PROFILING = {
    "comms_logger": used(OBJECT, "a table of all collectives at the end of the run"),
    "comms_logger.enabled": used(FLAG),
    "comms_logger.prof_all": used(FLAG),
    "comms_logger.prof_ops": used(TEXTS),
    "comms_logger.verbose": used(FLAG, 'a line for each collective, with log_level = "info"'),
    "comms_logger.debug": used(FLAG, "names the caller of each collective"),
    "flops_profiler": refused(
        "set enabled = false; it does not see bigmodel's kernels and counts a small part of the FLOPs. "
        "metrics.jsonl has the FLOPs of each step, "
        "`bigmodel profile RUN trace` the time of each operation",
        inside="enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file",
    ),
    "timers": used(OBJECT),
    "timers.throughput": used(OBJECT),
    "timers.throughput.enabled": used(FLAG),
    "timers.throughput.synchronized": used(FLAG),
}

_RECOMPUTE = "training.activation_checkpointing in the run file turns recomputation on"
ACTIVATIONS = {
    "": ours(OBJECT, f"turns nothing on, as in DeepSpeed; {_RECOMPUTE}"),
    "partition_activations": refused(
        f"remove the key; training.tensor_parallel_ranks splits them over its ranks anyway. {_RECOMPUTE}"
    ),
    "cpu_checkpointing": refused(f"remove the key; activations are not moved to the CPU: {_RECOMPUTE}"),
    "contiguous_memory_optimization": refused(f"remove the key; it needs partition_activations. {_RECOMPUTE}"),
    "number_checkpoints": idle(whole(0), "it belongs to contiguous_memory_optimization", nullable=True),
    "synchronize_checkpoint_boundary": refused(f"remove the key; {_RECOMPUTE}"),
    "profile": refused("remove the key; metrics.jsonl has the time of forward and backward pass of each step"),
}

OFF_ONLY = {
    "aio": ours(OBJECT, NO_SWAPPER, nullable=True),
    "aio.block_size": idle(whole(1), NO_SWAPPER),
    "aio.queue_depth": idle(whole(1), NO_SWAPPER),
    "aio.intra_op_parallelism": idle(whole(1), NO_SWAPPER),
    "aio.thread_count": idle(whole(1), "the old name of intra_op_parallelism"),
    "aio.single_submit": idle(FLAG, NO_SWAPPER),
    "aio.overlap_events": idle(FLAG, NO_SWAPPER),
    "aio.use_gds": refused(f"remove the key; {NO_SWAPPER}"),
    "checkpoint": ours(OBJECT, NO_CHECKPOINTS),
    "checkpoint.tag_validation": idle(choice("warn", "ignore", "fail"), NO_CHECKPOINTS),
    "checkpoint.checkpoint_serialization": idle(FLAG, NO_CHECKPOINTS),
    "checkpoint.load_universal": refused(f"remove the key; {NO_CHECKPOINTS}, at any stage and number of ranks"),
    "checkpoint.use_node_local_storage": refused(f"remove the key; {NO_CHECKPOINTS}"),
    "checkpoint.parallel_write": refused(f"remove the key; {NO_CHECKPOINTS}", inside="pipeline_stage"),
    "checkpoint.writer": refused(
        f"remove the key; {NO_CHECKPOINTS}",
        inside="type io_buffer_size io_buffer_double show_statistics data_parallel decoupled io_multiplier",
    ),
    "datastates_ckpt": refused("remove the section; checkpoints are bigmodel's own"),
    "compile": refused(
        "remove the section; DeepCompile is not offered: set training.compile in the run file",
        enabled_by("deepcompile", False),
        "deepcompile autoep_non_moe free_activation free_activation_threshold offload_activation "
        "offload_activation_pin_memory offload_opt_states double_buffer symmetric_memory debug_log "
        "offload_parameters sync_before_reduce sync_after_reduce sync_before_allgather sync_after_allgather "
        "keep_int_input_tensors keep_all_input_tensors passes",
    ),
    "autotuning": refused(
        "set enabled = false; the number of packed sequences at once is yours to choose: `bigmodel show memory`",
        enabled_by("enabled", False),
        "enabled fast results_dir exps_dir overwrite start_profile_step end_profile_step metric metric_path tuner_type "
        "tuner_early_stopping tuner_num_trials arg_mappings model_info model_info.profile model_info.num_params "
        "model_info.hidden_size model_info.num_layers model_info_path mp_size max_train_batch_size "
        "min_train_batch_size max_train_micro_batch_size_per_gpu min_train_micro_batch_size_per_gpu "
        "num_tuning_micro_batch_sizes",
    ),
    "data_efficiency": refused(
        "set enabled = false; data is read and ordered by [data] of the run file, which has a curriculum",
        enabled_by("enabled", False),
        "enabled seed data_sampling data_sampling.enabled data_sampling.num_epochs data_sampling.num_workers "
        "data_sampling.pin_memory data_sampling.curriculum_learning data_sampling.curriculum_learning.enabled "
        "data_sampling.dynamic_batching data_sampling.dynamic_batching.enabled "
        "data_sampling.dynamic_batching.lr_scaling_method data_sampling.dynamic_batching.max_batch_size "
        "data_sampling.dynamic_batching.min_batch_size data_sampling.dynamic_batching.sequence_picking_order "
        "data_sampling.dynamic_batching.verbose data_routing data_routing.enabled data_routing.random_ltd "
        "data_routing.random_ltd.enabled",
    ),
    "hybrid_engine": refused(
        "set enabled = false; it serves reinforcement learning",
        enabled_by("enabled", False),
        "enabled max_out_tokens inference_tp_size release_inference_cache pin_parameters tp_gather_partition_size "
        "enable_cuda_graph",
    ),
    "pipeline": refused(
        "remove the section; pipeline parallelism is not offered: use ZeRO stage 3",
        enabled_by("stages", 1),
        "stages partition seed_layers activation_checkpoint_interval pipe_partitioned grad_partitioned",
    ),
    "tensor_parallel": refused(
        "remove the section; training.tensor_parallel_ranks in the run file has its place",
        enabled_by("autotp_size", 0, 1),
        "dtype autotp_size tp_overlap_comm vocab_parallel_lm_head vocab_parallel_ce_backend "
        "tp tp.tp_size tp.tp_grain_size tp.mpu tp.tp_group tensor_parallel tensor_parallel.tp_size "
        "tensor_parallel.tp_grain_size tensor_parallel.mpu tensor_parallel.tp_group injection_policy_tuple "
        "partition_config preset_model keep_module_on_host replace_with_kernel_inject kernel_inject",
    ),
    "expert_parallel": refused(
        "set enabled = false; [model.experts] and training.expert_parallel_ranks in the run file have their place",
        enabled_by("enabled", False),
        "enabled autoep_size expert_tensor_parallel_size validate_folding_routing async_split_plan preset_model "
        "moe_layer_pattern expert_pattern router_pattern use_grouped_mm disable_triton_grouped_mm route_norm "
        "route_scale score_apply combine_impl row_weighting_impl gate_up_impl comm_backend comm_num_sm comm_qp_margin "
        "comm_max_tokens_per_rank num_expert_groups num_limited_groups score_func top_k load_balance_coeff "
        "routed_scaling_factor expert_w1 expert_w2 expert_w3 num_experts_attr top_k_attr has_shared_experts "
        "shared_experts_pattern shared_experts_gate_pattern expert_activation",
    ),
    "weight_quantization": refused(
        "remove the section; it serves inference",
        unless_disabled,
        "enabled num_bits q_type q_groups quantized_initialization post_init_quant",
    ),
}

# DeepSpeed refuses these keys itself since 0.19.7 or 0.19.8, even where they are off.
_GONE = {
    "elasticity": "remove the section; set training.global_batch_size: a run resumes at any world size",
    "nebula": "remove the section; checkpoints are bigmodel's own",
    "compression_training": "remove the section",
    "amp": 'remove the section; use training.precision = "bf16"',
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
REMOVED = {
    path: refused(f"removed from DeepSpeed (gone in {VERSION}); {remedy}",
                  only(-1, False) if path.endswith("mics_shard_size") else None)
    for path, remedy in _GONE.items()
}  # fmt: skip


def _below(section: str, keys: dict[str, Key]) -> dict[str, Key]:
    return {f"{section}.{name}" if name else section: key for name, key in keys.items()}


KEYS: dict[str, Key] = {
    **TOP_LEVEL,
    **_below("zero_optimization", ZERO),
    **_below("activation_checkpointing", ACTIVATIONS),
    **MONITORS,
    **PROFILING,
    **OFF_ONLY,
    **REMOVED,
}
