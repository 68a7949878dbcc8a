"""Attention over packed documents, forward and backward.

Formula, for query row t of head h, which reads key head g = h // (H // G) and sees the keys lo(t) <= s < hi(t):

    score_s = scale * (q[t, h] . k[s, g])        out[t, h] = sum_s softmax(score)_s * v[s, g]

and out[t, h] = 0, with zero gradients, where t sees no key. With p the softmax and dp_s = dout[t, h] . v[s, g]:

    dv[s, g] = sum_th p_s * dout[t, h]           delta = dout[t, h] . out[t, h]
    dk[s, g] = scale * sum_th p_s * (dp_s - delta) * q[t, h]
    dq[t, h] = scale * sum_s  p_s * (dp_s - delta) * k[s, g]

Takes q (T, H, K), k and v (S, G, K) with any strides (slices of a fused projection too), and a Visibility.
Gives out (T, H, K). Guarantees: no document influences another, bitwise; rows beyond the last offset are written
(zero) and never read; the backward has no atomics and repeats bitwise; grouped key heads are read in place.
Costs: 2 matrix products per visible tile forward and 7 backward (5 would need atomics); memory for out and one
fp32 per query row and head. Full tiles run without a mask.

Shape suffixes: T queries, S keys, H query heads, G key heads, K channels of a head, N tiles, F fields of a tile.
Inside kernels: M rows of the tile, C columns of the tile visited.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import INTERPRETED, tl, triton
from kernels.visibility import (
    FULL,
    Schedule,
    Visibility,
    dense,
    document_lengths,
    load_tile,
    make_schedule,
    part_bounds,
    sees,
)

# Part 2: the reference.


def attention_reference(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGK: Tensor,
    visibility: Visibility,
    lengths: tuple[tuple[int, int], ...] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention in plain torch, one document at a time; also what runs on CPU. Shapes as `attention`, any float type.

    `lengths` (queries, keys) of each document save a look at the offsets. One call per document needs no padding
    and keeps documents apart bitwise. Against padded groups of documents of like length (one shared core, T = 2048,
    forward and backward, K = 32 unless marked): lengths around 300, 29 ms against 25 to 35 with 4 heads, 71 against 91
    to 135 with 8 on 4 and K = 64; 52 documents of 40, the best case for padding, 13 to 19 ms against 9 to 13 with
    4 heads, 29 against 35 to 40 with 8 on 4 and K = 64.
    """
    lengths = lengths or document_lengths(visibility)
    dtype = q_THK.dtype
    if q_THK.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        # A CPU without bf16 instructions multiplies bf16 at 1.2 GFLOP/s and fp32 at 32: compute in fp32, round once.
        q_THK, k_SGK, v_SGK = q_THK.float(), k_SGK.float(), v_SGK.float()

    query_split = [queries for queries, _ in lengths]
    key_split = [keys for _, keys in lengths]
    beyond_T, beyond_S = q_THK.shape[0] - sum(query_split), k_SGK.shape[0] - sum(key_split)
    documents = zip(
        q_THK.split([*query_split, beyond_T])[:-1],
        k_SGK.split([*key_split, beyond_S])[:-1],
        v_SGK.split([*key_split, beyond_S])[:-1],
        strict=True,
    )
    outs = [_attend_document(q, k, v, visibility.left, visibility.right, scale) for q, k, v in documents]
    outs.append(q_THK.new_zeros(beyond_T, *q_THK.shape[1:]))
    return torch.cat(outs).to(dtype)


def _attend_document(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, left: int | None, right: int | None, scale: float | None
) -> Tensor:
    num_queries, num_keys = q_THK.shape[0], k_SGK.shape[0]
    if num_queries == 0 or num_keys == 0:
        return q_THK.new_zeros(q_THK.shape)
    left_is_open = left is None or left >= num_queries - 1
    right_is_open = right is None or right >= num_keys - 1
    mask = None
    is_causal = left_is_open and right == 0
    if not is_causal and not (left_is_open and right_is_open):
        offsets = [
            torch.tensor([0, length], dtype=torch.int32, device=q_THK.device) for length in (num_queries, num_keys)
        ]
        mask = dense(Visibility(offsets[0], offsets[1], left, right), num_queries, num_keys)
    out_1HTK = F.scaled_dot_product_attention(
        *(rows.transpose(0, 1)[None] for rows in (q_THK, k_SGK, v_SGK)),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q_THK.shape[1] != k_SGK.shape[1],
    )
    return out_1HTK[0].transpose(0, 1)


# Part 3: Triton kernels. Scores are in base 2: scale * log2(e) is folded into one multiplication.
# A score that must not count is HIDDEN: finite, so that no inf - inf can make a NaN; whatever a row gathers before its
# first visible key is multiplied by exp2(HIDDEN - real) = 0 when that key comes.

LOG2_E = 1.4426950408889634
HIDDEN = tl.constexpr(-1.0e30)


@triton.jit
def load_rows(base, first, end, stride, ROWS: tl.constexpr, CHANNELS: tl.constexpr, HEAD: tl.constexpr,
              BOUNDED: tl.constexpr):  # fmt: skip
    """Rows [first, first + ROWS) of a head as (ROWS, HEAD): 0 in channels from CHANNELS on, and in rows from `end` on.

    Only BOUNDED loads look at `end`: a full tile lies inside its document.
    """
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, HEAD)
    pointers = base + first.to(tl.int64) * stride + row[:, None] * stride + channel[None, :]
    if BOUNDED:
        return tl.load(pointers, mask=(first + row < end)[:, None] & (channel < CHANNELS)[None, :], other=0.0)
    elif CHANNELS != HEAD:
        return tl.load(pointers, mask=(channel < CHANNELS)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(base, values, first, end, stride, ROWS: tl.constexpr, CHANNELS: tl.constexpr, HEAD: tl.constexpr):
    """The inverse of `load_rows`: rows from `end` on and channels from CHANNELS on are left as they are."""
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, HEAD)
    pointers = base + first.to(tl.int64) * stride + row[:, None] * stride + channel[None, :]
    inside = (first + row < end)[:, None] & (channel < CHANNELS)[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["left", "right", "num_rows"])
def forward_kernel(q, k, v, out, lse, tiles, q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride,
                   left, right, scale2, num_heads, num_rows,
                   GROUP: tl.constexpr, CHANNELS: tl.constexpr, HEAD: tl.constexpr,
                   ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """One program: one tile of queries of one head. Writes out, and lse = log2 of the sum of exp2 of the scores."""
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    first_row, row_end, column_end, lo, hi, begin, full_from, full_to, visited = load_tile(
        tiles, tl.program_id(0) // num_heads, left, right, ROWS, COLUMNS
    )
    if first_row >= row_end:
        return
    q_MH = load_rows(q + head * q_head_stride, first_row, row_end, q_stride, ROWS, CHANNELS, HEAD, True)
    k += (head // GROUP) * k_head_stride
    v += (head // GROUP) * v_head_stride
    acc_MH = tl.zeros([ROWS, HEAD], tl.float32)
    top_M = tl.full([ROWS], HIDDEN, tl.float32)
    total_M = tl.zeros([ROWS], tl.float32)
    for part in tl.static_range(3):
        tile_from, tile_to = part_bounds(part, full_from, full_to, visited)
        for tile in range(tile_from, tile_to):
            first = begin + tile * COLUMNS
            k_CH = load_rows(k, first, column_end, k_stride, COLUMNS, CHANNELS, HEAD, part != FULL)
            score_MC = tl.dot(q_MH, tl.trans(k_CH), input_precision="ieee")
            if part != FULL:
                score_MC = tl.where(sees(lo, hi, first + tl.arange(0, COLUMNS)), score_MC, HIDDEN)
            new_top_M = tl.maximum(top_M, tl.max(score_MC, 1) * scale2)
            p_MC = tl.exp2(score_MC * scale2 - new_top_M[:, None])
            shrink_M = tl.exp2(top_M - new_top_M)
            total_M = total_M * shrink_M + tl.sum(p_MC, 1)
            v_CH = load_rows(v, first, column_end, v_stride, COLUMNS, CHANNELS, HEAD, part != FULL)
            acc_MH = tl.dot(p_MC.to(v_CH.dtype), v_CH, acc_MH * shrink_M[:, None], input_precision="ieee")
            top_M = new_top_M
    sees_any_M = lo < hi
    total_M = tl.where(sees_any_M, total_M, 1.0)
    out_MH = tl.where(sees_any_M[:, None], acc_MH / total_M[:, None], 0.0)
    store_rows(out + head * CHANNELS, out_MH, first_row, row_end, num_heads * CHANNELS, ROWS, CHANNELS, HEAD)
    row = first_row + tl.arange(0, ROWS)
    lse_M = tl.where(sees_any_M, top_M + tl.log2(total_M), 0.0)
    tl.store(lse + head * num_rows + row, lse_M, mask=row < row_end)


@triton.jit(do_not_specialize=["num_rows"])
def delta_kernel(out, d_out, delta, d_out_stride, d_out_head_stride, num_heads, num_rows,
                 CHANNELS: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """delta[head, row] = d_out . out, in fp32."""
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    first = (tl.program_id(0) // num_heads) * ROWS
    out_MH = load_rows(out + head * CHANNELS, first, num_rows, num_heads * CHANNELS, ROWS, CHANNELS, HEAD, True)
    d_out_MH = load_rows(d_out + head * d_out_head_stride, first, num_rows, d_out_stride, ROWS, CHANNELS, HEAD, True)
    row = first + tl.arange(0, ROWS)
    delta_M = tl.sum(out_MH.to(tl.float32) * d_out_MH.to(tl.float32), 1)
    tl.store(delta + head * num_rows + row, delta_M, mask=row < num_rows)


@triton.jit(do_not_specialize=["left", "right", "num_rows"])
def query_gradient_kernel(q, k, v, d_out, dq, lse, delta, tiles, q_stride, q_head_stride, k_stride, k_head_stride,
                          v_stride, v_head_stride, d_out_stride, d_out_head_stride,
                          left, right, scale, scale2, num_heads, num_rows,
                          GROUP: tl.constexpr, CHANNELS: tl.constexpr, HEAD: tl.constexpr,
                          ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """One program: dq of one tile of queries of one head."""
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    first_row, row_end, column_end, lo, hi, begin, full_from, full_to, visited = load_tile(
        tiles, tl.program_id(0) // num_heads, left, right, ROWS, COLUMNS
    )
    if first_row >= row_end:
        return
    q_MH = load_rows(q + head * q_head_stride, first_row, row_end, q_stride, ROWS, CHANNELS, HEAD, True)
    d_out_MH = load_rows(d_out + head * d_out_head_stride, first_row, row_end, d_out_stride, ROWS, CHANNELS, HEAD, True)
    row = first_row + tl.arange(0, ROWS)
    lse_M = tl.load(lse + head * num_rows + row, mask=row < row_end, other=0.0)
    delta_M = tl.load(delta + head * num_rows + row, mask=row < row_end, other=0.0)
    k += (head // GROUP) * k_head_stride
    v += (head // GROUP) * v_head_stride
    dq_MH = tl.zeros([ROWS, HEAD], tl.float32)
    for part in tl.static_range(3):
        tile_from, tile_to = part_bounds(part, full_from, full_to, visited)
        for tile in range(tile_from, tile_to):
            first = begin + tile * COLUMNS
            k_CH = load_rows(k, first, column_end, k_stride, COLUMNS, CHANNELS, HEAD, part != FULL)
            v_CH = load_rows(v, first, column_end, v_stride, COLUMNS, CHANNELS, HEAD, part != FULL)
            p_MC = tl.exp2(tl.dot(q_MH, tl.trans(k_CH), input_precision="ieee") * scale2 - lse_M[:, None])
            if part != FULL:
                p_MC = tl.where(sees(lo, hi, first + tl.arange(0, COLUMNS)), p_MC, 0.0)
            dp_MC = tl.dot(d_out_MH, tl.trans(v_CH), input_precision="ieee")
            d_score_MC = p_MC * (dp_MC - delta_M[:, None])
            dq_MH = tl.dot(d_score_MC.to(k_CH.dtype), k_CH, dq_MH, input_precision="ieee")
    store_rows(dq + head * CHANNELS, dq_MH * scale, first_row, row_end, num_heads * CHANNELS, ROWS, CHANNELS, HEAD)


@triton.jit(do_not_specialize=["left", "right", "num_rows"])
def key_gradient_kernel(q, k, v, d_out, dk, dv, lse, delta, tiles, q_stride, q_head_stride, k_stride, k_head_stride,
                        v_stride, v_head_stride, d_out_stride, d_out_head_stride,
                        left, right, scale, scale2, num_heads, num_rows,
                        GROUP: tl.constexpr, CHANNELS: tl.constexpr, HEAD: tl.constexpr,
                        ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """One program: dk and dv of one tile of keys of one key head, summed over the GROUP query heads that read it.

    The rule is transposed: rows are keys, columns are queries, `left` and `right` come exchanged.
    num_heads counts key heads, num_rows queries.
    """
    key_head = (tl.program_id(0) % num_heads).to(tl.int64)
    first_row, row_end, column_end, lo, hi, begin, full_from, full_to, visited = load_tile(
        tiles, tl.program_id(0) // num_heads, left, right, ROWS, COLUMNS
    )
    if first_row >= row_end:
        return
    k_MH = load_rows(k + key_head * k_head_stride, first_row, row_end, k_stride, ROWS, CHANNELS, HEAD, True)
    v_MH = load_rows(v + key_head * v_head_stride, first_row, row_end, v_stride, ROWS, CHANNELS, HEAD, True)
    dk_MH = tl.zeros([ROWS, HEAD], tl.float32)
    dv_MH = tl.zeros([ROWS, HEAD], tl.float32)
    for member in range(GROUP):
        head = key_head * GROUP + member
        q_head, d_out_head = q + head * q_head_stride, d_out + head * d_out_head_stride
        for part in tl.static_range(3):
            tile_from, tile_to = part_bounds(part, full_from, full_to, visited)
            for tile in range(tile_from, tile_to):
                first = begin + tile * COLUMNS
                column = first + tl.arange(0, COLUMNS)
                q_CH = load_rows(q_head, first, column_end, q_stride, COLUMNS, CHANNELS, HEAD, part != FULL)
                lse_C = tl.load(lse + head * num_rows + column, mask=column < column_end, other=0.0)
                p_MC = tl.exp2(tl.dot(k_MH, tl.trans(q_CH), input_precision="ieee") * scale2 - lse_C[None, :])
                if part != FULL:
                    p_MC = tl.where(sees(lo, hi, column), p_MC, 0.0)
                d_out_CH = load_rows(d_out_head, first, column_end, d_out_stride, COLUMNS, CHANNELS, HEAD, part != FULL)
                dv_MH = tl.dot(p_MC.to(d_out_CH.dtype), d_out_CH, dv_MH, input_precision="ieee")
                delta_C = tl.load(delta + head * num_rows + column, mask=column < column_end, other=0.0)
                dp_MC = tl.dot(v_MH, tl.trans(d_out_CH), input_precision="ieee")
                d_score_MC = p_MC * (dp_MC - delta_C[None, :])
                dk_MH = tl.dot(d_score_MC.to(q_CH.dtype), q_CH, dk_MH, input_precision="ieee")
    dk_base, dv_base = dk + key_head * CHANNELS, dv + key_head * CHANNELS
    store_rows(dk_base, dk_MH * scale, first_row, row_end, num_heads * CHANNELS, ROWS, CHANNELS, HEAD)
    store_rows(dv_base, dv_MH, first_row, row_end, num_heads * CHANNELS, ROWS, CHANNELS, HEAD)


# Part 4: launching and autograd.

# (columns visited at a time, warps, pipeline stages) for 16-bit heads of up to 64 and 128 channels and tiles of 128
# rows: the largest that compile without spilling registers (tests/test_attention.py compiles them all). Not yet timed.
TILE_SHAPES = {
    ("forward", 64): (128, 8, 3),
    ("forward", 128): (64, 8, 3),
    ("query_gradient", 64): (64, 8, 2),
    ("query_gradient", 128): (32, 8, 2),
    ("key_gradient", 64): (32, 8, 2),
    ("key_gradient", 128): (32, 8, 1),
}
TILE_SHAPES_BEFORE_HOPPER = TILE_SHAPES | {("forward", 128): (32, 8, 3)}


def launch_options(kernel: str, channels: int, dtype: torch.dtype, block: int, capability: int) -> dict[str, Any]:
    """The compile-time arguments of a kernel: CHANNELS, HEAD, ROWS, COLUMNS, num_warps, num_stages."""
    head = max(16, 1 << (channels - 1).bit_length())
    shapes = TILE_SHAPES if capability >= 90 else TILE_SHAPES_BEFORE_HOPPER
    columns, num_warps, num_stages = shapes[kernel, max(head, 64)]
    if dtype == torch.float32:
        columns, num_stages = 32, 1
    tile = {"CHANNELS": channels, "HEAD": head, "ROWS": block, "COLUMNS": min(columns, block)}
    return tile | {"num_warps": num_warps, "num_stages": num_stages}


def _options(kernel: str, q_THK: Tensor, block: int) -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability(q_THK.device) if q_THK.is_cuda else (9, 0)
    return launch_options(kernel, q_THK.shape[2], q_THK.dtype, block, 10 * major + minor)


def _strides(*rows_list: Tensor) -> list[int]:
    return [stride for rows in rows_list for stride in rows.stride()[:2]]


@torch.library.custom_op("bigmodel::attention", mutates_args=())
def _attention(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, query_tiles_NF: Tensor, key_tiles_NF: Tensor,
    left: int, right: int, scale: float, block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_rows, num_heads, _ = q_THK.shape
    q_THK, k_SGK, v_SGK = (_with_dense_channels(rows) for rows in (q_THK, k_SGK, v_SGK))
    out_THK = torch.empty(q_THK.shape, dtype=q_THK.dtype, device=q_THK.device)
    lse_HT = torch.empty(num_heads, num_rows, dtype=torch.float32, device=q_THK.device)
    forward_kernel[(query_tiles_NF.shape[0] * num_heads,)](
        q_THK, k_SGK, v_SGK, out_THK, lse_HT, query_tiles_NF, *_strides(q_THK, k_SGK, v_SGK),
        left, right, scale * LOG2_E, num_heads, num_rows,
        GROUP=num_heads // k_SGK.shape[1], **_options("forward", q_THK, block),
    )  # fmt: skip
    return out_THK, lse_HT


@torch.library.custom_op("bigmodel::attention_backward", mutates_args=())
def _attention_backward(
    d_out_THK: Tensor, q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, out_THK: Tensor, lse_HT: Tensor,
    query_tiles_NF: Tensor, key_tiles_NF: Tensor, left: int, right: int, scale: float, block: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    num_rows, num_heads, channels = q_THK.shape
    num_key_heads = k_SGK.shape[1]
    # loss.sum() sends a d_out whose strides are all 0.
    d_out_THK, q_THK, k_SGK, v_SGK = (_with_dense_channels(rows) for rows in (d_out_THK, q_THK, k_SGK, v_SGK))
    dq_THK, dk_SGK, dv_SGK = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_THK, k_SGK, v_SGK))
    delta_HT = torch.empty_like(lse_HT)
    options = _options("query_gradient", q_THK, block)
    delta_kernel[(triton.cdiv(num_rows, block) * num_heads,)](
        out_THK, d_out_THK, delta_HT, *_strides(d_out_THK), num_heads, num_rows,
        CHANNELS=channels, HEAD=options["HEAD"], ROWS=block,
    )  # fmt: skip
    strides = _strides(q_THK, k_SGK, v_SGK, d_out_THK)
    group = num_heads // num_key_heads
    query_gradient_kernel[(query_tiles_NF.shape[0] * num_heads,)](
        q_THK, k_SGK, v_SGK, d_out_THK, dq_THK, lse_HT, delta_HT, query_tiles_NF, *strides,
        left, right, scale, scale * LOG2_E, num_heads, num_rows, GROUP=group, **options,
    )  # fmt: skip
    key_gradient_kernel[(key_tiles_NF.shape[0] * num_key_heads,)](
        q_THK, k_SGK, v_SGK, d_out_THK, dk_SGK, dv_SGK, lse_HT, delta_HT, key_tiles_NF, *strides,
        right, left, scale, scale * LOG2_E, num_key_heads, num_rows,
        GROUP=group, **_options("key_gradient", q_THK, block),
    )  # fmt: skip
    return dq_THK, dk_SGK, dv_SGK


def _with_dense_channels(rows: Tensor) -> Tensor:
    """The kernels take any stride of rows and heads, and channels that lie side by side."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@_attention.register_fake
def _(q_THK: Tensor, *_inputs: Any) -> tuple[Tensor, Tensor]:
    lse_HT = q_THK.new_empty(q_THK.shape[1], q_THK.shape[0], dtype=torch.float32)
    return q_THK.new_empty(q_THK.shape), lse_HT


@_attention_backward.register_fake
def _(_d_out_THK: Tensor, q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, *_inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q_THK.new_empty(q_THK.shape), k_SGK.new_empty(k_SGK.shape), v_SGK.new_empty(v_SGK.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5])
    ctx.settings = inputs[5:]


def _differentiate(ctx: Any, d_out_THK: Tensor, _d_lse_HT: Tensor) -> tuple[Tensor | None, ...]:
    return (*_attention_backward(d_out_THK, *ctx.saved_tensors, *ctx.settings), *[None] * 6)


_attention.register_autograd(_differentiate, setup_context=_remember)


# Part 5: the public function.


def attention(
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGK: Tensor,
    visibility: Visibility,
    schedule: Schedule | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of packed queries (T, H, K) over packed keys and values (S, G, K): (T, H, K), differentiable.

    G divides H; query head h reads key head h // (H // G). `schedule` is `make_schedule` of the same rule, made once
    per batch (None: made here). `scale` multiplies the scores and is positive (None: 1 / sqrt(K)). On a GPU: bf16, fp16
    or fp32 and up to 128 channels a head. On CPU: the reference, any float type and head. Raises ValueError for
    shapes that do not fit. The method is that of FlashAttention-2 (Dao 2023).
    """
    scale = q_THK.shape[-1] ** -0.5 if scale is None else scale
    schedule = schedule or make_schedule(visibility, q_THK.shape[0], k_SGK.shape[0])
    _check_shapes(q_THK, k_SGK, v_SGK, schedule, scale)
    if schedule.query_tiles_NF is None or schedule.key_tiles_NF is None:
        return attention_reference(q_THK, k_SGK, v_SGK, visibility, schedule.lengths, scale)
    _check_kernel_can(q_THK)
    tables = schedule.query_tiles_NF, schedule.key_tiles_NF
    return _attention(q_THK, k_SGK, v_SGK, *tables, *visibility.window, scale, schedule.block)[0]


def _check_shapes(q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, schedule: Schedule, scale: float) -> None:
    shapes = f"q {tuple(q_THK.shape)}, k {tuple(k_SGK.shape)}, v {tuple(v_SGK.shape)}"
    if q_THK.dim() != 3 or k_SGK.dim() != 3 or k_SGK.shape != v_SGK.shape or q_THK.shape[2] != k_SGK.shape[2]:
        raise ValueError(f"attention got {shapes}; it needs q (T, H, K) and k, v (S, G, K) with the same K")
    if q_THK.shape[1] % k_SGK.shape[1]:
        raise ValueError(f"attention got {shapes}; the query heads must be a multiple of the key heads")
    if not q_THK.dtype == k_SGK.dtype == v_SGK.dtype:
        raise ValueError(f"attention got q {q_THK.dtype}, k {k_SGK.dtype}, v {v_SGK.dtype}; cast them to one type")
    if (schedule.num_queries, schedule.num_keys) != (q_THK.shape[0], k_SGK.shape[0]):
        made_for = f"{schedule.num_queries} queries and {schedule.num_keys} keys"
        raise ValueError(f"attention got {shapes} and a schedule made for {made_for}; make one for this batch")
    if not scale > 0:
        raise ValueError(f"attention got scale {scale}; it needs a positive one")


def _check_kernel_can(q_THK: Tensor) -> None:
    dtypes = (torch.float16, torch.float32) if INTERPRETED else (torch.bfloat16, torch.float16, torch.float32)
    if q_THK.dtype not in dtypes:
        # Triton's interpreter computes bf16 silently wrong.
        raise ValueError(f"the attention kernels got {q_THK.dtype}; they need one of {dtypes}; cast q, k and v")
    if q_THK.shape[2] > 128:
        raise ValueError(f"the attention kernels got {q_THK.shape[2]} channels a head; use at most 128 (more heads)")
