"""The implementation of attention that `training.attention_kernel` names, or the fastest one measured."""

from collections import Counter

import torch
from torch import nn

from bigmodel.config.layer_kinds import layer_kind
from bigmodel.config.settings import Settings, UserError, not_covered
from bigmodel.distributed.rendezvous import name_rank
from bigmodel.distributed.world import World
from bigmodel.kernels.attention_hopper import missing_device
from bigmodel.kernels.attention_libraries import missing
from bigmodel.model.transformer import Encoder, Transformer
from bigmodel.training.attention_measurements import Shape, fastest, machine_of, measurements_file


def resolve_attention_kernel(
    settings: Settings, num_packs: int, world: World, machine: dict[str, str] | None = None
) -> tuple[Settings, str]:
    """The settings with a name in place of "fastest", the same on all ranks, and a line that says so; else "".

    Collective. num_packs: packed sequences of a micro-batch. machine: of this rank, None: found out. Rank 0 reads the
    measurements: implementations differ in their last bits, so ranks must not choose each for itself.
    """
    if settings.training.attention_kernel != "fastest":
        return settings, ""
    machines = world.gather_objects(machine or machine_of(world.device))
    odd = next((rank for rank, machine in enumerate(machines) if machine != machines[0]), 0)
    if odd:
        name, reason = "triton", f"{name_rank(odd)} has another device or other versions than {name_rank(0)}"
    else:
        name, reason = world.on_rank_zero(lambda: choose(settings, num_packs, machines[0]))
    training = settings.training.model_copy(update={"attention_kernel": name})
    line = f'training.attention_kernel = "fastest": {name}; {reason}'
    return settings.model_copy(update={"training": training}), line


def choose(settings: Settings, num_packs: int, machine: dict[str, str]) -> tuple[str, str]:
    """(name, reason) for a run on such a machine."""
    if machine["device"] == "cpu":
        return "triton", "on a CPU all are the same"
    if problem := not_choosable(settings):
        return "triton", problem
    return fastest(shapes_of(settings, num_packs), measurements_file(), machine)


def not_choosable(settings: Settings) -> str:
    """Why there is no choice for a run; empty if there is one."""
    if settings.model.is_recurrent or settings.model.has_source:
        return f'none is measured for model.kind = "{settings.model.kind}"'
    found = not_covered(settings, "fastest")
    return found and f"the others do not cover {found}"


def shapes_of(settings: Settings, num_packs: int) -> Counter[Shape]:
    """Number of layers by shape of their self-attention, in the only stack of a model."""
    model, training = settings.model, settings.training
    window, sharing = model.sliding_window, training.ranks_per_sequence
    sides: dict[str, tuple[int | None, int | None]] = {"full": (None, 0), "sliding": (window - 1, 0)}
    if model.kind == "encoder":
        sides = {"full": (None, None), "sliding": (window // 2, window // 2)}
    return Counter(
        Shape(
            heads=model.num_heads // sharing,
            key_heads=max(1, model.num_kv_heads // sharing),
            channels=model.resolved_head_dim,
            dtype={"bf16": "bfloat16", "fp16": "float16"}.get(training.precision, "float32"),
            left=sides[layer_kind(model, layer)][0],
            right=sides[layer_kind(model, layer)][1],
            tokens=num_packs * settings.data.sequence_length,
        )
        for layer in range(model.num_layers + model.num_mtp_modules)
    )


def use_attention_kernel(model: nn.Module, settings: Settings, device: torch.device) -> None:
    """Let the model's self-attention call it. Raises `UserError` where it cannot run."""
    name = settings.training.attention_kernel
    if name == "triton":
        return
    asked = f'training.attention_kernel = "{name}"'
    if device.type != "cuda":
        raise UserError(f'{asked}: needs a GPU, and this rank computes on a {device.type}; set it to "triton"')
    if reason := missing_device(device) if name == "hopper" else missing(name):
        raise UserError(f'{asked}: {reason}, or set it to "triton"')
    for stack in model.modules():
        if isinstance(stack, (Encoder, Transformer)):
            stack.attention_kernel = name
