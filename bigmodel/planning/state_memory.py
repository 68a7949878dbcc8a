"""Bytes of weights, gradients, masters, moments and buffers on each rank, by ZeRO stage. Imports no torch.

In: the parameters of a model, settings, the effective DeepSpeed JSON, number of ranks. Out: bytes by part. Frozen
parameters (adapters, `training.freeze`) are weights only. Guarantee: within 1% of what engines of each stage hold, by a
test. Formulas: Rajbhandari et al. 2020 (ZeRO), plus our fp32 sums of gradients.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bigmodel.config.deepspeed_json import device_of
from bigmodel.config.settings import OptimizerSettings, Settings
from bigmodel.planning.parameters import Parameter, held_of
from bigmodel.training.optimizers.table import OPTIMIZERS

LOW, WIDE = 2, 4  # bytes of a bf16 or fp16, and of an fp32 number
# Defaults of DeepSpeed 0.19.8 for keys that are absent from the JSON, in elements.
DEFAULTS = {"reduce_bucket_size": 5e8, "stage3_max_live_parameters": 1e9, "stage3_prefetch_bucket_size": 5e7}


@dataclass(frozen=True)
class Plan:
    """Bytes of one rank by part: on its device, and offloaded to memory or files of its node."""

    device: dict[str, int]
    host: dict[str, int]


def state_plan(parameters: Sequence[Parameter], settings: Settings, effective: dict[str, Any], ranks: int) -> Plan:
    """Bytes of a rank between and during steps, without activations and a teacher."""
    zero = effective["zero_optimization"]
    everything, parameters = parameters, held_of(parameters, settings)
    numel, stage = sum(one.numel for one in parameters), zero["stage"]
    trained = sum(one.numel for one in parameters if one.is_trained)
    width = bytes_of(settings.training.precision)
    # Frozen ones have no gradient, master or moment. Ranks that share experts hold as much of their state as others.
    share = math.ceil(sum(one.numel for one in everything if one.is_trained) / ranks) if stage else trained
    buckets = {name: min(numel, int(float(zero.get(name, default)))) for name, default in DEFAULTS.items()}
    buckets["reduce_bucket_size"] = min(trained, buckets["reduce_bucket_size"])
    state = {
        "masters": WIDE * share if stage else 0,
        "moments": moment_bytes(everything if stage else parameters, settings.optimizer, ranks if stage else 1),
        "average of weights": WIDE * share if settings.training.ema_decay else 0,
    }
    of_all = sum(one.numel for one in everything)
    device = {"weights": width * (math.ceil(of_all / ranks) if stage == 3 else numel)}
    host: dict[str, int] = {}
    if stage == 3:
        hpz = zero.get("zero_hpz_partition_size", 1)
        device["weights"] += width * numel // hpz if hpz > 1 else 0
        live = buckets["stage3_max_live_parameters"] + buckets["stage3_prefetch_bucket_size"]
        device["gathered weights"] = width * min(numel, live)
    offload = is_offloaded(zero, "offload_optimizer")
    sums = WIDE * share  # in fp32; below stage 2 not sharded until the last micro-batch
    in_flight = LOW * trained if stage == 1 and settings.training.precision == "bf16" and not offload else 0
    device["gradients"] = WIDE * trained + in_flight if stage < 2 else sums
    device["reduce buckets"] = WIDE * buckets["reduce_bucket_size"]
    if offload:
        # The fp32 sums lie beside the masters; from stage 2 on, accumulation of micro-batches needs a second copy.
        host = state | {"gradients": sums if stage < 2 else 2 * sums}
        device["gradients"] = device["gradients"] if stage < 2 else 0
        if stage < 3:  # new weights and gradients pass through extra memory
            largest = width * max(one.numel for one in parameters if one.is_trained)
            host |= {"weights": width * share, "gradients": host["gradients"] + largest}
            device["reduce buckets"] += largest
    else:
        device |= state
    if is_offloaded(zero, "offload_param"):
        host["weights"] = device["weights"]
        device["weights"] = 0
    return Plan({name: n for name, n in device.items() if n}, {name: n for name, n in host.items() if n})


def moment_bytes(parameters: Sequence[Parameter], settings: OptimizerSettings, shards: int) -> int:
    """Of the optimizer's states on one rank, divided over `shards` ranks; vectors of rows and columns are whole."""
    row, total = OPTIMIZERS[settings.kind], 0
    shapes_of = {is_matrix: [state.shape for state in row.states_of(is_matrix)] for is_matrix in (False, True)}
    for one in parameters:
        if not one.is_trained:
            continue
        shapes = shapes_of[_is_matrix(one, row.matrices)]
        total += WIDE * shapes.count("parameter") * math.ceil(one.numel / shards)
        vectors = [shapes.count("rows"), shapes.count("columns")]
        total += WIDE * sum(number * size for number, size in zip(vectors, one.shape, strict=False))
    return total


def _is_matrix(parameter: Parameter, matrices: str) -> bool:
    """Whether the optimizer treats it as a matrix, as `parameter_groups` decides."""
    if matrices == "hidden":
        return parameter.role == "matrix" and not parameter.name.startswith("head.")
    return matrices == "all" and len(parameter.shape) == 2


def bytes_of(precision: str) -> int:
    """Of a weight or an activation."""
    return WIDE if precision == "fp32" else LOW


def is_offloaded(zero: dict[str, Any], section: str) -> bool:
    return device_of(zero.get(section)) in ("cpu", "nvme")
