"""Ranks that share a packed sequence by keys have equally many positions and about equal attention work."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bigmodel.config.settings import ModelSettings
from bigmodel.data.plan.position_sharing import chunks_per_rank, deal_chunks, share_positions, work_of_positions
from bigmodel.data.plan.visible_pairs import visible_pairs

ONE_LAYER = ModelSettings(num_layers=1)


def offsets(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths])


def loads(lengths: list[int], ranks: int, model: ModelSettings = ONE_LAYER) -> list[int]:
    work = work_of_positions(offsets(lengths), model)
    shares = share_positions(offsets(lengths), model, ranks)
    return [sum(int(work[run.start : run.stop].sum()) for run in runs) for runs in shares]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.sampled_from([1, 2, 3, 4, 8]))
def test_each_position_has_one_rank_and_all_ranks_equally_many(lengths: list[int], ranks: int) -> None:
    lengths = [*lengths, -sum(lengths) % ranks or ranks]
    shares = share_positions(offsets(lengths), ONE_LAYER, ranks)
    places = [[place for run in runs for place in run] for runs in shares]
    assert sorted(place for one in places for place in one) == list(range(sum(lengths)))
    assert {len(one) for one in places} == {sum(lengths) // ranks}
    for runs in shares:
        assert all(one.stop < two.start for one, two in pairwise(runs)), "neighbours are one run"


def test_the_examples_of_the_docstring() -> None:
    assert loads([16], 2) == [68, 68]
    assert loads([8, *[1] * 8], 2) == [22, 22]
    keys = work_of_positions(offsets([8, *[1] * 8]), ONE_LAYER)
    zigzag = [int(keys[:4].sum() + keys[12:].sum()), int(keys[4:12].sum())]
    assert zigzag == [14, 30]


def test_uneven_documents_are_spread_within_a_few_percent_of_the_mean() -> None:
    for lengths in ([700, 20, 30, 1100, 150, 48], [2048], [100] * 20 + [48], [3, 2045]):
        for ranks in (2, 4, 8):
            found = loads(lengths, ranks)
            assert max(found) * ranks / sum(found) < 1.06, (lengths, ranks, found)


def test_work_is_the_pairs_of_all_layers() -> None:
    """Of one full and three sliding layers, by the closed forms that FLOPs rest on."""
    model = ModelSettings(num_layers=4, sliding_window=5, full_attention_every=4)
    lengths = np.array([9, 1, 0, 30])
    nothing = np.zeros_like(lengths)
    pairs = visible_pairs(lengths, nothing, nothing, model).stack
    assert work_of_positions(offsets([*lengths]), model).sum() == pairs


def test_the_heaviest_chunk_goes_to_the_rank_with_the_least_work_that_has_room() -> None:
    assert deal_chunks([9, 7, 6, 5, 5, 4], 2) == [[0, 3, 5], [1, 2, 4]]
    assert deal_chunks([100, 1, 1, 1, 1, 1], 2) == [[0, 4, 5], [1, 2, 3]]


def test_sizes_that_do_not_divide_have_fewer_chunks() -> None:
    assert [chunks_per_rank(count) for count in (4096, 6, 5, 12)] == [4, 2, 1, 4]
