"""Who computes which packs: contiguous over nodes, even within a node, nothing twice and nothing left out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigmodel.data.plan.sharing import Place, deal_contiguously, deal_evenly, imbalance


def test_nodes_take_contiguous_shares_that_differ_by_one_pack_at_most() -> None:
    assert [Place(rank, 4).share(10) for rank in range(4)] == [range(2), range(2, 5), range(5, 7), range(7, 10)]
    assert [Place(rank, 4, 2).share(10) for rank in range(4)] == [range(5), range(5), range(5, 10), range(5, 10)]
    assert [len(Place(rank, 8).share(3)) for rank in range(8)] == [0, 0, 1, 0, 0, 1, 0, 1]


def test_a_node_plans_its_own_lanes() -> None:
    assert [Place(8 * node, 64, 8).lanes(64) for node in (0, 1, 7)] == [range(8), range(8, 16), range(56, 64)]
    assert [Place(node, 3).lanes(2) for node in range(3)] == [range(1), range(2), range(1, 2)]
    assert [Place(node, 4).lanes(1) for node in range(4)] == [range(1)] * 4


@pytest.mark.parametrize(
    ("world_size", "ranks_per_node", "sharing", "nodes", "node_size"),
    [(16, 8, 1, 2, 8), (16, 8, 4, 2, 2), (16, 8, 16, 1, 1), (12, 6, 4, 3, 1), (20, 10, 4, 5, 1), (8, 1, 2, 4, 1)],
)
def test_ranks_that_share_packs_have_one_place(
    world_size: int, ranks_per_node: int, sharing: int, nodes: int, node_size: int
) -> None:
    places = [Place.of_rank(rank, world_size, ranks_per_node, sharing) for rank in range(world_size)]
    assert [place.rank for place in places] == [rank // sharing for rank in range(world_size)]
    assert {(place.num_nodes, place.node_size) for place in places} == {(nodes, node_size)}
    speakers = [place.node for rank, place in enumerate(places) if place.rank_in_node == 0 and rank % sharing == 0]
    assert speakers == list(range(nodes))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(1, 5))
def test_every_pack_is_one_nodes_and_comes_from_its_lanes(
    num_nodes: int, lanes: int, each: int, node_size: int
) -> None:
    packs, taken = lanes * each, []
    for node in range(num_nodes):
        place = Place(node * node_size, num_nodes * node_size, node_size)
        taken += place.share(packs)
        assert {number // each for number in place.share(packs)} <= set(place.lanes(lanes))
    assert taken == list(range(packs))


def test_heavy_packs_run_at_the_same_time() -> None:
    work = [9, 1, 9, 1]
    assert deal_contiguously(4, num_ranks=2, num_rounds=2, size=1) == [[[0], [1]], [[2], [3]]]
    assert deal_contiguously(4, num_ranks=2, num_rounds=1, size=2) == [[[0, 1]], [[2, 3]]]
    assert deal_evenly(work, num_ranks=2, num_rounds=2, size=1) == [[[0], [1]], [[2], [3]]]
    assert deal_evenly([9, 9, 1, 1], num_ranks=2, num_rounds=2, size=1) == [[[0], [2]], [[1], [3]]]
    assert deal_evenly([9, 9, 1, 1], num_ranks=2, num_rounds=1, size=2) == [[[0, 2]], [[1, 3]]]
    assert deal_evenly([8, 5, 4, 1], num_ranks=2, num_rounds=2, size=1) == [[[0], [3]], [[1], [2]]]


def test_imbalance_is_the_time_over_that_of_an_even_share() -> None:
    assert imbalance([9, 9, 1, 1], [[[0], [1]], [[2], [3]]]) == 18 / 10
    assert imbalance([9, 9, 1, 1], [[[0], [2]], [[1], [3]]]) == 1
    assert imbalance([], [[[]], [[]]]) == 1


@given(st.lists(st.integers(0, 100), max_size=40), st.integers(1, 4), st.integers(1, 3))
def test_every_pack_has_one_slot_and_rounds_are_filled_alike(work: list[int], num_ranks: int, size: int) -> None:
    num_rounds = -(-len(work) // (num_ranks * size))
    for slots in (
        deal_evenly(work, num_ranks, num_rounds, size),
        deal_contiguously(len(work), num_ranks, num_rounds, size),
    ):
        assert [len(rank) for rank in slots] == [num_rounds] * num_ranks
        assert sorted(pack for rank in slots for slot in rank for pack in slot) == list(range(len(work)))
        assert all(len(slot) <= size and slot == sorted(slot) for rank in slots for slot in rank)
        assert imbalance(work, slots) + 1e-9 >= 1


def test_a_place_outside_of_the_world_is_refused() -> None:
    with pytest.raises(AssertionError, match="rank 4 is not one of 4"):
        Place(4, 4)
    with pytest.raises(AssertionError, match="nodes of 3"):
        Place(0, 4, 3)
