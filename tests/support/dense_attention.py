"""Reference of the attention tests: the formula with a dense mask, and inputs surrounded by NaN."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigmodel.kernels.attention_dropout import AttentionDropout, make_dropout
from bigmodel.kernels.mask import AttentionMask, dense


def dense_attention(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGK: Tensor,
    mask: AttentionMask,
    softcap: float | None = None,
    bias_HR: Tensor | None = None,
    dropout: AttentionDropout | None = None,
) -> Tensor:
    """softmax(score) v over the visible keys, in the type of the inputs; 0 for a query without visible keys."""
    group = q_THK.shape[1] // k_SGK.shape[1]
    k_SHK, v_SHK = k_SGK.repeat_interleave(group, 1), v_SGK.repeat_interleave(group, 1)
    score_HTS = torch.einsum("thk,shk->hts", q_THK, k_SHK) * q_THK.shape[2] ** -0.5
    if bias_HR is not None:
        reach = bias_HR.shape[1] // 2
        distance_TS = places(mask.cu_seqlens_k, len(k_SGK)) - places(mask.cu_seqlens_q, len(q_THK))[:, None]
        score_HTS = score_HTS + bias_HR[:, distance_TS.clamp(-reach, reach) + reach]
    if softcap is not None:
        score_HTS = softcap * (score_HTS / softcap).tanh()
    hidden_TS = ~dense(mask, q_THK.shape[0], k_SGK.shape[0])
    score_HTS = score_HTS.masked_fill(hidden_TS, -torch.inf)
    p_HTS = score_HTS.softmax(-1).masked_fill(hidden_TS, 0.0)
    if dropout is not None:
        p_HTS = torch.where(kept(dropout, q_THK.shape[1]), p_HTS / (1 - dropout.rate), 0.0)
    return torch.einsum("hts,shk->thk", p_HTS, v_SHK)


def dense_largest_products(q_THK: Tensor, k_SGK: Tensor, mask: AttentionMask) -> Tensor:
    """(H,) the largest scaled product over the visible pairs of each query head, -inf without any."""
    k_SHK = k_SGK.repeat_interleave(q_THK.shape[1] // k_SGK.shape[1], 1)
    product_HTS = torch.einsum("thk,shk->hts", q_THK, k_SHK) * q_THK.shape[2] ** -0.5
    seen_TS = dense(mask, q_THK.shape[0], k_SGK.shape[0])
    return torch.stack([product_TS.masked_fill(~seen_TS, -torch.inf).amax() for product_TS in product_HTS])


def kept(dropout: AttentionDropout, num_heads: int) -> Tensor:
    """(H, T, S) bool: the weights that dropout keeps, by its formula in numpy's 32-bit integers."""
    queries, keys = (rows.cpu().numpy().view(np.uint32) for rows in (dropout.query_words_T, dropout.key_words_S))
    heads = np.arange(dropout.first_head, dropout.first_head + num_heads, dtype=np.uint32) * np.uint32(0x9E3779B9)
    words = finalized(finalized(queries ^ heads[:, None])[:, :, None] + keys)
    return torch.from_numpy(words / 2**32 >= dropout.rate).to(dropout.query_words_T.device)


def finalized(words: np.ndarray) -> np.ndarray:
    """fmix32 of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        words = (words ^ words >> np.uint32(shift)) * np.uint32(factor)
    return words


def places(cu_seqlens: Tensor, rows: int) -> Tensor:
    """The position of every row in its document; any number for rows beyond the last cu_seqlens."""
    row = torch.arange(rows, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, row.to(torch.int32), right=True) - 1
    return row - cu_seqlens[document].long()


@dataclass
class Inputs:
    """q, k, v and the gradient of the output. Rows beyond the last cu_seqlens and surrounding memory are NaN."""

    mask: AttentionMask
    q_THK: Tensor
    k_SGK: Tensor
    v_SGK: Tensor
    d_out_THK: Tensor
    softcap: float | None = None
    bias_HR: Tensor | None = None
    dropout: AttentionDropout | None = None

    def in_documents(self, dtype: torch.dtype) -> "Inputs":
        """A copy with 0 in the rows beyond the last cu_seqlens, for formulas that read every row."""
        bias_HR = None if self.bias_HR is None else self.bias_HR.to(dtype)
        rows = {name: getattr(self, name).nan_to_num(0.0).to(dtype) for name in ROWS}
        return replace(self, bias_HR=bias_HR, **rows)


def cancelled(inputs: Inputs) -> dict[str, float]:
    """Largest sums of magnitudes in gradients that are exactly zero for rows with one visible key.

    Such a row has p = 1, and the gradient of its score is d_out . v - d_out . out with out = v. Plain torch subtracts
    equal bits: its error is 0, so no multiple of it is a bound. Another order of the two sums, as in the formula with
    the row sum of d_out * out, leaves eps times their magnitude.
    """
    wide = inputs.in_documents(torch.float64)
    seen_TS = dense(wide.mask, len(wide.q_THK), len(wide.k_SGK))
    row_R = (seen_TS.sum(1) == 1).nonzero()[:, 0]
    if not len(row_R):
        return {}
    key_R, group = seen_TS[row_R].int().argmax(1), wide.q_THK.shape[1] // wide.k_SGK.shape[1]
    q_RHK = wide.q_THK[row_R]
    k_RHK, v_RHK = (side[key_R].repeat_interleave(group, 1) for side in (wide.k_SGK, wide.v_SGK))
    score_RH = (wide.d_out_THK[row_R] * v_RHK).abs().sum(-1)
    scale = q_RHK.shape[2] ** -0.5
    of_q, to_k = (score_RH[..., None] * side.abs() * scale for side in (k_RHK, q_RHK))
    of_k = torch.zeros_like(wide.k_SGK).index_add(0, key_R, to_k.unflatten(1, (-1, group)).sum(2))
    return {"dq": of_q.max().item(), "dk": of_k.max().item(), "dbias": score_RH.sum(0).max().item()}


ROWS = ["q_THK", "k_SGK", "v_SGK", "d_out_THK"]


def make_inputs(
    mask: AttentionMask,
    queries: int,
    keys: int,
    heads: tuple[int, int],
    channels: int,
    dtype: torch.dtype,
    softcap: float | None = None,
    reach: int | None = None,
    dropout: float = 0.0,
) -> Inputs:
    """Random inputs on the device of the cu_seqlens, with a bias if a reach is given. q, k and v of one length are
    slices of one tensor, as from a fused projection. `dropout`: its rate."""
    device = mask.cu_seqlens_q.device
    generator = torch.Generator().manual_seed(7)
    num_heads, num_key_heads = heads

    def surrounded(rows: int, last_offset: int, width: int) -> Tensor:
        whole = torch.full((rows + 40, width, channels + 8), torch.nan, dtype=dtype, device=device)
        inner = whole[20:-20, :, :channels]
        inner[:last_offset] = torch.randn(last_offset, width, channels, generator=generator).to(device, dtype)
        return inner

    query_end, key_end = int(mask.cu_seqlens_q[-1]), int(mask.cu_seqlens_k[-1])
    if (queries, query_end) == (keys, key_end):
        fused = surrounded(queries, query_end, num_heads + 2 * num_key_heads)
        q_THK, k_SGK, v_SGK = fused.split([num_heads, num_key_heads, num_key_heads], dim=1)
    else:
        q_THK = surrounded(queries, query_end, num_heads)
        k_SGK, v_SGK = surrounded(keys, key_end, 2 * num_key_heads).chunk(2, dim=1)
    d_out_THK = surrounded(queries, query_end, num_heads)
    bias_HR = None
    if reach is not None:
        bias_HR = torch.randn(num_heads, 2 * reach + 1, generator=generator).to(device, dtype)
    seeds = [torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator) for rows in (queries, keys)]
    drops = make_dropout(dropout, *(one.to(device) for one in seeds)).from_head(5) if dropout else None
    return Inputs(mask, q_THK, k_SGK, v_SGK, d_out_THK, softcap, bias_HR, drops)


def out_and_gradients(attend, inputs: Inputs) -> dict[str, Tensor]:
    """out, dq, dk, dv and, with a bias, dbias of `attend(q, k, v, mask)`."""
    leaves = {name: getattr(inputs, f"{name}_{shape}") for name, shape in LEAVES.items()}
    leaves = {name: rows.detach().requires_grad_() for name, rows in leaves.items() if rows is not None}
    extra: dict[str, Any] = {} if inputs.softcap is None else {"softcap": inputs.softcap}
    extra |= {"bias_HR": leaves["bias"]} if "bias" in leaves else {}
    extra |= {"dropout": inputs.dropout} if inputs.dropout else {}
    out_THK = attend(leaves["q"], leaves["k"], leaves["v"], inputs.mask, **extra)
    out_THK.backward(inputs.d_out_THK)
    return {"out": out_THK.detach()} | {f"d{name}": rows.grad for name, rows in leaves.items()}


LEAVES = {"q": "THK", "k": "SGK", "v": "SGK", "bias": "HR"}


def assert_as_exact_as_plain_torch(attend, inputs: Inputs) -> None:
    """Asserts `errors_and_bounds`, the type, and zeros in the rows beyond the last cu_seqlens."""
    if problem := problem_of_results(out_and_gradients(attend, inputs), inputs):
        raise AssertionError(problem)


def problem_of_results(ours: dict[str, Tensor], inputs: Inputs) -> str:
    """What is wrong with `out_and_gradients` of an implementation; empty if nothing is."""
    for name, (error, bound) in errors_and_bounds(ours, inputs).items():
        if ours[name].dtype != inputs.q_THK.dtype:
            return f"{name}: {ours[name].dtype}, not {inputs.q_THK.dtype}"
        if not error <= bound:
            return f"{name}: error {error:.2e}, bound {bound:.2e}"
        cu_seqlens = inputs.mask.cu_seqlens_q if name in ("out", "dq") else inputs.mask.cu_seqlens_k
        if name != "dbias" and ours[name][cu_seqlens[-1] :].ne(0).any():
            return f"{name}: rows beyond the last cu_seqlens are not 0"
    return ""


def errors_and_bounds(ours: dict[str, Tensor], inputs: Inputs) -> dict[str, tuple[float, float]]:
    """Largest error against float64 of each of `out_and_gradients`, and the largest allowed: 2 (out) and 4 (gradients)
    times that of plain torch in the inputs' type, plus rounding errors where exact terms cancel."""
    dtype, found = inputs.q_THK.dtype, {}
    truth = out_and_gradients(dense_attention, inputs.in_documents(torch.float64))
    plain = out_and_gradients(dense_attention, inputs.in_documents(dtype))
    assert truth.keys() == ours.keys()
    anything_is_seen = dense(inputs.mask, len(inputs.q_THK), len(inputs.k_SGK)).any()
    assert truth["out"].any() or not anything_is_seen, "nothing to compare"
    left_over = cancelled(inputs)
    for name, exact in truth.items():
        torch_error = (plain[name].double() - exact).abs().max().item()
        bound = (2 if name == "out" else 4) * torch_error + torch.finfo(dtype).eps * (1 + left_over.get(name, 0.0))
        found[name] = ((ours[name].double() - exact).abs().max().item(), bound)
    return found


def assert_largest_products_are_those_of_a_dense_matrix(attend_and_measure, inputs: Inputs) -> None:
    """`attend_and_measure(q, k, v, mask=..., ...)`: (out, largest products)."""
    rows = inputs.q_THK, inputs.k_SGK, inputs.v_SGK
    out_THK, largest_H = attend_and_measure(
        *rows, mask=inputs.mask, softcap=inputs.softcap, bias_HR=inputs.bias_HR, dropout=inputs.dropout
    )
    wide = inputs.in_documents(torch.float64)
    wanted_H = dense_largest_products(wide.q_THK, wide.k_SGK, inputs.mask)
    assert wanted_H.isfinite().any() or not dense(inputs.mask, len(rows[0]), len(rows[1])).any(), "nothing to compare"
    assert (largest_H.dtype, largest_H.requires_grad) == (torch.float32, False)
    torch.testing.assert_close(largest_H.double(), wanted_H, rtol=1e-5, atol=1e-5)
    assert out_THK.shape == inputs.q_THK.shape
