"""Attention over packed documents, forward and backward.

Formula, for query row t of head h, which reads key head g = h // (H // G) and attends to the keys lo(t) <= s < hi(t):

    raw_s = scale * (q[t, h] . k[s, g]) + bias[h, clamp(position(s) - position(t), -reach, reach) + reach]
    score_s = cap * tanh(raw_s / cap)            out[t, h] = sum_s softmax(score)_s * v[s, g]

and out[t, h] = 0, with zero gradients, where t attends to no key. Positions count from 0 in each document. Without a
bias raw is the scaled product alone; without a cap score = raw. With p the softmax and dp_s = dout[t, h] . v[s, g]:

    dv[s, g] = sum_th p_s * dout[t, h]           delta = dout[t, h] . out[t, h]
    draw_s = p_s * (dp_s - delta) * (1 - (score_s / cap)^2)
    dk[s, g] = scale * sum_th draw_s * q[t, h]   dq[t, h] = scale * sum_s draw_s * k[s, g]
    dbias[h, r] = sum of draw over all pairs at that distance

With dropout p_s counts as p_s * f_s in out and dv, and dp_s as dp_s * f_s, with f_s = 0 or 1 / (1 - rate)
(`kernels/attention_dropout.py`).

In: q (T, H, K), k and v (S, G, K) with any strides (slices of a fused projection too), an AttentionMask.
Out: (T, H, K). Guarantees: no document influences another, bitwise; rows beyond the last of cu_seqlens are written
(zero) and influence nothing; the backward has no atomics and repeats bitwise; key heads are read in place. On a GPU
nothing waits for the device, no value on the device decides a shape or a launch, and other documents cause no
recompilation (other row strides do, and a window where there was none): forward and backward may be captured in a CUDA
graph and replayed with other cu_seqlens in the same tensor, and torch.compile sees two operators without graph breaks.
Costs: 2 matrix products per visited tile forward and 7 backward (5 would need atomics; 9 with the gradient of a bias);
memory for out and one fp32 per query row and head. Full tiles run without a mask. A bias costs one load from the
first-level cache per pair, a cap about fifteen instructions; without them the cost is zero. The largest products
(`attention_and_largest`) cost one fp32 per tile and head and, beside a bias or a cap, a maximum per pair.

Example: documents of 3 and 5 tokens, causal, 8 heads on 2 key heads of 64 channels: q (8, 8, 64), k and v (8, 2, 64),
causal(cu_seqlens = [0, 3, 8]) give out (8, 8, 64); row 3 begins the second document: its output is its own v.

Shape suffixes: T queries, S keys, H query heads, G key heads, K channels of a head, R distances (2 * reach + 1),
N tiles, F fields of a tile. Inside kernels: M rows of the tile, C columns of the visited tile.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, library

from bigmodel.kernels import attention_hopper
from bigmodel.kernels.attention_dropout import AttentionDropout, factors, keeps, load_key_words, load_query_words
from bigmodel.kernels.attention_kernels import AttentionCall, AttentionKernel, chosen
from bigmodel.kernels.attention_libraries import LIBRARIES
from bigmodel.kernels.cpu import is_wide
from bigmodel.kernels.mask import (
    BOTH,
    FULL,
    LOWER,
    UNBOUNDED,
    UPPER,
    AttentionMask,
    columns_in_part,
    dense,
    first_column,
    load_tile,
    sees,
    sees_tile,
)
from bigmodel.kernels.tiles import TileMetadata, make_tile_metadata
from bigmodel.kernels.triton_import import INTERPRETED, tl, triton

aten = torch.ops.aten
HALF_TYPES = (torch.bfloat16, torch.float16)

# Part 2: the reference.


def attention_reference(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGK: Tensor,
    mask: AttentionMask,
    scale: float | None = None,
    softcap: float | None = None,
    bias_HR: Tensor | None = None,
    dropout: AttentionDropout | None = None,
) -> Tensor:
    """Attention without Triton; runs on CPU. Shapes as `attention`, any float type.

    On a CPU, without cap, bias and dropout: torch's kernel, one call for all documents of equal lengths and prefixes;
    in bf16 where the processor has units for it (`kernels/cpu.py`), with an fp32 backward.
    Else: the formula in plain torch, one document at a time. No document is padded, and the arithmetic of a document
    does not depend on the others of the batch: it is the same to the last bit in any micro-batch.
    """
    scale = q_THK.shape[-1] ** -0.5 if scale is None else scale
    dtype = q_THK.dtype
    on_cpu = q_THK.device.type == "cpu"
    is_plain = on_cpu and softcap is None and bias_HR is None and dropout is None
    if on_cpu and dtype in HALF_TYPES and (is_wide(q_THK) or not is_plain):
        # Without units for them 16-bit types are multiplied at 1.2 GFLOP/s, fp32 at 32: compute in fp32, round once.
        q_THK, k_SGK, v_SGK = q_THK.float(), k_SGK.float(), v_SGK.float()
    if is_plain:
        rows = _with_dense_channels(q_THK, k_SGK, v_SGK)
        offsets = mask.cu_seqlens_q, mask.cu_seqlens_k, mask.query_prefix, mask.key_prefix
        return cpu_attention_op(*rows, *offsets, mask.left, mask.right, scale)[0].to(dtype)
    bias_HR = None if bias_HR is None else bias_HR.to(q_THK.dtype)
    return _by_formula(q_THK, k_SGK, v_SGK, mask, scale, softcap, bias_HR, dropout).to(dtype)


ROWS_AT_ONCE = 512  # of a document's queries in `largest_products`: bounds the products in memory


@library.custom_op("bigmodel::largest_products", mutates_args=())
def largest_products(
    q_THK: Tensor, k_SGK: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    query_prefix: Tensor | None, key_prefix: Tensor | None, left: int | None, right: int | None, scale: float,
) -> Tensor:  # fmt: skip
    """(H,) fp32: the largest scale * q . k over the visible pairs of each query head, -inf without any; on a CPU.

    One document after the other, in fp32 at least: the same to the last bit in any micro-batch. Costs a third product.
    """
    mask = AttentionMask(cu_seqlens_q, cu_seqlens_k, left, right, key_prefix, query_prefix)
    num_heads, num_key_heads = q_THK.shape[1], k_SGK.shape[1]
    wide = torch.promote_types(q_THK.dtype, torch.float32)
    largest_GR = torch.full((num_key_heads, num_heads // num_key_heads), -torch.inf, dtype=wide)
    query_edges, key_edges = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for number in range(mask.num_documents):
        queries, keys = (slice(edges[number], edges[number + 1]) for edges in (query_edges, key_edges))
        if queries.start == queries.stop or keys.start == keys.stop:
            continue
        sees_TS = _visible_in_document(mask, number, queries.stop - queries.start, keys.stop - keys.start)
        k_GKS = k_SGK[keys].to(wide).permute(1, 2, 0)
        q_GRTK = q_THK[queries].to(wide).unflatten(1, (num_key_heads, -1)).permute(1, 2, 0, 3)
        for rows_GRTK, visible_TS in zip(q_GRTK.split(ROWS_AT_ONCE, 2), sees_TS.split(ROWS_AT_ONCE), strict=True):
            product_GRTS = rows_GRTK @ k_GKS[:, None] * scale
            largest_GR = torch.maximum(largest_GR, product_GRTS.masked_fill_(~visible_TS, -torch.inf).amax((2, 3)))
    return largest_GR.flatten().float()


@largest_products.register_fake
def _(q_THK: Tensor, *_inputs: Any) -> Tensor:
    return q_THK.new_empty(q_THK.shape[1], dtype=torch.float32)


class _Alike(NamedTuple):
    """Documents of equal lengths and prefixes: rows of their queries and keys, a slice or (B, rows) row numbers."""

    queries: slice | Tensor
    keys: slice | Tensor
    is_causal: bool
    hidden_TS: Tensor | None  # 0 or -inf, added to the scores; None: all keys, or causal


def _alike_documents(mask: AttentionMask, dtype: torch.dtype) -> list[_Alike]:
    """The documents with queries and keys, each once. Pretraining has about 20 of them in 2,000 places of cu_seqlens,
    and 4,096 documents of 1 to 8 tokens are eight groups."""
    query_edges, key_edges = mask.cu_seqlens_q.tolist(), mask.cu_seqlens_k.tolist()
    query_prefixes, key_prefixes = (
        [0] * mask.num_documents if prefix is None else prefix.tolist()
        for prefix in (mask.query_prefix, mask.key_prefix)
    )
    groups: dict[tuple[int, ...], list[int]] = {}
    for number in range(mask.num_documents):
        queries = query_edges[number + 1] - query_edges[number]
        keys = key_edges[number + 1] - key_edges[number]
        if queries and keys:
            shape = queries, keys, query_prefixes[number], key_prefixes[number]
            groups.setdefault(shape, []).append(number)

    def rows(edges: list[int], numbers: list[int], count: int) -> slice | Tensor:
        first = [edges[number] for number in numbers]
        return (
            slice(first[0], first[0] + count) if len(first) == 1 else torch.tensor(first)[:, None] + torch.arange(count)
        )

    return [
        _Alike(
            rows(query_edges, numbers, queries),
            rows(key_edges, numbers, keys),
            *_hidden(mask, numbers[0], queries, keys, dtype),
        )
        for (queries, keys, *_), numbers in groups.items()
    ]


def _hidden(
    mask: AttentionMask, number: int, queries: int, keys: int, dtype: torch.dtype
) -> tuple[bool, Tensor | None]:
    """Whether a document's mask is causal, and what is added to its scores."""
    left, right = mask.window
    left_is_open = left >= queries - 1
    is_causal = left_is_open and mask.right == 0 and mask.key_prefix is None
    if is_causal or (left_is_open and right >= keys - 1):
        return is_causal, None
    sees_TS = _visible_in_document(mask, number, queries, keys)
    return False, torch.zeros(queries, keys, dtype=dtype).masked_fill(~sees_TS, -torch.inf)


def _taken(rows: Tensor, where: slice | Tensor) -> Tensor:
    """(B, heads, rows of a document, ...) of (rows, heads, ...)."""
    return (rows[where][None] if isinstance(where, slice) else rows[where]).transpose(1, 2)


def _put(rows: Tensor, where: slice | Tensor, values: Tensor) -> None:
    """The inverse of `_taken`: writes into `rows`."""
    rows[where] = values.transpose(1, 2)[0] if isinstance(where, slice) else values.transpose(1, 2)


@library.custom_op("bigmodel::cpu_attention", mutates_args=())
def cpu_attention_op(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    query_prefix: Tensor | None, key_prefix: Tensor | None, left: int | None, right: int | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Out, and the log of each query's sum of exponentials, (T, H). An operator: torch.compile sees no lengths."""
    mask = AttentionMask(cu_seqlens_q, cu_seqlens_k, left, right, key_prefix, query_prefix)
    out_THK = torch.zeros(q_THK.shape, dtype=q_THK.dtype)
    lse_TH = torch.zeros(q_THK.shape[:2], dtype=torch.promote_types(q_THK.dtype, torch.float32))
    for queries, keys, is_causal, hidden_TS in _alike_documents(mask, q_THK.dtype):
        rows = _taken(q_THK, queries), _taken(k_SGK, keys), _taken(v_SGK, keys)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *rows, 0.0, is_causal, attn_mask=hidden_TS, scale=scale
        )
        _put(out_THK, queries, out)
        _put(lse_TH, queries, lse)
    return out_THK, lse_TH


@library.custom_op("bigmodel::cpu_attention_backward", mutates_args=())
def _cpu_attention_backward(
    d_out_THK: Tensor, out_THK: Tensor, lse_TH: Tensor, q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, query_prefix: Tensor | None, key_prefix: Tensor | None,
    left: int | None, right: int | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv). In fp32 at least: torch's kernel is twice as fast in bf16 forward, but 1.3 to 2 times slower here
    and three times as far off (AMX, torch 2.13)."""
    mask = AttentionMask(cu_seqlens_q, cu_seqlens_k, left, right, key_prefix, query_prefix)
    dtype, wide = q_THK.dtype, lse_TH.dtype
    d_out_THK, out_THK, q_THK, k_SGK, v_SGK = (x.to(wide) for x in (d_out_THK, out_THK, q_THK, k_SGK, v_SGK))
    dq_THK, dk_SGK, dv_SGK = (torch.zeros(rows.shape, dtype=wide) for rows in (q_THK, k_SGK, v_SGK))
    (d_out_THK,) = _with_dense_channels(d_out_THK)  # loss.sum() sends one whose strides are all 0
    for queries, keys, is_causal, hidden_TS in _alike_documents(mask, wide):
        rows = _taken(q_THK, queries), _taken(k_SGK, keys), _taken(v_SGK, keys)
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _taken(d_out_THK, queries), *rows, _taken(out_THK, queries), _taken(lse_TH, queries), 0.0, is_causal,
            attn_mask=hidden_TS, scale=scale,
        )  # fmt: skip
        for gradients, where, values in zip((dq_THK, dk_SGK, dv_SGK), (queries, keys, keys), found, strict=True):
            _put(gradients, where, values)
    return dq_THK.to(dtype), dk_SGK.to(dtype), dv_SGK.to(dtype)


@cpu_attention_op.register_fake
def _(q_THK: Tensor, *_inputs: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q_THK.dtype, torch.float32)
    return q_THK.new_empty(q_THK.shape), q_THK.new_empty(q_THK.shape[:2], dtype=wide)


@_cpu_attention_backward.register_fake
def _(_d_out_THK: Tensor, _out: Tensor, _lse: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(rows.new_empty(rows.shape) for rows in inputs[:3])


def _remember_on_cpu(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:7])
    ctx.settings = inputs[7:]


def _differentiate_on_cpu(ctx: Any, d_out_THK: Tensor | None, _d_lse_TH: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out_THK is None:
        return (None,) * 10
    return (*_cpu_attention_backward(d_out_THK, *ctx.saved_tensors, *ctx.settings), *[None] * 7)


cpu_attention_op.register_autograd(_differentiate_on_cpu, setup_context=_remember_on_cpu)


@torch.compiler.disable
def _by_formula(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, mask: AttentionMask, scale: float,
    softcap: float | None, bias_HR: Tensor | None, dropout: AttentionDropout | None,
) -> Tensor:  # fmt: skip
    """The formula, one document at a time. torch.compile leaves it alone: it would compile each length anew."""
    query_edges, key_edges = mask.cu_seqlens_q.tolist(), mask.cu_seqlens_k.tolist()
    outs, written = [], 0
    for number in range(mask.num_documents):
        queries, keys = (slice(edges[number], edges[number + 1]) for edges in (query_edges, key_edges))
        if queries.start == queries.stop or keys.start == keys.stop:
            continue
        q, k, v = q_THK[queries], k_SGK[keys], v_SGK[keys]
        drops = None if dropout is None else factors(dropout, queries, keys, q.shape[1], q.dtype)
        outs.append(q_THK.new_zeros(queries.start - written, *q_THK.shape[1:]))
        outs.append(_attend_document_by_formula(q, k, v, mask, number, scale, softcap, bias_HR, drops))
        written = queries.stop
    outs.append(q_THK.new_zeros(q_THK.shape[0] - written, *q_THK.shape[1:]))
    out_THK = torch.cat(outs)
    return out_THK if written else out_THK + _zero_of(q_THK, k_SGK, v_SGK, bias_HR)


def _zero_of(*inputs: Tensor | None) -> Tensor:
    """0 with a gradient of zeros at every input: the sum of none of their elements, which may be NaN."""
    return torch.stack([rows[:0].sum() for rows in inputs if rows is not None]).sum()


def _attend_document_by_formula(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, mask: AttentionMask, number: int, scale: float,
    softcap: float | None, bias_HR: Tensor | None, factors_HTS: Tensor | None,
) -> Tensor:  # fmt: skip
    group = q_THK.shape[1] // k_SGK.shape[1]
    k_SHK, v_SHK = k_SGK.repeat_interleave(group, 1), v_SGK.repeat_interleave(group, 1)
    score_HTS = torch.einsum("thk,shk->hts", q_THK, k_SHK) * scale
    if bias_HR is not None:
        reach = bias_HR.shape[1] // 2
        place_T, place_S = (torch.arange(rows.shape[0], device=q_THK.device) for rows in (q_THK, k_SGK))
        distance_TS = (place_S - place_T[:, None]).clamp(-reach, reach)
        score_HTS = score_HTS + bias_HR[:, distance_TS + reach]
    if softcap is not None:
        score_HTS = softcap * torch.tanh(score_HTS / softcap)
    hidden_TS = ~_visible_in_document(mask, number, q_THK.shape[0], k_SGK.shape[0])
    score_HTS = score_HTS.masked_fill(hidden_TS, -torch.inf)
    p_HTS = score_HTS.softmax(-1).masked_fill(hidden_TS, 0.0)
    if factors_HTS is not None:
        p_HTS = p_HTS * factors_HTS
    return torch.einsum("hts,shk->thk", p_HTS, v_SHK)


def _visible_in_document(mask: AttentionMask, number: int, queries: int, keys: int) -> Tensor:
    """(T, S) bool: the mask inside one document."""
    cu_seqlens_q, cu_seqlens_k = (mask.cu_seqlens_q.new_tensor([0, rows]) for rows in (queries, keys))
    key_prefix, query_prefix = (
        None if prefix is None else prefix[number : number + 1] for prefix in (mask.key_prefix, mask.query_prefix)
    )
    left, right = mask.left, mask.right
    return dense(AttentionMask(cu_seqlens_q, cu_seqlens_k, left, right, key_prefix, query_prefix), queries, keys)


# Part 3: Triton kernels. Scores are in base 2: scale, bias and cap come multiplied by log2(e), as scale2, bias, cap2.
# A masked score is HIDDEN. It is finite, so that no inf - inf makes a NaN: what a row sums up before its first unmasked
# key is multiplied by exp2(HIDDEN - real) = 0 at that key. It is a power of two, so that its product with any scale is
# exact: the compiler fuses one of two subtracted products with the subtraction, and 1e30 would be rounded by 1e22,
# whose exp2 is infinite. REACH < 0: no bias.

LOG2_E = 1.4426950408889634
HIDDEN = tl.constexpr(-(2.0**100))
MAX_REACH_WITH_GRADIENT = 2048  # the bias gradient takes 210 registers here, and spills at 8,192 (sm_90, 64 channels)


INSIDE, ZEROS, LAST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what `load_rows` gives from `end` on


@triton.jit
def load_rows(base, first, end, stride, ROWS: tl.constexpr, CHANNELS: tl.constexpr, HEAD: tl.constexpr,
              BEYOND: tl.constexpr):  # fmt: skip
    """Rows [first, first + ROWS) of a head as (ROWS, HEAD); 0 in channels from CHANNELS on.

    From `end` on: ZEROS, or the LAST row before it again, which needs fewer instructions, or nothing where a full tile
    lies INSIDE its document. With a constant stride an address is one instruction.
    """
    row = first + tl.arange(0, ROWS)
    channel = tl.arange(0, HEAD)
    inside = row < end
    if BEYOND == LAST:
        row = tl.minimum(row, end - 1)
    pointers = base + (row.to(tl.int64) * stride)[:, None] + channel[None, :]
    if BEYOND == ZEROS:
        return tl.load(pointers, mask=inside[:, None] & (channel < CHANNELS)[None, :], other=0.0)
    elif CHANNELS != HEAD:
        return tl.load(pointers, mask=(channel < CHANNELS)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_numbers(base, first, end, beyond, COUNT: tl.constexpr, BOUNDED: tl.constexpr):
    """(COUNT,) numbers from `first` on; `beyond` from `end` on."""
    place = tl.arange(0, COUNT)
    if BOUNDED:
        return tl.load(base + first + place, mask=place < end - first, other=beyond)
    else:
        return tl.load(base + first + place)


@triton.jit
def store_rows(base, values, first, end, stride, ROWS: tl.constexpr, CHANNELS: tl.constexpr, HEAD: tl.constexpr):
    """The inverse of `load_rows`; does not write rows from `end` on and channels from CHANNELS on."""
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, HEAD)
    pointers = base + first.to(tl.int64) * stride + row[:, None] * stride + channel[None, :]
    inside = (first + row < end)[:, None] & (channel < CHANNELS)[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def tanh(x):
    """Relative error at most 2e-7: 1 - 2 / (1 + exp(2 x)); near 0, where this is inexact, the fifth convergent of
    Lambert's continued fraction x / (1 + x^2 / (3 + x^2 / (5 + ...)))."""
    square = x * x
    near_zero = x * (945 + square * (105 + square)) / (945 + square * (420 + square * 15))
    return tl.where(tl.abs(x) < 0.75, near_zero, 1 - 2 / (1 + tl.exp2(2.8853900817779268 * x)))


@triton.jit
def score_of(product_MC, distance_MC, head, bias, scale2, cap2, REACH: tl.constexpr, CAPPED: tl.constexpr):
    """Scores in base 2, from the products q . k and the distances (position of the key - position of the query)."""
    score_MC = product_MC * scale2
    if REACH >= 0:
        clamped_MC = tl.minimum(tl.maximum(distance_MC, -REACH), REACH)
        score_MC += tl.load(bias + head * (2 * REACH + 1) + REACH + clamped_MC)
    if CAPPED:
        score_MC = cap2 * tanh(score_MC / cap2)
    return score_MC


@triton.jit
def raw_gradient(p_MC, dp_MC, delta_MC, score_MC, cap2, CAPPED: tl.constexpr):
    """The gradient of scale * product + bias: backward through the softmax and the cap."""
    d_raw_MC = p_MC * (dp_MC - delta_MC)
    if CAPPED:
        tanh_MC = score_MC / cap2
        d_raw_MC *= 1 - tanh_MC * tanh_MC
    return d_raw_MC


@triton.jit(do_not_specialize=["left", "right", "num_rows", "first_head", "threshold"])
def forward_kernel(q, k, v, out, lse, largest, bias, query_words, key_words, first_head, threshold, factor, tiles,
                   q_stride: tl.constexpr, q_head_stride, k_stride: tl.constexpr, k_head_stride,
                   v_stride: tl.constexpr, v_head_stride, left, right, scale2, cap2, num_heads, num_rows,
                   GROUP: tl.constexpr, REACH: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
                   CHANNELS: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
                   COLUMNS: tl.constexpr):  # fmt: skip
    """One program: a tile, or part of one, of queries of one head. Writes out, lse = log2 of the sum of exp2 of the
    scores, -inf for rows without keys, and largest[program], unless None: the largest scale * product of a visible
    pair, in natural units."""
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    first_row, row_end, column_end, beside, lo, hi, begin, full_from, full_to, visited = load_tile(
        tiles, tl.program_id(0) // num_heads, left, right, ROWS, COLUMNS, PARTS
    )
    if first_row >= row_end:
        return
    q_MH = load_rows(q + head * q_head_stride, first_row, row_end, q_stride, ROWS, CHANNELS, HEAD, ZEROS)
    k += (head // GROUP) * k_head_stride
    v += (head // GROUP) * v_head_stride
    if query_words is not None:
        query_row = first_row + tl.arange(0, ROWS)
        query_word_M = load_query_words(query_words, query_row, query_row < row_end, first_head + head)
    acc_MH = tl.zeros([ROWS, HEAD], tl.float32)
    top_M = tl.full([ROWS], HIDDEN, tl.float32)
    total_M = tl.zeros([ROWS], tl.float32)
    PLAIN: tl.constexpr = REACH < 0 and not CAPPED
    unit = scale2 if PLAIN else 1.0  # plain products are scaled inside the exponent, at no cost
    TRACKS: tl.constexpr = largest is not None and not PLAIN  # plain scores are the scaled products: top has them
    if TRACKS:
        top_product_M = tl.full([ROWS], HIDDEN, tl.float32)
    ENDS: tl.constexpr = BOTH if WINDOWED else UPPER
    for part in tl.static_range(2):
        # Read again in each part: values that are needed here alone hold no registers in the other part's loop.
        first_row, row_end, column_end, beside, lo, hi, begin, full_from, full_to, visited = load_tile(
            tiles, tl.program_id(0) // num_heads, left, right, ROWS, COLUMNS, PARTS
        )
        start, stop = columns_in_part(part, begin, full_from, full_to, visited, COLUMNS)
        for place in range(start, stop, COLUMNS):
            first = first_column(part, place, begin, full_from, full_to, COLUMNS)
            column = first + tl.arange(0, COLUMNS)
            k_CH = load_rows(k, first, column_end, k_stride, COLUMNS, CHANNELS, HEAD, INSIDE if part == FULL else LAST)
            score_MC = tl.dot(q_MH, tl.trans(k_CH), input_precision="ieee")
            if TRACKS:
                product_MC = score_MC
                if part != FULL:
                    product_MC = tl.where(sees_tile(lo, hi, first, COLUMNS, ENDS), product_MC, HIDDEN)
                top_product_M = tl.maximum(top_product_M, tl.max(product_MC, 1))
            if not PLAIN:
                distance_MC = column[None, :] - (beside + tl.arange(0, ROWS))[:, None]
                score_MC = score_of(score_MC, distance_MC, head, bias, scale2, cap2, REACH, CAPPED)
            if part != FULL:
                score_MC = tl.where(sees_tile(lo, hi, first, COLUMNS, ENDS), score_MC, HIDDEN)
            new_top_M = tl.maximum(top_M, tl.max(score_MC, 1) * unit)
            p_MC = tl.exp2(score_MC * unit - new_top_M[:, None])
            shrink_M = tl.exp2(top_M - new_top_M)
            total_M = total_M * shrink_M + tl.sum(p_MC, 1)
            if query_words is not None:
                key_word_C = load_key_words(key_words, column, column < column_end)
                p_MC = tl.where(keeps(query_word_M[:, None], key_word_C[None, :], threshold), p_MC * factor, 0.0)
            v_CH = load_rows(v, first, column_end, v_stride, COLUMNS, CHANNELS, HEAD, INSIDE if part == FULL else LAST)
            acc_MH = tl.dot(p_MC.to(v_CH.dtype), v_CH, acc_MH * shrink_M[:, None], input_precision="ieee")
            top_M = new_top_M
    first_row, row_end, column_end, beside, lo, hi, begin, full_from, full_to, visited = load_tile(
        tiles, tl.program_id(0) // num_heads, left, right, ROWS, COLUMNS, PARTS
    )
    sees_any_M = lo < hi
    total_M = tl.where(sees_any_M, total_M, 1.0)
    out_MH = tl.where(sees_any_M[:, None], acc_MH / total_M[:, None], 0.0)
    store_rows(out + head * CHANNELS, out_MH, first_row, row_end, num_heads * CHANNELS, ROWS, CHANNELS, HEAD)
    row = first_row + tl.arange(0, ROWS)
    lse_M = tl.where(sees_any_M, top_M + tl.log2(total_M), float("-inf"))
    tl.store(lse + head * num_rows + row, lse_M, mask=row < row_end)
    if largest is not None:
        product2_M = top_product_M * scale2 if TRACKS else top_M
        product2_M = tl.where(sees_any_M & (row < row_end), product2_M, float("-inf"))
        tl.store(largest + tl.program_id(0), tl.max(product2_M, 0) * 0.6931471805599453)  # ln 2


@triton.jit(do_not_specialize=["num_rows"])
def delta_kernel(out, d_out, delta, d_out_stride, d_out_head_stride, num_heads, num_rows,
                 CHANNELS: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """delta[head, row] = d_out . out, in fp32."""
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    first = (tl.program_id(0) // num_heads) * ROWS
    out_MH = load_rows(out + head * CHANNELS, first, num_rows, num_heads * CHANNELS, ROWS, CHANNELS, HEAD, ZEROS)
    d_out_MH = load_rows(d_out + head * d_out_head_stride, first, num_rows, d_out_stride, ROWS, CHANNELS, HEAD, ZEROS)
    row = first + tl.arange(0, ROWS)
    delta_M = tl.sum(out_MH.to(tl.float32) * d_out_MH.to(tl.float32), 1)
    tl.store(delta + head * num_rows + row, delta_M, mask=row < num_rows)


@triton.jit(do_not_specialize=["left", "right", "num_rows", "first_head", "threshold"])
def query_gradient_kernel(q, k, v, d_out, dq, lse, delta, bias, query_words, key_words, first_head, threshold, factor,
                          tiles, q_stride: tl.constexpr, q_head_stride, k_stride: tl.constexpr, k_head_stride,
                          v_stride: tl.constexpr, v_head_stride, d_out_stride: tl.constexpr, d_out_head_stride, left,
                          right, scale, scale2, cap2, num_heads, num_rows, GROUP: tl.constexpr, REACH: tl.constexpr,
                          CAPPED: tl.constexpr, WINDOWED: tl.constexpr, CHANNELS: tl.constexpr, HEAD: tl.constexpr,
                          ROWS: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """One program: dq of a tile, or part of one, of queries of one head."""
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    first_row, row_end, column_end, beside, lo, hi, begin, full_from, full_to, visited = load_tile(
        tiles, tl.program_id(0) // num_heads, left, right, ROWS, COLUMNS, PARTS
    )
    if first_row >= row_end:
        return
    q_MH = load_rows(q + head * q_head_stride, first_row, row_end, q_stride, ROWS, CHANNELS, HEAD, ZEROS)
    d_out_MH = load_rows(
        d_out + head * d_out_head_stride, first_row, row_end, d_out_stride, ROWS, CHANNELS, HEAD, ZEROS
    )
    row = first_row + tl.arange(0, ROWS)
    lse_M = tl.load(lse + head * num_rows + row, mask=row < row_end, other=0.0)
    delta_M = tl.load(delta + head * num_rows + row, mask=row < row_end, other=0.0)
    k += (head // GROUP) * k_head_stride
    v += (head // GROUP) * v_head_stride
    if query_words is not None:
        query_word_M = load_query_words(query_words, row, row < row_end, first_head + head)
    dq_MH = tl.zeros([ROWS, HEAD], tl.float32)
    ENDS: tl.constexpr = BOTH if WINDOWED else UPPER
    for part in tl.static_range(2):
        first_row, row_end, column_end, beside, lo, hi, begin, full_from, full_to, visited = load_tile(
            tiles, tl.program_id(0) // num_heads, left, right, ROWS, COLUMNS, PARTS
        )
        start, stop = columns_in_part(part, begin, full_from, full_to, visited, COLUMNS)
        for place in range(start, stop, COLUMNS):
            first = first_column(part, place, begin, full_from, full_to, COLUMNS)
            column = first + tl.arange(0, COLUMNS)
            distance_MC = column[None, :] - (beside + tl.arange(0, ROWS))[:, None]
            k_CH = load_rows(k, first, column_end, k_stride, COLUMNS, CHANNELS, HEAD, INSIDE if part == FULL else LAST)
            v_CH = load_rows(v, first, column_end, v_stride, COLUMNS, CHANNELS, HEAD, INSIDE if part == FULL else LAST)
            product_MC = tl.dot(q_MH, tl.trans(k_CH), input_precision="ieee")
            score_MC = score_of(product_MC, distance_MC, head, bias, scale2, cap2, REACH, CAPPED)
            p_MC = tl.exp2(score_MC - lse_M[:, None])
            if part != FULL:
                p_MC = tl.where(sees_tile(lo, hi, first, COLUMNS, ENDS), p_MC, 0.0)
            dp_MC = tl.dot(d_out_MH, tl.trans(v_CH), input_precision="ieee")
            if query_words is not None:
                key_word_C = load_key_words(key_words, column, column < column_end)
                dp_MC = tl.where(keeps(query_word_M[:, None], key_word_C[None, :], threshold), dp_MC * factor, 0.0)
            d_raw_MC = raw_gradient(p_MC, dp_MC, delta_M[:, None], score_MC, cap2, CAPPED)
            dq_MH = tl.dot(d_raw_MC.to(k_CH.dtype), k_CH, dq_MH, input_precision="ieee")
    first_row, row_end, column_end, beside, lo, hi, begin, full_from, full_to, visited = load_tile(
        tiles, tl.program_id(0) // num_heads, left, right, ROWS, COLUMNS, PARTS
    )
    store_rows(dq + head * CHANNELS, dq_MH * scale, first_row, row_end, num_heads * CHANNELS, ROWS, CHANNELS, HEAD)


@triton.jit(do_not_specialize=["left", "right", "num_rows", "first_head", "threshold"])
def key_gradient_kernel(q, k, v, d_out, dk, dv, lse, delta, bias, query_words, key_words, first_head, threshold,
                        factor, tiles, q_stride: tl.constexpr, q_head_stride, k_stride: tl.constexpr, k_head_stride,
                        v_stride: tl.constexpr, v_head_stride, d_out_stride: tl.constexpr, d_out_head_stride, left,
                        right, scale, scale2, cap2, num_heads, num_rows, GROUP: tl.constexpr, REACH: tl.constexpr,
                        CAPPED: tl.constexpr, WINDOWED: tl.constexpr, CHANNELS: tl.constexpr, HEAD: tl.constexpr,
                        ROWS: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """One program: dk and dv of a tile, or part of one, of keys of one key head, summed over its GROUP query heads.

    The mask is transposed: rows are keys, columns are queries, `left` and `right` come exchanged.
    num_heads counts key heads, num_rows queries.
    """
    key_head = (tl.program_id(0) % num_heads).to(tl.int64)
    first_row, row_end, column_end, beside, lo, hi, begin, full_from, full_to, visited = load_tile(
        tiles, tl.program_id(0) // num_heads, left, right, ROWS, COLUMNS, PARTS
    )
    if first_row >= row_end:
        return
    k_MH = load_rows(k + key_head * k_head_stride, first_row, row_end, k_stride, ROWS, CHANNELS, HEAD, ZEROS)
    v_MH = load_rows(v + key_head * v_head_stride, first_row, row_end, v_stride, ROWS, CHANNELS, HEAD, ZEROS)
    if query_words is not None:
        key_row = first_row + tl.arange(0, ROWS)
        key_word_M = load_key_words(key_words, key_row, key_row < row_end)
    dk_MH = tl.zeros([ROWS, HEAD], tl.float32)
    dv_MH = tl.zeros([ROWS, HEAD], tl.float32)
    # Queries from column_end on weigh exp2(0 - 0) = 1 and have zeros in q, d_out and delta, so they add 0. A changed
    # score may be large there: then their lse is infinite and they weigh 0.
    BEYOND_LSE: tl.constexpr = 0.0 if REACH < 0 and not CAPPED else float("inf")
    ENDS: tl.constexpr = BOTH if WINDOWED else LOWER
    for part in tl.static_range(2):
        first_row, row_end, column_end, beside, lo, hi, begin, full_from, full_to, visited = load_tile(
            tiles, tl.program_id(0) // num_heads, left, right, ROWS, COLUMNS, PARTS
        )
        start, stop = columns_in_part(part, begin, full_from, full_to, visited, COLUMNS)
        for member in range(GROUP):
            head = key_head * GROUP + member
            q_head, d_out_head = q + head * q_head_stride, d_out + head * d_out_head_stride
            lse_head, delta_head = lse + head * num_rows, delta + head * num_rows
            for place in range(start, stop, COLUMNS):
                first = first_column(part, place, begin, full_from, full_to, COLUMNS)
                column = first + tl.arange(0, COLUMNS)
                distance_MC = (beside + tl.arange(0, ROWS))[:, None] - column[None, :]
                # Both products before the weights: fewer registers than a product at a time.
                q_CH = load_rows(
                    q_head, first, column_end, q_stride, COLUMNS, CHANNELS, HEAD, INSIDE if part == FULL else ZEROS
                )
                product_MC = tl.dot(k_MH, tl.trans(q_CH), input_precision="ieee")
                d_out_CH = load_rows(
                    d_out_head,
                    first,
                    column_end,
                    d_out_stride,
                    COLUMNS,
                    CHANNELS,
                    HEAD,
                    INSIDE if part == FULL else ZEROS,
                )
                dp_MC = tl.dot(v_MH, tl.trans(d_out_CH), input_precision="ieee")
                lse_C = load_numbers(lse_head, first, column_end, BEYOND_LSE, COLUMNS, part != FULL)
                score_MC = score_of(product_MC, distance_MC, head, bias, scale2, cap2, REACH, CAPPED)
                p_MC = tl.exp2(score_MC - lse_C[None, :])
                if part != FULL:
                    p_MC = tl.where(sees_tile(lo, hi, first, COLUMNS, ENDS), p_MC, 0.0)
                kept_MC = p_MC
                if query_words is not None:
                    query_word_C = load_query_words(query_words, column, column < column_end, first_head + head)
                    is_kept_MC = keeps(query_word_C[None, :], key_word_M[:, None], threshold)
                    kept_MC = tl.where(is_kept_MC, p_MC * factor, 0.0)
                    dp_MC = tl.where(is_kept_MC, dp_MC * factor, 0.0)
                delta_C = load_numbers(delta_head, first, column_end, 0.0, COLUMNS, part != FULL)
                d_raw_MC = raw_gradient(p_MC, dp_MC, delta_C[None, :], score_MC, cap2, CAPPED)
                dv_MH = tl.dot(kept_MC.to(d_out_CH.dtype), d_out_CH, dv_MH, input_precision="ieee")
                dk_MH = tl.dot(d_raw_MC.to(q_CH.dtype), q_CH, dk_MH, input_precision="ieee")
    first_row, row_end, column_end, beside, lo, hi, begin, full_from, full_to, visited = load_tile(
        tiles, tl.program_id(0) // num_heads, left, right, ROWS, COLUMNS, PARTS
    )
    dk_base, dv_base = dk + key_head * CHANNELS, dv + key_head * CHANNELS
    store_rows(dk_base, dk_MH * scale, first_row, row_end, num_heads * CHANNELS, ROWS, CHANNELS, HEAD)
    store_rows(dv_base, dv_MH, first_row, row_end, num_heads * CHANNELS, ROWS, CHANNELS, HEAD)


@triton.jit(do_not_specialize=["left", "right", "num_rows", "num_parts", "first_head", "threshold"])
def bias_gradient_kernel(q, k, v, d_out, d_bias, lse, delta, bias, query_words, key_words, first_head, threshold,
                         factor, tiles, q_stride: tl.constexpr, q_head_stride, k_stride: tl.constexpr, k_head_stride,
                         v_stride: tl.constexpr, v_head_stride, d_out_stride: tl.constexpr, d_out_head_stride, left,
                         right, scale2, cap2, num_heads, num_rows, num_parts, GROUP: tl.constexpr,
                         REACH: tl.constexpr, CAPPED: tl.constexpr, CHANNELS: tl.constexpr, HEAD: tl.constexpr,
                         ROWS: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """One program: the gradient of each distance's bias, from some of the tiles of queries of one head.

    Visits square tiles that start `step` whole tiles after the column aligned with the first row. So diagonal c of a
    tile holds one distance, step * ROWS + c for -ROWS < c < ROWS. To sum diagonals, row m is rotated left by m: then
    column c holds diagonal c above the wrap and diagonal c - ROWS below it. All tiles of one step are summed in one
    lane; steps whose distances all exceed the reach share the outermost lanes. Writes d_bias[program, head, 0 or 1
    (above, below), lane, column].
    """
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    program = tl.program_id(0) // num_heads
    k += (head // GROUP) * k_head_stride
    v += (head // GROUP) * v_head_stride
    FARTHEST: tl.constexpr = (REACH + ROWS - 1) // ROWS + 1
    m = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, ROWS)[None, :]
    lane = tl.arange(0, LANES)
    above_LC = tl.zeros([LANES, ROWS], tl.float32)
    below_LC = tl.zeros([LANES, ROWS], tl.float32)
    for part in range(program, num_parts, tl.num_programs(0) // num_heads):
        first_row, row_end, column_end, beside, lo, hi, begin, _full_from, _full_to, visited = load_tile(
            tiles, part, left, right, ROWS, ROWS, PARTS
        )
        q_MH = load_rows(q + head * q_head_stride, first_row, row_end, q_stride, ROWS, CHANNELS, HEAD, ZEROS)
        d_out_MH = load_rows(
            d_out + head * d_out_head_stride, first_row, row_end, d_out_stride, ROWS, CHANNELS, HEAD, ZEROS
        )
        row = first_row + tl.arange(0, ROWS)
        lse_M = tl.load(lse + head * num_rows + row, mask=row < row_end, other=0.0)
        delta_M = tl.load(delta + head * num_rows + row, mask=row < row_end, other=0.0)
        if query_words is not None:
            query_word_M = load_query_words(query_words, row, row < row_end, first_head + head)
        hi = tl.where(row < row_end, hi, lo)
        before = (beside - begin + ROWS - 1) // ROWS  # begin <= beside
        end = begin + visited * ROWS
        steps = tl.where((first_row < row_end) & (visited > 0), (end - beside + before * ROWS + ROWS - 1) // ROWS, 0)
        for tile in range(steps):
            step = tile - before
            first = beside + step * ROWS
            k_CH = load_rows(k, first, column_end, k_stride, ROWS, CHANNELS, HEAD, ZEROS)
            v_CH = load_rows(v, first, column_end, v_stride, ROWS, CHANNELS, HEAD, ZEROS)
            product_MC = tl.dot(q_MH, tl.trans(k_CH), input_precision="ieee")
            score_MC = score_of(product_MC, step * ROWS + c - m, head, bias, scale2, cap2, REACH, CAPPED)
            p_MC = tl.exp2(score_MC - lse_M[:, None])
            p_MC = tl.where(sees(lo, hi, first + tl.arange(0, ROWS)), p_MC, 0.0)
            dp_MC = tl.dot(d_out_MH, tl.trans(v_CH), input_precision="ieee")
            if query_words is not None:
                column = first + tl.arange(0, ROWS)
                key_word_C = load_key_words(key_words, column, (column >= 0) & (column < column_end))
                dp_MC = tl.where(keeps(query_word_M[:, None], key_word_C[None, :], threshold), dp_MC * factor, 0.0)
            d_raw_MC = raw_gradient(p_MC, dp_MC, delta_M[:, None], score_MC, cap2, CAPPED)
            turned_MC = tl.gather(d_raw_MC, (c + m) % ROWS, 1)
            above_C = tl.sum(tl.where(c + m < ROWS, turned_MC, 0.0), 0)
            below_C = tl.sum(tl.where(c + m < ROWS, 0.0, turned_MC), 0)
            here_L = lane == FARTHEST + tl.minimum(tl.maximum(step, -FARTHEST), FARTHEST)
            above_LC += tl.where(here_L[:, None], above_C[None, :], 0.0)
            below_LC += tl.where(here_L[:, None], below_C[None, :], 0.0)
    sums = d_bias + (program * num_heads + head) * (2 * LANES * ROWS) + lane[:, None] * ROWS + c
    tl.store(sums, above_LC)
    tl.store(sums + LANES * ROWS, below_LC)


# Part 4: launching and autograd.

# (rows of the tile, columns visited at a time, warps, pipeline stages) for heads of up to 64, 128 and 256 channels: the
# largest of those tried that compile without spilling registers (tests/kernels/test_attention.py compiles them all) and
# fit into shared memory: 227 KB on sm_90 and sm_100, 99 KB elsewhere. Not yet timed.
TILE_SHAPES = {
    ("forward", 64): (128, 128, 8, 3),
    ("forward", 128): (128, 64, 8, 3),
    ("forward", 256): (64, 32, 8, 2),
    ("query_gradient", 64): (128, 64, 8, 2),
    ("query_gradient", 128): (128, 64, 8, 2),
    ("query_gradient", 256): (32, 64, 8, 1),
    ("key_gradient", 64): (128, 64, 8, 2),
    ("key_gradient", 128): (128, 64, 8, 2),
    ("key_gradient", 256): (32, 64, 8, 1),
}
TILE_SHAPES_IN_99_KB = TILE_SHAPES | {
    ("forward", 128): (128, 32, 8, 3),
    ("query_gradient", 128): (128, 32, 8, 2),
    ("query_gradient", 256): (64, 32, 8, 1),
    ("key_gradient", 64): (128, 32, 8, 2),
    ("key_gradient", 128): (64, 64, 8, 2),
    ("key_gradient", 256): (32, 32, 8, 1),
}
# sm_100 spills dK and dV of 128 channels with 64 columns, and with 32 and two stages.
TILE_SHAPES_OF_BLACKWELL = TILE_SHAPES | {("key_gradient", 128): (128, 32, 8, 1)}
# With a cap or a bias, on every architecture. The bias gradient takes square tiles.
TILE_SHAPES_OF_CHANGED_SCORES = {
    ("forward", 64): (128, 64, 8, 2),
    ("forward", 128): (64, 64, 8, 2),
    ("forward", 256): (64, 32, 8, 2),
    ("query_gradient", 64): (128, 64, 8, 2),
    ("query_gradient", 128): (128, 32, 8, 2),
    ("query_gradient", 256): (32, 32, 8, 1),
    ("key_gradient", 64): (64, 32, 8, 1),
    ("key_gradient", 128): (32, 16, 8, 1),
    ("key_gradient", 256): (32, 32, 8, 1),
    ("bias_gradient", 64): (64, 64, 8, 1),
    ("bias_gradient", 128): (32, 32, 4, 1),
    ("bias_gradient", 256): (16, 16, 4, 1),
}
TILE_SHAPES_WITH_DROPOUT = TILE_SHAPES_OF_CHANGED_SCORES | {
    ("forward", 64): (64, 32, 8, 2),
    ("forward", 128): (64, 32, 4, 2),
    ("query_gradient", 64): (128, 32, 8, 2),
    ("query_gradient", 128): (64, 32, 8, 2),
}
DELTA_ROWS = 64  # of a program, at most: sm_100 spills with 128 rows of 128 channels
# fp32 products are exact: no tensor cores, and small tiles in plain registers.
TILE_SHAPES_OF_FP32 = {64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)}


def launch_options(
    kernel: str,
    channels: int,
    dtype: torch.dtype,
    block: int,
    capability: int,
    changed: bool = False,
    drops: bool = False,
) -> dict[str, Any]:
    """The compile-time arguments of a kernel: CHANNELS, HEAD, ROWS, PARTS, COLUMNS, num_warps, num_stages.

    `block`: rows of a tile in the tile metadata; a program takes ROWS of them, one PARTS-th. `changed`: a
    cap or a bias; `drops`: dropout."""
    head = max(16, 1 << (channels - 1).bit_length())
    width = max(head, 64)
    if dtype == torch.float32:
        shape = TILE_SHAPES_OF_FP32[width]
    elif drops:
        shape = TILE_SHAPES_WITH_DROPOUT[kernel, width]
    elif changed:
        shape = TILE_SHAPES_OF_CHANGED_SCORES[kernel, width]
    else:
        tables = {9: TILE_SHAPES, 10: TILE_SHAPES_OF_BLACKWELL}
        shape = tables.get(capability // 10, TILE_SHAPES_IN_99_KB)[kernel, width]
    rows, columns, num_warps, num_stages = min(shape[0], block), min(shape[1], block), *shape[2:]
    assert block % rows == 0, f"tiles of {block} rows cannot be taken {rows} at a time"
    tile = {"CHANNELS": channels, "HEAD": head, "ROWS": rows, "PARTS": block // rows, "COLUMNS": columns}
    return tile | {"num_warps": num_warps, "num_stages": num_stages}


def _options(kernel: str, q_THK: Tensor, block: int, changed: bool, drops: bool) -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability(q_THK.device) if q_THK.is_cuda else (9, 0)
    return launch_options(kernel, q_THK.shape[2], q_THK.dtype, block, 10 * major + minor, changed, drops)


def _is_changed(bias_HR: Tensor | None, softcap: float | None) -> bool:
    return bias_HR is not None or softcap is not None


def _strides(*rows_list: Tensor) -> list[int]:
    return [stride for rows in rows_list for stride in rows.stride()[:2]]


def _with_dense_channels(*rows_list: Tensor) -> list[Tensor]:
    """The kernels take any strides of rows and heads, but contiguous channels."""
    return [rows if rows.stride(-1) == 1 else rows.contiguous() for rows in rows_list]


def _score_settings(bias_HR: Tensor | None, softcap: float | None) -> tuple[Tensor | None, float, dict[str, Any]]:
    """(bias and cap in base 2, compile-time arguments)."""
    constants = {"REACH": -1 if bias_HR is None else bias_HR.shape[1] // 2, "CAPPED": softcap is not None}
    bias2_HR = None if bias_HR is None else (bias_HR.float() * LOG2_E).contiguous()
    return bias2_HR, (softcap or 1.0) * LOG2_E, constants


def _dropout_arguments(query_words_T: Tensor | None, key_words_S: Tensor | None, rate: float, first_head: int) -> Any:
    """The arguments of a kernel from query_words to factor."""
    if query_words_T is None or key_words_S is None:
        return None, None, first_head, 0, 1.0
    words = query_words_T.contiguous(), key_words_S.contiguous()
    return *words, first_head, int(rate * 2**31), 1.0 / (1.0 - rate)


def _run_forward(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, bias_HR: Tensor | None,
    query_words_T: Tensor | None, key_words_S: Tensor | None, query_tiles_NF: Tensor,
    left: int, right: int, scale: float, softcap: float | None, block: int, rate: float, first_head: int,
    wants_largest: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Out, lse and, if wanted, the largest product of each program and head, -inf where a program has no pair."""
    num_rows, num_heads, _ = q_THK.shape
    q_THK, k_SGK, v_SGK = _with_dense_channels(q_THK, k_SGK, v_SGK)
    out_THK = torch.empty(q_THK.shape, dtype=q_THK.dtype, device=q_THK.device)
    lse_HT = torch.empty(num_heads, num_rows, dtype=torch.float32, device=q_THK.device)
    bias2_HR, cap2, constants = _score_settings(bias_HR, softcap)
    constants["WINDOWED"] = left < UNBOUNDED
    drops = _dropout_arguments(query_words_T, key_words_S, rate, first_head)
    options = _options("forward", q_THK, block, _is_changed(bias_HR, softcap), query_words_T is not None)
    num_parts = query_tiles_NF.shape[0] * options["PARTS"]
    largest_PH = lse_HT.new_full((num_parts, num_heads), -torch.inf) if wants_largest else None
    forward_kernel[(num_parts * num_heads,)](
        q_THK, k_SGK, v_SGK, out_THK, lse_HT, largest_PH, bias2_HR, *drops, query_tiles_NF,
        *_strides(q_THK, k_SGK, v_SGK), left, right, scale * LOG2_E, cap2, num_heads, num_rows,
        GROUP=num_heads // k_SGK.shape[1], **constants, **options,
    )  # fmt: skip
    return out_THK, lse_HT, largest_PH


@library.custom_op("bigmodel::attention", mutates_args=())
def attention_op(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, bias_HR: Tensor | None,
    query_words_T: Tensor | None, key_words_S: Tensor | None, query_tiles_NF: Tensor, key_tiles_NF: Tensor,
    left: int, right: int, scale: float, softcap: float | None, block: int, rate: float = 0.0, first_head: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = q_THK, k_SGK, v_SGK, bias_HR, query_words_T, key_words_S, query_tiles_NF
    out_THK, lse_HT, _ = _run_forward(*rows, left, right, scale, softcap, block, rate, first_head, False)
    return out_THK, lse_HT


@library.custom_op("bigmodel::attention_on_hopper", mutates_args=())
def attention_on_hopper_op(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, bias_HR: Tensor | None,
    query_words_T: Tensor | None, key_words_S: Tensor | None, query_tiles_NF: Tensor, key_tiles_NF: Tensor,
    left: int, right: int, scale: float, softcap: float | None, block: int, rate: float = 0.0, first_head: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `attention_op`, for calls that `attention_hopper.refusal` lets pass; the backward is the same."""
    out_THK = torch.empty(q_THK.shape, dtype=q_THK.dtype, device=q_THK.device)
    lse_HT = torch.empty(q_THK.shape[1], q_THK.shape[0], dtype=torch.float32, device=q_THK.device)
    outputs = out_THK, lse_HT, query_tiles_NF
    attention_hopper.run_forward(q_THK, k_SGK, v_SGK, *outputs, left, right, scale * LOG2_E, block, float(HIDDEN.value))
    return out_THK, lse_HT


@library.custom_op("bigmodel::attention_and_largest", mutates_args=())
def attention_and_largest_op(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, bias_HR: Tensor | None,
    query_words_T: Tensor | None, key_words_S: Tensor | None, query_tiles_NF: Tensor, key_tiles_NF: Tensor,
    left: int, right: int, scale: float, softcap: float | None, block: int, rate: float = 0.0, first_head: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `attention_op`, and the largest product of each head, (H,), without a gradient."""
    rows = q_THK, k_SGK, v_SGK, bias_HR, query_words_T, key_words_S, query_tiles_NF
    out_THK, lse_HT, largest_PH = _run_forward(*rows, left, right, scale, softcap, block, rate, first_head, True)
    assert largest_PH is not None
    # Without queries there is no program, and a maximum of nothing is an error.
    return out_THK, lse_HT, F.pad(largest_PH, (0, 0, 0, 1), value=-torch.inf).amax(0)


@library.custom_op("bigmodel::attention_backward", mutates_args=())
def _attention_backward(
    d_out_THK: Tensor, bias_is_wanted: bool, out_THK: Tensor, lse_HT: Tensor, q_THK: Tensor,
    k_SGK: Tensor, v_SGK: Tensor, bias_HR: Tensor | None,
    query_words_T: Tensor | None, key_words_S: Tensor | None, query_tiles_NF: Tensor, key_tiles_NF: Tensor,
    left: int, right: int, scale: float, softcap: float | None, block: int, rate: float, first_head: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dbias); dbias is empty unless `bias_is_wanted`."""
    num_rows, num_heads, channels = q_THK.shape
    num_key_heads = k_SGK.shape[1]
    # loss.sum() sends a d_out whose strides are all 0.
    d_out_THK, q_THK, k_SGK, v_SGK = _with_dense_channels(d_out_THK, q_THK, k_SGK, v_SGK)
    dq_THK, dk_SGK, dv_SGK = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_THK, k_SGK, v_SGK))
    delta_HT = torch.empty_like(lse_HT)
    scores = _is_changed(bias_HR, softcap), query_words_T is not None
    drops = _dropout_arguments(query_words_T, key_words_S, rate, first_head)
    of_queries, of_keys = (_options(kernel, q_THK, block, *scores) for kernel in ("query_gradient", "key_gradient"))
    rows_of_delta = min(of_queries["ROWS"], DELTA_ROWS)
    delta_kernel[(triton.cdiv(num_rows, rows_of_delta) * num_heads,)](
        out_THK, d_out_THK, delta_HT, *_strides(d_out_THK), num_heads, num_rows,
        CHANNELS=channels, HEAD=of_queries["HEAD"], ROWS=rows_of_delta,
    )  # fmt: skip
    strides = _strides(q_THK, k_SGK, v_SGK, d_out_THK)
    bias2_HR, cap2, constants = _score_settings(bias_HR, softcap)
    constants["GROUP"] = num_heads // num_key_heads
    windowed = {"WINDOWED": left < UNBOUNDED}
    rows = q_THK, k_SGK, v_SGK, d_out_THK
    query_gradient_kernel[(query_tiles_NF.shape[0] * of_queries["PARTS"] * num_heads,)](
        *rows, dq_THK, lse_HT, delta_HT, bias2_HR, *drops, query_tiles_NF, *strides,
        left, right, scale, scale * LOG2_E, cap2, num_heads, num_rows, **constants, **windowed, **of_queries,
    )  # fmt: skip
    key_gradient_kernel[(key_tiles_NF.shape[0] * of_keys["PARTS"] * num_key_heads,)](
        *rows, dk_SGK, dv_SGK, lse_HT, delta_HT, bias2_HR, *drops, key_tiles_NF, *strides,
        right, left, scale, scale * LOG2_E, cap2, num_key_heads, num_rows, **constants, **windowed, **of_keys,
    )  # fmt: skip
    if bias_HR is None or not bias_is_wanted:
        return dq_THK, dk_SGK, dv_SGK, lse_HT.new_empty(0)

    options = _options("bias_gradient", q_THK, block, *scores)
    num_parts = query_tiles_NF.shape[0] * options["PARTS"]
    num_programs = min(num_parts, BIAS_GRADIENT_PROGRAMS)
    square, reach = options.pop("COLUMNS"), bias_HR.shape[1] // 2
    lanes = triton.next_power_of_2(2 * (triton.cdiv(reach, square) + 1) + 1)
    d_bias_PHALC = torch.empty(num_programs, num_heads, 2, lanes, square, dtype=torch.float32, device=q_THK.device)
    bias_gradient_kernel[(num_programs * num_heads,)](
        *rows, d_bias_PHALC, lse_HT, delta_HT, bias2_HR, *drops, query_tiles_NF, *strides,
        left, right, scale * LOG2_E, cap2, num_heads, num_rows, num_parts, LANES=lanes, **constants, **options,
    )  # fmt: skip
    return dq_THK, dk_SGK, dv_SGK, _by_distance(d_bias_PHALC.sum(0), reach).to(bias_HR.dtype)


BIAS_GRADIENT_PROGRAMS = 64  # per head: enough to fill a GPU with few heads; few enough for a small d_bias


def _by_distance(d_bias_HALC: Tensor, reach: int) -> Tensor:
    """(H, R) from the output of `bias_gradient_kernel`, summed over its programs."""
    above_HX, below_HX = d_bias_HALC.flatten(2).unbind(1)
    square = d_bias_HALC.shape[3]
    sums_HX = F.pad(above_HX, (square, 0)) + F.pad(below_HX, (0, square))  # by distance, from -(farthest + 1) * square
    first = (triton.cdiv(reach, square) + 2) * square - reach
    last = first + 2 * reach
    if reach == 0:
        return sums_HX.sum(1, keepdim=True)
    ends = sums_HX[:, : first + 1].sum(1, keepdim=True), sums_HX[:, last:].sum(1, keepdim=True)
    return torch.cat([ends[0], sums_HX[:, first + 1 : last], ends[1]], dim=1)


@attention_on_hopper_op.register_fake
@attention_op.register_fake
def _(q_THK: Tensor, *_inputs: Any) -> tuple[Tensor, Tensor]:
    lse_HT = q_THK.new_empty(q_THK.shape[1], q_THK.shape[0], dtype=torch.float32)
    return q_THK.new_empty(q_THK.shape), lse_HT


@attention_and_largest_op.register_fake
def _(q_THK: Tensor, *_inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    lse_HT = q_THK.new_empty(q_THK.shape[1], q_THK.shape[0], dtype=torch.float32)
    return q_THK.new_empty(q_THK.shape), lse_HT, lse_HT.new_empty(lse_HT.shape[0])


@_attention_backward.register_fake
def _(
    _d_out_THK: Tensor, bias_is_wanted: bool, _out_THK: Tensor, lse_HT: Tensor,
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, bias_HR: Tensor | None, *_inputs: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_bias_HR = bias_HR.new_empty(bias_HR.shape) if bias_is_wanted and bias_HR is not None else lse_HT.new_empty(0)
    return (*(rows.new_empty(rows.shape) for rows in (q_THK, k_SGK, v_SGK)), d_bias_HR)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[:2], *inputs[:8])
    ctx.settings = inputs[8:]


def _differentiate(ctx: Any, d_out_THK: Tensor | None, *_others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of the first output: lse never leaves this file, the largest products leave it detached."""
    if d_out_THK is None:
        return (None,) * 15
    bias_is_wanted = ctx.needs_input_grad[3]
    *d_rows, d_bias_HR = _attention_backward(d_out_THK, bias_is_wanted, *ctx.saved_tensors, *ctx.settings)
    return (*d_rows, d_bias_HR if bias_is_wanted else None, *[None] * 11)


attention_op.register_autograd(_differentiate, setup_context=_remember)
attention_on_hopper_op.register_autograd(_differentiate, setup_context=_remember)
attention_and_largest_op.register_autograd(_differentiate, setup_context=_remember)


# Part 5: the public function.


def attention(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGK: Tensor,
    mask: AttentionMask,
    tile_metadata: TileMetadata | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias_HR: Tensor | None = None,
    dropout: AttentionDropout | None = None,
    kernel: str = "triton",
) -> Tensor:
    """Attention of packed queries (T, H, K) over packed keys and values (S, G, K): (T, H, K), differentiable.

    G divides H; query head h reads key head h // (H // G). `tile_metadata`: `make_tile_metadata` of the same mask, made
    once per batch (None: made here). `scale` > 0 multiplies the scores (None: 1 / sqrt(K)). `softcap` limits scores to
    -softcap ... softcap. `bias_HR` (H, 2 * reach + 1), any float type, differentiable: added to the scaled scores by
    distance, -reach to reach (position of the key - position of the query, in their document); its ends serve all
    larger distances. `bigmodel.kernels.relative_bias` makes one from T5's table. `dropout` drops attention weights, the
    same ones in every implementation. `kernel`: a name of KERNELS; a call that it does not cover takes "triton". On a
    GPU: bf16, fp16 or fp32, up to 256 channels a head. On CPU: the reference, any float type and head_dim. Raises
    ValueError for shapes that do not match and for an unknown kernel. Method: FlashAttention-2 (Dao 2023).
    """
    scores = scale, softcap, bias_HR, dropout
    tile_metadata, scale = _checked(q_THK, k_SGK, v_SGK, mask, tile_metadata, *scores)
    call = AttentionCall(q_THK, k_SGK, v_SGK, mask, tile_metadata, scale, softcap, bias_HR, dropout)
    implementation = chosen(KERNELS, kernel, call)
    if tile_metadata.query_tiles_NF is None:
        return attention_reference(q_THK, k_SGK, v_SGK, mask, scale, softcap, bias_HR, dropout)
    return implementation.attend(call)


def _attend(call: AttentionCall) -> Tensor:
    """By the operators of this file."""
    arguments = _arguments_of_kernel(call.tile_metadata, call.scale, call.softcap, call.bias_HR, call.dropout)
    return attention_op(call.q_THK, call.k_SGK, call.v_SGK, *arguments)[0]


def _attend_on_hopper(call: AttentionCall) -> Tensor:
    arguments = _arguments_of_kernel(call.tile_metadata, call.scale, call.softcap, call.bias_HR, call.dropout)
    return attention_on_hopper_op(call.q_THK, call.k_SGK, call.v_SGK, *arguments)[0]


# By name, for `attention(kernel=...)`.
KERNELS = {
    "triton": AttentionKernel(_attend, lambda _call: None),
    "hopper": AttentionKernel(_attend_on_hopper, attention_hopper.refusal),
} | LIBRARIES


def attention_and_largest(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGK: Tensor,
    mask: AttentionMask,
    tile_metadata: TileMetadata | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias_HR: Tensor | None = None,
    dropout: AttentionDropout | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention`, and the largest product scale * q . k over the visible pairs of each query head: (H,) fp32.

    In natural units, before bias and cap, which weights of queries and keys do not bound; -inf for a head without a
    visible pair; without a gradient. Without atomics: a maximum per tile, then one over tiles. Output and gradients
    have the bits of `attention`. On a CPU it costs a third matrix product.
    """
    scores = scale, softcap, bias_HR, dropout
    tile_metadata, scale = _checked(q_THK, k_SGK, v_SGK, mask, tile_metadata, *scores)
    if tile_metadata.query_tiles_NF is None:
        offsets = mask.cu_seqlens_q, mask.cu_seqlens_k, mask.query_prefix, mask.key_prefix
        largest_H = largest_products(q_THK.detach(), k_SGK.detach(), *offsets, mask.left, mask.right, scale)
        return attention_reference(q_THK, k_SGK, v_SGK, mask, scale, softcap, bias_HR, dropout), largest_H
    arguments = _arguments_of_kernel(tile_metadata, scale, softcap, bias_HR, dropout)
    out_THK, _, largest_H = attention_and_largest_op(q_THK, k_SGK, v_SGK, *arguments)
    return out_THK, largest_H.detach()


def _checked(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, mask: AttentionMask, tile_metadata: TileMetadata | None,
    scale: float | None, softcap: float | None, bias_HR: Tensor | None, dropout: AttentionDropout | None,
) -> tuple[TileMetadata, float]:  # fmt: skip
    """Tile metadata and scale, after all checks of `attention`."""
    scale = q_THK.shape[-1] ** -0.5 if scale is None else scale
    tile_metadata = tile_metadata or make_tile_metadata(mask, q_THK.shape[0], k_SGK.shape[0])
    _check_shapes(q_THK, k_SGK, v_SGK, tile_metadata)
    if tile_metadata.mask is not mask:
        raise ValueError("attention got a tile_metadata made for another mask; pass the same AttentionMask to both")
    _check_scores(q_THK, scale, softcap, bias_HR)
    _check_dropout(q_THK, k_SGK, dropout)
    if tile_metadata.query_tiles_NF is not None:
        _check_kernel_can(q_THK)
    return tile_metadata, scale


def _arguments_of_kernel(
    tile_metadata: TileMetadata, scale: float, softcap: float | None, bias_HR: Tensor | None,
    dropout: AttentionDropout | None,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of `attention_op` from bias_HR on."""
    settings: tuple[Any, ...] = (*tile_metadata.mask.window, scale, softcap, tile_metadata.block)
    words: tuple[Tensor | None, Tensor | None] = (None, None)
    if dropout:
        words, settings = (dropout.query_words_T, dropout.key_words_S), (*settings, dropout.rate, dropout.first_head)
    return bias_HR, *words, tile_metadata.query_tiles_NF, tile_metadata.key_tiles_NF, *settings


def _check_shapes(q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, tile_metadata: TileMetadata) -> None:
    shapes = f"q {tuple(q_THK.shape)}, k {tuple(k_SGK.shape)}, v {tuple(v_SGK.shape)}"
    if q_THK.dim() != 3 or k_SGK.dim() != 3 or k_SGK.shape != v_SGK.shape or q_THK.shape[2] != k_SGK.shape[2]:
        raise ValueError(f"attention got {shapes}; it needs q (T, H, K) and k, v (S, G, K) with the same K")
    if q_THK.shape[1] % k_SGK.shape[1]:
        raise ValueError(f"attention got {shapes}; the query heads must be a multiple of the key heads")
    if not q_THK.dtype == k_SGK.dtype == v_SGK.dtype:
        raise ValueError(f"attention got q {q_THK.dtype}, k {k_SGK.dtype}, v {v_SGK.dtype}; cast them to one type")
    if (tile_metadata.num_queries, tile_metadata.num_keys) != (q_THK.shape[0], k_SGK.shape[0]):
        made_for = f"{tile_metadata.num_queries} queries and {tile_metadata.num_keys} keys"
        raise ValueError(f"attention got {shapes} and a tile_metadata made for {made_for}; make one for this batch")


def _check_scores(q_THK: Tensor, scale: float, softcap: float | None, bias_HR: Tensor | None) -> None:
    if not scale > 0:
        raise ValueError(f"attention got scale {scale}; it needs a positive one")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention got softcap {softcap}; it needs a positive one, or None for no cap")
    heads = q_THK.shape[1]
    if bias_HR is not None and (bias_HR.dim() != 2 or bias_HR.shape[0] != heads or bias_HR.shape[1] % 2 == 0):
        raise ValueError(
            f"attention got a bias of shape {tuple(bias_HR.shape)}; it needs ({heads} heads, 2 * reach + 1): a number "
            "per distance from -reach to reach"
        )
    if bias_HR is not None and bias_HR.requires_grad and bias_HR.shape[1] // 2 > MAX_REACH_WITH_GRADIENT:
        raise ValueError(
            f"attention got a bias that reaches {bias_HR.shape[1] // 2} keys and requires a gradient; its kernel holds "
            f"one sum per distance in registers and needs a reach of at most {MAX_REACH_WITH_GRADIENT}"
        )


def _check_dropout(q_THK: Tensor, k_SGK: Tensor, dropout: AttentionDropout | None) -> None:
    if dropout and not 0 <= dropout.rate < 1:
        raise ValueError(f"attention got a dropout of {dropout.rate}; it needs at least 0 and less than 1")
    if dropout and (len(dropout.query_words_T), len(dropout.key_words_S)) != (len(q_THK), len(k_SGK)):
        raise ValueError(
            f"attention got words of {len(dropout.query_words_T)} queries and {len(dropout.key_words_S)} keys for "
            f"{len(q_THK)} queries and {len(k_SGK)} keys; make the dropout for this batch"
        )


def _check_kernel_can(q_THK: Tensor) -> None:
    dtypes = (torch.float16, torch.float32) if INTERPRETED else (torch.bfloat16, torch.float16, torch.float32)
    if q_THK.dtype not in dtypes:
        # Triton's interpreter computes wrong results in bf16, without an error.
        raise ValueError(f"the attention kernels got {q_THK.dtype}; they need one of {dtypes}; cast q, k and v")
    if q_THK.shape[2] > 256:
        raise ValueError(f"the attention kernels got {q_THK.shape[2]} channels a head; use at most 256 (more heads)")
