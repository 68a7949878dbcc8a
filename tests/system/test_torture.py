"""A sample of `make torture`, and that it finds what is planted."""

from pathlib import Path

import pytest

from tools.torture import DEFECTS, POINTS, torture


def test_no_kill_power_cut_or_flipped_bit_breaks_a_promise(tmp_path: Path) -> None:
    assert torture(tmp_path, kills=4, flips=40) == []
    assert len(POINTS) == 13


@pytest.mark.parametrize(
    ("defect", "kills", "words"),
    [
        ("publish before the last rank", 1, "published and broken"),
        ("no sync", 2, "published and broken"),
        ("hash unchecked", 0, "without an error"),
    ],
)
def test_a_planted_defect_is_found(tmp_path: Path, defect: str, kills: int, words: str) -> None:
    assert defect in DEFECTS
    wrong = torture(tmp_path, kills, flips=20, defect=defect)
    assert any(words in line for line in wrong)
