"""Grouped matrix product: the rows of each expert times the matrix of this expert, in one launch.

Formula, for the rows m from offsets[e] to offsets[e + 1] - 1, which are those of expert e:

    y[m, n]         = sum_k x[m, k] * weight[e, n, k]          0 in rows from offsets[E] on: padding
    dx[m, k]        = sum_n dy[m, n] * weight[e, n, k]         0 there, too
    dweight[e, n, k] = sum_m dy[m, n] * x[m, k]                0 for an expert without rows

In: x (M, K) and weight (E, N, K) of one floating type; offsets (E + 1,) int32 on their device, from 0, never
decreasing, at most M. Out: y (M, N), differentiable once. Guarantees: sums in fp32 (fp64 for fp64), rounded once; fp32
products are exact, not TF32; padding is never read, so a NaN in it stays there; two runs agree bitwise; a row of y and
dx depends on this row alone, bitwise. dweight sums rows; its last bits depend on their places, and an edit of one
document moves the rows of others. Nothing waits for a GPU, and shapes alone decide its grid and compiled code, so
other counts compile nothing again. Costs: 2 N K operations a row forward, 4 backward; on a GPU up to E tiles more than
the rows fill; on a CPU, expert by expert, fill-up to 16 rows, or in bf16 to 128. The offsets of a GPU are not checked.

Why not a library's: torch 2.13's grouped_mm and DeepSpeed 0.19.8's group_gemm_triton leave padding rows of y and dx
uninitialised (torch issue 154557), know no fp64, and torch's reads the offsets on the host before sm_90; DeepSpeed's
measures at run time which tile to take, so that the order of its sums can change from run to run, and takes TF32.

Example: E = 2, offsets = [0, 2, 3], M = 4: rows 0 and 1 times weight[0], row 2 times weight[1], row 3 is 0.

Shape suffixes: M rows, K inputs, N outputs, E experts, E1 = E + 1. In kernels: R rows, C columns and I inner places of
a tile, S slots for experts.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from bigmodel.kernels.cpu import is_wide
from bigmodel.kernels.triton_import import HAS_TRITON, INTERPRETED, tl, triton

# Part 2: the reference, expert by expert; runs on CPU.

# With fewer rows MKL adds in another order (fp32 and fp64 on AVX-512; 8 to 4,096 inputs).
FEWEST_ROWS = 16
# In bf16 oneDNN chooses the order by the number of rows, and makes code for each new number: 3.3 ms for 0.7.
ROWS_OF_BF16 = 128


def grouped_matmul_reference(x_MK: Tensor, weight_ENK: Tensor, offsets_E1: Tensor) -> Tensor:
    y_MN = x_MK.new_empty(len(x_MK), weight_ENK.shape[1])
    for expert, rows in enumerate(_experts_rows(offsets_E1, len(x_MK))):
        _multiply_rows(x_MK[rows], weight_ENK[expert].T, y_MN[rows])
    y_MN[rows.stop :] = 0
    return y_MN


def gradients_reference(
    dy_MN: Tensor, x_MK: Tensor, weight_ENK: Tensor, offsets_E1: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight; empty where not needed."""
    dx_MK = torch.empty_like(x_MK) if need_x else x_MK.new_empty(0)
    d_weight_ENK = torch.empty_like(weight_ENK) if need_weight else x_MK.new_empty(0)
    for expert, rows in enumerate(_experts_rows(offsets_E1, len(x_MK))):
        if need_x:
            _multiply_rows(dy_MN[rows], weight_ENK[expert], dx_MK[rows])
        if need_weight:
            dy_RN, x_RK = dy_MN[rows], x_MK[rows]
            if missing := -len(x_RK) % ROWS_OF_BF16 if _is_native_bf16(x_MK) else 0:  # F.pad by 0 rows copies, too
                dy_RN, x_RK = (F.pad(one, (0, 0, 0, missing)) for one in (dy_RN, x_RK))
            _multiply(dy_RN.T, x_RK, d_weight_ENK[expert])
    if need_x:
        dx_MK[rows.stop :] = 0
    return dx_MK, d_weight_ENK


def _experts_rows(offsets_E1: Tensor, num_rows: int) -> list[slice]:
    offsets = offsets_E1.tolist()
    if offsets[0] != 0 or offsets[-1] > num_rows or sorted(offsets) != offsets:
        raise ValueError(
            f"grouped matmul got the offsets {offsets} for {num_rows} rows; they need to start at 0, never decrease, "
            "and end at most at the number of rows"
        )
    return [slice(start, end) for start, end in pairwise(offsets)]


def _multiply_rows(rows_MI: Tensor, right_IO: Tensor, out_MO: Tensor) -> None:
    """out = rows @ right, by numbers of rows that give a row the same bits beside any others."""
    at_once = ROWS_OF_BF16 if _is_native_bf16(out_MO) else max(FEWEST_ROWS, len(rows_MI))
    for rows_RI, out_RO in zip(rows_MI.split(at_once), out_MO.split(at_once), strict=True):
        if missing := at_once - len(rows_RI):
            filled_RO = out_RO.new_empty(at_once, out_RO.shape[1])
            _multiply(F.pad(rows_RI, (0, 0, 0, missing)), right_IO, filled_RO)
            out_RO.copy_(filled_RO[: len(out_RO)])
        else:
            _multiply(rows_RI, right_IO, out_RO)


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left @ right, added up in fp32 at least and rounded once. Products over nothing are 0."""
    if is_wide(out):
        out.copy_(left.float() @ right.float())
    else:
        torch.mm(left, right, out=out)


def _is_native_bf16(rows: Tensor) -> bool:
    return rows.dtype == torch.bfloat16 and not is_wide(rows)


# Part 3: Triton kernels.


@triton.jit
def find_tile(offsets, tile, num_rows, EXPERTS: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr):
    """Expert, first row and end of a tile. Tiles of the experts come first, in order, each expert's from its first row
    on; those of the padding are of expert EXPERTS. A tile beyond all has its first row at or after its end."""
    slot = tl.arange(0, SLOTS)
    inside = slot < EXPERTS
    start_S = tl.load(offsets + slot, mask=inside, other=0)
    end_S = tl.load(offsets + slot + 1, mask=inside, other=0)
    until_S = tl.cumsum((end_S - start_S + ROWS - 1) // ROWS, 0)
    before_S = (until_S <= tile) & inside
    expert = tl.sum(before_S.to(tl.int32), 0)
    first_tile = tl.max(tl.where(before_S, until_S, 0), 0)
    first_row = tl.load(offsets + expert) + (tile - first_tile) * ROWS
    return expert, first_row, tl.load(offsets + expert + 1, mask=expert < EXPERTS, other=num_rows)


@triton.jit
def load_block(base, row_R, row_end, column_C, stride: tl.constexpr, COLUMN_END: tl.constexpr, BY_ROW: tl.constexpr,
               BY_COLUMN: tl.constexpr):  # fmt: skip
    """(R, C) of a matrix with this many columns between its rows; 0 from row_end on if BY_ROW, and from COLUMN_END on
    if BY_COLUMN. Without these there has to be something to read."""
    pointers = base + row_R.to(tl.int64)[:, None] * stride + column_C[None, :]
    if BY_ROW and BY_COLUMN:
        return tl.load(pointers, mask=(row_R < row_end)[:, None] & (column_C < COLUMN_END)[None, :], other=0.0)
    elif BY_ROW:
        return tl.load(pointers, mask=(row_R < row_end)[:, None], other=0.0)
    elif BY_COLUMN:
        return tl.load(pointers, mask=(column_C < COLUMN_END)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit(do_not_specialize=["num_rows"])
def product_kernel(x, weight, offsets, y, num_rows, INNER: tl.constexpr, OUTER: tl.constexpr, TURNED: tl.constexpr,
                   EXPERTS: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                   STEP: tl.constexpr, TOGETHER: tl.constexpr):  # fmt: skip
    """One program: a tile of y (M, OUTER), from x (M, INNER). The weight is (E, INNER, OUTER), or (E, OUTER, INNER) if
    TURNED. TOGETHER tiles of rows and all columns run side by side, so that both operands are found in the cache."""
    COLUMN_TILES: tl.constexpr = (OUTER + COLUMNS - 1) // COLUMNS
    num_tiles = (num_rows + ROWS - 1) // ROWS + EXPERTS
    beside = TOGETHER * COLUMN_TILES
    first_tile = tl.program_id(0) // beside * TOGETHER
    tiles_here = tl.minimum(num_tiles - first_tile, TOGETHER)
    tile = first_tile + tl.program_id(0) % beside % tiles_here
    expert, first_row, row_end = find_tile(offsets, tile, num_rows, EXPERTS, SLOTS, ROWS)
    if first_row >= row_end:
        return
    row_R = first_row + tl.arange(0, ROWS)
    column_C = tl.program_id(0) % beside // tiles_here * COLUMNS + tl.arange(0, COLUMNS)
    acc_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
    if expert < EXPERTS:
        weight += expert.to(tl.int64) * INNER * OUTER
        read_R = tl.minimum(row_R, row_end - 1)
        for start in range(0, INNER, STEP):
            inner_I = start + tl.arange(0, STEP)
            x_RI = load_block(x, read_R, row_end, inner_I, INNER, INNER, False, INNER % STEP != 0)
            if TURNED:
                weight_CI = load_block(
                    weight, column_C, OUTER, inner_I, INNER, INNER, OUTER % COLUMNS != 0, INNER % STEP != 0
                )
                weight_IC = tl.trans(weight_CI)
            else:
                weight_IC = load_block(
                    weight, inner_I, INNER, column_C, OUTER, OUTER, INNER % STEP != 0, OUTER % COLUMNS != 0
                )
            acc_RC = tl.dot(x_RI, weight_IC, acc_RC, input_precision="ieee")
    pointers = y + row_R.to(tl.int64)[:, None] * OUTER + column_C[None, :]
    inside_RC = (row_R < row_end)[:, None] & (column_C < OUTER)[None, :]
    tl.store(pointers, acc_RC.to(y.dtype.element_ty), mask=inside_RC)


@triton.jit
def weight_gradient_kernel(dy, x, offsets, d_weight, INNER: tl.constexpr, OUTER: tl.constexpr, ROWS: tl.constexpr,
                           COLUMNS: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """One program: a tile of (ROWS outputs, COLUMNS inputs) of one expert's gradient, over its rows in order."""
    COLUMN_TILES: tl.constexpr = (INNER + COLUMNS - 1) // COLUMNS
    TILES: tl.constexpr = COLUMN_TILES * ((OUTER + ROWS - 1) // ROWS)
    expert = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    output_R = tile // COLUMN_TILES * ROWS + tl.arange(0, ROWS)
    input_C = tile % COLUMN_TILES * COLUMNS + tl.arange(0, COLUMNS)
    acc_RC = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(start, end, STEP):
        row_I = first + tl.arange(0, STEP)
        dy_IR = load_block(dy, row_I, end, output_R, OUTER, OUTER, True, OUTER % ROWS != 0)
        x_IC = load_block(x, row_I, end, input_C, INNER, INNER, True, INNER % COLUMNS != 0)
        acc_RC = tl.dot(tl.trans(dy_IR), x_IC, acc_RC, input_precision="ieee")
    d_weight += expert.to(tl.int64) * INNER * OUTER
    pointers = d_weight + output_R.to(tl.int64)[:, None] * INNER + input_C[None, :]
    inside_RC = (output_R < OUTER)[:, None] & (input_C < INNER)[None, :]
    tl.store(pointers, acc_RC.to(d_weight.dtype.element_ty), mask=inside_RC)


# Part 4: launching and autograd.

# (rows, columns, step, warps, pipeline stages) of a tile: compile without spilling registers and fit into shared memory
# (tests/kernels/test_grouped_matmul.py compiles them): 227 KB on sm_90 and sm_100, 99 KB elsewhere. Not yet timed.
TILE_SHAPES = {"product": (128, 256, 64, 8, 3), "weight_gradient": (128, 256, 64, 8, 3)}
TILE_SHAPES_IN_99_KB = {"product": (128, 128, 64, 8, 3), "weight_gradient": (128, 128, 64, 8, 3)}
# fp32 products are exact: no tensor cores, and small tiles in plain registers.
TILE_SHAPES_OF_FP32 = {"product": (64, 64, 16, 8, 2), "weight_gradient": (64, 64, 16, 8, 2)}
TOGETHER = 8  # tiles of rows


def launch_options(kernel: str, dtype: torch.dtype, capability: int) -> dict[str, int]:
    """ROWS, COLUMNS, STEP, num_warps and num_stages of a kernel; `capability` 90: sm_90."""
    large = TILE_SHAPES if capability // 10 in (9, 10) else TILE_SHAPES_IN_99_KB
    shape = (TILE_SHAPES_OF_FP32 if dtype == torch.float32 else large)[kernel]
    return dict(zip(("ROWS", "COLUMNS", "STEP", "num_warps", "num_stages"), shape, strict=True))


def _options(kernel: str, x_MK: Tensor) -> dict[str, int]:
    major, minor = torch.cuda.get_device_capability(x_MK.device) if x_MK.is_cuda else (9, 0)
    return launch_options(kernel, x_MK.dtype, 10 * major + minor)


def _launch_product(x_MK: Tensor, weight: Tensor, offsets_E1: Tensor, turned: bool) -> Tensor:
    experts, inner = len(weight), x_MK.shape[1]
    outer = weight.shape[1 if turned else 2]
    y = x_MK.new_empty(len(x_MK), outer)
    options = _options("product", x_MK)
    num_tiles = triton.cdiv(len(x_MK), options["ROWS"]) + experts
    product_kernel[(num_tiles * triton.cdiv(outer, options["COLUMNS"]),)](
        x_MK, weight, offsets_E1, y, len(x_MK), INNER=inner, OUTER=outer, TURNED=turned,
        EXPERTS=experts, SLOTS=triton.next_power_of_2(experts), TOGETHER=TOGETHER, **options,
    )  # fmt: skip
    return y


def _launch_weight_gradient(dy_MN: Tensor, x_MK: Tensor, offsets_E1: Tensor) -> Tensor:
    experts, outer, inner = len(offsets_E1) - 1, dy_MN.shape[1], x_MK.shape[1]
    d_weight_ENK = x_MK.new_empty(experts, outer, inner)
    options = _options("weight_gradient", x_MK)
    tiles = triton.cdiv(outer, options["ROWS"]) * triton.cdiv(inner, options["COLUMNS"])
    weight_gradient_kernel[(experts * tiles,)](
        dy_MN, x_MK, offsets_E1, d_weight_ENK, INNER=inner, OUTER=outer, **options
    )
    return d_weight_ENK


def _has_kernels(x_MK: Tensor) -> bool:
    return HAS_TRITON and (x_MK.is_cuda or INTERPRETED) and x_MK.dtype != torch.float64


@library.custom_op("bigmodel::grouped_matmul", mutates_args=())
def grouped_matmul_op(x_MK: Tensor, weight_ENK: Tensor, offsets_E1: Tensor) -> Tensor:
    if not _has_kernels(x_MK):
        return grouped_matmul_reference(x_MK, weight_ENK, offsets_E1)
    return _launch_product(x_MK, weight_ENK, offsets_E1, turned=True)


@library.custom_op("bigmodel::grouped_matmul_backward", mutates_args=())
def _backward_op(
    dy_MN: Tensor, x_MK: Tensor, weight_ENK: Tensor, offsets_E1: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    if not _has_kernels(x_MK):
        return gradients_reference(dy_MN, x_MK, weight_ENK, offsets_E1, need_x, need_weight)
    nothing = x_MK.new_empty(0)
    dx_MK = _launch_product(dy_MN, weight_ENK, offsets_E1, turned=False) if need_x else nothing
    return dx_MK, _launch_weight_gradient(dy_MN, x_MK, offsets_E1) if need_weight else nothing.clone()


@grouped_matmul_op.register_fake
def _(x_MK: Tensor, weight_ENK: Tensor, _offsets_E1: Tensor) -> Tensor:
    return x_MK.new_empty(len(x_MK), weight_ENK.shape[1])


@_backward_op.register_fake
def _(
    _dy_MN: Tensor, x_MK: Tensor, weight_ENK: Tensor, _offsets_E1: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    of_x, of_weight = (one.shape if needed else (0,) for one, needed in ((x_MK, need_x), (weight_ENK, need_weight)))
    return x_MK.new_empty(of_x), x_MK.new_empty(of_weight)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy_MN: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:2]
    gradients = _backward_op(dy_MN.contiguous(), *ctx.saved_tensors, *needed)
    return *(one if is_needed else None for one, is_needed in zip(gradients, needed, strict=True)), None


grouped_matmul_op.register_autograd(_differentiate, setup_context=_remember)


# Part 5: the public function.


def grouped_matmul(x_MK: Tensor, weight_ENK: Tensor, offsets_E1: Tensor) -> Tensor:
    """(M, N): the rows of each expert times its matrix, 0 in rows of no expert; differentiable once in x and weight.

    Raises ValueError for wrong shapes or types, and on a CPU for wrong offsets.
    """
    shapes = f"x {tuple(x_MK.shape)}, weight {tuple(weight_ENK.shape)}, offsets {tuple(offsets_E1.shape)}"
    if x_MK.dim() != 2 or weight_ENK.dim() != 3 or x_MK.shape[1] != weight_ENK.shape[2] or not len(weight_ENK):
        raise ValueError(f"grouped matmul got {shapes}; it needs x (M, K) and weight (E, N, K) with the same K")
    if offsets_E1.shape != (len(weight_ENK) + 1,) or offsets_E1.dtype != torch.int32:
        raise ValueError(f"grouped matmul got {shapes} of {offsets_E1.dtype}; it needs E + 1 offsets of torch.int32")
    if x_MK.dtype != weight_ENK.dtype or not x_MK.is_floating_point():
        raise ValueError(
            f"grouped matmul got x {x_MK.dtype}, weight {weight_ENK.dtype}; cast them to one floating type"
        )
    return grouped_matmul_op(x_MK.contiguous(), weight_ENK.contiguous(), offsets_E1.contiguous())
