"""Initial weights: one function, one table, every value fixed by (seed, parameter name)."""

import contextlib
import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn


@torch.no_grad()
def init_weights(
    model: nn.Module, seed: int, whole: Callable[[nn.Parameter], AbstractContextManager] | None = None
) -> None:
    """Fill every parameter in place, in fp32. `whole` makes a partitioned one whole while it is filled.

    | parameter                            | distribution                        | source                        |
    |--------------------------------------|-------------------------------------|-------------------------------|
    | embedding, head                      | normal, deviation 0.02              | GPT-2                         |
    | attention.output, feed_forward.down  | normal, deviation sqrt(1/inputs/2L) | GPT-2: the residual stream of |
    |                                      | with L layers                       | 2L additions keeps its size   |
    | other matrices                       | normal, deviation sqrt(1/inputs)    | LeCun et al. 1998             |
    | norms                                | 1                                   |                               |

    Each parameter has its own random stream, keyed by seed and name, so that a value depends on neither the
    order of creation nor the number of ranks.
    """
    for name, parameter in model.named_parameters():
        with whole(parameter) if whole else contextlib.nullcontext():
            _fill(name, parameter, seed, additions=2 * model.settings.layers)


def _fill(name: str, parameter: nn.Parameter, seed: int, additions: int) -> None:
    if parameter.dim() == 1:
        parameter.fill_(1.0)
        return
    if name.startswith(("embedding.", "head.")):
        deviation = 0.02
    elif name.endswith(("attention.output.weight", "feed_forward.down.weight")):
        deviation = math.sqrt(1.0 / parameter.shape[1] / additions)
    else:
        deviation = math.sqrt(1.0 / parameter.shape[1])
    parameter.copy_(torch.randn(parameter.shape, generator=_generator(seed, name)) * deviation)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
