"""Curves as text, smoothed or not: lines of braille characters, each a cell of 2 x 4 dots."""

import math
from collections.abc import Sequence

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # Unicode 2800: row, column in a cell
SMOOTHING_SHARE = 0.02  # the smoothed curve averages about this share of the run


def braille(
    points: Sequence[tuple[int, float]], steps: tuple[int, int], values: tuple[float, float], columns: int, height: int
) -> list[str]:
    """A curve in a grid of braille cells of 2 x 4 dots; lines join neighbouring points.

    steps, values: (minimum, maximum) of the axes.
    """
    dots_wide, dots_high = 2 * columns, 4 * height
    span, reach = (values[1] - values[0]) or 1.0, (steps[1] - steps[0]) or 1
    cells = [[0] * columns for _ in range(height)]
    before = None
    for step, value in points:
        x = round((step - steps[0]) / reach * (dots_wide - 1))
        y = round((values[1] - value) / span * (dots_high - 1))
        for dot_x, dot_y in _line(before or (x, y), (x, y)):
            cells[dot_y // 4][dot_x // 2] |= DOTS[dot_y % 4][dot_x % 2]
        before = (x, y)
    return ["".join(chr(0x2800 + cell) for cell in row) for row in cells]


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average, unbiased at the start; values that are not finite are skipped.

    It covers 2% of the run, at least 5 steps: the trend shows, and a lasting spike still shows.
    """
    decay = 1 - 1 / max(5.0, SMOOTHING_SHARE * len(values))
    total = weight = 0.0
    smoothed = []
    for value in values:
        if math.isfinite(value):
            total = decay * total + (1 - decay) * value
            weight = decay * weight + (1 - decay)
        smoothed.append(total / weight if weight else math.nan)
    return smoothed


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """Dots from start to end, both included, without gaps between them."""
    count = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (round(start[0] + (end[0] - start[0]) * part / count), round(start[1] + (end[1] - start[1]) * part / count))
        for part in range(count + 1)
    ]
