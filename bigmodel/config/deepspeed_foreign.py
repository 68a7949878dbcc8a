"""Keys of GPT-NeoX and Megatron in a DeepSpeed JSON: which setting has this meaning here, or why nothing has.

GPT-NeoX writes hyphens or underscores; both are found. Imports neither torch nor deepspeed.

    answer("pipe-parallel-size")    # "remove it: pipeline parallelism is not offered, ..."
    answer("num_layers")            # "set model.num_layers in the run file"
"""

_PIPELINE = "remove it: pipeline parallelism is not offered, ZeRO stage 3 splits large models"
_TENSOR = "remove it: tensor parallelism is not offered, ZeRO stage 3 splits large models"
_EXPERTS = "remove it: mixture of experts is not offered"
_DATA = "`bigmodel prepare` reads text and makes shards: set prepare.sources and data.directory in the run file"

# Key with underscores -> setting of the run file that has its meaning.
SETTINGS = {
    "activation": "model.activation",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.epsilon",
    "attention_dropout": "model.dropout",
    "checkpoint_activations": "training.activation_checkpointing",
    "checkpoint_factor": "checkpoint.every_steps",
    "checkpoint_num_layers": "training.activation_checkpointing",
    "clip_grad": "optimizer.gradient_clipping",
    "context_parallel_size": "training.sequence_parallel_ranks",
    "data_impl": "data.directory",
    "eval_interval": "evaluation.every_steps",
    "eval_iters": "evaluation.sequences",
    "ffn_hidden_size": "model.intermediate_size",
    "global_batch_size": "training.global_batch_size",
    "hidden_dropout": "model.dropout",
    "hidden_size": "model.hidden_size",
    "intermediate_size": "model.intermediate_size",
    "keep_last_n_checkpoints": "checkpoint.keep",
    "layernorm_epsilon": "model.norm_epsilon",
    "load": "run.directory",
    "lr": "optimizer.learning_rate",
    "lr_decay_iters": "schedule.decay_steps",
    "lr_decay_style": "schedule.kind",
    "lr_warmup_fraction": "schedule.warmup_steps",
    "lr_warmup_iters": "schedule.warmup_steps",
    "max_position_embeddings": "data.max_document_length",
    "min_lr": "schedule.final_ratio",
    "no_weight_tying": "model.tied_embeddings",
    "num_attention_heads": "model.num_heads",
    "num_kv_heads": "model.num_kv_heads",
    "num_workers": "data.workers",
    "num_layers": "model.num_layers",
    "num_query_groups": "model.num_kv_heads",
    "pos_emb": "model.position_embedding",
    "position_embedding_type": "model.position_embedding",
    "precision": "training.precision",
    "recompute_granularity": "training.activation_checkpointing",
    "rms_norm_epsilon": "model.norm_epsilon",
    "rotary_base": "model.rope_theta",
    "rotary_emb_base": "model.rope_theta",
    "rotary_pct": "model.rotary_fraction",
    "rotary_percent": "model.rotary_fraction",
    "save": "run.directory",
    "save_interval": "checkpoint.every_steps",
    "seed": "run.seed",
    "seq_length": "data.sequence_length",
    "tensorboard_dir": "metrics.writers",
    "tokenizer_model": "prepare.tokenizer",
    "tokenizer_type": "prepare.tokenizer",
    "train_iters": "training.steps",
    "train_samples": "training.steps",
    "use_wandb": "metrics.writers",
    "vocab_file": "prepare.tokenizer",
    "vocab_size": "prepare.tokenizer",
    "merge_file": "prepare.tokenizer",
    "wandb_group": "metrics.group",
    "wandb_project": "metrics.project",
    "wandb_team": "metrics.team",
    "warmup": "schedule.warmup_steps",
    "weight_decay": "optimizer.weight_decay",
    "window_size": "model.sliding_window",
}

# Key with underscores -> why it is not offered, or who decides it here.
REASONS = {
    "attention_config": "model.sliding_window in the run file gives local attention; sparse patterns are not offered",
    "bias_gelu_fusion": "kernels are chosen by the device; remove the key",
    "data_path": _DATA,
    "deepspeed_mpi": "remove the key; `bigmodel launch` starts the ranks, and ranks of mpirun are recognized",
    "distributed_backend": "remove the key; NCCL serves GPUs, gloo CPUs",
    "expert_model_parallel_size": _EXPERTS,
    "expert_parallel_size": _EXPERTS,
    "fp32_allreduce": 'remove the key; sums over ranks are in fp32 (communication_data_type = "fp32")',
    "gas": 'write "gradient_accumulation_steps", or training.global_batch_size in the run file',
    "hostfile": "remove the key; hosts stand in the cluster file of `bigmodel launch`",
    "init_method": "remove the key; bigmodel/model/init.py has the table of initial weights",
    "launcher": "remove the key; `bigmodel launch` starts the ranks",
    "log_interval": "remove the key; every step is recorded",
    "make_vocab_size_divisible_by": "remove the key; the tokenizer gives the number of tokens",
    "master_addr": "remove the key; the launcher sets the address",
    "master_port": "remove the key; the launcher sets the port",
    "micro_batch_size": 'write "train_micro_batch_size_per_gpu"',
    "model_parallel_size": _TENSOR,
    "moe_expert_parallel_size": _EXPERTS,
    "moe_num_experts": _EXPERTS,
    "num_experts": _EXPERTS,
    "norm": "remove the key; all norms are RMSNorm",
    "num_layers_per_virtual_pipeline_stage": _PIPELINE,
    "partition_activations": "remove the key; set training.activation_checkpointing in the run file",
    "pipe_parallel_size": _PIPELINE,
    "pipe_partition_method": _PIPELINE,
    "pipeline_model_parallel_size": _PIPELINE,
    "scaled_masked_softmax_fusion": "kernels are chosen by the device; remove the key",
    "scaled_upper_triang_masked_softmax_fusion": "kernels are chosen by the device; remove the key",
    "sequence_parallel": "tensor parallelism, to which it belongs, is not offered; "
    "training.sequence_parallel_ranks shares long documents",
    "split": "set prepare.validation_share in the run file",
    "synchronize_each_layer": "remove the key; recomputation does not wait between layers",
    "tensor_model_parallel_size": _TENSOR,
    "test_data_paths": _DATA,
    "train_data_paths": _DATA,
    "valid_data_paths": _DATA,
    "use_flash_attn": "kernels are chosen by the device; remove the key",
}

# Keys inside sections of DeepSpeed.
INSIDE = {
    "fp16.fp16": "remove it; fp16.enabled says the same",
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
