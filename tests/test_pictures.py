"""Colours of pictures can be told apart, also by readers who do not see red or green, on light and dark grounds."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from bigmodel.config.user_error import UserError
from bigmodel.pictures import CAUSES, DARK, HEAT, MEMORY, PHASES, SERIES, figure, save_picture
from tests.inspect.page.test_page import STATIC

# Linear RGB as seen without red or green cones: Machado, Oliveira and Fernandes 2009, severity 1.
SEEN = {
    "all": np.eye(3),
    "no red": np.array([[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]]),
    "no green": np.array([[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]]),
}  # fmt: skip
NEAREST = 0.055  # distance in OKLab; 0.02 is the least that an eye sees side by side


def linear(colour: str) -> np.ndarray:
    encoded = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Björn Ottosson's OKLab, from linear RGB."""
    cones = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]) @ np.maximum(
        rgb, 0
    )
    rows = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])
    return rows @ np.cbrt(cones)


def contrast(one: str, two: str) -> float:
    """Of WCAG 2."""
    light = sorted(float(np.array([0.2126, 0.7152, 0.0722]) @ linear(colour)) for colour in (one, two))
    return (light[1] + 0.05) / (light[0] + 0.05)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("eyes", SEEN)
def test_the_colours_of_one_picture_can_be_told_apart(eyes: str, dark: bool) -> None:
    for name, colours in {
        "phases": PHASES,
        "causes": CAUSES,
        "memory": MEMORY,
        "series": dict(enumerate(SERIES)),
    }.items():
        shown = {what: DARK.get(colour, colour) if dark else colour for what, colour in colours.items()}
        for (one, a), (two, b) in combinations(shown.items(), 2):
            apart = np.linalg.norm(oklab(SEEN[eyes] @ linear(a)) - oklab(SEEN[eyes] @ linear(b)))
            assert apart > NEAREST, (name, one, two, round(float(apart), 3))


def test_lines_are_seen_on_both_grounds() -> None:
    style = (STATIC / "page.css").read_text()
    cards = [part.split(";")[0].strip() for part in style.split("--card:")[1:3]]
    for ground, shade in zip(cards, ({}, DARK), strict=True):
        for colour in SERIES:
            assert contrast(shade.get(colour, colour), ground) > 2.0, (colour, ground)


def test_the_heat_map_gets_darker_with_the_value() -> None:
    light = [float(oklab(linear(colour))[0]) for colour in HEAT]
    assert light == sorted(light, reverse=True)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none/plan.png", "No such file or directory"),
        (".", "Is a directory"),
        ("plan.txt", "Format 'txt' is not supported"),
    ],
)
def test_a_picture_that_cannot_be_written_names_the_file(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"the picture cannot be written: {reason}.*; give a file ending in .png"):
        save_picture(figure(1, 1), tmp_path / name)


def test_a_picture_is_written_to_the_file_that_was_named(tmp_path: Path) -> None:
    save_picture(figure(1, 1), tmp_path / "plan")
    assert (tmp_path / "plan").read_bytes().startswith(b"\x89PNG")
