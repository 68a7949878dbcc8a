"""Inputs of grouped matrix products, the formula row by row, and the rule for errors."""

from typing import NamedTuple

import torch
from torch import Tensor

from bigmodel.kernels.grouped_matmul import grouped_matmul


class Products(NamedTuple):
    """Rows, matrices, offsets, and the gradient of the result."""

    x_MK: Tensor
    weight_ENK: Tensor
    offsets_E1: Tensor
    dy_MN: Tensor

    def to(self, dtype: torch.dtype) -> "Products":
        return Products(*(one.to(dtype) if one.is_floating_point() else one for one in self))

    def on(self, device: str) -> "Products":
        return Products(*(one.to(device) for one in self))


class Results(NamedTuple):
    y_MN: Tensor
    dx_MK: Tensor
    d_weight_ENK: Tensor


def make_products(
    dtype: torch.dtype, counts: list[int], padding: int = 0, inputs: int = 40, outputs: int = 24
) -> Products:
    generator, rows = torch.Generator().manual_seed(3), sum(counts) + padding
    x_MK, weight_ENK, dy_MN = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((rows, inputs), (len(counts), outputs, inputs), (rows, outputs))
    )
    offsets_E1 = torch.tensor([0, *counts]).cumsum(0).int()
    return Products(x_MK, weight_ENK, offsets_E1, dy_MN)


def our_results(products: Products) -> Results:
    x_MK, weight_ENK = (one.detach().clone().requires_grad_() for one in products[:2])
    y_MN = grouped_matmul(x_MK, weight_ENK, products.offsets_E1)
    return Results(y_MN.detach(), *torch.autograd.grad(y_MN, (x_MK, weight_ENK), products.dy_MN))


def dense_results(products: Products) -> Results:
    """Every row times the matrix of its expert; torch's autograd. Rows beyond the last offset are 0."""
    x_MK, weight_ENK, offsets_E1, dy_MN = (one.detach().clone() for one in products)
    x_MK.requires_grad_()
    weight_ENK.requires_grad_()
    offsets = offsets_E1.tolist()
    parts = [x_MK[start:end] @ one.T for one, start, end in zip(weight_ENK, offsets, offsets[1:], strict=False)]
    y_MN = torch.cat([*parts, x_MK.new_zeros(len(x_MK) - offsets[-1], dy_MN.shape[1])])
    return Results(y_MN.detach(), *torch.autograd.grad(y_MN, (x_MK, weight_ENK), dy_MN))


def assert_as_exact_as_plain_torch(ours: Results, products: Products) -> None:
    """Errors against float64: at most twice plain torch's forward, three times backward, in the same type."""
    exact, plain = dense_results(products.to(torch.float64)), dense_results(products)
    for name, factor in (("y_MN", 2), ("dx_MK", 3), ("d_weight_ENK", 3)):
        found, torchs, truth = (getattr(results, name) for results in (ours, plain, exact))
        assert found.dtype == products.x_MK.dtype
        assert truth.abs().max() > 1, f"{name}: nothing to compare"
        our_error, torch_error = ((one.double() - truth).abs().max().item() for one in (found, torchs))
        bound = factor * torch_error + torch.finfo(found.dtype).eps
        assert our_error <= bound, f"{name}: error {our_error:.2e}, plain torch {torch_error:.2e}, bound {bound:.2e}"
