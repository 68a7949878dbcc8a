"""What a run says when an allocation fails: the rank, what was asked for, the plan, and the settings that would help.

In: the error, the settings. Out: a few lines. The plan is that of `show memory`, of the run's own stage and number of
ranks; without a GPU there is no framework in it.
"""

import traceback
from typing import Any

from bigmodel.config.deepspeed_config import packs_per_micro_batch
from bigmodel.config.settings import Settings, UserError
from bigmodel.planning.context import cluster_of_ranks, context_of
from bigmodel.planning.memory import memory_of, unit_of
from bigmodel.planning.state_memory import Plan
from bigmodel.sizes import amount
from bigmodel.system_errors import asked_for


def explain(error: BaseException, settings: Settings, rank: int, ranks: int, device: str) -> str:
    """device: "cpu" or "cuda". Lets go of what the failed step held."""
    asked = asked_for(error)
    traceback.clear_frames(error.__traceback__)
    lines = [f"rank {rank}: out of memory{' of the GPU' if _is_of_device(error) else ''}: {asked}"]
    try:
        context = context_of(settings, cluster_of_ranks(ranks))
        plan = memory_of(context)
    except (UserError, OSError, MemoryError, RuntimeError) as problem:
        return "\n".join([*lines, f"  its plan could not be computed: {problem}"])
    if device == "cpu":
        del plan.device["framework"]
    settings, effective = context.settings, context.effective
    stage = effective["zero_optimization"]["stage"]
    lines.append(f"  plan (bigmodel show memory RUN.toml --ranks {ranks}), ZeRO {stage}: {_in_words(plan)}")
    lines.append("  would help: " + "; ".join(remedies(settings, effective, plan, ranks, device)))
    return "\n".join(lines)


def remedies(settings: Settings, effective: dict[str, Any], plan: Plan, ranks: int, device: str) -> list[str]:
    """Settings that lower the memory of a rank, those of the larger part first."""
    zero, packs = effective["zero_optimization"], packs_per_micro_batch(effective)
    recomputed, precision = settings.training.activation_checkpointing, settings.training.precision
    shared = settings.training.expert_parallel_ranks
    of_activations = {
        f'"train_micro_batch_size_per_gpu": {packs // 2} in the DeepSpeed JSON (now {packs})': packs > 1,
        f'training.activation_checkpointing = "full" (now "{recomputed}")': recomputed != "full",
        f"a smaller data.sequence_length (now {settings.data.sequence_length})": True,
    }
    of_state = {
        f'"zero_optimization": {{"stage": {zero["stage"] + 1}}} in the DeepSpeed JSON': zero["stage"] < 3 and ranks > 1,
        '"zero_optimization": {"offload_optimizer": {"device": "cpu"}}': device == "cuda" and not plan.host,
        f'training.precision = "bf16" (now "{precision}")': precision == "fp32" and device == "cuda",
        'optimizer.kind = "adafactor" (smaller moments)': settings.optimizer.kind in ("adamw", "ademamix"),
        f"training.expert_parallel_ranks = {2 * shared} (now {shared})": settings.model.experts is not None
        and not (settings.model.experts.count % (2 * shared) or ranks % (2 * shared)),
        f"more ranks (now {ranks})": zero["stage"] > 0,
    }
    of_host = {
        "checkpoint.asynchronous = false (no second copy of the state)": settings.checkpoint.asynchronous
        and device == "cpu",
    }
    activations = plan.device["activations"]
    first, second = of_activations, of_state
    if activations < sum(plan.device.values()) - activations:
        first, second = second, first
    return [remedy for remedy, helps in {**first, **second, **of_host}.items() if helps]


def _is_of_device(error: BaseException) -> bool:
    return "CUDA" in str(error) or "CUBLAS" in str(error)


def _in_words(plan: Plan) -> str:
    parts = plan.device | {f"{name} off the device": number for name, number in plan.host.items()}
    total = sum(plan.device.values())
    name, unit = unit_of(total)
    told = ", ".join(f"{part} {amount(number / unit)}" for part, number in parts.items() if number)
    return f"{told}; {amount(total / unit)} {name} on the device of each rank"
