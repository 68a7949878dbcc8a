"""Layers of the transformer that act on each position alone: matrices, norms, feed-forward, embedding, dropout,
stochastic depth.

Letters in tensor names as in `bigmodel.model.transformer`: T positions, H hidden_size, F intermediate_size.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigmodel.config.settings import ModelSettings
from bigmodel.kernels.cpu import is_wide

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_erf": F.gelu,
    "relu": F.relu,
}

EMBEDDING_SALT = 1 << 21  # dropout salt of embeddings: above those of blocks, below those of adapters


class Linear(nn.Linear):
    """A matrix product, by default without bias. On a CPU without bf16 units bf16 is multiplied in fp32 and rounded
    once (`kernels/cpu.py`); the result is that of a GPU, which also adds bf16 products in fp32.

    `lora`: adapters that are added to the product (`bigmodel.model.lora`).
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False, parts: tuple[int, ...] = ()) -> None:
        """`parts`: rows of each of the matrices that this one holds; empty: it is one."""
        assert not parts or sum(parts) == outputs
        super().__init__(inputs, outputs, bias=bias)
        self.parts = parts
        self.lora: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x) if self.lora is None else self.lora(x, self.product(x))

    def product(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias; see `Linear`."""
    if is_wide(x):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32 at least (Zhang & Sennrich 2019). Zero-centered: the factor
    is 1 + weight."""

    def __init__(self, width: int, epsilon: float, zero_centered: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if zero_centered else torch.ones(width))
        self.epsilon, self.zero_centered = epsilon, zero_centered

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        factor = 1.0 + self.weight.to(wide.dtype) if self.zero_centered else self.weight
        return (wide * inverse_rms * factor).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """(x - mean) / deviation * weight + bias over the last dimension, in fp32 at least (Ba et al. 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.layer_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), bias, self.eps).to(x.dtype)


def make_norm(width: int, settings: ModelSettings) -> nn.Module:
    """The norm of `model.norm` over `width` channels."""
    if settings.norm == "layer":
        return LayerNorm(width, settings.norm_epsilon, bias=settings.norm_bias)
    return RMSNorm(width, settings.norm_epsilon, settings.zero_centered_norm)


class AllHeadsNorm(RMSNorm):
    """RMSNorm over the channels of all heads of a position together, (T, N, K) (OLMo 2)."""

    def forward(self, x_TNK: Tensor) -> Tensor:
        return super().forward(x_TNK.flatten(1)).unflatten(-1, x_TNK.shape[1:])


def make_head_norm(settings: ModelSettings, num_heads: int) -> nn.Module:
    """The norm of queries or keys (T, N, K)."""
    if not settings.qk_norm:
        return nn.Identity()
    if settings.qk_norm_over == "head":
        return RMSNorm(settings.resolved_head_dim, settings.norm_epsilon, settings.zero_centered_norm)
    return AllHeadsNorm(num_heads * settings.resolved_head_dim, settings.norm_epsilon, settings.zero_centered_norm)


def dropout(x_TH: Tensor, rate: float, seeds_T: Tensor, salt: int) -> Tensor:
    """Dropout by a hash of (seed of the position, salt, channel): equal on any rank and device and when recomputed.

    The hash is the finalizer of splitmix64 (Steele et al. 2014); its top 31 bits are compared with the rate.
    """
    if rate == 0.0:
        return x_TH
    channels = torch.arange(x_TH.shape[-1], device=x_TH.device, dtype=torch.int64)
    return x_TH * _keeps(seeds_T[:, None], salt, rate, channels) * (1.0 / (1.0 - rate))


def drop_documents(x_TH: Tensor, rate: float, seeds_T: Tensor, salt: int) -> Tensor:
    """Stochastic depth (Huang et al. 2016): zero in all positions of a document, or divided by 1 - rate.

    The draw is by the upper half of the seeds, the document's word (`bigmodel.data.load.batch.document_seeds`)."""
    return x_TH * _keeps((seeds_T >> 32)[:, None], salt, rate) * (1.0 / (1.0 - rate))


def _keeps(seeds: Tensor, salt: int, rate: float, channels: Tensor | int = 0) -> Tensor:
    word = (seeds ^ (salt * 0x632BE59BD9B4E019 & 0x7FFFFFFFFFFFFFFF)) + channels * 0x1E3779B97F4A7C15
    word = (word ^ (word >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    word = (word ^ (word >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return (word >> 33 & 0x7FFFFFFF) >= int(rate * 2**31)


def sinusoids(positions_T: Tensor, channels: int) -> Tensor:
    """(T, channels) fp32: channel 2i is sin(position / 10000^(2i/channels)), channel 2i + 1 its cosine (Vaswani et al.
    2017). The angles are fp64: in fp32 they are wrong by 0.004 at position 100,000."""
    exponents_P = torch.arange(0, channels, 2, device=positions_T.device, dtype=torch.float64) / channels
    angles_TP = positions_T[:, None] * 10_000.0**-exponents_P
    return torch.stack((angles_TP.sin(), angles_TP.cos()), -1).flatten(1)[:, :channels].float()


class Input(nn.Module):
    """Embedded tokens (T, H) to the input of the first block: scaled, with positions and token types added, normalised,
    dropped, as far as the settings say so. Without these settings it changes nothing and has no parameters."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.is_sinusoidal = settings.position_embedding == "sinusoidal"
        self.scale = settings.embedding_scale * (math.sqrt(settings.hidden_size) if self.is_sinusoidal else 1.0)
        learned, types = settings.position_embedding == "learned", settings.num_token_types
        self.positions = nn.Embedding(settings.max_positions, settings.hidden_size) if learned else None
        self.token_types = nn.Embedding(types, settings.hidden_size) if types else None
        self.norm = make_norm(settings.hidden_size, settings) if settings.embedding_norm else nn.Identity()
        self.dropout = settings.embedding_dropout

    def forward(self, x_TH: Tensor, positions_T: Tensor, seeds_T: Tensor | None = None) -> Tensor:
        if self.scale != 1.0:
            x_TH = x_TH * self.scale
        if self.token_types is not None:
            x_TH = x_TH + self.token_types(torch.zeros_like(positions_T))
        if self.positions is not None:
            x_TH = x_TH + self.positions(positions_T)
        if self.is_sinusoidal:
            x_TH = x_TH + sinusoids(positions_T, x_TH.shape[-1]).to(x_TH.dtype)
        x_TH = self.norm(x_TH)
        if not (self.training and self.dropout):
            return x_TH
        assert seeds_T is not None, "dropout of embeddings needs the batch's seeds"
        return dropout(x_TH, self.dropout, seeds_T, EMBEDDING_SALT)


class FeedForward(nn.Module):
    """(act(x W_gate) * (x W_up)) W_down, gate and up as one product (Shazeer 2020); not gated: act(x W_up) W_down."""

    def __init__(self, settings: ModelSettings, inner: int = 0) -> None:
        """inner 0: `model.intermediate_size`."""
        super().__init__()
        self.is_gated, self.activation = settings.gated, ACTIVATIONS[settings.activation]
        width, inner, bias = settings.hidden_size, inner or settings.intermediate_size, settings.feed_forward_bias
        if self.is_gated:
            self.gate_up = Linear(width, 2 * inner, bias, parts=(inner, inner))
        else:
            self.up = Linear(width, inner, bias)
        self.down = Linear(inner, width, bias)

    def forward(self, x_TH: Tensor) -> Tensor:
        if not self.is_gated:
            return self.down(self.activation(self.up(x_TH)))
        gate_TF, up_TF = self.gate_up(x_TH).chunk(2, dim=-1)
        return self.down(self.activation(gate_TF) * up_TF)
