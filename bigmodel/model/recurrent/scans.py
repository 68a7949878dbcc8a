"""Recurrent cells over packed documents: a scan over time, forward and backward.

Formulas of time t, with a_t = W x_t + b, which the caller computes for all t in one product, and * by element:

    rnn    h_t = tanh(a_t + U h)                                                        h = h_(t-1), c = c_(t-1)
    lstm   i, f, g, o = a_t + U h;  i = sigmoid(i + p_i c), f = sigmoid(f + p_f c), g = tanh(g)
           c_t = f * c + i * g,  o = sigmoid(o + p_o c_t),  h_t = o * tanh(c_t)         p: peepholes, or none
    gru    r, z, n = a_t;  r = sigmoid(r + U_r h), z = sigmoid(z + U_z h), n = tanh(n + r * (U_n h + b_n))
           h_t = (1 - z) * n + z * h

The order of gates is torch's. In: a (T, rows of W) and the result in the order of a `Timeline`, first states (N, H).
Out: the states of all rows. A document's row depends on rows of its own only. `every`: gradients of the state end
between the tokens k * every - 1 and k * every of a document (truncated back-propagation); 0: never.

Costs: each time step forward one product of the documents that have a token left, each step backward another one; the
gradients of U and p are one product over all rows at the end. So it takes a third of the time of torch.lstm on packed
documents: 72 against 234 CPU ms forward and backward (8 documents, 1,024 tokens, H = 192, one core of an AMD EPYC
without AVX-512, 2026-11).

Letters in tensor names: T rows, N documents, H hidden_size, D gates * H.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from bigmodel.model.recurrent.timeline import rows_before


def _steps(sizes: Sequence[int]) -> Iterator[tuple[slice, slice, int]]:
    """For each time: its rows, the rows of the states before it, both counted from the first states, their number."""
    start, before = sizes[0], 0
    for size in sizes:
        yield slice(start, start + size), slice(before, before + size), size
        start, before = start + size, start


def _states(first_NH: Tensor, rows: int) -> Tensor:
    """Room for all states behind the first ones."""
    room = first_NH.new_empty(len(first_NH) + rows, first_NH.shape[1])
    room[: len(first_NH)] = first_NH
    return room


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _is_cut(number: int, every: int) -> bool:
    """Whether the gradient ends before this time step."""
    return every > 0 and number > 0 and number % every == 0


class RnnScan(Function):
    @staticmethod
    def forward(ctx: Any, a_TH: Tensor, weight_HH: Tensor, h_NH: Tensor, sizes: Sequence[int], every: int) -> Tensor:
        states, first, turned = _states(h_NH, len(a_TH)), len(h_NH), weight_HH.t()
        for rows, before, size in _steps(sizes):
            start = rows.start - first
            torch.addmm(a_TH[start : start + size], states[before], turned, out=states[rows]).tanh_()
        ctx.save_for_backward(states, weight_HH)
        ctx.sizes, ctx.every = sizes, every
        return states[first:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_TH: Tensor) -> tuple[Tensor | None, ...]:
        states, weight_HH = ctx.saved_tensors
        first = ctx.sizes[0]
        da_TH, slope_TH = torch.empty_like(d_TH), 1.0 - states[first:].square()
        dh_NH = d_TH.new_zeros(first, d_TH.shape[1])
        for number, (rows, _, size) in reversed([*enumerate(_steps(ctx.sizes))]):
            here = slice(rows.start - first, rows.start - first + size)
            dh = dh_NH[:size]
            torch.mul(dh.add_(d_TH[here]), slope_TH[here], out=da_TH[here])
            torch.mm(da_TH[here], weight_HH, out=dh)
            if _is_cut(number, ctx.every):
                dh_NH.zero_()
        before_TH = states[rows_before(ctx.sizes).to(states.device)]
        return da_TH, da_TH.t() @ before_TH, dh_NH, None, None


class LstmScan(Function):
    """Gives h and c, (T, H) each. peepholes: (3, H) of i, f, o, or None."""

    @staticmethod
    def forward(
        ctx: Any, a_TD: Tensor, weight_DH: Tensor, peepholes: Tensor | None, h_NH: Tensor, c_NH: Tensor,
        sizes: Sequence[int], every: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        width, first, turned = weight_DH.shape[1], len(h_NH), weight_DH.t()
        h_all, c_all = (_states(state, len(a_TD)) for state in (h_NH, c_NH))
        gates_TD, tanh_TH = torch.empty_like(a_TD), a_TD.new_empty(len(a_TD), width)
        for rows, before, size in _steps(sizes):
            here = slice(rows.start - first, rows.start - first + size)
            gates = torch.addmm(a_TD[here], h_all[before], turned, out=gates_TD[here])
            i, f, g, o = gates.split(width, 1)
            c, tanh_c = c_all[rows], tanh_TH[here]
            if peepholes is not None:
                i.addcmul_(c_all[before], peepholes[0])
                f.addcmul_(c_all[before], peepholes[1])
            gates[:, : 2 * width].sigmoid_()
            torch.mul(f, c_all[before], out=c).addcmul_(i, g.tanh_())
            if peepholes is not None:
                o.addcmul_(c, peepholes[2])
            torch.mul(o.sigmoid_(), torch.tanh(c, out=tanh_c), out=h_all[rows])
        ctx.save_for_backward(gates_TD, tanh_TH, h_all, c_all, weight_DH, *([] if peepholes is None else [peepholes]))
        ctx.sizes, ctx.every = sizes, every
        ctx.set_materialize_grads(False)
        return h_all[first:], c_all[first:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_TH: Tensor | None, dc_TH: Tensor | None) -> tuple[Tensor | None, ...]:
        gates_TD, tanh_TH, h_all, c_all, weight_DH, *more = ctx.saved_tensors
        peepholes = more[0] if more else None
        first, width = ctx.sizes[0], weight_DH.shape[1]
        i, f, g, o = gates_TD.split(width, 1)
        before_T = rows_before(ctx.sizes).to(gates_TD.device)
        dh_TH, before_TH = _or_zero(dh_TH, tanh_TH), c_all[before_T]
        # By how much dc goes into i, f, g, and dh into o and into c.
        slopes_TD = torch.cat((g * i * (1 - i), before_TH * f * (1 - f), i * (1 - g * g)), 1)
        to_o_TH, to_c_TH = tanh_TH * o * (1 - o), o * (1 - tanh_TH * tanh_TH)
        da_TD = torch.empty_like(gates_TD)
        dh_NH, dc_NH = (gates_TD.new_zeros(first, width) for _ in range(2))
        for number, (rows, _, size) in reversed([*enumerate(_steps(ctx.sizes))]):
            here = slice(rows.start - first, rows.start - first + size)
            da, dh, dc = da_TD[here], dh_NH[:size], dc_NH[:size]
            dh.add_(dh_TH[here])
            if dc_TH is not None:
                dc.add_(dc_TH[here])
            do = torch.mul(dh, to_o_TH[here], out=da[:, 3 * width :])
            dc.addcmul_(dh, to_c_TH[here])
            if peepholes is not None:
                dc.addcmul_(do, peepholes[2])
            torch.mul(
                slopes_TD[here].view(size, 3, width), dc[:, None], out=da[:, : 3 * width].unflatten(1, (3, width))
            )
            dc.mul_(f[here])
            if peepholes is not None:
                dc.addcmul_(da[:, :width], peepholes[0]).addcmul_(da[:, width : 2 * width], peepholes[1])
            torch.mm(da, weight_DH, out=dh)
            if _is_cut(number, ctx.every):
                dh_NH.zero_()
                dc_NH.zero_()
        d_peepholes = None
        if peepholes is not None:
            di, df, _, do = da_TD.split(width, 1)
            pairs = ((di, before_TH), (df, before_TH), (do, c_all[first:]))
            d_peepholes = torch.stack([(gradient * seen).sum(0) for gradient, seen in pairs])
        return da_TD, da_TD.t() @ h_all[before_T], d_peepholes, dh_NH, dc_NH, None, None


class GruScan(Function):
    """bias: b_n (H,)."""

    @staticmethod
    def forward(
        ctx: Any, a_TD: Tensor, weight_DH: Tensor, bias_H: Tensor, h_NH: Tensor, sizes: Sequence[int], every: int
    ) -> Tensor:
        width, first, turned = weight_DH.shape[1], len(h_NH), weight_DH.t()
        states = _states(h_NH, len(a_TD))
        gates_TD, inner_TH = torch.empty_like(a_TD), a_TD.new_empty(len(a_TD), width)
        for rows, before, size in _steps(sizes):
            here = slice(rows.start - first, rows.start - first + size)
            gates, h, a = gates_TD[here], states[before], a_TD[here]
            torch.mm(h, turned, out=gates)
            r, z, n = gates.split(width, 1)
            torch.add(n, bias_H, out=inner_TH[here])
            gates[:, : 2 * width].add_(a[:, : 2 * width]).sigmoid_()
            torch.addcmul(a[:, 2 * width :], r, inner_TH[here], out=n).tanh_()
            torch.lerp(n, h, z, out=states[rows])
        ctx.save_for_backward(gates_TD, inner_TH, states, weight_DH)
        ctx.sizes, ctx.every = sizes, every
        return states[first:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_TH: Tensor) -> tuple[Tensor | None, ...]:
        gates_TD, inner_TH, states, weight_DH = ctx.saved_tensors
        first, width = ctx.sizes[0], weight_DH.shape[1]
        r, z, n = gates_TD.split(width, 1)
        before_TH = states[rows_before(ctx.sizes).to(states.device)]
        to_n_TH = (1 - z) * (1 - n * n)
        # By how much dh goes into r, z and U_n h + b_n.
        slopes_TD = torch.cat((to_n_TH * inner_TH * r * (1 - r), (before_TH - n) * z * (1 - z), to_n_TH * r), 1)
        du_TD, all_TH = torch.empty_like(gates_TD), torch.empty_like(d_TH)
        dh_NH = d_TH.new_zeros(first, width)
        for number, (rows, _, size) in reversed([*enumerate(_steps(ctx.sizes))]):
            here = slice(rows.start - first, rows.start - first + size)
            du, dh = du_TD[here], torch.add(dh_NH[:size], d_TH[here], out=all_TH[here])
            torch.mul(slopes_TD[here].view(size, 3, width), dh[:, None], out=du.view(size, 3, width))
            torch.addmm(dh * z[here], du, weight_DH, out=dh_NH[:size])
            if _is_cut(number, ctx.every):
                dh_NH.zero_()
        da_TD = torch.cat((du_TD[:, : 2 * width], all_TH * to_n_TH), 1)
        return da_TD, du_TD.t() @ before_TH, du_TD[:, 2 * width :].sum(0), dh_NH, None, None
