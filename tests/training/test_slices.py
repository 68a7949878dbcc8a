"""Slices: where a rank's part of a parameter lies in the whole."""

import pytest
import torch

from bigmodel.training.slices import Place, Run, Slice, parse_place

SHAPE = (8, 6)
WHOLE = torch.arange(48)
PARTS = {
    "rows": (Slice.of_rows(SHAPE, 2, 1), WHOLE.view(SHAPE)[4:]),
    "rows of two matrices": (Slice.of_rows(SHAPE, 2, 1, (6, 2)), WHOLE.view(SHAPE)[[3, 4, 5, 7]]),
    "columns": (Slice.of_columns(SHAPE, 3, 1), WHOLE.view(SHAPE)[:, 2:4]),
    "a vector": (Slice.of_rows((48,), 3, 2), WHOLE[32:]),
}


@pytest.mark.parametrize("name", PARTS)
def test_any_range_of_a_part_is_found_in_the_whole(name: str) -> None:
    mine, wanted = PARTS[name][0], PARTS[name][1].flatten()
    assert mine.numel == len(wanted)
    for start in range(mine.numel):
        for end in range(start + 1, mine.numel + 1):
            assert torch.equal(mine.take(WHOLE, start, end - start), wanted[start:end])
            whole = torch.full_like(WHOLE, -1)
            mine.put(whole, start, wanted[start:end])
            assert sorted(whole[whole >= 0].tolist()) == sorted(wanted[start:end].tolist())
            assert torch.equal(whole[whole >= 0], WHOLE[whole >= 0])


@pytest.mark.parametrize("name", PARTS)
def test_any_range_of_the_whole_is_found_in_a_part(name: str) -> None:
    for start in range(48):
        for end in range(start + 1, 49):
            for run in PARTS[name][0].runs:
                held, found = run.of(WHOLE).flatten(), torch.full((end - start,), -1)
                for at, part in run.within(start, end):
                    there = part._replace(first=part.first - start).of(found)
                    there.copy_(held[at : at + part.numel].view_as(there))
                assert found[found >= 0].tolist() == [one for one in held.tolist() if start <= one < end]


def test_a_place_is_read_back_from_its_text() -> None:
    assert parse_place("7") == (7, ())
    place = PARTS["columns"][0].place(5)
    assert str(place) == "5 of 2+2/6*8"
    assert isinstance(place, Place)
    assert parse_place(str(place)) == (5, place.runs)
    assert str(PARTS["rows of two matrices"][0].place(0)) == "0 of 18+18,42+6"
    assert PARTS["rows"][0].place(2) == 26, "one range of the whole"


def test_a_run_spans_what_lies_between() -> None:
    assert Run(4, 4, 8, 3).span == 20
    assert Run(4, 4, 8, 3).of(torch.arange(24)).tolist() == [[4, 5, 6, 7], [12, 13, 14, 15], [20, 21, 22, 23]]
