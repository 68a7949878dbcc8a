"""Initial weights: one function and its table; every value depends on (seed, parameter name) only."""

import contextlib
import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn

from bigmodel.config.settings import ModelSettings
from bigmodel.model.experts import Router

TO_RESIDUAL_STREAM = (
    "attention.output.weight", "feed_forward.down.weight", "feed_forward.experts.down",
    "feed_forward.shared.down.weight",
)  # fmt: skip


@torch.no_grad()
def init_weights(
    model: nn.Module, seed: int, whole: Callable[[nn.Parameter], AbstractContextManager] | None = None
) -> None:
    """Fill every parameter in place, in fp32. `whole` gathers a partitioned parameter while it is filled.

    | parameter                            | distribution                        | source                        |
    |--------------------------------------|-------------------------------------|-------------------------------|
    | embeddings, head, relative bias      | normal, deviation 0.02              | GPT-2                         |
    | embeddings, with sinusoidal          | normal, deviation sqrt(1/hidden),   | Vaswani et al. 2017: of the   |
    | positions                            | which the input scales to 1         | sinusoids' size after scaling |
    | attention.output, feed_forward.down, | normal, deviation sqrt(1/inputs/A)  | GPT-2: the residual stream of |
    | cross_attention.output, experts.down,|                                     | A additions keeps its size    |
    | feed_forward.shared.down             |                                     |                               |
    | other matrices                       | normal, deviation sqrt(1/inputs)    | LeCun et al. 1998             |
    | norms                                | 1; zero-centered: 0                 |                               |
    | biases, peepholes                    | 0                                   |                               |
    | bias of an lstm's forget gate        | 1                                   | Jozefowicz et al. 2015        |
    | lora: a                              | uniform, at most sqrt(1/inputs)     | peft 0.21                     |
    | lora: b                              | 0                                   | Hu et al. 2021                |

    A is 2 per layer, 3 in a decoder with cross-attention; the encoder counts its own layers. With
    model.attention_scale set, query weights are divided by it and by sqrt(head_dim), as in T5, so that initial scores
    are the same as without.

    With width, deviations of matrices in blocks fall as its root and those of embeddings and head are constant: that is
    muP's table 8 (Yang et al. 2022), so that model.mup_base_width changes no initial weight but those of a
    classification head, whose logits are not divided by the width ratio m: matrix / m, matrix inside / sqrt(m).

    Each parameter has its own random stream, keyed by seed and name: values depend on neither the order of creation nor
    the number of ranks.
    """
    for module in model.modules():
        if isinstance(module, Router):
            module.reset()  # DeepSpeed makes tensors of the precision of the forward pass
    for name, parameter in model.named_parameters():
        with whole(parameter) if whole else contextlib.nullcontext():
            _fill(name, parameter, seed, model.settings)


def _fill(name: str, parameter: nn.Parameter, seed: int, settings: ModelSettings) -> None:
    if parameter.dim() == 1:
        zero_centered = settings.zero_centered_norm and not name.startswith("head.")
        parameter.fill_(0.0 if name.endswith(("bias", ".peepholes")) or zero_centered else 1.0)
        if settings.is_recurrent and settings.cell == "lstm" and "blocks." in name and name.endswith(".bias"):
            parameter[settings.hidden_size : 2 * settings.hidden_size] = 1.0
        return
    if ".lora." in name:
        limit = 0.0 if name.endswith(".b.weight") else math.sqrt(1.0 / parameter.shape[1])
        parameter.copy_((torch.rand(parameter.shape, generator=generator_of(seed, name)) * 2 - 1) * limit)
        return
    crosses = settings.kind == "encoder_decoder" and settings.source_attention == "cross"
    side, additions = settings, (3 if crosses else 2) * settings.num_layers
    if name.startswith("encoder."):
        side = settings.encoder
        additions = 2 * side.num_layers
    if name.removeprefix("encoder.").startswith(("embedding.", "input.", "head.", "relative_bias.")):
        deviation = 0.02
        if settings.position_embedding == "sinusoidal" and "embedding." in name:
            deviation = math.sqrt(1.0 / parameter.shape[1])
        if settings.classification and name.startswith("head."):
            deviation /= settings.width_ratio if name == "head.weight" else math.sqrt(settings.width_ratio)
    elif name.endswith(TO_RESIDUAL_STREAM):
        deviation = math.sqrt(1.0 / parameter.shape[-1] / additions)
    else:
        deviation = math.sqrt(1.0 / parameter.shape[-1])
    parameter.copy_(torch.randn(parameter.shape, generator=generator_of(seed, name)).mul_(deviation))
    if settings.attention_scale and name.endswith(("attention.query_key_value.weight", "cross_attention.query.weight")):
        parameter[: side.num_heads * side.resolved_head_dim] /= settings.attention_scale * math.sqrt(
            side.resolved_head_dim
        )


def generator_of(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
