"""Published throughput of training steps, for `tools.bench_plan`: figures of others, as they stand in their tables.

llm-foundry (MosaicML), scripts/train/benchmarking/README.md, commit 061f2c7: MPT models, FSDP FULL_SHARD, bf16, on
nodes of 8 GPUs; A100 80 GB with 1,600 Gb/s between nodes. torchtitan, benchmarks/llama3_h100_202412_torchtitan.md,
commit 31a17bf: Llama 3.1 8B, FSDP, torch.compile, H100 of 96 GB HBM2e limited to 500 W.

Left out: runs with tensor or pipeline parallelism (Llama 3 70B and 405B, Megatron-LM, nanotron), which this system does
not have, and fp8.
"""

from typing import Any, NamedTuple

import numpy as np

from bigmodel.config.settings import Settings
from bigmodel.launcher.cluster import Cluster
from bigmodel.planning.context import Context
from bigmodel.planning.hardware import hardware_of
from bigmodel.planning.pack_work import work_of_documents
from bigmodel.planning.step_demand import step_demand
from bigmodel.planning.step_time import Rates, seconds_by_phase

NETWORKS = {"H100 SXM": "InfiniBand NDR", "A100 80GB": "RoCE 200", "A100 40GB": "RoCE 200"}
ATTENTION_OF_2023 = {"H100 SXM": 0.18, "A100 80GB": 0.35, "A100 40GB": 0.35}  # share of the peak; fitted
GPUS_PER_NODE = 8


class Shape(NamedTuple):
    hidden_size: int
    num_layers: int
    num_heads: int


class Published(NamedTuple):
    """`fitted`: the rates were chosen on this row; the others are predictions."""

    model: str
    gpu: str
    gpus: int
    sequence_length: int
    micro_batch: int
    accumulation: int
    recomputes: bool
    tokens_per_second_per_gpu: int
    fitted: bool = False
    sums: str = "fp32"  # data type in which gradients are summed over ranks
    memory_gigabytes_per_second: float = 0  # 0: of the data sheet


MPT = {
    "125m": Shape(768, 12, 12),
    "350m": Shape(1024, 24, 16),
    "760m": Shape(1536, 24, 12),
    "1b": Shape(2048, 24, 16),
    "3b": Shape(2560, 32, 20),
    "7b": Shape(4096, 32, 32),
    "13b": Shape(5120, 40, 40),
    "30b": Shape(7168, 48, 56),
    "70b": Shape(8192, 80, 64),
}
MPT_VOCABULARY, LLAMA_VOCABULARY = 50368, 128256
LLAMA_8B = "llama 3 8b"
ROWS = [
    Published("1b", "H100 SXM", 8, 2048, 14, 1, False, 45455, True),
    Published("3b", "H100 SXM", 8, 4096, 5, 6, False, 20964, True),
    Published("7b", "H100 SXM", 8, 2048, 6, 1, False, 10643, True),
    Published("13b", "H100 SXM", 8, 2048, 2, 1, False, 4792, True),
    Published("30b", "H100 SXM", 8, 2048, 3, 21, True, 2002, True),
    Published("760m", "A100 80GB", 8, 2048, 24, 2, False, 32434, True),
    Published("1b", "A100 80GB", 8, 2048, 14, 4, False, 20513, True),
    Published("3b", "A100 80GB", 8, 2048, 10, 2, False, 10811, True),
    Published("7b", "A100 80GB", 8, 2048, 6, 2, False, 4641, True),
    Published("13b", "A100 80GB", 8, 4096, 10, 3, True, 2060, True),
    Published("760m", "H100 SXM", 8, 2048, 24, 2, False, 63147),
    Published("760m", "H100 SXM", 32, 2048, 24, 1, False, 67971),
    Published("1b", "H100 SXM", 64, 2048, 20, 1, False, 44402),
    Published("1b", "H100 SXM", 8, 8192, 3, 4, False, 29157, True),
    Published("3b", "H100 SXM", 64, 2048, 6, 3, False, 22525),
    Published("3b", "H100 SXM", 8, 16384, 1, 6, False, 11152),
    Published("7b", "H100 SXM", 8, 8192, 8, 2, True, 6935),
    Published("7b", "H100 SXM", 8, 32768, 2, 2, True, 3318, True),
    Published("13b", "H100 SXM", 64, 2048, 2, 1, False, 4800),
    Published("30b", "H100 SXM", 32, 2048, 14, 3, True, 2308),
    Published("70b", "H100 SXM", 32, 2048, 2, 16, True, 882),
    Published("70b", "H100 SXM", 64, 2048, 8, 4, True, 1039),
    Published("125m", "A100 80GB", 8, 2048, 32, 2, False, 141737),
    Published("350m", "A100 80GB", 8, 2048, 32, 2, False, 58782),
    Published("1b", "A100 80GB", 8, 16384, 2, 4, False, 9956, True),
    Published("7b", "A100 80GB", 8, 8192, 8, 2, True, 3206),
    Published("7b", "A100 80GB", 8, 32768, 2, 2, True, 1672, True),
    Published("30b", "A100 80GB", 8, 2048, 3, 21, True, 916),
    Published("70b", "A100 80GB", 64, 2048, 8, 4, True, 410),
    Published("3b", "A100 40GB", 128, 2048, 6, 1, False, 9538, sums="bf16"),
    Published("7b", "A100 40GB", 8, 2048, 12, 4, True, 3679, sums="bf16"),
    Published("7b", "A100 40GB", 128, 2048, 18, 1, True, 3623, sums="bf16"),
    Published("13b", "A100 40GB", 128, 2048, 16, 1, True, 1972, sums="bf16"),
    Published("30b", "A100 40GB", 128, 2048, 6, 1, True, 865, sums="bf16"),
    Published(LLAMA_8B, "H100 SXM", 8, 8192, 2, 1, False, 6667, memory_gigabytes_per_second=2400),
    Published(LLAMA_8B, "H100 SXM", 128, 8192, 2, 1, False, 6514, memory_gigabytes_per_second=2400),
]


def predicted(row: Published) -> float:
    """Tokens per second and GPU."""
    figures = {"memory_gigabytes_per_second": row.memory_gigabytes_per_second}
    hardware = {"gpu": row.gpu, "network": NETWORKS[row.gpu], **figures}
    table = {"nodes": row.gpus // GPUS_PER_NODE, "gpus_per_node": GPUS_PER_NODE, "hardware": hardware}
    cluster, settings = Cluster.model_validate(table), settings_of(row)
    context = Context(settings, effective_of(row), vocabulary_of(row), cluster, row.gpus, None)
    demand = step_demand(context, of_pack=work_of_documents(settings, np.array([float(row.sequence_length)])))
    rates = Rates() if row.model == LLAMA_8B else Rates(attention=ATTENTION_OF_2023[row.gpu])
    phases = seconds_by_phase(context, demand, hardware_of(cluster.hardware, cluster.nodes, GPUS_PER_NODE), rates)
    return demand.tokens / row.gpus / sum(phases.values())


def vocabulary_of(row: Published) -> int:
    return LLAMA_VOCABULARY if row.model == LLAMA_8B else MPT_VOCABULARY


def settings_of(row: Published) -> Settings:
    """The run as one of ours: a packed sequence is one document."""
    training = {
        "global_batch_size": row.micro_batch * row.accumulation * row.gpus,
        "activation_checkpointing": "full" if row.recomputes else "none",
    }
    if row.model in MPT:
        model = _mpt(MPT[row.model], row.sequence_length)
    else:
        model = {"num_layers": 32, "hidden_size": 4096, "num_heads": 32, "num_kv_heads": 8, "intermediate_size": 14336}
        training["activation_checkpointing"] = "selective"
    data = {"sequence_length": row.sequence_length, "max_document_length": row.sequence_length}
    return Settings.model_validate({"model": model, "data": data, "training": training})


def effective_of(row: Published) -> dict[str, Any]:
    """FSDP FULL_SHARD in DeepSpeed's words: ZeRO 3 that frees each block after its forward, and overlaps."""
    zero = {"stage": 3, "overlap_comm": True, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    return {
        "train_micro_batch_size_per_gpu": row.micro_batch,
        "gradient_accumulation_steps": row.accumulation,
        "communication_data_type": row.sums,
        "zero_optimization": zero,
    }


def _mpt(shape: Shape, positions: int) -> dict[str, Any]:
    return shape._asdict() | {
        "num_kv_heads": shape.num_heads,
        "intermediate_size": 4 * shape.hidden_size,
        "gated": False,
        "activation": "gelu",
        "norm": "layer",
        "norm_bias": False,
        "position_embedding": "learned",
        "max_positions": positions,
        "tied_embeddings": True,
    }
