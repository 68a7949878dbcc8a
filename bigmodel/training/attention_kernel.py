"""The implementation of attention that `training.attention_kernel` names."""

import torch
from torch import nn

from bigmodel.config.settings import Settings, UserError
from bigmodel.kernels.attention_hopper import missing_device
from bigmodel.kernels.attention_libraries import missing
from bigmodel.model.transformer import Encoder, Transformer


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
