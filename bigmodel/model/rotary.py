"""Rotary position embedding (RoPE): the angle of each pair of channels at each token, and the rotation.

In: the model's settings and a batch's positions. Out: tables of cos and sin, made once per batch and kind of layer
and shared by its layers. With `model.rotary_fraction` only the first channels of a head rotate. `model.rope_scaling`
lowers the frequencies of full-attention layers; sliding layers keep theirs, as in Gemma 3 and OLMo 3. Guarantee: the
numbers are those of `transformers.modeling_rope_utils`, by a test.

Letters in tensor names: T tokens, N heads, K channels of a head, P pairs of rotated channels.
"""

import math

import torch
from torch import Tensor

from bigmodel.config.layer_kinds import LayerKind
from bigmodel.config.settings import ModelSettings, RopeScalingSettings

Table = tuple[Tensor, Tensor]  # cos and sin, (T, 1, P) each, fp32


def rotary_table(positions_T: Tensor, settings: ModelSettings, kind: LayerKind = "full") -> Table:
    """The table for layers of one kind. Made once per batch: a buffer of the model would be cast to bf16."""
    frequencies_P, factor = rotary_frequencies(settings, kind, positions_T.device)
    angles_TP = positions_T.float()[:, None] * frequencies_P
    cos_TP, sin_TP = angles_TP.cos(), angles_TP.sin()
    if factor != 1.0:
        cos_TP, sin_TP = cos_TP * factor, sin_TP * factor
    return cos_TP[:, None, :], sin_TP[:, None, :]


def rotate(x_TNK: Tensor, table: Table) -> Tensor:
    """Rotate the pairs (x[i], x[i + P]) by their token's angle, as Llama's published weights expect; channels from 2 P
    on are unchanged."""
    cos, sin = table
    pairs = cos.shape[-1]
    wide = x_TNK.to(torch.promote_types(x_TNK.dtype, torch.float32))
    first, second, rest = wide.split((pairs, pairs, wide.shape[-1] - 2 * pairs), dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*turned, rest) if rest.shape[-1] else turned, dim=-1).to(x_TNK.dtype)


def rotary_frequencies(
    settings: ModelSettings, kind: LayerKind = "full", device: torch.device | str = "cpu"
) -> tuple[Tensor, float]:
    """(P,) fp32 radians per token: theta^(-2 p / channels) (Su et al. 2021), scaled; YaRN's factor of cos and sin."""
    channels, scaling = settings.rotary_channels, settings.rope_scaling
    theta = (settings.sliding_rope_theta if kind == "sliding" else 0.0) or settings.rope_theta
    exponents_P = torch.arange(0, channels, 2, device=device, dtype=torch.float32) / channels
    frequencies_P = theta**-exponents_P
    if scaling is None or kind == "sliding":
        return frequencies_P, 1.0
    if scaling.kind == "linear":
        return frequencies_P / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequencies_P, scaling), 1.0
    factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return _yarn(frequencies_P, theta, scaling), factor


def _llama3(frequencies_P: Tensor, scaling: RopeScalingSettings) -> Tensor:
    """Llama 3.1's scaling, by the number of turns of a pair in the original length: below `low_freq_factor` turns
    divided by `factor`, above `high_freq_factor` unchanged, between them a mean weighted by the turns."""
    turns_P = scaling.original_max_position_embeddings * frequencies_P / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_P = ((turns_P - low) / (high - low)).clamp(0, 1)
    return frequencies_P * (kept_P + (1 - kept_P) / scaling.factor)


def _yarn(frequencies_P: Tensor, theta: float, scaling: RopeScalingSettings) -> Tensor:
    """YaRN's "NTK by parts" (Peng et al. 2023), by a pair's number of turns in the original length: unchanged up to the
    pair of `beta_fast` turns, divided by `factor` from the pair of `beta_slow` turns on, between them a linear ramp
    over pair numbers."""
    pairs = len(frequencies_P)

    def pair_of(turns: float) -> float:
        """The number of the pair with this many turns in the original length: frequency 2 pi turns / length."""
        return pairs * math.log(scaling.original_max_position_embeddings / (2 * math.pi * turns)) / math.log(theta)

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)  # bounded by channels, as in the published code, not by pairs
    width = last - first or 0.001
    divided_P = ((torch.arange(pairs, device=frequencies_P.device, dtype=torch.float32) - first) / width).clamp(0, 1)
    return frequencies_P * (1 - divided_P + divided_P / scaling.factor)
