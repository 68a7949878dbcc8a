"""DeepSpeed files as the documentation of Hugging Face, DeepSpeed, GPT-NeoX and Megatron-DeepSpeed shows them: each is
accepted, or everything that hinders is told at once.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.settings import Settings, UserError

AUTO_ADAMW = {
    "type": "AdamW",
    "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
}
AUTO_WARMUP = {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
}
AUTO_DECAY = {"type": "WarmupDecayLR", "params": {**AUTO_WARMUP["params"], "total_num_steps": "auto"}}  # type: ignore[dict-item]
FP16 = {
    "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1
}  # fmt: skip
AUTO_SIZES = {
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
BUCKETS = {
    "allgather_partitions": True,
    "allgather_bucket_size": 2e8,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 2e8,
    "contiguous_gradients": True,
}
CPU = {"device": "cpu", "pin_memory": True}
AUTO_STAGE3 = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
HUGGING_FACE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "ZeRO-2 with CPU offload": (
        {"fp16": {"enabled": "auto", **FP16}, "optimizer": AUTO_ADAMW, "scheduler": AUTO_WARMUP}
        | {"zero_optimization": {"stage": 2, "offload_optimizer": CPU, **BUCKETS}, **AUTO_SIZES},
        [],
    ),
    "ZeRO-2 without a scheduler": (
        {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", **FP16}, "optimizer": AUTO_ADAMW}
        | {"zero_optimization": {"stage": 2, **BUCKETS}, **AUTO_SIZES},
        [],
    ),
    "ZeRO-3 with CPU offload": (
        {"fp16": {"enabled": "auto", **FP16}, "bf16": {"enabled": "auto"}, "optimizer": AUTO_ADAMW}
        | {"scheduler": AUTO_DECAY, "amp": {"enabled": "auto", "opt_level": "auto"}, **AUTO_SIZES}
        | {"zero_optimization": {**AUTO_STAGE3, "offload_optimizer": CPU, "offload_param": CPU}},
        [],
    ),
    "ZeRO-3 on NVMe": (
        {"bf16": {"enabled": True}, "zero_optimization": {
            **AUTO_STAGE3,
            "offload_optimizer": {
                "device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True, "buffer_count": 4,
                "fast_init": False,
            },
            "offload_param": {
                "device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True, "buffer_count": 5,
                "buffer_size": 1e8, "max_in_cpu": 1e9,
            },
        }, "aio": {
            "block_size": 262144, "queue_depth": 32, "thread_count": 1, "single_submit": False,
            "overlap_events": True,
        }, **AUTO_SIZES},
        ["zero_optimization.offload_param.device"],
    ),
    "ZeRO-0 with fp16": ({"fp16": {"enabled": True, **FP16}, "zero_optimization": {"stage": 0}},
                         ["zero_optimization.stage"]),
    "activation checkpointing": (
        {"activation_checkpointing": {
            "partition_activations": False, "cpu_checkpointing": False, "contiguous_memory_optimization": False,
            "number_checkpoints": None, "synchronize_checkpoint_boundary": False, "profile": False,
        }, "zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True,
         "zero_force_ds_cpu_optimizer": False},
        [],
    ),
}  # fmt: skip
DEEPSPEED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "CIFAR-10": (
        {
            "train_batch_size": 16,
            "steps_per_print": 2000,
            "optimizer": {
                "type": "Adam", "params": {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}
            },
            "scheduler": {
                "type": "WarmupLR",
                "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 100},
            },
            "gradient_clipping": 1.0,
            "prescale_gradients": False,
            "bf16": {"enabled": False},
            "fp16": {"enabled": True, "fp16_master_weights_and_grads": False, **FP16},
            "wall_clock_breakdown": False,
            "zero_optimization": {"stage": 1, **BUCKETS, "cpu_offload": False},
        },
        [],
    ),
    "BERT": (
        {
            "train_batch_size": 64,
            "train_micro_batch_size_per_gpu": 64,
            "steps_per_print": 100,
            "prescale_gradients": True,
            "gradient_predivide_factor": 8,
            "gradient_clipping": 1.0,
            "wall_clock_breakdown": False,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 2},
            "sparse_attention": {"mode": "fixed", "block": 16, "num_local_blocks": 4},
        },
        ["sparse_attention", "prescale_gradients or gradient_predivide_factor with zero_optimization.stage"],
    ),
    "1-bit Adam": (
        {
            "train_batch_size": 8,
            "fp16": {"enabled": True, **FP16},
            "optimizer": {
                "type": "OneBitAdam",
                "params": {"lr": 4e-4, "freeze_step": 400, "cuda_aware": False, "comm_backend_name": "nccl"},
            },
            "elasticity": {"enabled": True, "max_train_batch_size": 2000, "micro_batch_sizes": [2, 4]},
        },
        ["elasticity", "optimizer.type"],
    ),
    "ZeRO-3 offload": (
        {"zero_optimization": {
            "stage": 3, "contiguous_gradients": True, "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9, "stage3_prefetch_bucket_size": 1e7,
            "stage3_param_persistence_threshold": 1e5, "reduce_bucket_size": 1e7, "sub_group_size": 1e9,
            "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"},
        }},
        [],
    ),
    "ZeRO++": (
        {"zero_optimization": {
            "stage": 3, "reduce_bucket_size": 10000000, "reduce_scatter": True, "zero_quantized_weights": True,
            "zero_hpz_partition_size": 16, "zero_quantized_gradients": True, "contiguous_gradients": True,
            "overlap_comm": True,
        }},
        [],
    ),
    "flops profiler": (
        {"flops_profiler": {
            "enabled": True, "profile_step": 1, "module_depth": -1, "top_modules": 1, "detailed": True,
            "output_file": None,
        }},
        ["flops_profiler"],
    ),
    "monitors": (
        {"tensorboard": {"enabled": True, "output_path": "output/ds_logs/", "job_name": "train_bert"},
         "wandb": {"enabled": True, "team": "my_team", "group": "my_group", "project": "my_project"},
         "comet": {"enabled": True, "workspace": "my_team", "project": "my_project", "samples_log_interval": 50,
                   "experiment_name": "first"},
         "csv_monitor": {"enabled": True, "output_path": "output/ds_logs/", "job_name": "train_bert"}},
        [],
    ),
    "communication logging": (
        {"comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False}}, []
    ),
    "data efficiency, autotuning": (
        {"data_efficiency": {
            "enabled": True, "seed": 1234,
            "data_routing": {"enabled": True, "random_ltd": {"enabled": True, "total_layer_num": 24}},
        }, "autotuning": {"enabled": True, "fast": False}, "communication_data_type": "fp64",
         "gradient_clipping": None},
        ["data_efficiency", "autotuning", "communication_data_type", "gradient_clipping"],
    ),
    "compression, curriculum": (
        {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}},
         "curriculum_learning": {"enabled": True, "curriculum_type": "seqlen", "min_difficulty": 8}},
        ["compression_training", "curriculum_learning"],
    ),
}  # fmt: skip
OTHERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "GPT-NeoX": (
        {
            "pipe-parallel-size": 1, "model-parallel-size": 1, "num-layers": 12, "hidden-size": 768,
            "num-attention-heads": 12, "seq-length": 2048, "max-position-embeddings": 2048, "pos-emb": "rotary",
            "optimizer": {"type": "Adam", "params": {"lr": 0.0006, "betas": [0.9, 0.95], "eps": 1e-8}},
            "zero_optimization": {"stage": 1, **BUCKETS, "cpu_offload": False},
            "train_micro_batch_size_per_gpu": 4, "data-impl": "mmap", "checkpoint-activations": True,
            "gradient_clipping": 1.0, "weight-decay": 0.1, "hidden-dropout": 0,
            "fp16": {"fp16": True, "enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2},
            "train-iters": 320000, "lr-decay-style": "cosine", "warmup": 0.01, "steps_per_print": 10,
            "wall_clock_breakdown": True,
        },
        ["pipe-parallel-size", "model-parallel-size", "num-layers", "hidden-size", "num-attention-heads", "seq-length",
         "max-position-embeddings", "pos-emb", "data-impl", "checkpoint-activations", "weight-decay",
         "hidden-dropout", "fp16.fp16", "train-iters", "lr-decay-style", "warmup"],
    ),
    "Megatron-DeepSpeed": (
        {
            "train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "steps_per_print": 10,
            "zero_optimization": {"stage": 2, "cpu_offload": False}, "gradient_clipping": 1.0,
            "prescale_gradients": False, "zero_allow_untested_optimizer": True,
            "fp16": {"enabled": False, **FP16}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"},
            "wall_clock_breakdown": False,
        },
        [],
    ),
    "Megatron-DeepSpeed with parallelism": (
        {"train_batch_size": 16, "tensor_parallel": {"autotp_size": 2}, "pipeline": {"stages": 4},
         "sequence_parallel_size": 2, "tensor_model_parallel_size": 2, "checkpoint": {"load_universal": True}},
        ["tensor_parallel", "pipeline", "tensor_model_parallel_size", "checkpoint.load_universal",
         "training.sequence_parallel_ranks"],
    ),
}  # fmt: skip
EXAMPLES = HUGGING_FACE | DEEPSPEED | OTHERS


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_file_of_the_documentation_is_accepted_or_everything_that_hinders_is_told_at_once(
    tmp_path: Path, name: str
) -> None:
    config, hindrances = EXAMPLES[name]
    path = tmp_path / "example.json"
    path.write_text(json.dumps(config))
    settings = Settings.model_validate({"training": {"deepspeed": str(path)}, "data": {"lanes": 1}})
    if not hindrances:
        effective, _ = resolve_deepspeed(settings, 1)
        assert "auto" not in json.dumps(effective)
        return
    with pytest.raises(UserError) as caught:
        resolve_deepspeed(settings, 1)
    told = str(caught.value).removeprefix(f"{path}:").strip().splitlines()
    assert [line.split(" = ")[0].split(" is not")[0].strip() for line in told] == hindrances
