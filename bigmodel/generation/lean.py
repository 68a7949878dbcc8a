"""Blocks for single tokens on a CPU: the same functions as the model's, in fewer and faster operations.

In: a model in fp32. Out: its blocks with the model's own weights, but matrices copied into a layout that fits few rows,
norms in few operations, and queries and keys rotated together. The model is unchanged. Guarantee: equal within fp32
rounding. Costs: one copy of the blocks' and the head's matrices.

A matrix product with few rows reads every weight once, so the layout decides. A model of 24 M weights, one thread of an
AMD EPYC without AVX-512, all products of a token: `linear` 7.8 ms for one row and 22.8 for 8; transposed 5.6 and 24.0;
packed by oneDNN 9.1 and 16.8.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigmodel.model.layers import Linear, RMSNorm
from bigmodel.model.rotary import Table
from bigmodel.model.transformer import Attention, AttentionInputs, Head, Output, Transformer


def is_lean(model: Transformer) -> bool:
    """Whether `lean_copy` has something to gain."""
    weight = model.embedding.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def lean_copy(model: Transformer, slots: int) -> Transformer:
    """A model whose blocks, last norm and head are lean, for at most `slots` rows. Its blocks take `wide_table`s."""
    lean = copy.copy(model)
    used = ("input", "blocks", "norm", "head")
    lean._modules = {
        name: _lean(child, slots) if child and name in used else child for name, child in model._modules.items()
    }
    return lean


def product(weight: Tensor, slots: int) -> Any:
    """x -> x @ weight.T, in a layout for `slots` rows at most."""
    return _Transposed(weight) if slots == 1 or not torch.backends.mkldnn.is_available() else _Packed(weight, slots)


class _Transposed:
    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.detach().T.contiguous()

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return x @ self._weight if bias is None else torch.addmm(bias, x, self._weight)


class _Packed:
    """By oneDNN, as torch's compiler packs frozen weights; one row is faster as it is."""

    def __init__(self, weight: Tensor, slots: int) -> None:
        self._plain = weight.detach()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self._plain, slots)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if len(x) == 1:
            return F.linear(x, self._plain, bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")


class _Linear(nn.Module):
    def __init__(self, of: Linear, slots: int) -> None:
        super().__init__()
        self.bias, self._product = of.bias, product(of.weight, slots)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self.bias)


class _Norm(nn.Module):
    def __init__(self, of: RMSNorm) -> None:
        super().__init__()
        self._factor = 1.0 + of.weight.detach() if of.zero_centered else of.weight.detach()
        self._epsilon = self._factor.new_full((1,), of.epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """Fewer operations than torch's rms_norm, which a CPU composes of ten."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self._epsilon, length, length, value=1 / x.shape[-1]).rsqrt_()
        return x * scale * self._factor


class _Head(nn.Module):
    def __init__(self, of: Head, slots: int) -> None:
        super().__init__()
        self._softcap, self._product = of.options.logit_softcap, product(of.weight, slots)

    def forward(self, x_BH: Tensor, labels: None, output: Output) -> Tensor:
        assert output == "logits"
        logits_BV = self._product(x_BH)
        return self._softcap * torch.tanh(logits_BV / self._softcap) if self._softcap else logits_BV


class _Attention(Attention):
    """One that rotates queries and keys together."""

    def project(self, x_TH: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
        heads_TNK = self.query_key_value(x_TH).unflatten(-1, (-1, self.head_dim))
        turned = self.num_heads + self.num_kv_heads
        v_TGK = heads_TNK[:, turned:]
        if isinstance(self.query_norm, nn.Identity):
            qk_TNK = heads_TNK[:, :turned]
        else:
            normed = (
                self.query_norm(heads_TNK[:, : self.num_heads]),
                self.key_norm(heads_TNK[:, self.num_heads : turned]),
            )
            qk_TNK = torch.cat(normed, 1)
        if inputs.table:
            qk_TNK = turn(qk_TNK, inputs.table)
        return qk_TNK[:, : self.num_heads], qk_TNK[:, self.num_heads :], v_TGK


def wide_table(table: Table) -> Table:
    """cos and sin (T, 1, 2 P) for `turn`: of both halves, the sin of the first one negative."""
    cos, sin = table
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def turn(x_TNK: Tensor, table: Table) -> Tensor:
    """`rotate` with a `wide_table`."""
    cos, sin = table
    channels = cos.shape[-1]
    turned = x_TNK[..., :channels]
    first, second = turned.chunk(2, -1)
    turned = torch.addcmul(turned * cos, torch.cat((second, first), -1), sin)
    return turned if channels == x_TNK.shape[-1] else torch.cat((turned, x_TNK[..., channels:]), -1)


def _lean(module: nn.Module, slots: int) -> nn.Module:
    if type(module) is Linear:
        return _Linear(module, slots)
    if type(module) is RMSNorm:
        return _Norm(module)
    if type(module) is Head:
        return _Head(module, slots)
    lean = copy.copy(module)
    lean._modules = {name: child and _lean(child, slots) for name, child in module._modules.items()}
    if isinstance(module, Attention):
        lean.__class__ = _Attention
    return lean
