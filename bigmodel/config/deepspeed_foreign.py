"""Keys of GPT-NeoX and Megatron in a DeepSpeed JSON: which setting has this meaning here, or why nothing has.

GPT-NeoX writes hyphens or underscores; both are found. Imports neither torch nor deepspeed.

    answer("pipe-parallel-size")    # "remove it: pipeline parallelism is not offered, ..."
    answer("num_layers")            # "set model.num_layers in the run file"
"""

_PIPELINE = "remove it: pipeline parallelism is not offered, ZeRO stage 3 splits large models"
_EXPERTS = "remove it: [model.experts] in the run file makes a mixture of experts"
_LOSS_SCALE = 'write it inside "fp16"'
_OWN_DOCUMENTS = "remove the key; documents of a pack never see each other, and each has its own positions"
_NO_PIPELINE = "remove the key; there is no pipeline parallelism"
_GOES_ON = "remove the key; a resumed run continues its schedule"
_HOSTS = "remove the key; hosts stand in the cluster file of `bigmodel launch`"
_KERNELS = "kernels are chosen by the device; remove the key"
_INITIAL = "remove the key; bigmodel/model/init.py has the table of initial weights"
_THIS_FILE = "remove the key; training.deepspeed in the run file names this file"
_DATA = "`bigmodel prepare` reads text and makes shards: set prepare.sources and data.directory in the run file"

# Key with underscores -> setting of the run file that has its meaning (and how its value differs).
SETTINGS = {
    "activation": "model.activation",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.epsilon",
    "attention_dropout": "model.attention_dropout",
    "checkpoint_activations": "training.activation_checkpointing",
    "checkpoint_factor": "checkpoint.every_steps",
    "checkpoint_num_layers": "training.activation_checkpointing",
    "clip_grad": "optimizer.gradient_clipping",
    "context_parallel_size": "training.sequence_parallel_ranks",
    "deepspeed_activation_checkpointing": "training.activation_checkpointing",
    "disable_bias_linear": "model.attention_bias and model.feed_forward_bias (the opposite)",
    "ds_sequence_parallel_size": "training.sequence_parallel_ranks",
    "eval_interval": "evaluation.every_steps",
    "eval_iters": "evaluation.sequences",
    "expert_model_parallel_size": "training.expert_parallel_ranks",
    "expert_parallel_size": "training.expert_parallel_ranks",
    "ffn_hidden_size": "model.intermediate_size",
    "global_batch_size": "training.global_batch_size",
    "group_query_attention": "model.num_kv_heads",
    "hidden_dropout": "model.dropout",
    "hidden_size": "model.hidden_size",
    "intermediate_size": "model.intermediate_size",
    "keep_last_n_checkpoints": "checkpoint.keep",
    "kv_channels": "model.head_dim",
    "layernorm_epsilon": "model.norm_epsilon",
    "load": "run.directory",
    "log_dir": "run.directory",
    "lr": "optimizer.learning_rate",
    "lr_decay_iters": "schedule.decay_steps",
    "lr_decay_samples": "schedule.decay_steps (samples divided by training.global_batch_size)",
    "lr_decay_style": "schedule.kind",
    "lr_warmup_fraction": "schedule.warmup_steps (in steps)",
    "lr_warmup_iters": "schedule.warmup_steps",
    "lr_warmup_samples": "schedule.warmup_steps (samples divided by training.global_batch_size)",
    "make_vocab_size_divisible_by": "model.vocabulary_multiple",
    "max_position_embeddings": "data.max_document_length",
    "merge_file": "prepare.tokenizer",
    "min_lr": "schedule.final_ratio (min_lr divided by the highest rate)",
    "mixed_precision": "training.precision",
    "mlp_type": "model.activation",
    "model_parallel_size": "training.tensor_parallel_ranks",
    "moe_expert_parallel_size": "training.expert_parallel_ranks",
    "no_weight_tying": "model.tied_embeddings (the opposite)",
    "norm": "model.norm",
    "normalization": "model.norm",
    "num_attention_heads": "model.num_heads",
    "num_kv_heads": "model.num_kv_heads",
    "num_layers": "model.num_layers",
    "num_query_groups": "model.num_kv_heads",
    "num_workers": "data.workers",
    "pos_emb": "model.position_embedding",
    "position_embedding_type": "model.position_embedding",
    "precision": "training.precision",
    "rampup_batch_size": "training.batch_ramp",
    "recompute_granularity": "training.activation_checkpointing",
    "rms_norm_epsilon": "model.norm_epsilon",
    "rotary_base": "model.rope_theta",
    "rotary_emb_base": "model.rope_theta",
    "rotary_pct": "model.rotary_fraction",
    "rotary_percent": "model.rotary_fraction",
    "s3_path": "checkpoint.remote",
    "save": "run.directory",
    "save_interval": "checkpoint.every_steps",
    "seed": "run.seed",
    "seq_length": "data.sequence_length",
    "swiglu": "model.activation",
    "tensor_model_parallel_size": "training.tensor_parallel_ranks",
    "tensorboard_dir": "metrics.writers",
    "tokenizer_model": "prepare.tokenizer",
    "tokenizer_type": "prepare.tokenizer",
    "train_data_weights": "data.mix",
    "train_iters": "training.steps",
    "train_samples": "training.steps (samples divided by training.global_batch_size)",
    "untie_embeddings_and_output_weights": "model.tied_embeddings (the opposite)",
    "use_bias_in_attn_linear": "model.attention_bias",
    "use_bias_in_norms": "model.norm_bias",
    "use_rotary_position_embeddings": "model.position_embedding",
    "use_wandb": "metrics.writers",
    "vocab_file": "prepare.tokenizer",
    "vocab_size": "prepare.tokenizer",
    "wandb_group": "metrics.group",
    "wandb_project": "metrics.project",
    "wandb_team": "metrics.team",
    "warmup": "schedule.warmup_steps",
    "weight_decay": "optimizer.weight_decay",
    "window_size": "model.sliding_window",
}

# Key with underscores -> why it is not offered, or who decides it here.
REASONS = {
    "attention_backend": _KERNELS,
    "attention_config": "model.sliding_window in the run file gives local attention; sparse patterns are not offered",
    "batch_size": 'write "train_micro_batch_size_per_gpu"',
    "bias_gelu_fusion": _KERNELS,
    "create_moe_param_group": _EXPERTS,
    "curriculum_learning_legacy": "remove the section; data.curriculum in the run file orders the sources",
    "data_impl": _DATA,
    "data_path": _DATA,
    "dataset_impl": _DATA,
    "deepspeed": _THIS_FILE,
    "deepspeed_config": _THIS_FILE,
    "deepspeed_mpi": "remove the key; `bigmodel launch` starts the ranks, and ranks of mpirun are recognized",
    "distributed_backend": "remove the key; NCCL serves GPUs, gloo CPUs",
    "dynamic_loss_scale": _LOSS_SCALE,
    "eod_mask_loss": _OWN_DOCUMENTS,
    "exclude": _HOSTS,
    "fp32_allreduce": 'remove the key; sums over ranks are in fp32 (communication_data_type = "fp32")',
    "gas": 'write "gradient_accumulation_steps", or training.global_batch_size in the run file',
    "gpt_j_residual": "remove the key; feed-forward and attention one after the other is the only form",
    "hostfile": _HOSTS,
    "hysteresis": _LOSS_SCALE,
    "include": _HOSTS,
    "init_method": _INITIAL,
    "init_method_std": _INITIAL,
    "initial_loss_scale": _LOSS_SCALE,
    "is_pipe_parallel": _PIPELINE,
    "launcher": "remove the key; `bigmodel launch` starts the ranks",
    "log_interval": "remove the key; every step is recorded",
    "loss_scale": _LOSS_SCALE,
    "loss_scale_window": _LOSS_SCALE,
    "master_addr": "remove the key; the launcher sets the address",
    "master_port": "remove the key; the launcher sets the port",
    "micro_batch_size": 'write "train_micro_batch_size_per_gpu"',
    "min_loss_scale": _LOSS_SCALE,
    "moe": _EXPERTS,
    "moe_expert_capacity": "remove it: model.experts.capacity_factor in the run file, within each document",
    "moe_num_experts": _EXPERTS,
    "no_pipeline_parallel": _NO_PIPELINE,
    "num_experts": _EXPERTS,
    "num_layers_per_virtual_pipeline_stage": _PIPELINE,
    "optimizer_type": 'write "optimizer": {"type": ...}',
    "output_layer_init_method": _INITIAL,
    "output_layer_parallelism": "remove it: training.tensor_parallel_ranks share the output matrix by its rows",
    "overlap_grad_reduce": 'write "overlap_comm" inside "zero_optimization"',
    "override_lr_scheduler": _GOES_ON,
    "partition_activations": "remove the key; set training.activation_checkpointing in the run file",
    "pipe_merge": _PIPELINE,
    "pipe_parallel_size": _PIPELINE,
    "pipe_partition_method": _PIPELINE,
    "pipeline_model_parallel_size": _PIPELINE,
    "reset_attention_mask": _OWN_DOCUMENTS,
    "reset_position_ids": _OWN_DOCUMENTS,
    "scaled_masked_softmax_fusion": _KERNELS,
    "scaled_upper_triang_masked_softmax_fusion": _KERNELS,
    "sequence_parallel": "remove the key; training.tensor_parallel_ranks share the positions between layers always",
    "split": "set prepare.validation_share in the run file",
    "synchronize_each_layer": "remove the key; recomputation does not wait between layers",
    "test_data_paths": _DATA,
    "train_data_paths": _DATA,
    "tutel": _EXPERTS,
    "use_checkpoint_lr_scheduler": _GOES_ON,
    "use_distributed_optimizer": 'write "zero_optimization": {"stage": 1}',
    "use_flash_attn": _KERNELS,
    "valid_data_paths": _DATA,
    "valid_data_weights": _DATA,
    "zero_stage": 'write "zero_optimization": {"stage": ...}',
}

# Keys inside sections of DeepSpeed.
INSIDE = {
    "fp16.fp16": "remove it; fp16.enabled says the same",
    "bf16.bf16": "remove it; bf16.enabled says the same",
    "fp16.type": 'write "bf16": {"enabled": true} instead of a type inside fp16',
    "bf16.type": 'write "bf16": {"enabled": true}',
    "optimizer.lr": 'write it inside "params", or set optimizer.learning_rate in the run file',
}


def answer(path: str) -> str:
    """What a key of GPT-NeoX or Megatron means here; empty for another key."""
    if path in INSIDE:
        return INSIDE[path]
    name = path.replace("-", "_")
    if name in SETTINGS:
        return f"set {SETTINGS[name]} in the run file"
    return REASONS.get(name, "")
