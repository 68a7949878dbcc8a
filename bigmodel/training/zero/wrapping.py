"""Module wrapping: activation checkpointing and torch.compile, applied to the model's blocks from outside.

In: a model with its repeated blocks in `nn.ModuleList`s; their forward is wrapped. Guarantee: loss and gradients are
bitwise equal with and without checkpointing, dropout included, because dropout is keyed and not drawn from a generator.
Costs: full checkpointing keeps only each block's input and needs a second forward (a third more arithmetic, Chen et al.
2016); selective also keeps the results of products and attention, and recomputes norms, rotary positions, activations
and dropout, which is cheap.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from bigmodel.config.settings import Settings, UserError

aten = torch.ops.aten
KEPT = {aten.mm.default, aten.addmm.default, aten.bmm.default}  # and all operators of the kernels

GRAPHS_PER_BLOCK = 4  # training and evaluation, each with and without prefixes


def wrap_blocks(model: nn.Module, settings: Settings, stage: int) -> None:
    """Wrap every block's forward according to `training.compile` and `training.activation_checkpointing`.

    Raises `UserError` for torch.compile under ZeRO-3 or with sequence parallelism.
    """
    training = settings.training
    if training.compile and stage == 3:
        raise UserError(
            "training.compile = true with ZeRO stage 3: DeepSpeed gathers weights in hooks that torch.compile cannot "
            "trace; use stage 1 or 2, or compile = false"
        )
    blocks = [block for part in model.modules() if isinstance(part, nn.ModuleList) for block in part]
    if training.compile:
        if training.sequence_parallel_ranks > 1:
            raise UserError(
                f"training.compile = true with training.sequence_parallel_ranks = {training.sequence_parallel_ranks}: "
                "the exchange between ranks is not compiled; use one of them only"
            )
        # With dropout each layer has its own graph, in training and in evaluation. Above its limit torch.compile leaves
        # a layer uncompiled; the default, 8, is too small for a model.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, GRAPHS_PER_BLOCK * len(blocks))
    for block in blocks:
        if training.compile:
            block.forward = torch.compile(block.forward, dynamic=False)
        if training.activation_checkpointing != "none":
            block.forward = partial(_checkpointed, block.forward, training.activation_checkpointing == "selective")


def hide_gathers(offload: Any) -> None:
    """Hide ZeRO-3's gathers from selective checkpointing. It counts the calls of each operation in the forward pass and
    refuses one more in the recomputation; weights that were gathered ahead, or kept, in one are not in the other.
    offload: DeepSpeed's object whose hooks gather and free a module's weights.
    """
    for name in ("pre_sub_module_forward_function", "post_sub_module_forward_function"):
        setattr(offload, name, partial(_unseen, getattr(offload, name)))


def _unseen(hook: Any, module: nn.Module) -> None:
    with torch._C._DisableTorchDispatch():
        hook(module)


def _checkpointed(forward: Any, selective: bool, *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    more = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if selective else {}
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, determinism_check="none", **more)


def _policy(context: Any, operation: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    kept = operation in KEPT or getattr(operation, "namespace", "") == "bigmodel"
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
