"""The decoder-only transformer: a flat run of packed documents in, the loss of every document out.

Takes a `Batch` (one flat run of T positions), gives the summed loss, the loss of each position, or logits.
Guarantees: documents cannot influence one another (attention, positions and loss restart at each boundary)
and dropout depends on the batch's keys only, never on rank or call order. The model does not know how
many machines there are: ZeRO is applied from outside.

    tokens -> embedding -> [ norm -> attention -> + -> norm -> SwiGLU -> + ] x layers -> norm -> head -> loss

Letters in tensor names: T positions of the micro-batch, H hidden width, Q query heads, G key/value heads,
K head width, F feed-forward width, V vocabulary. `x_TH` is a tensor of shape (T, H).
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigmodel.config import ModelSettings
from bigmodel.data.batch import Batch
from kernels.attention import Schedule, attention, make_schedule
from kernels.linear_cross_entropy import Options, linear_cross_entropy, linear_cross_entropy_per_token
from kernels.visibility import Visibility, causal

Output = Literal["loss_sum", "loss_per_position", "logits"]


class Linear(nn.Linear):
    """A matrix product without bias. bf16 on a CPU is multiplied in fp32 and rounded once.

    CPUs without bf16 instructions multiply bf16 about 30 times slower than fp32 (1.2 against 32 GFLOP/s on
    one AVX2 core); the result is the one a GPU gives, which also adds bf16 products in fp32.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype is torch.bfloat16:
            return F.linear(x.float(), self.weight.float()).to(x.dtype)
        return F.linear(x, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in fp32 at least (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * inverse_rms * self.weight).to(x.dtype)


def rotary_table(positions_T: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of shape (T, 1, K/2), fp32 (Su et al. 2021). Made once per batch: a buffer would be cast to bf16."""
    exponents = torch.arange(0, head_width, 2, device=positions_T.device, dtype=torch.float32) / head_width
    angles = positions_T.float()[:, None] * theta**-exponents
    return angles.cos()[:, None, :], angles.sin()[:, None, :]


def rotate(x_TQK: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (x[i], x[i + K/2]) by their position's angle, as Llama's published weights expect."""
    cos, sin = table
    first, second = x_TQK.to(torch.promote_types(x_TQK.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_TQK.dtype)


def dropout(x_TH: Tensor, rate: float, keys_T: Tensor, salt: int) -> Tensor:
    """Drop by a hash of (key of the position, salt, channel): the same on any rank, device and at any recomputation.

    The hash is the finalizer of splitmix64 (Steele et al. 2014); its top 31 bits are compared with the rate.
    """
    if rate == 0.0:
        return x_TH
    channels = torch.arange(x_TH.shape[-1], device=x_TH.device, dtype=torch.int64)
    word = (keys_T[:, None] ^ (salt * 0x632BE59BD9B4E019 & 0x7FFFFFFFFFFFFFFF)) + channels * 0x1E3779B97F4A7C15
    word = (word ^ (word >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    word = (word ^ (word >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    keep = (word >> 33 & 0x7FFFFFFF) >= int(rate * 2**31)
    return x_TH * keep * (1.0 / (1.0 - rate))


class Attention(nn.Module):
    """Causal attention inside each document, with grouped-query heads (Ainslie et al. 2023)."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.heads, self.groups, self.head_width = settings.heads, settings.key_value_heads, settings.head_width
        self.query_key_value = Linear(settings.width, (self.heads + 2 * self.groups) * self.head_width)
        self.output = Linear(self.heads * self.head_width, settings.width)
        self.query_norm = RMSNorm(self.head_width, settings.norm_epsilon) if settings.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_width, settings.norm_epsilon) if settings.qk_norm else nn.Identity()

    def forward(self, x_TH: Tensor, visibility: Visibility, schedule: Schedule, table: tuple[Tensor, Tensor]) -> Tensor:
        heads_TNK = self.query_key_value(x_TH).unflatten(-1, (self.heads + 2 * self.groups, self.head_width))
        q_TQK, k_TGK, v_TGK = heads_TNK.split((self.heads, self.groups, self.groups), dim=1)
        q_TQK = rotate(self.query_norm(q_TQK), table)
        k_TGK = rotate(self.key_norm(k_TGK), table)
        out_TQK = attention(q_TQK, k_TGK, v_TGK, visibility, schedule)
        return self.output(out_TQK.flatten(1))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): (silu(x W_gate) * (x W_up)) W_down, the first two as one product."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.gate_up = Linear(settings.width, 2 * settings.feed_forward_width)
        self.down = Linear(settings.feed_forward_width, settings.width)

    def forward(self, x_TH: Tensor) -> Tensor:
        gate_TF, up_TF = self.gate_up(x_TH).chunk(2, dim=-1)
        return self.down(F.silu(gate_TF) * up_TF)


class Block(nn.Module):
    """One layer: attention and feed-forward, each on a normalised input and added to the residual stream."""

    def __init__(self, settings: ModelSettings, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout = layer, settings.dropout
        self.attention_norm = RMSNorm(settings.width, settings.norm_epsilon)
        self.attention = Attention(settings)
        self.feed_forward_norm = RMSNorm(settings.width, settings.norm_epsilon)
        self.feed_forward = FeedForward(settings)

    def forward(
        self, x_TH: Tensor, visibility: Visibility, schedule: Schedule, table: tuple[Tensor, Tensor], keys_T: Tensor
    ) -> Tensor:
        rate = self.dropout if self.training else 0.0
        mixed_TH = self.attention(self.attention_norm(x_TH), visibility, schedule, table)
        x_TH = x_TH + dropout(mixed_TH, rate, keys_T, salt=2 * self.layer)
        thought_TH = self.feed_forward(self.feed_forward_norm(x_TH))
        return x_TH + dropout(thought_TH, rate, keys_T, salt=2 * self.layer + 1)


class Head(nn.Module):
    """From hidden states to the loss, without ever holding T x V logits.

    The loss is taken inside this module's own forward: under ZeRO-3 the weight is whole only there. The value of
    loss_sum leaves the z-loss out, its gradient has it; loss_per_position is the plain cross-entropy.
    """

    def __init__(self, weight_VH: nn.Parameter, options: Options) -> None:
        super().__init__()
        self.weight = weight_VH
        self.options = options

    def forward(self, x_TH: Tensor, targets_T: Tensor, output: Output) -> Tensor:
        softcap = self.options.logit_softcap
        if output == "loss_sum":
            return linear_cross_entropy(x_TH, self.weight, targets_T, self.options).loss_sum
        if output == "loss_per_position":
            return linear_cross_entropy_per_token(x_TH, self.weight, targets_T, softcap)
        logits_TV = x_TH.float() @ self.weight.float().T
        return softcap * torch.tanh(logits_TV / softcap) if softcap else logits_TV


class Transformer(nn.Module):
    """The model. `forward(batch)` gives the loss summed over the batch's targets, a scalar in fp32, in nats.

    z_loss and label_smoothing are settings of the training: they shape the gradient of that sum (Options).
    """

    def __init__(
        self, settings: ModelSettings, vocabulary: int, z_loss: float = 0.0, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.settings = settings
        self.embedding = nn.Embedding(vocabulary, settings.width)
        self.blocks = nn.ModuleList(Block(settings, layer) for layer in range(settings.layers))
        self.norm = RMSNorm(settings.width, settings.norm_epsilon)
        untied = not settings.tied_embeddings
        weight_VH = nn.Parameter(torch.empty(vocabulary, settings.width)) if untied else self.embedding.weight
        self.head = Head(weight_VH, Options(z_loss, label_smoothing, settings.logit_softcap))

    def forward(self, batch: Batch, output: Output = "loss_sum") -> Tensor:
        """loss_sum: (); loss_per_position: (T,), 0 at padding; logits: (T, V). All fp32."""
        return self.head(self.hidden(self.embedding(batch.tokens), batch), batch.targets, output)

    def hidden(self, x_TH: Tensor, batch: Batch) -> Tensor:
        """Embedded tokens (T, H) to the normalised states (T, H) that the head reads."""
        visibility = causal(batch.offsets)
        schedule = make_schedule(visibility, len(batch.tokens), len(batch.tokens))
        table = rotary_table(batch.positions, self.settings.head_width, self.settings.rope_theta)
        for block in self.blocks:
            x_TH = block(x_TH, visibility, schedule, table, batch.keys)
        return self.norm(x_TH)
