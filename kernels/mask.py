"""Attention masks: which keys each query attends to. Masks are defined here, and chosen in the model room.

Queries and keys hold packed documents. Document i has the queries [cu_seqlens_q[i], cu_seqlens_q[i+1]) and the keys
[cu_seqlens_k[i], cu_seqlens_k[i+1]). The n-th query of a document is aligned with its n-th key. Within its document it
attends to that key, `left` keys before it and `right` keys after it (None: no limit). The first `key_prefix` keys of a
document have no limit on the right (prefix-LM: the keys of the prefix attend to one another). So each query attends to
one contiguous interval of keys,

    lo(q) <= k < hi(q),

and neither end moves back from one query of a document to the next. The interval is computed, never stored. A few
values describe causal, bidirectional, prefix-LM, sliding-window and packed cross-attention masks. In the pictures
below a line is a query, a column is a key, and # means "attends". cu_seqlens are 0 3 3 7; for cross, 0 2 5 (queries)
and 0 4 7 (keys).

    causal            left 1            bidirectional     prefixes 2 0 3    cross
    #.......          #.......          ###.....          ##......          ####....
    ##......          ##......          ###.....          ##......          ####....
    ###.....          .##.....          ###.....          ###.....          ....###.
    ...#....          ...#....          ...####.          ...###..          ....###.
    ...##...          ...##...          ...####.          ...###..          ....###.
    ...###..          ....##..          ...####.          ...###..          ........
    ...####.          .....##.          ...####.          ...####.          ........
    ........          ........          ........          ........          ........

In the first four pictures the second document is empty. Rows and columns beyond the last of cu_seqlens belong to no
document; their mask is empty. To transpose a mask, exchange queries with keys, left with right, and the two prefixes:
the first `query_prefix` queries of a document have no limit on the left.

In: cu_seqlens of the documents. Out: the mask in three forms, equal by a test: `picture` (the definition, in plain
Python), `dense` (a bool matrix, for tests and small cases) and tiles (`tile_table`, read inside Triton kernels by
`load_tile`; `kernels/tiles.py` makes the same table in two launches). Guarantee: no form mixes documents. Cost of the
tile form: about one tile more per document than its area.

Shape suffixes: Q queries, K keys, R rows of either, D documents, N tiles, F fields of a tile or document.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel.kernels.triton_import import tl, triton

# "No limit" as a number: larger than any position, and position + UNBOUNDED still fits into int32.
UNBOUNDED = 2**30


@dataclass(frozen=True)
class AttentionMask:
    """The mask of a batch. Both cu_seqlens: (D+1,) int32, from 0, never decreasing; a repeated value is an empty
    document.

    `left` and `right` count keys before and after the query's aligned key; None: the whole document.
    `key_prefix`, (D,) int32: the number of first keys of each document without a limit on the right; a number above
    the document's length means the whole document. `query_prefix`: the same in the transposed mask. None: 0.
    Raises ValueError where shapes or types do not match, or a window is negative.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    left: int | None
    right: int | None
    key_prefix: Tensor | None = None
    query_prefix: Tensor | None = None

    def __post_init__(self) -> None:
        for name, cu_seqlens in (("cu_seqlens_q", self.cu_seqlens_q), ("cu_seqlens_k", self.cu_seqlens_k)):
            if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype != torch.int32:
                raise ValueError(
                    f"{name} has shape {tuple(cu_seqlens.shape)} and type {cu_seqlens.dtype}; it needs shape "
                    "(documents + 1,) and torch.int32, with at least one document"
                )
        if self.cu_seqlens_q.shape != self.cu_seqlens_k.shape:
            raise ValueError(
                f"cu_seqlens_q has {self.cu_seqlens_q.numel() - 1} documents and cu_seqlens_k has "
                f"{self.cu_seqlens_k.numel() - 1}; both sides need the same documents in the same order "
                "(repeat a value for a document that is empty on one side)"
            )
        for name, prefix in (("key_prefix", self.key_prefix), ("query_prefix", self.query_prefix)):
            if prefix is not None and (prefix.shape != (self.num_documents,) or prefix.dtype != torch.int32):
                raise ValueError(
                    f"{name} has shape {tuple(prefix.shape)} and type {prefix.dtype}; it needs one torch.int32 for "
                    f"each of the {self.num_documents} documents (0 for an empty one)"
                )
        for name, window in (("left", self.left), ("right", self.right)):
            if window is not None and not 0 <= window < UNBOUNDED:
                raise ValueError(f"{name} is {window}; it needs 0 to {UNBOUNDED - 1} keys, or None for no limit")

    @property
    def num_documents(self) -> int:
        """Empty ones included."""
        return self.cu_seqlens_q.numel() - 1

    @property
    def transposed(self) -> "AttentionMask":
        """The same mask with queries and keys exchanged: which queries attend to each key."""
        return AttentionMask(
            self.cu_seqlens_k, self.cu_seqlens_q, self.right, self.left, self.query_prefix, self.key_prefix
        )

    @property
    def window(self) -> tuple[int, int]:
        """(left, right) as numbers: None becomes UNBOUNDED."""
        left, right = (UNBOUNDED if side is None else side for side in (self.left, self.right))
        return left, right


def causal(cu_seqlens: Tensor, left: int | None = None) -> AttentionMask:
    """Each position attends to itself and all before it in its document; with `left`, at most `left` before it."""
    return AttentionMask(cu_seqlens, cu_seqlens, left=left, right=0)


def prefix_lm(cu_seqlens: Tensor, prefix_lengths: Tensor, left: int | None = None) -> AttentionMask:
    """Causal, but all positions of document i attend to its first prefix_lengths[i] positions.

    With `left`, at most `left` positions before the query.
    """
    return AttentionMask(cu_seqlens, cu_seqlens, left=left, right=0, key_prefix=prefix_lengths)


def bidirectional(cu_seqlens: Tensor, reach: int | None = None) -> AttentionMask:
    """Each position attends to its whole document; with `reach`, to at most `reach` before and after it."""
    return AttentionMask(cu_seqlens, cu_seqlens, left=reach, right=reach)


def cross(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> AttentionMask:
    """Each query of document i attends to every key of document i: a decoder over a packed encoder."""
    return AttentionMask(cu_seqlens_q, cu_seqlens_k, left=None, right=None)


def mixed(target_cu_seqlens: Tensor, source_cu_seqlens: Tensor, left: int | None = None) -> AttentionMask:
    """A decoder that attends to its own past and its source in one softmax: queries and keys are reversed.

    Forwards, the keys of a document are its source, then its own positions (`mixed_rows`). The n-th query attends to
    the source and its own first n + 1 keys; this interval does not end at the n-th key. Reversed, the n-th query is
    aligned with its own n-th key and attends to it and everything on its right: its past, then the source. With
    `left`, at most `left` keys before its own: its past, and where that is shorter, the end of the source.
    """
    cu_seqlens = target_cu_seqlens + source_cu_seqlens
    queries, keys = (edges[-1] - edges.flip(0) for edges in (target_cu_seqlens, cu_seqlens))
    return AttentionMask(queries, keys, left=0, right=left)


def mixed_rows(target_cu_seqlens: Tensor, source_cu_seqlens: Tensor, num_labels: int, num_sources: int) -> Tensor:
    """(S + T,) int64: the keys of `mixed`, last first, as row numbers of the S source rows followed by the T target
    rows.

    Each cu_seqlens ends at the number of its rows.
    """
    device = target_cu_seqlens.device
    source_S, target_T = (torch.arange(rows, device=device, dtype=torch.int32) for rows in (num_sources, num_labels))
    source_place_S = source_S + target_cu_seqlens[torch.searchsorted(source_cu_seqlens, source_S, right=True) - 1]
    target_place_T = target_T + source_cu_seqlens[torch.searchsorted(target_cu_seqlens, target_T, right=True)]
    rows = torch.empty(num_sources + num_labels, dtype=torch.int64, device=device)
    rows[torch.cat([source_place_S, target_place_T]).long()] = torch.arange(len(rows), device=device)
    return rows.flip(0)


def last_first(mask: AttentionMask, queries: range, first_key: int) -> AttentionMask:
    """The queries of a run of positions and the keys [first_key, queries.stop) of a causal mask, both last first.

    The first document of the run may begin before it, so that its n-th query is not aligned with its n-th key. Last
    first the last position's query and key come first, and those of every document are aligned. Its documents must
    cover the run, and no query of the run attends to a key before first_key.
    """
    assert mask.right == 0, "the mask is not causal"
    assert mask.key_prefix is None, "the positions of a prefix attend to later keys"
    edges = queries.stop - mask.cu_seqlens_q.clamp(max=queries.stop).flip(0)
    of_queries, of_keys = edges.clamp(max=len(queries)), edges.clamp(max=queries.stop - first_key)
    return AttentionMask(of_queries, of_keys, left=0, right=mask.left)


# First form: the picture. It is the definition: slow, and simple enough to check by reading.


def picture(mask: AttentionMask, num_queries: int, num_keys: int) -> list[str]:
    """One line per query, one character per key: '#' where the query attends to the key, else '.'."""
    queries = [range(*pair) for pair in pairwise(mask.cu_seqlens_q.tolist())]
    keys = [range(*pair) for pair in pairwise(mask.cu_seqlens_k.tolist())]
    left, right = mask.window
    query_prefix, key_prefix = (
        [0] * len(keys) if prefix is None else prefix.tolist() for prefix in (mask.query_prefix, mask.key_prefix)
    )

    def sees(query: int, key: int) -> bool:
        for document, (document_queries, document_keys) in enumerate(zip(queries, keys, strict=True)):
            if query in document_queries and key in document_keys:
                query_place, key_place = document_queries.index(query), document_keys.index(key)
                not_too_far_left = key_place >= query_place - left or query_place < query_prefix[document]
                not_too_far_right = key_place <= query_place + right or key_place < key_prefix[document]
                return not_too_far_left and not_too_far_right
        return False

    return ["".join("#" if sees(query, key) else "." for key in range(num_keys)) for query in range(num_queries)]


# Second form: dense torch.


def intervals(mask: AttentionMask, num_queries: int) -> tuple[Tensor, Tensor]:
    """(lo, hi), each (Q,) int32: query q attends to the keys lo[q] <= k < hi[q]; to none where lo[q] >= hi[q]."""
    row_Q = torch.arange(num_queries, device=mask.cu_seqlens_q.device, dtype=torch.int32)
    document_Q = torch.searchsorted(mask.cu_seqlens_q, row_Q, right=True) - 1
    return _interval(row_Q, _document_fields(mask, num_queries)[:, document_Q], *mask.window)


def _document_fields(mask: AttentionMask, num_rows: int) -> Tensor:
    """(6, D+1): first row, end row, first column, end column and the ends of both prefixes, for each document.

    The rows beyond the last document form one more document, which has no columns.
    """
    row_starts, column_starts = mask.cu_seqlens_q, mask.cu_seqlens_k
    row_ends = F.pad(row_starts[1:], (0, 1), value=num_rows)
    column_ends = torch.cat([column_starts[1:], column_starts[-1:]])
    row_prefix_ends, column_prefix_ends = (
        starts if prefix is None else starts + torch.minimum(F.pad(prefix, (0, 1)), ends - starts)
        for starts, ends, prefix in (
            (row_starts, row_ends, mask.query_prefix),
            (column_starts, column_ends, mask.key_prefix),
        )
    )
    return torch.stack([row_starts, row_ends, column_starts, column_ends, row_prefix_ends, column_prefix_ends])


def _interval(row_R: Tensor, fields_FR: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    """(lo, hi) of each row, from the fields of its document."""
    row_start, _, column_start, column_end, row_prefix_end, column_prefix_end = fields_FR
    place = row_R - row_start + column_start
    lo = torch.where(row_R < row_prefix_end, column_start, torch.maximum(column_start, place - left))
    return lo, torch.minimum(column_end, torch.maximum(column_prefix_end, place + right + 1))


def dense(mask: AttentionMask, num_queries: int, num_keys: int) -> Tensor:
    """(Q, K) bool: True where the query attends to the key."""
    lo_Q, hi_Q = intervals(mask, num_queries)
    key_K = torch.arange(num_keys, device=lo_Q.device)
    return (lo_Q[:, None] <= key_K) & (key_K < hi_Q[:, None])


# Third form: tiles. A tile is up to `block` rows of one document, so no tile mixes documents.


def tile_table(mask: AttentionMask, num_rows: int, block: int) -> Tensor:
    """(N, 7) int32: tiles that cover every row exactly once, sorted by the number of columns to visit, most first.

    Fields: the first row of the tile, then the fields of its document (`_document_fields`).
    N = ceil(num_rows / block) + D for any cu_seqlens: shapes are static and nothing waits for the device.
    Rows are the queries of `mask`; for tiles of keys pass `mask.transposed`. Spare tiles have no rows.
    """
    fields_FD = _document_fields(mask, num_rows)
    tiles_of_document = (fields_FD[1] - fields_FD[0] + block - 1) // block
    tile_ends = tiles_of_document.cumsum(0, dtype=torch.int32)
    num_tiles = -(-num_rows // block) + mask.num_documents
    tile_N = torch.arange(num_tiles, device=fields_FD.device, dtype=torch.int32)
    document_N = torch.searchsorted(tile_ends, tile_N, right=True).clamp(max=mask.num_documents)

    tile_in_document_N = tile_N - (tile_ends - tiles_of_document)[document_N]
    fields_FN = fields_FD[:, document_N]
    row_start_N, row_end_N = fields_FN[:2]
    first_row_N = torch.minimum(row_start_N + tile_in_document_N * block, row_end_N)
    last_row_N = torch.minimum(first_row_N + block, row_end_N) - 1
    lo_N, _ = _interval(first_row_N, fields_FN, *mask.window)
    _, hi_N = _interval(last_row_N, fields_FN, *mask.window)
    longest_first_N = torch.argsort(hi_N - lo_N, descending=True, stable=True)
    return torch.cat([first_row_N[None], fields_FN])[:, longest_first_N].T.contiguous()


@triton.jit
def load_tile(tiles, part, left, right, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """ROWS rows of a tile (part number `part` % PARTS of it) and the columns that they visit.

    A table of tiles of ROWS * PARTS rows serves kernels that take ROWS rows at a time. row_end <= first_row: a spare
    tile or part, without rows. Gives first_row, row_end, column_end, beside (the column aligned with the first row),
    lo and hi (ROWS,), and begin, full_from, full_to, visited of `tile_bounds`.
    """
    field = tiles + (part // PARTS) * 7
    first_row, row_start, row_end = tl.load(field) + (part % PARTS) * ROWS, tl.load(field + 1), tl.load(field + 2)
    column_start, column_end = tl.load(field + 3), tl.load(field + 4)
    row_prefix_end, column_prefix_end = tl.load(field + 5), tl.load(field + 6)
    beside = first_row - row_start + column_start
    rows = tl.arange(0, ROWS)
    lo = interval_lo(first_row + rows, beside + rows, column_start, row_prefix_end, left)
    hi = interval_hi(beside + rows, column_end, column_prefix_end, right)
    last = tl.minimum(ROWS, row_end - first_row) - 1
    lo_first = interval_lo(first_row, beside, column_start, row_prefix_end, left)
    lo_last = interval_lo(first_row + last, beside + last, column_start, row_prefix_end, left)
    hi_first = interval_hi(beside, column_end, column_prefix_end, right)
    hi_last = interval_hi(beside + last, column_end, column_prefix_end, right)
    begin, full_from, full_to, visited = tile_bounds(lo_first, hi_first, lo_last, hi_last, COLUMNS)
    return first_row, row_end, column_end, beside, lo, hi, begin, full_from, full_to, visited


@triton.jit
def interval_lo(row, place, column_start, row_prefix_end, left):
    """The first column that a row attends to; `place` is the column aligned with it. Vectors or scalars."""
    return tl.where(row < row_prefix_end, column_start, tl.maximum(column_start, place - left))


@triton.jit
def interval_hi(place, column_end, column_prefix_end, right):
    """The end of the columns that a row attends to."""
    return tl.minimum(column_end, tl.maximum(column_prefix_end, place + right + 1))


@triton.jit
def sees(lo, hi, column):
    """(ROWS, COLUMNS) bool: which of these columns each row attends to."""
    return (lo[:, None] <= column[None, :]) & (column[None, :] < hi[:, None])


LOWER, UPPER, BOTH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # ends of the intervals that a kernel checks


@triton.jit
def sees_tile(lo, hi, first, COLUMNS: tl.constexpr, ENDS: tl.constexpr):
    """`sees` for the columns from `first` on, with one comparison a pair; ENDS: those that differ from row to row.

    A thread of the tensor cores' layout holds columns that are 8 apart. So `far` is a constant in the compiled code,
    and what it is compared with is computed once for a row. Correct in every layout.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    near, far = column & 7, column & -8
    if ENDS == LOWER:
        return (lo[:, None] - near) - first <= far
    elif ENDS == UPPER:
        return far < (hi[:, None] - near) - first
    else:
        after_lo = far + (first - (lo[:, None] - near))  # below 0: very large without a sign
        length = tl.maximum(hi - lo, 0)[:, None]
        return after_lo.to(tl.uint32, bitcast=True) < length.to(tl.uint32, bitcast=True)


@triton.jit
def tile_bounds(lo_first, hi_first, lo_last, hi_last, COLUMNS: tl.constexpr):
    """The columns that a tile of rows visits: (begin, full_from, full_to, visited).

    Column tile n holds COLUMNS columns from begin + n * COLUMNS on. Tiles 0 <= n < visited hold all columns that any
    row attends to; all rows attend to all columns of the tiles full_from <= n < full_to.
    lo and hi never decrease from row to row, so the intervals of the first and the last row suffice.
    """
    visited = (tl.maximum(hi_last - lo_first, 0) + COLUMNS - 1) // COLUMNS
    full_from = tl.minimum((lo_last - lo_first + COLUMNS - 1) // COLUMNS, visited)
    full_to = tl.maximum(tl.maximum(hi_first - lo_first, 0) // COLUMNS, full_from)
    return lo_first, full_from, full_to, visited


FULL, PARTIAL = tl.constexpr(0), tl.constexpr(1)  # parts of the visited column tiles: without and with masking


@triton.jit
def columns_in_part(part: tl.constexpr, begin, full_from, full_to, visited, COLUMNS: tl.constexpr):
    """(start, stop) of the loop over the tiles of a part, in steps of COLUMNS."""
    if part == FULL:
        return begin + full_from * COLUMNS, begin + full_to * COLUMNS
    else:
        return begin, begin + (visited - (full_to - full_from)) * COLUMNS


@triton.jit
def first_column(part: tl.constexpr, place, begin, full_from, full_to, COLUMNS: tl.constexpr):
    """The first column of the tile at a place of that loop. Partial tiles lie left and right of the full ones."""
    if part == FULL:
        return place
    else:
        return tl.where(place < begin + full_from * COLUMNS, place, place + (full_to - full_from) * COLUMNS)
