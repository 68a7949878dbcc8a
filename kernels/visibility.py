"""The attention rule: which keys each query sees. Nothing else in the tree speaks of masks.

A row of queries and a row of keys hold documents end to end. Document i has the queries
[query_offsets[i], query_offsets[i+1]) and the keys [key_offsets[i], key_offsets[i+1]). The n-th query of a
document stands beside its n-th key, and sees, inside its own document, that key, `left` keys before it and
`right` keys after it (None: all of them). So every query sees one contiguous interval of keys,

    lo(q) <= k < hi(q),

and the interval is computed, never stored. Causal, bidirectional, sliding-window and packed cross-attention are
settings of four values. In the pictures below a line is a query, a column is a key, and # is "sees".

    causal, offsets 0 3 3 7   window, 0 3 3 7, left 1   bidirectional, 0 3 3 7    cross, 0 2 5 and 0 4 7
    #.......                  #.......                  ###.....                  ####....
    ##......                  ##......                  ###.....                  ####....
    ###.....                  .##.....                  ###.....                  ....###.
    ...#....                  ...#....                  ...####.                  ....###.
    ...##...                  ...##...                  ...####.                  ....###.
    ...###..                  ....##..                  ...####.                  ........
    ...####.                  .....##.                  ...####.                  ........
    ........                  ........                  ........                  ........

The second document of the first three is empty, and rows and columns beyond the last offset belong to nobody:
they see nothing and are not seen. Exchanging queries with keys and left with right transposes the picture.

Takes document offsets. Gives the rule in three forms that a test holds equal: `picture` (the definition, in plain
Python), `dense` (a bool matrix, for tests and small cases) and the tile form (`tile_table`, read inside Triton
kernels by `load_tile`); and the Schedule of a batch made from it. Guarantees that no form mixes documents. Costs of
the tile form: a dozen small device operations per batch, no waiting for the device, and about one tile more per
document than its area.

Shape suffixes: Q queries, K keys, D documents, N tiles.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import HAS_TRITON, INTERPRETED, tl, triton

# "No limit" as a number: beyond every position, and position + UNBOUNDED still fits into int32.
UNBOUNDED = 2**30


@dataclass(frozen=True)
class Visibility:
    """Who sees whom. Both offsets: (D+1,) int32, from 0, never decreasing; a repeated offset is an empty document.

    `left` and `right` count the keys visible before and after a query's own place; None: all of its document.
    Raises ValueError where the offsets differ in shape or type, or a window is negative.
    """

    query_offsets: Tensor
    key_offsets: Tensor
    left: int | None
    right: int | None

    def __post_init__(self) -> None:
        for name, offsets in (("query_offsets", self.query_offsets), ("key_offsets", self.key_offsets)):
            if offsets.dim() != 1 or offsets.numel() < 2 or offsets.dtype != torch.int32:
                raise ValueError(
                    f"{name} has shape {tuple(offsets.shape)} and type {offsets.dtype}; it needs shape "
                    "(documents + 1,) and torch.int32, with at least one document"
                )
        if self.query_offsets.shape != self.key_offsets.shape:
            raise ValueError(
                f"query_offsets has {self.query_offsets.numel() - 1} documents and key_offsets has "
                f"{self.key_offsets.numel() - 1}; both sides need the same documents in the same order "
                "(repeat an offset for a document that is empty on one side)"
            )
        for name, window in (("left", self.left), ("right", self.right)):
            if window is not None and not 0 <= window < UNBOUNDED:
                raise ValueError(f"{name} is {window}; it needs 0 to {UNBOUNDED - 1} keys, or None for no limit")

    @property
    def transposed(self) -> "Visibility":
        """The same rule with queries and keys exchanged: which queries see each key."""
        return Visibility(self.key_offsets, self.query_offsets, left=self.right, right=self.left)

    @property
    def window(self) -> tuple[int, int]:
        """(left, right) as numbers: None becomes UNBOUNDED."""
        left, right = (UNBOUNDED if side is None else side for side in (self.left, self.right))
        return left, right


def causal(offsets: Tensor, left: int | None = None) -> Visibility:
    """Each position sees itself and what came before it in its document; with `left`, at most that many before it."""
    return Visibility(offsets, offsets, left=left, right=0)


def bidirectional(offsets: Tensor) -> Visibility:
    """Each position sees its whole document."""
    return Visibility(offsets, offsets, left=None, right=None)


def cross(query_offsets: Tensor, key_offsets: Tensor) -> Visibility:
    """Each query of document i sees every key of document i: a decoder's view of a packed encoder."""
    return Visibility(query_offsets, key_offsets, left=None, right=None)


# First form: the picture. It is the definition: slow, and plain enough to be believed.


def picture(visibility: Visibility, num_queries: int, num_keys: int) -> list[str]:
    """One line per query, one character per key: '#' where the query sees the key, '.' where not."""
    queries = [range(*pair) for pair in pairwise(visibility.query_offsets.tolist())]
    keys = [range(*pair) for pair in pairwise(visibility.key_offsets.tolist())]
    left, right = visibility.window

    def sees(query: int, key: int) -> bool:
        for document_queries, document_keys in zip(queries, keys, strict=True):
            if query in document_queries and key in document_keys:
                distance = document_keys.index(key) - document_queries.index(query)
                return -left <= distance <= right
        return False

    return ["".join("#" if sees(query, key) else "." for key in range(num_keys)) for query in range(num_queries)]


# Second form: dense torch.


def intervals(visibility: Visibility, num_queries: int) -> tuple[Tensor, Tensor]:
    """(lo, hi), each (Q,) int32: query q sees the keys lo[q] <= k < hi[q]. Both are 0 for rows in no document."""
    query_offsets, key_offsets = visibility.query_offsets, visibility.key_offsets
    left, right = visibility.window
    row_Q = torch.arange(num_queries, device=query_offsets.device, dtype=torch.int32)
    num_documents = query_offsets.numel() - 1
    found_Q = torch.searchsorted(query_offsets, row_Q, right=True) - 1
    document_Q = found_Q.clamp(max=num_documents - 1)
    place_Q = row_Q - query_offsets[document_Q] + key_offsets[document_Q]
    lo_Q = torch.maximum(key_offsets[document_Q], place_Q - left)
    hi_Q = torch.minimum(key_offsets[document_Q + 1], place_Q + right + 1)
    outside_Q = found_Q >= num_documents
    return lo_Q.masked_fill(outside_Q, 0), hi_Q.masked_fill(outside_Q, 0)


def dense(visibility: Visibility, num_queries: int, num_keys: int) -> Tensor:
    """(Q, K) bool: True where the query sees the key."""
    lo_Q, hi_Q = intervals(visibility, num_queries)
    key_K = torch.arange(num_keys, device=lo_Q.device)
    return (lo_Q[:, None] <= key_K) & (key_K < hi_Q[:, None])


# Third form: tiles. A tile is up to `block` rows of one document, so no tile mixes documents.


def tile_table(visibility: Visibility, num_rows: int, block: int) -> Tensor:
    """(N, 5) int32: the tiles that cover every row exactly once, those with most columns to visit first.

    Fields: first row, end row (both in the flat run), and of the document: first row, first column, end column.
    N = ceil(num_rows / block) + D whatever the offsets, so shapes are static and nothing waits for the device.
    Rows beyond the last offset come as one more document, which has no columns. Spare tiles have no rows.
    Rows are the queries of `visibility`; give `visibility.transposed` for tiles of keys.
    """
    left, right = visibility.window
    row_offsets = F.pad(visibility.query_offsets, (0, 1), value=num_rows)
    column_starts = F.pad(visibility.key_offsets[:-1], (0, 1))
    column_ends = F.pad(visibility.key_offsets[1:], (0, 1))

    num_documents = visibility.query_offsets.numel() - 1
    tiles_of_document = (row_offsets.diff() + block - 1) // block
    tile_ends = tiles_of_document.cumsum(0, dtype=torch.int32)
    tile_N = torch.arange(-(-num_rows // block) + num_documents, device=row_offsets.device, dtype=torch.int32)
    document_N = torch.searchsorted(tile_ends, tile_N, right=True).clamp(max=num_documents)

    tile_in_document_N = tile_N - (tile_ends - tiles_of_document)[document_N]
    row_start_N, row_end_N = row_offsets[document_N], row_offsets[document_N + 1]
    first_row_N = torch.minimum(row_start_N + tile_in_document_N * block, row_end_N)
    column_start_N, column_end_N = column_starts[document_N], column_ends[document_N]

    to_column_N = column_start_N - row_start_N
    last_row_N = torch.minimum(first_row_N + block, row_end_N) - 1
    lo_N = torch.maximum(column_start_N, first_row_N + to_column_N - left)
    hi_N = torch.minimum(column_end_N, last_row_N + to_column_N + right + 1)
    longest_first_N = torch.argsort(hi_N - lo_N, descending=True, stable=True)
    table_NF = torch.stack([first_row_N, row_end_N, row_start_N, column_start_N, column_end_N], dim=1)
    return table_NF[longest_first_N].contiguous()


@triton.jit
def load_tile(tiles, tile, left, right, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One tile of the table (row_end <= first_row: a spare one), and what it visits.

    Gives first_row, row_end, column_end, lo and hi (ROWS,), and begin, full_from, full_to, visited
    of `tile_bounds`.
    """
    field = tiles + tile * 5
    first_row, row_end, row_start = tl.load(field), tl.load(field + 1), tl.load(field + 2)
    column_start, column_end = tl.load(field + 3), tl.load(field + 4)
    row = first_row + tl.arange(0, ROWS)
    lo, hi = row_interval(row, row_start, column_start, column_end, left, right)
    last_row = tl.minimum(first_row + ROWS, row_end) - 1
    lo_first, hi_first = row_interval(first_row, row_start, column_start, column_end, left, right)
    lo_last, hi_last = row_interval(last_row, row_start, column_start, column_end, left, right)
    begin, full_from, full_to, visited = tile_bounds(lo_first, hi_first, lo_last, hi_last, COLUMNS)
    return first_row, row_end, column_end, lo, hi, begin, full_from, full_to, visited


@triton.jit
def row_interval(row, row_start, column_start, column_end, left, right):
    """(lo, hi): each row of a document sees the columns lo <= column < hi. `row` may be a vector or a scalar."""
    place = row - row_start + column_start
    return tl.maximum(column_start, place - left), tl.minimum(column_end, place + right + 1)


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


LEFT, FULL, RIGHT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # the three parts of what a tile visits


@triton.jit
def part_bounds(part: tl.constexpr, full_from, full_to, visited):
    """The column tiles of the left part (partial), the full part (needs no mask) and the right part: (from, to)."""
    if part == LEFT:
        return 0, full_from
    elif part == FULL:
        return full_from, full_to
    else:
        return full_to, visited


# The schedule: what attention needs to know of a batch, made once and shared by all layers.

TILE_ROWS = 128


@dataclass(frozen=True)
class Schedule:
    """What attention needs to know of a batch: tiles for the kernels, or lengths on the host for the reference."""

    num_queries: int
    num_keys: int
    query_tiles_NF: Tensor | None
    key_tiles_NF: Tensor | None
    block: int
    lengths: tuple[tuple[int, int], ...] | None


def make_schedule(visibility: Visibility, num_queries: int, num_keys: int, block: int = TILE_ROWS) -> Schedule:
    """The schedule of a batch of `num_queries` query rows and `num_keys` key rows, on the device of the offsets.

    On a GPU it is two tables of tiles of `block` rows, made without waiting for the device; on CPU the lengths of
    the documents. Raises ValueError for offsets that do not start at 0, decrease, or pass the end of the rows; on a
    GPU the same is asserted on the device.
    """
    _check_offsets("query_offsets", visibility.query_offsets, num_queries)
    _check_offsets("key_offsets", visibility.key_offsets, num_keys)
    if _runs_kernels(visibility.query_offsets.device):
        query_tiles_NF = tile_table(visibility, num_queries, block)
        key_tiles_NF = tile_table(visibility.transposed, num_keys, block)
        return Schedule(num_queries, num_keys, query_tiles_NF, key_tiles_NF, block, lengths=None)
    return Schedule(num_queries, num_keys, None, None, block, document_lengths(visibility))


def document_lengths(visibility: Visibility) -> tuple[tuple[int, int], ...]:
    """(queries, keys) of each document, on the host: waits for the device if the offsets are on one."""
    query_lengths, key_lengths = visibility.query_offsets.diff().tolist(), visibility.key_offsets.diff().tolist()
    return tuple(zip(query_lengths, key_lengths, strict=True))


def _check_offsets(name: str, offsets: Tensor, num_rows: int) -> None:
    good = (offsets[0] == 0) & (offsets.diff() >= 0).all() & (offsets[-1] <= num_rows)
    need = f"start at 0, never decrease, and end at most at the number of rows, {num_rows}"
    if offsets.device.type == "cpu":
        if not good:
            raise ValueError(f"{name} is {offsets.tolist()}; offsets need to {need}")
    else:
        torch._assert_async(good, f"{name} does not {need}")


def _runs_kernels(device: torch.device) -> bool:
    return HAS_TRITON and (device.type == "cuda" or INTERPRETED)
