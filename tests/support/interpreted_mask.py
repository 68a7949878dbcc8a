"""The tile form of the attention mask draws the same picture as the dense form. Run by tests/kernels/test_mask.py."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as some
from torch import library

from bigmodel.kernels import tiles as tile_metadata
from bigmodel.kernels.mask import (
    BOTH,
    FULL,
    LOWER,
    UPPER,
    AttentionMask,
    bidirectional,
    causal,
    columns_in_part,
    dense,
    first_column,
    load_tile,
    prefix_lm,
    sees_tile,
    tile_table,
)
from bigmodel.kernels.tiles import make_tile_metadata, tile_tables_reference
from bigmodel.kernels.triton_import import tl, triton
from tests.kernels.test_mask import int32, offsets_of, random_masks

BY_MASK, BY_FULL_TILE = 1, 16


@triton.jit
def draw_kernel(
    drawing,
    tiles,
    left,
    right,
    num_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    ENDS: tl.constexpr,
):  # fmt: skip; one program: one part of a tile
    """Adds 1 to every visible pair of a partial tile, 16 to every pair of a full tile, without a mask on columns."""
    first_row, row_end, column_end, _beside, lo, hi, begin, full_from, full_to, visited = load_tile(
        tiles, tl.program_id(0), left, right, ROWS, COLUMNS, PARTS
    )
    if first_row >= row_end:
        return
    row = first_row + tl.arange(0, ROWS)
    for part in tl.static_range(2):
        start, stop = columns_in_part(part, begin, full_from, full_to, visited, COLUMNS)
        for place in range(start, stop, COLUMNS):
            first = first_column(part, place, begin, full_from, full_to, COLUMNS)
            column = first + tl.arange(0, COLUMNS)
            drawn = (row < row_end)[:, None] & (column < num_columns)[None, :]
            pair = drawing + row[:, None] * num_columns + column[None, :]
            if part == FULL:
                tl.store(pair, tl.load(pair, mask=drawn) + 16, mask=drawn)
            else:
                drawn = drawn & sees_tile(lo, hi, first, COLUMNS, ENDS) & (column < column_end)[None, :]
                tl.store(pair, tl.load(pair, mask=drawn) + 1, mask=drawn)


def drawn(
    mask: AttentionMask, num_rows: int, num_columns: int, rows: int, columns: int, parts: int = 1
) -> torch.Tensor:
    tiles = tile_table(mask, num_rows, rows * parts)
    drawing = torch.zeros(num_rows, num_columns, dtype=torch.int32)
    ends = UPPER if mask.left is None else LOWER if mask.right is None else BOTH
    constants = {"ROWS": rows, "COLUMNS": columns, "PARTS": parts, "ENDS": ends}
    draw_kernel[(len(tiles) * parts,)](drawing, tiles, *mask.window, num_columns, **constants)
    return drawing


# hypothesis's shrinking and explaining trace every line of the interpreter: minutes.
@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
@given(random_masks(longest=11, most=5), some.sampled_from([1, 2]))
def test_tiles_visit_every_visible_pair_once_and_no_other(case: tuple[AttentionMask, int, int], parts: int) -> None:
    mask, num_queries, num_keys = case
    drawing = drawn(mask, num_queries, num_keys, 4 // parts, 4, parts)
    once = (drawing == BY_MASK) | (drawing == BY_FULL_TILE)
    assert torch.equal(once, drawing > 0)
    assert torch.equal(once, dense(mask, num_queries, num_keys))


def test_tiles_of_keys_draw_the_transposed_picture() -> None:
    mask = causal(offsets_of([3, 0, 21, 1]), left=9)
    drawing = drawn(mask.transposed, 30, 30, rows=8, columns=4)
    assert torch.equal(drawing > 0, dense(mask, 30, 30).T)


def test_a_prefix_is_seen_from_every_tile_and_full_where_all_of_it_is_seen() -> None:
    # One document of 32 with a prefix of 10: of the first 8 rows, 8 columns are in a full tile, 2 in a partial one.
    mask = prefix_lm(offsets_of([32]), int32([10]))
    drawing = drawn(mask, 32, 32, rows=8, columns=4)
    assert (drawing[0] == torch.tensor([16] * 8 + [1] * 2 + [0] * 22)).all()
    of_keys = drawn(mask.transposed, 32, 32, rows=8, columns=4)
    assert (of_keys > 0).equal(dense(mask, 32, 32).T)
    assert (of_keys[:8] == BY_FULL_TILE).all()
    assert not of_keys[10, :10].any()


def test_tiles_inside_a_document_are_full() -> None:
    # 32 x 32 pairs in 8 x 4 tiles. Causal: row tile i has 2 i full column tiles before its diagonal.
    assert (drawn(bidirectional(offsets_of([32])), 32, 32, 8, 4) == BY_FULL_TILE).sum() == 32 * 32
    assert (drawn(causal(offsets_of([32])), 32, 32, 8, 4) == BY_FULL_TILE).sum() == (0 + 2 + 4 + 6) * 8 * 4


def test_a_window_leaves_tiles_on_both_sides_unvisited_and_has_full_tiles_between() -> None:
    drawing = drawn(causal(offsets_of([64]), left=24), 64, 64, 8, 4)
    assert (drawing[32] == torch.tensor([0] * 8 + [1] * 8 + [16] * 16 + [1] + [0] * 31)).all()


# Tile metadata.


def assert_the_kernels_make_the_tables_of_torch(mask: AttentionMask, num_queries: int, num_keys: int) -> None:
    made = make_tile_metadata(mask, num_queries, num_keys, block=16)
    for ours, exact in zip(
        (made.query_tiles_NF, made.key_tiles_NF),
        tile_tables_reference(mask, num_queries, num_keys, 16),
        strict=True,
    ):
        assert torch.equal(ours, exact)


@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])
@given(random_masks(longest=70, most=9), some.sampled_from([4, 1024]), some.sampled_from([4, 32]))
def test_the_kernels_make_the_tables_of_torch(case: tuple[AttentionMask, int, int], at_once: int, slots: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_metadata, "AT_ONCE", at_once)
        patch.setattr(tile_metadata, "SLOTS", slots)
        assert_the_kernels_make_the_tables_of_torch(*case)


@pytest.mark.parametrize("lengths", [[1] * 4096, [0] * 1500 + [3000] + [40, 0] * 20])
def test_the_tables_of_thousands_of_documents(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_metadata, "SLOTS", 1024)  # the interpreter's cost per program does not depend on its size
    assert_the_kernels_make_the_tables_of_torch(causal(offsets_of(lengths)), sum(lengths) + 3, sum(lengths) + 3)


@pytest.mark.parametrize("cu_seqlens", [[1, 4], [0, 3, 2, 4], [0, 7]])
def test_offsets_that_do_not_fit_end_the_kernels(cu_seqlens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_metadata, "check_offsets", lambda *_inputs: None)  # as on a GPU
    good, bad = offsets_of([2] * (len(cu_seqlens) - 1)), int32(cu_seqlens)
    make_tile_metadata(AttentionMask(good, good, left=None, right=0), 6, 6)
    for mask in (AttentionMask(good, bad, left=None, right=0), AttentionMask(bad, good, left=None, right=0)):
        with pytest.raises(RuntimeError, match=r"do not start at 0, never decrease, and end at most .* 6 and 6"):
            make_tile_metadata(mask, 6, 6)


def test_torch_knows_all_about_the_operator() -> None:
    cu_seqlens = offsets_of([5, 20])
    for prefix in (None, int32([1, 4])):
        library.opcheck(tile_metadata.tile_tables_op, (cu_seqlens, cu_seqlens, None, prefix, 9, 0, 30, 30, 16))
