"""What an implementation of packed attention is: the type behind the names that `attention(kernel=...)` takes.

The table of names, KERNELS, is in `kernels/attention.py`. An implementation says which calls it covers, from shapes,
types, settings and the device alone: nothing waits for the device. `attention` computes a call that it does not cover
with "triton", which covers all. On a CPU without Triton's interpreter every name is the reference.

Shape suffixes: T queries, S keys, H query heads, G key heads, K channels of a head, R distances.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from bigmodel.kernels.attention_dropout import AttentionDropout
from bigmodel.kernels.mask import AttentionMask
from bigmodel.kernels.tiles import TileMetadata


class AttentionCall(NamedTuple):
    """The arguments of one call of `attention`, checked."""

    q_THK: Tensor
    k_SGK: Tensor
    v_SGK: Tensor
    mask: AttentionMask
    tile_metadata: TileMetadata
    scale: float
    softcap: float | None
    bias_HR: Tensor | None
    dropout: AttentionDropout | None


class AttentionKernel(NamedTuple):
    """`attend`: the output (T, H, K), differentiable. `refusal`: why it does not cover a call; None if it does."""

    attend: Callable[[AttentionCall], Tensor]
    refusal: Callable[[AttentionCall], str | None]


def chosen(kernels: dict[str, AttentionKernel], name: str, call: AttentionCall) -> AttentionKernel:
    """The implementation of that name, or "triton" where it does not cover the call. Raises ValueError for a name that
    is not in the table."""
    if name not in kernels:
        raise ValueError(f"attention got kernel {name!r}; it needs one of {', '.join(sorted(kernels))}")
    return kernels[name if kernels[name].refusal(call) is None else "triton"]
