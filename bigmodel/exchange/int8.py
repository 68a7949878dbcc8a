"""Weights in 8 bits, one scale for each output channel, in a form of compressed-tensors: transformers and vLLM load it.

In: weights under the names of a class. Out: for each hidden matrix `weight_packed`, `weight_scale` and `weight_shape`;
other weights as they are. Form: "pack-quantized", 8 bits, symmetric, strategy "channel", activations not quantized
(W8A16). Guarantees: |weight - integer * scale| <= scale / 2; zeros stay 0. Costs: one matrix in memory at a time.

Example, two outputs of two inputs: [[1.27, -0.5], [0, 0]] becomes [[127, -50], [0, 0]] with the scales 0.01 and 1.
"""

from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bigmodel.model.huggingface.folder import Described

LARGEST = 127
PARTS = ("_packed", "_scale", "_shape")  # of a quantized weight; the class has one module for all three
# Types that transformers 4.57 with compressed-tensors 0.20 does not load, and why.
NOT_LOADED = {
    "t5": "its embedding is shared by two modules",
    "mt5": "its embedding is shared by two modules",
    "modernbert": "its class initializes weights that are not there yet",
}
# Modules that a class for encoders may add to what the folder holds.
ADDED_HEADS = ("re:.*pooler.*", "re:cls.*", "re:head.*", "re:decoder$", "re:classifier.*")


def quantized(weight: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Integers of the weight's shape (outputs, inputs) and scales (outputs, 1) of type `dtype`."""
    weight = weight.float()
    largest = weight.abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest / LARGEST, 1.0).to(dtype)
    scale = torch.where(scale > 0, scale, 1.0)  # so small that the type has no such number: all become 0
    # Below its normal numbers a type rounds coarsely: where down, the next number holds the largest weight, too.
    unit = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    scale = torch.where(largest > (LARGEST + 0.5) * scale.float(), scale + unit, scale)
    return (weight / scale.float()).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale


def packed(integers: Tensor) -> Tensor:
    """4 integers, each plus 128, in one int32, the first in the lowest byte; (outputs, inputs / 4 rounded up)."""
    shifted = (integers.to(torch.int16) + LARGEST + 1).to(torch.uint8)
    return torch.nn.functional.pad(shifted, (0, -shifted.shape[1] % 4)).contiguous().view(torch.int32)


class Int8Weights:
    """The weights to write, each computed when it is asked for. chosen: names of the matrices to quantize."""

    def __init__(self, weights: Described, chosen: Collection[str], dtype: torch.dtype) -> None:
        self._weights, self._chosen, self._dtype = weights, frozenset(chosen), dtype
        self._last = lru_cache(maxsize=1)(lambda name: quantized(weights[name], dtype))

    def __iter__(self) -> Iterator[str]:
        for name in self._weights:
            yield from (f"{name}{part}" for part in PARTS) if name in self._chosen else (name,)

    def __getitem__(self, name: str) -> Tensor:
        base, part = self._split(name)
        if not part:
            return self._weights[name]
        if part == "_shape":
            return torch.tensor(self._weights.shape(base))
        integers, scale = self._last(base)
        return packed(integers) if part == "_packed" else scale

    def dtype_of(self, name: str) -> torch.dtype:
        part = self._split(name)[1]
        return {"_packed": torch.int32, "_shape": torch.int64}.get(part, self._dtype)

    def shape(self, name: str) -> list[int]:
        base, part = self._split(name)
        shape = self._weights.shape(base)
        return {"": shape, "_packed": [shape[0], -(-shape[-1] // 4)], "_scale": [shape[0], 1], "_shape": [2]}[part]

    def _split(self, name: str) -> tuple[str, str]:
        """The weight, and which part of it."""
        base, _, part = name.rpartition("_")
        return (base, f"_{part}") if base in self._chosen else (name, "")


def rounded(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What a reader gets for a quantized weight."""
    integers, scale = quantized(weight, dtype)
    return integers.float() * scale.float()


def quantization_config(whole: Collection[str]) -> dict[str, Any]:
    """For config.json. whole: modules of linear layers that are not quantized."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"format": "pack-quantized"}},
        "ignore": sorted(whole),
    }
