"""Forward of packed attention for Hopper: loads by the tensor memory accelerator (TMA), warps with different tasks.

Formula, mask, tiles and output are those of `kernels/attention.py`, without bias, cap and dropout. A producer warp
group loads keys and values; two consumer groups take 64 rows each, so the softmax of one can overlap with the products
of the other. One loop over full and partial tiles, since Triton (3.6, 3.7) specializes the warps of one loop only, and
of one without branches: every tile is masked.

Rows of the next document must not be loaded: a weight of 0 times their NaN is NaN. The descriptor of keys and values
has two dimensions more than the tensor, in which the address wraps around 2^64, as in `triton.tools.ragged_tma`: row x
of the document that ends at `end` is row 2^30 - end + x of 2^30, so rows from `end` on lie outside and are loaded as 0.
One descriptor serves all documents.

Costs: a descriptor of the queries per program, made on the device; a copy of keys or values whose rows are not aligned
to 16 bytes. It has been run by Triton's interpreter, in fp32 and fp16, and compiled for sm_90; on no GPU.

Shape suffixes: T queries, S keys, H query heads, G key heads, K channels of a head, N tiles, F fields of a tile; M rows
of the tile and C columns of the visited tile.
"""

from typing import Any

import torch
from torch import Tensor

from bigmodel.kernels.attention_kernels import AttentionCall
from bigmodel.kernels.mask import BOTH, UNBOUNDED, UPPER, load_tile, sees_tile
from bigmodel.kernels.triton_import import HAS_TRITON, INTERPRETED, tl, triton

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

# (rows, columns, warps, stages) by channels. Four warps: with eight Triton ignores the specialization.
SHAPES = {64: (128, 128, 4, 2), 128: (128, 64, 4, 3)}
CAPABILITIES = (9,)
ALIGNMENT_BYTES = 16  # of a TMA address and stride

RAGGED_ROWS = tl.constexpr(2**30)
RAGGED_SIZE = 0x7FFF0000  # of the two dimensions in front: more than any coordinate
RAGGED_WRAP = 2**34  # elements; times 2^30 and the bytes of an element: a multiple of 2^64


# Part 3: the Triton kernel.


@triton.jit
def load_document_rows(rows, head, first, end, COUNT: tl.constexpr, HEAD: tl.constexpr):
    """Rows [first, first + COUNT) of a head, (COUNT, HEAD); 0 from `end` on."""
    loaded = rows.load([RAGGED_ROWS, end, head, RAGGED_ROWS - end + first, 0])
    return tl.reshape(loaded, [COUNT, HEAD])


@triton.jit(do_not_specialize=["left", "right", "num_rows"])
def hopper_forward_kernel(q, k, v, out, lse, tiles, q_stride: tl.constexpr, q_head_stride, left, right, scale2,
                          num_heads, num_rows, GROUP: tl.constexpr, WINDOWED: tl.constexpr, HIDDEN: tl.constexpr,
                          HEAD: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
                          COLUMNS: tl.constexpr):  # fmt: skip
    """As `forward_kernel`; k and v are descriptors of `ragged`. No early return: the specialization needs one block."""
    head = tl.program_id(0) % num_heads
    first_row, row_end, column_end, _beside, lo, hi, begin, _full_from, _full_to, visited = load_tile(
        tiles, tl.program_id(0) // num_heads, left, right, ROWS, COLUMNS, PARTS
    )
    visited = tl.where(first_row < row_end, visited, 0)  # a spare tile or part has no rows
    q += head.to(tl.int64) * q_head_stride
    # Two dimensions, made here: the compiler gives each consumer group half of such a tile, and of no other.
    q_MH = tl.make_tensor_descriptor(q, [row_end, HEAD], [q_stride, 1], [ROWS, HEAD]).load([first_row, 0])
    acc_MH = tl.zeros([ROWS, HEAD], tl.float32)
    top_M = tl.full([ROWS], HIDDEN, tl.float32)
    total_M = tl.zeros([ROWS], tl.float32)
    ENDS: tl.constexpr = BOTH if WINDOWED else UPPER
    for number in tl.range(0, visited, warp_specialize=True):
        first = begin + number * COLUMNS
        k_CH = load_document_rows(k, head // GROUP, first, column_end, COLUMNS, HEAD)
        score_MC = tl.dot(q_MH, tl.trans(k_CH), input_precision="ieee")
        score_MC = tl.where(sees_tile(lo, hi, first, COLUMNS, ENDS), score_MC, HIDDEN)
        new_top_M = tl.maximum(top_M, tl.max(score_MC, 1) * scale2)
        p_MC = tl.exp2(score_MC * scale2 - new_top_M[:, None])
        shrink_M = tl.exp2(top_M - new_top_M)
        total_M = total_M * shrink_M + tl.sum(p_MC, 1)
        v_CH = load_document_rows(v, head // GROUP, first, column_end, COLUMNS, HEAD)
        acc_MH = tl.dot(p_MC.to(v_CH.dtype), v_CH, acc_MH * shrink_M[:, None], input_precision="ieee")
        top_M = new_top_M
    sees_any_M = lo < hi
    total_M = tl.where(sees_any_M, total_M, 1.0)
    out_MH = tl.where(sees_any_M[:, None], acc_MH / total_M[:, None], 0.0)
    row = first_row + tl.arange(0, ROWS)
    place = row.to(tl.int64) * (num_heads * HEAD) + head * HEAD
    out_rows = out + place[:, None] + tl.arange(0, HEAD)[None, :]
    tl.store(out_rows, out_MH.to(out.dtype.element_ty), mask=(row < row_end)[:, None])
    lse_M = tl.where(sees_any_M, top_M + tl.log2(total_M), float("-inf"))
    tl.store(lse + head.to(tl.int64) * num_rows + row, lse_M, mask=row < row_end)


# Part 4: launching. The operator with its gradient is in `kernels/attention.py`.


def refusal(call: AttentionCall) -> str | None:
    """Why this kernel does not cover a call; None if it does."""
    dtypes = (torch.float16, torch.float32) if INTERPRETED else (torch.bfloat16, torch.float16)
    if call.softcap is not None or call.bias_HR is not None or call.dropout:
        return "it has no cap, bias and dropout"
    if call.q_THK.dtype not in dtypes:
        return f"it needs one of {dtypes}, not {call.q_THK.dtype}"
    if call.q_THK.shape[2] not in SHAPES:
        return f"it needs {' or '.join(map(str, SHAPES))} channels a head, not {call.q_THK.shape[2]}"
    if not call.q_THK.shape[0] or not call.k_SGK.shape[0]:
        return "it needs queries and keys"
    if INTERPRETED:
        return None
    rows = SHAPES[call.q_THK.shape[2]][0]
    if call.tile_metadata.block != rows:
        return f"it needs tiles of {rows} rows, not {call.tile_metadata.block}"
    if call.q_THK.is_cuda and _major(call.q_THK.device) not in CAPABILITIES:
        return "it needs Hopper (sm_90)"
    return None


def missing_device(device: torch.device) -> str | None:
    """Why this GPU cannot run the kernel; None if it can."""
    major, minor = torch.cuda.get_device_capability(device)
    return None if major in CAPABILITIES else f"needs Hopper (sm_90), and this GPU is sm_{major}{minor}"


@torch.compiler.assume_constant_result
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def launch_options(channels: int, block: int) -> dict[str, Any]:
    """The compile-time arguments of the kernel, as `attention.launch_options`."""
    rows, columns, num_warps, num_stages = SHAPES[channels]
    rows, columns = min(rows, block), min(columns, block)
    shape = {"HEAD": channels, "ROWS": rows, "PARTS": block // rows, "COLUMNS": columns}
    return shape | {"num_warps": num_warps, "num_stages": num_stages}


def ragged(rows_SGK: Tensor, count: int) -> Any:
    """The descriptor of `count` rows of one head, for `load_document_rows`."""
    stride, head_stride, _ = rows_SGK.stride()
    shape = [RAGGED_SIZE, RAGGED_SIZE, rows_SGK.shape[1], RAGGED_ROWS.value, rows_SGK.shape[2]]
    strides = [RAGGED_WRAP - stride, stride, head_stride, stride, 1]
    return TensorDescriptor(rows_SGK, shape, strides, [1, 1, 1, count, rows_SGK.shape[2]])


def aligned(rows: Tensor) -> Tensor:
    """The rows, or a contiguous copy if TMA cannot address them."""
    size = rows.element_size()
    fits = rows.stride(2) == 1 and all(stride * size % ALIGNMENT_BYTES == 0 for stride in rows.stride()[:2])
    return (
        rows if fits and rows.data_ptr() % ALIGNMENT_BYTES == 0 else rows.clone(memory_format=torch.contiguous_format)
    )


def _scratch(num_bytes: int, _alignment: int, _stream: int | None) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.int8, device="cuda")


def run_forward(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, out_THK: Tensor, lse_HT: Tensor, query_tiles_NF: Tensor,
    left: int, right: int, scale2: float, block: int, hidden: float,
) -> None:  # fmt: skip
    """Writes out and lse. scale2: of the scores, in base 2; hidden: a masked score."""
    num_rows, num_heads, channels = q_THK.shape
    q_THK, k_SGK, v_SGK = aligned(q_THK), aligned(k_SGK), aligned(v_SGK)
    options = launch_options(channels, block)
    if not INTERPRETED:
        triton.set_allocator(_scratch)  # of this thread: the backward pass, which may recompute, has its own
    hopper_forward_kernel[(query_tiles_NF.shape[0] * options["PARTS"] * num_heads,)](
        q_THK, ragged(k_SGK, options["COLUMNS"]), ragged(v_SGK, options["COLUMNS"]), out_THK, lse_HT, query_tiles_NF,
        *q_THK.stride()[:2], left, right, scale2, num_heads, num_rows,
        GROUP=num_heads // k_SGK.shape[1], WINDOWED=left < UNBOUNDED, HIDDEN=hidden, **options,
    )  # fmt: skip
