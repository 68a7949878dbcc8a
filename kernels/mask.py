"""The attention rule: which keys each query sees. Nothing else in the tree speaks of masks.

A row of queries and a row of keys hold documents end to end. Document i has the queries
[cu_seqlens_q[i], cu_seqlens_q[i+1]) and the keys [cu_seqlens_k[i], cu_seqlens_k[i+1]). The n-th query of a
document stands beside its n-th key, and sees, inside its own document, that key, `left` keys before it and
`right` keys after it (None: all of them). The first `key_prefix` keys of a document are seen however far they are to
the right (prefix-LM: the keys of the prefix see one another). So every query sees one contiguous interval of keys,

    lo(q) <= k < hi(q),

and neither end ever moves back from one query of a document to the next; the interval is computed, never stored.
Causal, bidirectional, prefix-LM, sliding-window and packed cross-attention are settings of a few values. In the
pictures below a line is a query, a column is a key, and # is "sees". The offsets are 0 3 3 7, those of cross 0 2 5
and 0 4 7.

    causal            left 1            bidirectional     prefixes 2 0 3    cross
    #.......          #.......          ###.....          ##......          ####....
    ##......          ##......          ###.....          ##......          ####....
    ###.....          .##.....          ###.....          ###.....          ....###.
    ...#....          ...#....          ...####.          ...###..          ....###.
    ...##...          ...##...          ...####.          ...###..          ....###.
    ...###..          ....##..          ...####.          ...###..          ........
    ...####.          .....##.          ...####.          ...####.          ........
    ........          ........          ........          ........          ........

The second document of the first four is empty, and rows and columns beyond the last offset belong to nobody: they see
nothing and are not seen. Exchanging queries with keys, left with right, and the two prefixes transposes the picture:
the first `query_prefix` queries of a document have no limit on the left.

Takes document cu_seqlens. Gives the rule in three forms that a test holds equal: `picture` (the definition, in plain
Python), `dense` (a bool matrix, for tests and small cases) and the tile form (`tile_table`, read inside Triton
kernels by `load_tile`; `kernels/tiles.py` makes the same table in two launches). Guarantees that no form mixes
documents. Cost of the tile form: about one tile more per document than its area.

Shape suffixes: Q queries, K keys, R rows of either, D documents, N tiles, F fields of a tile or document.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel.kernels.triton_import import tl, triton

# "No limit" as a number: beyond every position, and position + UNBOUNDED still fits into int32.
UNBOUNDED = 2**30


@dataclass(frozen=True)
class AttentionMask:
    """Who sees whom. Both cu_seqlens: (D+1,) int32, from 0, never decreasing; a repeated offset is an empty document.

    `left` and `right` count the keys visible before and after a query's own place; None: all of its document.
    `key_prefix`, (D,) int32: so many first keys of each document have no limit on the right; any number, from its
    length on it is the whole document. `query_prefix` is its counterpart in the transposed rule. None: 0.
    Raises ValueError where shapes or types do not fit one another, or a window is negative.
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
                "(repeat an offset for a document that is empty on one side)"
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
        """The same rule with queries and keys exchanged: which queries see each key."""
        return AttentionMask(
            self.cu_seqlens_k, self.cu_seqlens_q, self.right, self.left, self.query_prefix, self.key_prefix
        )

    @property
    def window(self) -> tuple[int, int]:
        """(left, right) as numbers: None becomes UNBOUNDED."""
        left, right = (UNBOUNDED if side is None else side for side in (self.left, self.right))
        return left, right


def causal(cu_seqlens: Tensor, left: int | None = None) -> AttentionMask:
    """Each position sees itself and what came before it in its document; with `left`, at most that many before it."""
    return AttentionMask(cu_seqlens, cu_seqlens, left=left, right=0)


def prefix_lm(cu_seqlens: Tensor, prefix_lengths: Tensor, left: int | None = None) -> AttentionMask:
    """Causal, except that the first prefix_lengths[i] positions of document i are seen by all of its positions.

    With `left`, no further back than that many before the one that looks.
    """
    return AttentionMask(cu_seqlens, cu_seqlens, left=left, right=0, key_prefix=prefix_lengths)


def bidirectional(cu_seqlens: Tensor, reach: int | None = None) -> AttentionMask:
    """Each position sees its whole document; with `reach`, at most that many before and after it."""
    return AttentionMask(cu_seqlens, cu_seqlens, left=reach, right=reach)


def cross(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> AttentionMask:
    """Each query of document i sees every key of document i: a decoder's inputs of a packed encoder."""
    return AttentionMask(cu_seqlens_q, cu_seqlens_k, left=None, right=None)


def mixed(target_cu_seqlens: Tensor, source_cu_seqlens: Tensor, left: int | None = None) -> AttentionMask:
    """A decoder that sees its own past and its source in one softmax: rows and keys are read backwards.

    Forwards, the keys of a document are its source, then its own positions (`mixed_rows`), and the n-th query sees the
    source and its own first n + 1: an interval whose end stands beside no key of its own number. Backwards, the n-th
    query stands beside its own n-th key and sees it and everything to its right: its past, then the source. With
    `left`, no further back than that many before its own: its past, and where that is shorter, the end of the source.
    """
    cu_seqlens = target_cu_seqlens + source_cu_seqlens
    queries, keys = (edges[-1] - edges.flip(0) for edges in (target_cu_seqlens, cu_seqlens))
    return AttentionMask(queries, keys, left=0, right=left)


def mixed_rows(target_cu_seqlens: Tensor, source_cu_seqlens: Tensor, num_labels: int, num_sources: int) -> Tensor:
    """(S + T,) int64: the keys of `mixed`, last first, as rows of the S source rows with the T target rows below.

    Both offsets end at the number of their rows.
    """
    device = target_cu_seqlens.device
    source_S, target_T = (torch.arange(rows, device=device, dtype=torch.int32) for rows in (num_sources, num_labels))
    source_place_S = source_S + target_cu_seqlens[torch.searchsorted(source_cu_seqlens, source_S, right=True) - 1]
    target_place_T = target_T + source_cu_seqlens[torch.searchsorted(target_cu_seqlens, target_T, right=True)]
    rows = torch.empty(num_sources + num_labels, dtype=torch.int64, device=device)
    rows[torch.cat([source_place_S, target_place_T]).long()] = torch.arange(len(rows), device=device)
    return rows.flip(0)


# First form: the picture. It is the definition: slow, and plain enough to be believed.


def picture(mask: AttentionMask, num_queries: int, num_keys: int) -> list[str]:
    """One line per query, one character per key: '#' where the query sees the key, '.' where not."""
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
    """(lo, hi), each (Q,) int32: query q sees the keys lo[q] <= k < hi[q]; none where lo[q] >= hi[q]."""
    row_Q = torch.arange(num_queries, device=mask.cu_seqlens_q.device, dtype=torch.int32)
    document_Q = torch.searchsorted(mask.cu_seqlens_q, row_Q, right=True) - 1
    return _interval(row_Q, _document_fields(mask, num_queries)[:, document_Q], *mask.window)


def _document_fields(mask: AttentionMask, num_rows: int) -> Tensor:
    """(6, D+1): of each document the first row, end row, first column, end column, and the ends of its two prefixes.

    The rows beyond the last offset come last, as one more document, which has no columns.
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
    """(Q, K) bool: True where the query sees the key."""
    lo_Q, hi_Q = intervals(mask, num_queries)
    key_K = torch.arange(num_keys, device=lo_Q.device)
    return (lo_Q[:, None] <= key_K) & (key_K < hi_Q[:, None])


# Third form: tiles. A tile is up to `block` rows of one document, so no tile mixes documents.


def tile_table(mask: AttentionMask, num_rows: int, block: int) -> Tensor:
    """(N, 7) int32: the tiles that cover every row exactly once, those with most columns to visit first.

    Fields: the first row of the tile, then those of its document (`_document_fields`).
    N = ceil(num_rows / block) + D whatever the cu_seqlens, so shapes are static and nothing waits for the device.
    Rows are the queries of `mask`; give `mask.transposed` for tiles of keys. Spare tiles have no rows.
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
    """ROWS rows of a tile of the table, its part number `part` % PARTS, and what they visit.

    A table of tiles of ROWS * PARTS rows serves kernels that take fewer rows at a time. No rows (row_end <= first_row):
    a spare tile or part. Gives first_row, row_end, column_end, beside (the column beside the first row), lo and hi
    (ROWS,), and begin, full_from, full_to, visited of `tile_bounds`.
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
    """The first column that a row sees; `place` is the column beside it. Vectors or scalars."""
    return tl.where(row < row_prefix_end, column_start, tl.maximum(column_start, place - left))


@triton.jit
def interval_hi(place, column_end, column_prefix_end, right):
    """The end of what a row sees."""
    return tl.minimum(column_end, tl.maximum(column_prefix_end, place + right + 1))


@triton.jit
def sees(lo, hi, column):
    """(ROWS, COLUMNS) bool: which of these columns each row sees."""
    return (lo[:, None] <= column[None, :]) & (column[None, :] < hi[:, None])


@triton.jit
def tile_bounds(lo_first, hi_first, lo_last, hi_last, COLUMNS: tl.constexpr):
    """Which columns a tile of rows visits: (begin, full_from, full_to, visited).

    Column tile n holds the columns begin + n * COLUMNS and the next COLUMNS - 1. Tiles 0 <= n < visited hold
    everything that a row of the tile sees; every row sees all of the tiles full_from <= n < full_to.
    lo and hi never decrease from row to row, so the intervals of the first and the last row decide.
    """
    visited = (tl.maximum(hi_last - lo_first, 0) + COLUMNS - 1) // COLUMNS
    full_from = tl.minimum((lo_last - lo_first + COLUMNS - 1) // COLUMNS, visited)
    full_to = tl.maximum(tl.maximum(hi_first - lo_first, 0) // COLUMNS, full_from)
    return lo_first, full_from, full_to, visited


FULL, PARTIAL = tl.constexpr(0), tl.constexpr(1)  # the two parts of what a tile visits


@triton.jit
def count_in_part(part: tl.constexpr, full_from, full_to, visited):
    """How many column tiles a part has."""
    if part == FULL:
        return full_to - full_from
    else:
        return visited - (full_to - full_from)


@triton.jit
def tile_in_part(part: tl.constexpr, number, full_from, full_to):
    """The column tile `number` of a part. The partial ones are those left and right of the full ones."""
    if part == FULL:
        return full_from + number
    else:
        return tl.where(number < full_from, number, number + full_to - full_from)
