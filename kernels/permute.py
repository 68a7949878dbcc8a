"""Permutation: the tokens of each expert as one run of rows, and the weighted sums of these rows back at the tokens.

Formula, for token t, its choice j of k, and routing weight w:

    place[t, j]     = #{choices of smaller experts} + #{choices (t', j') < (t, j) of the same expert}
    y[place[t, j]]  = x[t]                                  permute
    dx[t]           = sum_j dy[place[t, j]]                 its backward
    out[t]          = sum_j w[t, j] * y[place[t, j]]        unpermute
    dy[place[t, j]] = w[t, j] * dout[t]                     its backward
    dw[t, j]        = dout[t] . y[place[t, j]]

In: experts (T, k) of an integer type, 0 to E - 1, or E for a choice of no expert (padding, a dropped token): its row
comes after all experts' rows, from offsets[E] on, where `grouped_matmul` gives 0. Out: `ExpertRows`; rows in the type
of the input, sums in fp32 (fp64 for fp64) rounded once, gradients of weights in the weights' type. Guarantees: no
atomics, so two runs agree bitwise; a token's sum depends on its own rows alone, bitwise; nothing waits for a GPU, and
shapes alone decide the compiled code. Costs: a stable sort of T k numbers of 16 bits, once per layer; permute and
unpermute read and write each row once, the backward of unpermute reads the rows again and no sum is kept.

Example: E = 2, experts = [[1, 0], [1, 2]]: place = [[1, 0], [2, 3]], offsets = [0, 1, 3].

Shape suffixes: T tokens, k choices of a token, M = T k rows, H hidden_size, E1 = E + 1. In kernels: B columns of
a block.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from bigmodel.kernels.triton_import import HAS_TRITON, INTERPRETED, tl, triton

MAX_EXPERTS = 2**15 - 1  # of the sort in 16 bits


class ExpertRows(NamedTuple):
    """The row of each choice, (T, k) int64, and the first row of each expert, (E + 1,) int32."""

    place_Tk: Tensor
    offsets_E1: Tensor


# Part 2: the reference, choice by choice; runs on CPU.


def permute_reference(x_TH: Tensor, place_Tk: Tensor) -> Tensor:
    y_MH = x_TH.new_empty(place_Tk.numel(), x_TH.shape[1])
    for place_T in place_Tk.unbind(1):
        y_MH.index_copy_(0, place_T, x_TH)
    return y_MH


def unpermute_reference(y_MH: Tensor, place_Tk: Tensor, weights_Tk: Tensor | None) -> Tensor:
    """The sums; without weights each is 1."""
    wide = torch.promote_types(y_MH.dtype, torch.float32)
    sum_TH = y_MH.new_zeros((len(place_Tk), y_MH.shape[1]), dtype=wide)
    for choice, place_T in enumerate(place_Tk.unbind(1)):
        rows_TH = y_MH.index_select(0, place_T).to(wide)
        if weights_Tk is None:
            sum_TH += rows_TH
        else:
            sum_TH.addcmul_(rows_TH, weights_Tk[:, choice, None].to(wide))
    return sum_TH.to(y_MH.dtype)


def unpermute_gradients_reference(
    d_out_TH: Tensor, y_MH: Tensor, place_Tk: Tensor, weights_Tk: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the rows and of the weights."""
    wide = torch.promote_types(y_MH.dtype, torch.float32)
    dy_MH, d_weights_Tk, d_out_TH = torch.empty_like(y_MH), torch.empty_like(weights_Tk), d_out_TH.to(wide)
    for choice, place_T in enumerate(place_Tk.unbind(1)):
        d_weights_Tk[:, choice] = (d_out_TH * y_MH.index_select(0, place_T)).sum(-1)
        dy_MH.index_copy_(0, place_T, (d_out_TH * weights_Tk[:, choice, None].to(wide)).to(y_MH.dtype))
    return dy_MH, d_weights_Tk


# Part 3: Triton kernels.

BLOCK = 1024  # columns read at a time
NUM_WARPS = 4


@triton.jit
def permute_kernel(x, place, y, COLUMNS: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    """One program: a block of columns of one token, copied to the rows of its choices."""
    token = tl.program_id(0).to(tl.int64)
    column_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_B = column_B < COLUMNS
    x_B = tl.load(x + token * COLUMNS + column_B, mask=inside_B)
    for choice in tl.static_range(CHOICES):
        row = tl.load(place + token * CHOICES + choice)
        tl.store(y + row * COLUMNS + column_B, x_B, mask=inside_B)


@triton.jit
def unpermute_kernel(y, place, weights, out, COLUMNS: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    """One program: a block of columns of one token's sum. weights None: each is 1."""
    token = tl.program_id(0).to(tl.int64)
    column_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_B = column_B < COLUMNS
    sum_B = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(CHOICES):
        row = tl.load(place + token * CHOICES + choice)
        y_B = tl.load(y + row * COLUMNS + column_B, mask=inside_B, other=0.0).to(tl.float32)
        if weights is not None:
            y_B *= tl.load(weights + token * CHOICES + choice)
        sum_B += y_B
    tl.store(out + token * COLUMNS + column_B, sum_B.to(out.dtype.element_ty), mask=inside_B)


@triton.jit
def unpermute_gradient_kernel(d_out, y, place, weights, dy, d_weights, COLUMNS: tl.constexpr, CHOICES: tl.constexpr,
                              BLOCK: tl.constexpr):  # fmt: skip
    """One program: the gradients of one choice, of its row and of its weight."""
    choice = tl.program_id(0).to(tl.int64)
    row = tl.load(place + choice)
    weight = tl.load(weights + choice)
    d_out += choice // CHOICES * COLUMNS
    sum_B = tl.zeros([BLOCK], tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        column_B = start + tl.arange(0, BLOCK)
        inside_B = column_B < COLUMNS
        d_out_B = tl.load(d_out + column_B, mask=inside_B, other=0.0).to(tl.float32)
        sum_B += d_out_B * tl.load(y + row * COLUMNS + column_B, mask=inside_B, other=0.0).to(tl.float32)
        tl.store(dy + row * COLUMNS + column_B, (weight * d_out_B).to(dy.dtype.element_ty), mask=inside_B)
    tl.store(d_weights + choice, tl.sum(sum_B, 0))


# Part 4: launching and autograd.


def launch_options(columns: int) -> dict[str, int]:
    return {"BLOCK": min(BLOCK, triton.next_power_of_2(columns)), "num_warps": NUM_WARPS}


def _has_kernels(rows: Tensor) -> bool:
    return HAS_TRITON and (rows.is_cuda or INTERPRETED) and rows.dtype != torch.float64


def _sizes(rows: Tensor, place_Tk: Tensor) -> dict[str, int]:
    return {"COLUMNS": rows.shape[1], "CHOICES": place_Tk.shape[1], **launch_options(rows.shape[1])}


@library.custom_op("bigmodel::permute", mutates_args=())
def permute_op(x_TH: Tensor, place_Tk: Tensor) -> Tensor:
    if not _has_kernels(x_TH):
        return permute_reference(x_TH, place_Tk)
    y_MH, sizes = x_TH.new_empty(place_Tk.numel(), x_TH.shape[1]), _sizes(x_TH, place_Tk)
    if len(x_TH):
        permute_kernel[(len(x_TH), triton.cdiv(x_TH.shape[1], sizes["BLOCK"]))](x_TH, place_Tk, y_MH, **sizes)
    return y_MH


@library.custom_op("bigmodel::unpermute", mutates_args=())
def unpermute_op(y_MH: Tensor, place_Tk: Tensor, weights_Tk: Tensor | None) -> Tensor:
    if not _has_kernels(y_MH):
        return unpermute_reference(y_MH, place_Tk, weights_Tk)
    out_TH, sizes = y_MH.new_empty(len(place_Tk), y_MH.shape[1]), _sizes(y_MH, place_Tk)
    if len(out_TH):
        grid = len(out_TH), triton.cdiv(y_MH.shape[1], sizes["BLOCK"])
        unpermute_kernel[grid](y_MH, place_Tk, weights_Tk, out_TH, **sizes)
    return out_TH


@library.custom_op("bigmodel::unpermute_backward", mutates_args=())
def _unpermute_backward_op(
    d_out_TH: Tensor, y_MH: Tensor, place_Tk: Tensor, weights_Tk: Tensor
) -> tuple[Tensor, Tensor]:
    if not _has_kernels(y_MH):
        return unpermute_gradients_reference(d_out_TH, y_MH, place_Tk, weights_Tk)
    dy_MH, d_weights_Tk, sizes = torch.empty_like(y_MH), torch.empty_like(weights_Tk), _sizes(y_MH, place_Tk)
    if len(y_MH):
        unpermute_gradient_kernel[(len(y_MH),)](d_out_TH, y_MH, place_Tk, weights_Tk, dy_MH, d_weights_Tk, **sizes)
    return dy_MH, d_weights_Tk


@permute_op.register_fake
def _(x_TH: Tensor, place_Tk: Tensor) -> Tensor:
    return x_TH.new_empty(place_Tk.numel(), x_TH.shape[1])


@unpermute_op.register_fake
def _(y_MH: Tensor, place_Tk: Tensor, _weights_Tk: Tensor | None) -> Tensor:
    return y_MH.new_empty(len(place_Tk), y_MH.shape[1])


@_unpermute_backward_op.register_fake
def _(_d_out_TH: Tensor, y_MH: Tensor, _place_Tk: Tensor, weights_Tk: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y_MH), torch.empty_like(weights_Tk)


def _remember_place(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _differentiate_permute(ctx: Any, dy_MH: Tensor) -> tuple[Tensor | None, ...]:
    return unpermute_op(dy_MH.contiguous(), *ctx.saved_tensors, None), None


def _remember_all(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_unpermute(ctx: Any, d_out_TH: Tensor) -> tuple[Tensor | None, ...]:
    y_MH, place_Tk, weights_Tk = ctx.saved_tensors
    if weights_Tk is None:
        return permute_op(d_out_TH.contiguous(), place_Tk), None, None
    dy_MH, d_weights_Tk = _unpermute_backward_op(d_out_TH.contiguous(), y_MH, place_Tk, weights_Tk)
    return dy_MH, None, d_weights_Tk


permute_op.register_autograd(_differentiate_permute, setup_context=_remember_place)
unpermute_op.register_autograd(_differentiate_unpermute, setup_context=_remember_all)


# Part 5: the public functions.


def expert_rows(experts_Tk: Tensor, num_experts: int) -> ExpertRows:
    """The row of each choice, sorted by expert, stable; choices of `num_experts` and above come last, in no expert."""
    if not 0 < num_experts <= MAX_EXPERTS:
        raise ValueError(f"permutation got {num_experts} experts; it needs 1 to {MAX_EXPERTS}")
    if experts_Tk.dim() != 2 or experts_Tk.is_floating_point():
        raise ValueError(
            f"permutation got experts {tuple(experts_Tk.shape)} of {experts_Tk.dtype}; it needs (T, k) of an integer "
            "type"
        )
    experts_M = experts_Tk.flatten().to(torch.int16)
    sorted_M, order_M = torch.sort(experts_M, stable=True)
    firsts_E1 = torch.arange(num_experts + 1, dtype=torch.int16, device=experts_M.device)
    place_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))
    return ExpertRows(place_M.view(experts_Tk.shape), torch.searchsorted(sorted_M, firsts_E1, out_int32=True))


def permute(x_TH: Tensor, place_Tk: Tensor) -> Tensor:
    """(M, H): the rows of x at the places of their choices; differentiable once in x.

    Raises ValueError for shapes and types that do not fit; `place_Tk` is a permutation, as from `expert_rows`.
    """
    _check(x_TH, place_Tk, len(x_TH))
    return permute_op(x_TH.contiguous(), place_Tk.contiguous())


def unpermute(y_MH: Tensor, place_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
    """(T, H): the sum of each token's rows times its weights, fp32 (or fp64, as y); differentiable once in both.

    Raises ValueError for shapes and types that do not fit.
    """
    _check(y_MH, place_Tk, len(place_Tk))
    wide = torch.promote_types(y_MH.dtype, torch.float32)
    if len(y_MH) != place_Tk.numel() or weights_Tk.shape != place_Tk.shape or weights_Tk.dtype != wide:
        raise ValueError(
            f"unpermute got rows {tuple(y_MH.shape)}, place {tuple(place_Tk.shape)}, weights {tuple(weights_Tk.shape)} "
            f"of {weights_Tk.dtype}; it needs T k rows, and weights (T, k) of {wide}"
        )
    return unpermute_op(y_MH.contiguous(), place_Tk.contiguous(), weights_Tk.contiguous())


def _check(rows: Tensor, place_Tk: Tensor, num_tokens: int) -> None:
    if rows.dim() != 2 or place_Tk.dim() != 2 or place_Tk.dtype != torch.int64 or len(place_Tk) != num_tokens:
        raise ValueError(
            f"permutation got rows {tuple(rows.shape)}, place {tuple(place_Tk.shape)} of {place_Tk.dtype}; it needs "
            "rows of H columns and the place (T, k) of the choices in torch.int64"
        )
