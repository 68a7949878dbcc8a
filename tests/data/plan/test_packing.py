import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigmodel.data.plan.packing import best_fit_decreasing


def test_longest_first_each_where_the_least_room_is_left():
    #                           0  1  2  3  4  5
    packing = best_fit_decreasing([3, 6, 2, 7, 4, 5], sequence_length=10, max_documents=9)
    assert packing.packs == [[3, 0], [1, 4], [5, 2]]
    assert packing.num_tokens.tolist() == [10, 10, 7]
    assert packing.num_documents.tolist() == [2, 2, 2]
    assert packing.num_document_limited == 0


def test_of_equal_lengths_the_earlier_goes_first():
    assert best_fit_decreasing([5, 5, 5, 5], sequence_length=10, max_documents=9).packs == [[0, 1], [2, 3]]


def test_the_first_are_packed_before_longer_ones():
    assert best_fit_decreasing([2, 3, 9, 5], sequence_length=10, max_documents=9, num_first=2).packs == [[1, 0, 3], [2]]


def test_packs_that_are_full_by_the_limit_on_documents_are_counted():
    packing = best_fit_decreasing([1] * 7, sequence_length=10, max_documents=3)
    assert [len(pack) for pack in packing.packs] == [3, 3, 1]
    assert packing.num_document_limited == 2
    assert best_fit_decreasing([5, 5], sequence_length=10, max_documents=2).num_document_limited == 0  # full by both


def test_no_documents_no_packs():
    assert best_fit_decreasing([], sequence_length=10, max_documents=3).packs == []


def test_a_document_longer_than_a_pack_is_refused():
    with pytest.raises(AssertionError, match="sequence_length = 10"):
        best_fit_decreasing([11], sequence_length=10, max_documents=3)


@given(st.data())
def test_every_document_is_in_one_pack_and_no_pack_is_over_a_limit(data):
    sequence_length, max_documents = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 6))
    lengths = data.draw(st.lists(st.integers(1, sequence_length), max_size=60))
    num_first = data.draw(st.integers(0, len(lengths)))
    packing = best_fit_decreasing(np.array(lengths), sequence_length, max_documents, num_first)
    assert sorted(index for pack in packing.packs for index in pack) == list(range(len(lengths)))
    for pack, filled, documents in zip(packing.packs, packing.num_tokens, packing.num_documents, strict=True):
        assert filled == sum(lengths[index] for index in pack) <= sequence_length
        assert documents == len(pack) <= max_documents


@given(st.data())
def test_packs_are_those_of_the_rule_followed_document_by_document(data):
    sequence_length, max_documents = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 6))
    lengths = data.draw(st.lists(st.integers(1, sequence_length), max_size=60))
    num_first = data.draw(st.integers(0, len(lengths)))
    packs, reached = [], []  # reached: the turn in which each took its last document
    order = sorted(range(len(lengths)), key=lambda index: (index >= num_first, -lengths[index], index))
    for turn, index in enumerate(order):
        rooms = [sequence_length - sum(lengths[member] for member in pack) for pack in packs]
        fits = [
            place for place, room in enumerate(rooms) if room >= lengths[index] and len(packs[place]) < max_documents
        ]
        if fits:
            place = min(fits, key=lambda place: (rooms[place], -reached[place]))
            packs[place].append(index)
            reached[place] = turn
        else:
            packs.append([index])
            reached.append(turn)
    assert best_fit_decreasing(np.array(lengths), sequence_length, max_documents, num_first).packs == packs
