"""The attention rule: its three forms agree, and are what the module's picture shows."""

import re
from itertools import accumulate, pairwise
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from bigmodel.kernels import mask as rule
from bigmodel.kernels.mask import (
    AttentionMask,
    bidirectional,
    causal,
    cross,
    dense,
    intervals,
    last_first,
    mixed,
    mixed_rows,
    picture,
    prefix_lm,
    tile_table,
)
from bigmodel.kernels.tiles import make_tile_metadata
from tests.support.interpreted import run_interpreted


def int32(numbers: list[int]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def offsets_of(lengths: list[int]) -> torch.Tensor:
    return int32([0, *accumulate(lengths)])


@some.composite
def visibilities(draw, longest: int = 9, most: int = 5) -> tuple[AttentionMask, int, int]:
    """A rule, and numbers of queries and keys that may pass the last offset."""
    lengths = some.integers(0, longest) | some.just(0)
    documents = draw(some.lists(some.tuples(lengths, lengths), min_size=1, max_size=most))
    if draw(some.booleans()):
        documents = [(queries, queries) for queries, _ in documents]
    cu_seqlens_q, cu_seqlens_k = (offsets_of([document[side] for document in documents]) for side in (0, 1))
    window = some.none() | some.integers(0, longest + 1)
    prefix = some.none() | some.lists(lengths, min_size=len(documents), max_size=len(documents)).map(int32)
    mask = AttentionMask(cu_seqlens_q, cu_seqlens_k, draw(window), draw(window), draw(prefix), draw(prefix))
    beyond = some.integers(0, 5)
    return mask, int(cu_seqlens_q[-1]) + draw(beyond), int(cu_seqlens_k[-1]) + draw(beyond)


def random_masks(longest: int, most: int) -> some.SearchStrategy[tuple[AttentionMask, int, int]]:
    """The same, drawn evenly: of a few dozen that hypothesis draws by itself most are empty or without a window."""
    return some.integers(0, 2**32).map(lambda seed: _random_mask(Random(seed), longest, most))


def _random_mask(random: Random, longest: int, most: int) -> tuple[AttentionMask, int, int]:
    count = random.randint(1, most)
    queries, others = ([random.choice([0, *[random.randint(1, longest)] * 4]) for _ in range(count)] for _ in range(2))
    keys = random.choice([queries, queries, others])
    left, right = (random.choice([None, 0, random.randint(0, longest)]) for _ in range(2))
    prefixes = [random.choice([None, int32([random.randint(0, longest) for _ in keys])]) for _ in range(2)]
    mask = AttentionMask(offsets_of(queries), offsets_of(keys), left, right, *prefixes)
    return mask, sum(queries) + random.randint(0, 5), sum(keys) + random.randint(0, 5)


def pictured(mask: AttentionMask, num_queries: int, num_keys: int) -> torch.Tensor:
    lines = picture(mask, num_queries, num_keys)
    marks = [[mark == "#" for mark in line] for line in lines]
    return torch.tensor(marks, dtype=torch.bool).reshape(num_queries, num_keys)


def test_the_picture_in_the_docstring_is_what_the_rule_draws() -> None:
    shared, targets, sources = offsets_of([3, 0, 4]), offsets_of([2, 3]), offsets_of([4, 3])
    prefixes = prefix_lm(shared, int32([2, 0, 3]))
    rules = [causal(shared), causal(shared, left=1), bidirectional(shared), prefixes, cross(targets, sources)]
    drawn = list(zip(*(picture(each, 8, 8) for each in rules), strict=True))
    shown = re.findall(rf"^{' +([#.]{8})' * 5}$", rule.__doc__ or "", re.MULTILINE)
    assert len(shown) == 8
    assert shown == drawn


def test_causal_is_this_picture() -> None:
    assert picture(causal(torch.tensor([0, 2, 5], dtype=torch.int32)), 5, 5) == [
        "#....",
        "##...",
        "..#..",
        "..##.",
        "..###",
    ]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(visibilities())
def test_dense_equals_the_picture(case: tuple[AttentionMask, int, int]) -> None:
    assert torch.equal(dense(*case), pictured(*case))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(visibilities())
def test_exchanging_queries_and_keys_transposes(case: tuple[AttentionMask, int, int]) -> None:
    mask, num_queries, num_keys = case
    assert torch.equal(dense(mask.transposed, num_keys, num_queries), dense(*case).T)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(visibilities())
def test_the_tile_table_covers_every_row_once_and_no_tile_mixes_documents(case: tuple[AttentionMask, int, int]) -> None:
    mask, num_queries, _ = case
    table = tile_table(mask, num_queries, block=4)
    assert len(table) == -(-num_queries // 4) + mask.cu_seqlens_q.numel() - 1
    covered = [row for first, _, end, *_ in table.tolist() for row in range(first, min(first + 4, end))]
    assert sorted(covered) == list(range(num_queries))
    starts = {*mask.cu_seqlens_q.tolist()}
    assert all(row_start in starts and row_start <= first for first, row_start, *_ in table.tolist())


def test_tiles_with_most_to_do_come_first() -> None:
    firsts = [tile[0] for tile in tile_table(causal(offsets_of([4, 12, 2])), 18, block=4).tolist()]
    assert firsts[:3] == [12, 8, 0] or firsts[:3] == [12, 8, 4]


def test_the_tile_form_equals_the_dense_form() -> None:
    assert run_interpreted("tests/support/interpreted_mask.py") == 12


@settings(max_examples=100, deadline=None, derandomize=True)
@given(visibilities())
def test_no_end_of_an_interval_moves_back_inside_a_document(case: tuple[AttentionMask, int, int]) -> None:
    mask, num_queries, _ = case
    for ends in intervals(mask, num_queries):
        for first, end in pairwise(mask.cu_seqlens_q.tolist()):
            assert (ends[first:end].diff() >= 0).all()


def test_a_prefix_lm_is_this_picture() -> None:
    # Prefixes 0, 2 and one longer than its document; at most two keys before one's own place.
    rule_of_prefixes = prefix_lm(offsets_of([1, 4, 3]), int32([0, 2, 9]), left=2)
    assert picture(rule_of_prefixes, 8, 8) == [
        "#.......",
        ".##.....",
        ".##.....",
        ".###....",
        "..###...",
        ".....###",
        ".....###",
        ".....###",
    ]


def test_a_mixed_decoder_is_this_picture() -> None:
    # Targets 2, 0, 3 and sources 1, 2, 0: rows and keys last first; a document's keys are its past, then its source.
    assert picture(mixed(offsets_of([2, 0, 3]), offsets_of([1, 2, 0])), 5, 8) == [
        "###.....",
        ".##.....",
        "..#.....",
        ".....###",
        "......##",
    ]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(some.lists(some.tuples(some.integers(0, 6), some.integers(0, 6)), min_size=1, max_size=5))
def test_a_mixed_decoder_sees_its_own_past_and_the_whole_of_its_source(lengths: list[tuple[int, int]]) -> None:
    targets, sources = (offsets_of([document[side] for document in lengths]) for side in (0, 1))
    num_labels, num_sources = int(targets[-1]), int(sources[-1])
    rule_of_both = mixed(targets, sources)
    rows = mixed_rows(targets, sources, num_labels, num_sources)
    assert sorted(rows.tolist()) == list(range(num_sources + num_labels))
    seen = torch.zeros(num_labels, num_sources + num_labels, dtype=torch.bool)
    seen[:, rows] = pictured(rule_of_both, num_labels, num_sources + num_labels).flip(0)
    assert torch.equal(seen[:, :num_sources], pictured(cross(targets, sources), num_labels, num_sources))
    assert torch.equal(seen[:, num_sources:], pictured(causal(targets), num_labels, num_labels))
    assert torch.equal(dense(rule_of_both, *seen.shape), seen[:, rows].flip(0))


@pytest.mark.parametrize(
    ("cu_seqlens_q", "cu_seqlens_k", "left", "message"),
    [
        (torch.tensor([0, 3]), torch.tensor([0, 3]), None, "cu_seqlens_q has shape .* torch.int64; it needs"),
        (offsets_of([3]), offsets_of([1, 2]), None, "cu_seqlens_q has 1 documents and cu_seqlens_k has 2"),
        (offsets_of([3]), offsets_of([3]), -1, "left is -1; it needs 0 to"),
        (offsets_of([3]), torch.zeros(1, dtype=torch.int32), None, "cu_seqlens_k has shape .*at least one document"),
    ],
)
def test_what_cannot_be_a_rule_is_refused(cu_seqlens_q, cu_seqlens_k, left, message) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionMask(cu_seqlens_q, cu_seqlens_k, left=left, right=0)


@pytest.mark.parametrize("prefix", [torch.tensor([1]), int32([1, 2])])
def test_prefixes_that_do_not_fit_the_documents_are_refused(prefix: torch.Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"key_prefix has shape .* it needs one torch.int32 for each of the 1 documents"
    ):
        prefix_lm(offsets_of([3]), prefix)


@pytest.mark.parametrize("cu_seqlens", [[1, 4], [0, 3, 2, 4], [0, 7]])
def test_a_schedule_refuses_offsets_that_do_not_fit_the_rows(cu_seqlens: list[int]) -> None:
    mask = causal(torch.tensor(cu_seqlens, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"cu_seqlens_q is \[.*end at most at the number of rows, 6"):
        make_tile_metadata(mask, 6, 6)


def test_a_prefix_may_be_any_number() -> None:
    cu_seqlens, endless = offsets_of([4, 4]), int32([2**31 - 1, 2**31 - 1])
    assert torch.equal(dense(prefix_lm(cu_seqlens, endless), 8, 8), dense(bidirectional(cu_seqlens), 8, 8))


@settings(max_examples=80, deadline=None)
@given(some.lists(some.integers(0, 6), min_size=1, max_size=5), some.sampled_from([None, 0, 1, 3]), some.data())
def test_a_run_last_first_is_the_causal_mask_turned_around(
    lengths: list[int], left: int | None, data: some.DataObject
) -> None:
    mask = causal(torch.tensor([0, *lengths, 1], dtype=torch.int32).cumsum(0, dtype=torch.int32), left)
    whole = picture(mask, sum(lengths) + 1, sum(lengths) + 1)
    begin = data.draw(some.integers(0, sum(lengths)))
    end = data.draw(some.integers(begin + 1, sum(lengths) + 1))
    seen = [line.index("#") for line in whole[begin:end]]
    first = data.draw(some.integers(0, min(seen)))
    part = picture(last_first(mask, range(begin, end), first), end - begin, end - first)
    assert [line[::-1] for line in part[::-1]] == [line[first:end] for line in whole[begin:end]]
