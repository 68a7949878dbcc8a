"""Inputs of the permutation, its formula in plain torch, and the rule for errors."""

from typing import NamedTuple

import torch
from torch import Tensor

from bigmodel.kernels.permute import expert_rows, permute, unpermute


class Sums(NamedTuple):
    """Tokens, the factor of each row between permutation and sum, experts, routing weights, gradient of the sums."""

    x_TH: Tensor
    factor_MH: Tensor
    experts_Tk: Tensor
    weights_Tk: Tensor
    d_out_TH: Tensor


class Results(NamedTuple):
    out_TH: Tensor
    dx_TH: Tensor
    d_factor_MH: Tensor
    d_weights_Tk: Tensor


def make_sums(dtype: torch.dtype, tokens: int = 13, choices: int = 3, width: int = 20) -> Sums:
    """Experts 0 to 3, and 4: no expert."""
    generator = torch.Generator().manual_seed(7)
    x_TH, factor_MH, d_out_TH = (
        torch.randn(rows, width, generator=generator).to(dtype) for rows in (tokens, tokens * choices, tokens)
    )
    experts_Tk = torch.randint(0, 5, (tokens, choices), generator=generator)
    weights_Tk = torch.rand(tokens, choices, generator=generator).to(torch.promote_types(dtype, torch.float32))
    return Sums(x_TH, factor_MH, experts_Tk, weights_Tk, d_out_TH)


def our_results(sums: Sums) -> Results:
    leaves = [one.clone().requires_grad_() for one in (sums.x_TH, sums.factor_MH, sums.weights_Tk)]
    x_TH, factor_MH, weights_Tk = leaves
    place_Tk, _ = expert_rows(sums.experts_Tk, num_experts=4)
    out_TH = unpermute(permute(x_TH, place_Tk) * factor_MH, place_Tk, weights_Tk)
    return Results(out_TH.detach(), *torch.autograd.grad(out_TH, leaves, sums.d_out_TH))


def formula(sums: Sums) -> Results:
    """The same by indexing, in the type of the inputs, or wider in sums."""
    leaves = [one.clone().requires_grad_() for one in (sums.x_TH, sums.factor_MH, sums.weights_Tk)]
    x_TH, factor_MH, weights_Tk = leaves
    tokens, choices = sums.experts_Tk.shape
    order = sorted(range(tokens * choices), key=sums.experts_Tk.flatten().tolist().__getitem__)
    place_Tk = torch.tensor(order, device=x_TH.device).argsort().view(tokens, choices)
    rows_TkH = factor_MH[place_Tk] * x_TH[:, None, :].to(factor_MH.dtype)
    out_TH = (rows_TkH * weights_Tk[..., None]).sum(1).to(x_TH.dtype)
    return Results(out_TH.detach(), *torch.autograd.grad(out_TH, leaves, sums.d_out_TH))


def to_float64(sums: Sums) -> Sums:
    return Sums(*(one.double() if one.is_floating_point() else one for one in sums))


def assert_as_exact_as_plain_torch(sums: Sums) -> None:
    """Errors against float64: at most twice those of plain torch forward, and three times backward."""
    ours, plain, exact = our_results(sums), formula(sums), formula(to_float64(sums))
    for name, factor in (("out_TH", 2), ("dx_TH", 3), ("d_factor_MH", 3), ("d_weights_Tk", 3)):
        found, torchs, truth = (getattr(results, name) for results in (ours, plain, exact))
        assert found.dtype == torchs.dtype
        assert truth.abs().max() > 1, f"{name}: nothing to compare"
        our_error, torch_error = ((one.double() - truth).abs().max().item() for one in (found, torchs))
        bound = factor * torch_error + torch.finfo(found.dtype).eps
        assert our_error <= bound, f"{name}: error {our_error:.2e}, plain torch {torch_error:.2e}, bound {bound:.2e}"
