"""Tile metadata of a batch: the tiles that the attention kernels visit, made once and shared by all layers.

It is two tables, tiles of queries and tiles of keys (`tile_table` of the mask and of the transposed mask). The tiles of
all documents are first numbered end to end. Slot n is then a tile of

    document(n) = number of documents whose tiles end at or before n,   tile in it = n - first slot of the document

and the tiles are then sorted by the number of columns that they visit, most first, stable: tile i goes to row
#{j: width_j > width_i} + #{j < i: width_j = width_i}.

In: cu_seqlens on the device. Out: a TileMetadata. Guarantees: nothing waits for the device; shapes depend on the
numbers of rows and documents only; equal to `tile_table`, row by row. Costs on a GPU: two kernel launches and one
assertion (`tile_table` is about 20 small operations a side); N * D + N^2 comparisons a side for N tiles: 40 million at
64k tokens in 4,096 documents, 0.8 million in 256. The reference needs no tiles.

Shape suffixes: D documents of a block, N tiles of a block, O other tiles, F fields of a tile.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, library

from bigmodel.kernels.mask import AttentionMask, interval_hi, interval_lo, tile_table
from bigmodel.kernels.triton_import import HAS_TRITON, INTERPRETED, tl, triton

TILE_ROWS = 128


# Part 2: the reference.


def tile_tables_reference(mask: AttentionMask, num_queries: int, num_keys: int, block: int) -> tuple[Tensor, Tensor]:
    """The tables of queries and of keys, in plain torch."""
    return tile_table(mask, num_queries, block), tile_table(mask.transposed, num_keys, block)


# Part 3: Triton kernels. Axis 1 of both grids: 0 makes the table of queries, 1 the table of keys.

SLOTS = 32  # tiles that one program makes or sorts
AT_ONCE = 512  # documents or other tiles that a program compares with at a time
NUM_WARPS = 8
PLAN_FIELDS = tl.constexpr(8)  # the seven fields of a tile, and the number of columns that it visits


@triton.jit
def offsets_fit(cu_seqlens, num_documents, num_rows, AT_ONCE: tl.constexpr):
    """1 if cu_seqlens start at 0, never decrease, and end at most at num_rows; else 0."""
    fit = (tl.load(cu_seqlens) == 0) & (tl.load(cu_seqlens + num_documents) <= num_rows)
    for first in range(0, num_documents, AT_ONCE):
        place = first + tl.arange(0, AT_ONCE)
        inside = place < num_documents
        start_D = tl.load(cu_seqlens + place, mask=inside, other=0)
        end_D = tl.load(cu_seqlens + place + 1, mask=inside, other=0)
        fit = fit & (tl.min(end_D - start_D, 0) >= 0)
    return fit.to(tl.int32)


@triton.jit
def prefix_end(prefix, document, start, end, num_documents):
    """The end of each document's prefix; the rows beyond the last document have no prefix."""
    if prefix is None:
        return start
    length = tl.load(prefix + document, mask=document < num_documents, other=0)
    return start + tl.minimum(length, end - start)


@triton.jit
def plan_side(plan, row_offsets, column_offsets, row_prefix, column_prefix, left, right, num_rows, num_documents,
              num_tiles, BLOCK: tl.constexpr, SLOTS: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    """Writes the tiles of SLOTS slots, unsorted, as plan[field, slot]."""
    slot_N = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    document_N = tl.zeros([SLOTS], tl.int32)
    start_N = tl.zeros([SLOTS], tl.int32)  # the first slot of the document
    total = 0
    for first in range(0, num_documents, AT_ONCE):
        place = first + tl.arange(0, AT_ONCE)
        inside = place < num_documents
        length_D = tl.load(row_offsets + place + 1, mask=inside, other=0) - tl.load(
            row_offsets + place, mask=inside, other=0
        )
        tiles_D = (length_D + BLOCK - 1) // BLOCK
        end_D = total + tl.cumsum(tiles_D, 0)
        before_ND = (end_D[None, :] <= slot_N[:, None]) & inside[None, :]
        document_N += tl.sum(before_ND.to(tl.int32), 1)
        start_N = tl.maximum(start_N, tl.max(tl.where(before_ND, end_D[None, :], 0), 1))
        total += tl.sum(tiles_D, 0)

    row_start = tl.load(row_offsets + document_N)
    following = tl.minimum(document_N + 1, num_documents)
    row_end = tl.where(document_N < num_documents, tl.load(row_offsets + following), num_rows)
    column_start = tl.load(column_offsets + document_N)
    column_end = tl.load(column_offsets + following)
    row_prefix_end = prefix_end(row_prefix, document_N, row_start, row_end, num_documents)
    column_prefix_end = prefix_end(column_prefix, document_N, column_start, column_end, num_documents)
    first_row = tl.minimum(row_start + (slot_N - start_N) * BLOCK, row_end)
    last_row = tl.minimum(first_row + BLOCK, row_end) - 1
    beside = column_start - row_start  # from a row to the column aligned with it
    lo = interval_lo(first_row, first_row + beside, column_start, row_prefix_end, left)
    hi = interval_hi(last_row + beside, column_end, column_prefix_end, right)
    real = slot_N < num_tiles
    plan += slot_N
    tl.store(plan, first_row, mask=real)
    tl.store(plan + num_tiles, row_start, mask=real)
    tl.store(plan + 2 * num_tiles, row_end, mask=real)
    tl.store(plan + 3 * num_tiles, column_start, mask=real)
    tl.store(plan + 4 * num_tiles, column_end, mask=real)
    tl.store(plan + 5 * num_tiles, row_prefix_end, mask=real)
    tl.store(plan + 6 * num_tiles, column_prefix_end, mask=real)
    tl.store(plan + 7 * num_tiles, hi - lo, mask=real)


@triton.jit(do_not_specialize=["left", "right", "num_queries", "num_keys", "num_documents", "query_tiles", "key_tiles"])
def plan_kernel(plan, fit, cu_seqlens_q, cu_seqlens_k, query_prefix, key_prefix, left, right, num_queries, num_keys,
                num_documents, query_tiles, key_tiles,
                BLOCK: tl.constexpr, SLOTS: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    """Writes plan, the query side first, and fit: 1 if both cu_seqlens are valid (`offsets_fit`)."""
    if tl.program_id(1) == 0:
        plan_side(plan, cu_seqlens_q, cu_seqlens_k, query_prefix, key_prefix, left, right, num_queries, num_documents,
                  query_tiles, BLOCK, SLOTS, AT_ONCE)  # fmt: skip
        if tl.program_id(0) == 0:
            queries_fit = offsets_fit(cu_seqlens_q, num_documents, num_queries, AT_ONCE)
            tl.store(fit, queries_fit & offsets_fit(cu_seqlens_k, num_documents, num_keys, AT_ONCE))
    else:
        plan += PLAN_FIELDS * query_tiles
        plan_side(plan, cu_seqlens_k, cu_seqlens_q, key_prefix, query_prefix, right, left, num_keys, num_documents,
                  key_tiles, BLOCK, SLOTS, AT_ONCE)  # fmt: skip


@triton.jit
def order_side(plan, table, num_tiles, SLOTS: tl.constexpr, AT_ONCE: tl.constexpr):
    """Copies SLOTS tiles of the plan to their sorted rows of the table."""
    slot_N = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    real = slot_N < num_tiles
    widths = plan + 7 * num_tiles
    width_N = tl.load(widths + slot_N, mask=real, other=0)
    place_N = tl.zeros([SLOTS], tl.int32)
    for first in range(0, num_tiles, AT_ONCE):
        other_O = first + tl.arange(0, AT_ONCE)
        width_O = tl.load(widths + other_O, mask=other_O < num_tiles, other=-(2**31))
        wider_NO = width_O[None, :] > width_N[:, None]
        earlier_NO = (width_O[None, :] == width_N[:, None]) & (other_O[None, :] < slot_N[:, None])
        place_N += tl.sum((wider_NO | earlier_NO).to(tl.int32), 1)
    for field in tl.static_range(7):
        tl.store(table + place_N * 7 + field, tl.load(plan + field * num_tiles + slot_N, mask=real), mask=real)


@triton.jit(do_not_specialize=["query_tiles", "key_tiles"])
def order_kernel(plan, query_table, key_table, query_tiles, key_tiles,
                 SLOTS: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    """Writes the tables: the tiles of the plan, sorted by columns to visit, most first."""
    if tl.program_id(1) == 0:
        order_side(plan, query_table, query_tiles, SLOTS, AT_ONCE)
    else:
        order_side(plan + PLAN_FIELDS * query_tiles, key_table, key_tiles, SLOTS, AT_ONCE)


# Part 4: launching. Nothing here is differentiable.


def tile_tables(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, query_prefix: Tensor | None, key_prefix: Tensor | None,
    left: int, right: int, num_queries: int, num_keys: int, block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The tables of queries and of keys, by the kernels; asserts on the device that cu_seqlens are valid."""
    num_documents = cu_seqlens_q.numel() - 1
    query_tiles, key_tiles = (-(-rows // block) + num_documents for rows in (num_queries, num_keys))
    query_table, key_table = (cu_seqlens_q.new_empty(tiles, 7) for tiles in (query_tiles, key_tiles))
    plan = cu_seqlens_q.new_empty(PLAN_FIELDS.value, query_tiles + key_tiles)
    fit = cu_seqlens_q.new_empty(())
    cu_seqlens = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    prefixes = (None if prefix is None else prefix.contiguous() for prefix in (query_prefix, key_prefix))
    grid = -(-max(query_tiles, key_tiles) // SLOTS), 2
    constants = {"SLOTS": SLOTS, "AT_ONCE": AT_ONCE, "num_warps": NUM_WARPS}
    plan_kernel[grid](
        plan, fit, *cu_seqlens, *prefixes, left, right, num_queries, num_keys, num_documents, query_tiles, key_tiles,
        BLOCK=block, **constants,
    )  # fmt: skip
    order_kernel[grid](plan, query_table, key_table, query_tiles, key_tiles, **constants)
    need = f"start at 0, never decrease, and end at most at the numbers of rows, {num_queries} and {num_keys}"
    torch._assert_async(fit, f"cu_seqlens_q and cu_seqlens_k do not {need}")
    return query_table, key_table


tile_tables_op = library.custom_op("bigmodel::tile_tables", mutates_args=())(tile_tables)


@tile_tables_op.register_fake
def _(
    cu_seqlens_q: Tensor, _key_offsets: Tensor, _query_prefix: Tensor | None, _key_prefix: Tensor | None,
    _left: int, _right: int, num_queries: int, num_keys: int, block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_documents = cu_seqlens_q.numel() - 1
    query_tiles, key_tiles = (-(-rows // block) + num_documents for rows in (num_queries, num_keys))
    return cu_seqlens_q.new_empty(query_tiles, 7), cu_seqlens_q.new_empty(key_tiles, 7)


# Part 5: the public function.


@dataclass(frozen=True)
class TileMetadata:
    """Of a batch, for attention: tiles for the kernels; the reference needs none."""

    mask: AttentionMask
    num_queries: int
    num_keys: int
    query_tiles_NF: Tensor | None
    key_tiles_NF: Tensor | None
    block: int


def make_tile_metadata(mask: AttentionMask, num_queries: int, num_keys: int, block: int = TILE_ROWS) -> TileMetadata:
    """Tile metadata of a batch of `num_queries` query rows and `num_keys` key rows, on the device of cu_seqlens.

    On a GPU: two tables of tiles of `block` rows, for any head_dim; on CPU: none.
    On a GPU nothing waits for the device, and shapes depend on the numbers of rows and documents only: it may be
    captured in a CUDA graph together with the attention that uses it.

    Raises ValueError for cu_seqlens that do not start at 0, decrease, or pass the end of the rows. On a GPU this is an
    assertion on the device: it waits for nothing, works inside a graph, and ends the process before the attention
    kernels read or write out of bounds.
    """
    if block < 16 or block & (block - 1):
        raise ValueError(f"block is {block}; tiles need a power of two of rows, at least 16")
    cu_seqlens_q, cu_seqlens_k = mask.cu_seqlens_q, mask.cu_seqlens_k
    compiling = torch.compiler.is_compiling()
    if cu_seqlens_q.device.type == "cpu" and not compiling:
        check_offsets("cu_seqlens_q", cu_seqlens_q, num_queries)
        check_offsets("cu_seqlens_k", cu_seqlens_k, num_keys)
    if not _runs_kernels(cu_seqlens_q.device):
        return TileMetadata(mask, num_queries, num_keys, None, None, block)
    # The operator serves torch.compile and meta tensors; a direct call is faster.
    make = tile_tables_op if compiling or cu_seqlens_q.device.type == "meta" else tile_tables
    query_tiles_NF, key_tiles_NF = make(
        cu_seqlens_q, cu_seqlens_k, mask.query_prefix, mask.key_prefix, *mask.window,
        num_queries, num_keys, block,
    )  # fmt: skip
    return TileMetadata(mask, num_queries, num_keys, query_tiles_NF, key_tiles_NF, block)


def check_offsets(name: str, cu_seqlens: Tensor, num_rows: int) -> None:
    if cu_seqlens[0] != 0 or (F.pad(cu_seqlens, (0, 1), value=num_rows).diff() < 0).any():
        need = f"start at 0, never decrease, and end at most at the number of rows, {num_rows}"
        raise ValueError(f"{name} is {cu_seqlens.tolist()}; it needs to {need}")


def _runs_kernels(device: torch.device) -> bool:
    """Meta tensors take the GPU path: bigmodel/inspect/memory.py counts the memory that it would need."""
    return HAS_TRITON and (device.type in ("cuda", "meta") or INTERPRETED)
