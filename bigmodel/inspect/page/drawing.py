"""What the page draws: plots of lines, stacks and heat maps, and their points as base64.

In: numbers of a run. Out: plain values for JSON. Guarantees: a line has at most two points per bucket, its smallest and
its largest, so no extreme is lost; x is exact, y has the 24 bits of float32. Costs: 11 bytes of the page per point.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Range = tuple[float, float]  # the first and the last step in view
MOST_POINTS = 80_000  # of all lines of a page: 0.85 MB
MOST_BUCKETS, FEWEST_BUCKETS = 1500, 50  # per line; a plot is 600 to 1200 pixels wide
MEANS = 240  # buckets of a stack, columns of a heat map
THINNED = "drawn: the smallest and the largest value of each stretch of steps; with --serve a zoom loads those between"
MOST_ROWS = 64  # of a heat map; of more ranks, neighbours share a row


@dataclass(frozen=True)
class Line:
    """Points of one quantity; those that are not finite are left out, and the line goes on over them."""

    label: str
    colour: str
    x: Floats
    y: Floats
    dash: int = 0  # number of the dash pattern; 0: solid
    shown: bool = True
    thin: bool = False
    dots: bool = False

    def encoded(self, buckets: int, near: Range | None = None) -> dict[str, Any]:
        finite = np.isfinite(self.y) & np.isfinite(self.x)
        x, y = decimated(self.x[finite], self.y[finite], buckets, near)
        look = {"label": self.label, "colour": self.colour, "dash": self.dash, "shown": self.shown}
        return {**look, "thin": self.thin, "dots": self.dots, "x": _base64(x, "<f8"), "y": _base64(y, "<f4")}


@dataclass(frozen=True)
class Plot:
    """`kind`: "lines", or "stack", whose lines share their x and lie one on the other. `unit`: in words. `scale`: how
    numbers are written: "", "bytes", "seconds" or "share". `top`: of the first view, which leaves single peaks out."""

    name: str
    title: str
    unit: str
    lines: list[Line] = field(default_factory=list)
    kind: str = "lines"
    scale: str = ""
    x: str = "step"
    note: str = ""
    from_zero: bool = False
    marks: list[float] = field(default_factory=list)  # restarts, on the x axis

    def encoded(self, buckets: int, near: Range | None = None) -> dict[str, Any]:
        lines = [line.encoded(buckets, near if self.kind == "lines" else None) for line in self.lines]
        shown = [line.y for line in self.lines if line.shown]
        top = usual_top(shown if self.kind == "lines" else [np.sum(shown, axis=0)]) if shown else None
        names = ("name", "title", "unit", "kind", "scale", "x", "note", "from_zero", "marks")
        own = {name: getattr(self, name) for name in names}
        if any(is_thinned(line.y, buckets) for line in self.lines):
            own["note"] = "; ".join(filter(None, (self.note, THINNED)))
        return {**own, "lines": lines, "top": top}


@dataclass(frozen=True)
class HeatMap:
    """`cells`: pairs of rows and values, (steps,) each; where several fall into a column of the page, the largest
    counts. `row`: what a row is, "rank" or "layer"."""

    name: str
    title: str
    unit: str
    rows: int
    step: Floats
    cells: Sequence[tuple[Floats, Floats]]
    row: str = "rank"
    scale: str = "seconds"
    note: str = ""
    marks: list[float] = field(default_factory=list)

    def encoded(self, buckets: int, near: Range | None = None) -> dict[str, Any]:
        edges, columns = self._columns()
        height = -(-self.rows // MOST_ROWS)
        cells = np.zeros((len(edges) - 1, -(-self.rows // height)))
        for row, value in self.cells:
            known = np.isfinite(row) & np.isfinite(value)
            np.maximum.at(cells, (columns[known], row[known].astype(int) // height), value[known])
        names = ("name", "title", "unit", "scale", "note", "marks", "rows", "row")
        own = {name: getattr(self, name) for name in names}
        coded = {"edges": _base64(edges, "<f8"), "cells": _base64(cells.ravel(), "<f4")}
        return {**own, "kind": "heat", "x": "step", "height": height, **coded}

    def _columns(self) -> tuple[Floats, NDArray[np.int64]]:
        """Edges in steps, and the column of each step."""
        first, last = self.step[0] - 0.5, self.step[-1] + 0.5
        edges = np.linspace(first, last, 1 + int(min(MEANS, len(self.step))))
        return edges, np.clip(np.searchsorted(edges, self.step) - 1, 0, len(edges) - 2)


def is_thinned(y: Floats, buckets: int) -> bool:
    return len(y) > 2 * buckets


def decimated(x: Floats, y: Floats, buckets: int, near: Range | None = None) -> tuple[Floats, Floats]:
    """The points themselves, or of each bucket the smallest and the largest, and the first and last point of all.

    Example: 0 1 9 2 0 3 in 2 buckets: 0 9 | 0 3. `near`: the points there have as many buckets as those on each side.
    """
    if near and len(x):
        ends = (0, int(np.searchsorted(x, near[0])), int(np.searchsorted(x, near[1], side="right")), len(x))
        parts = [decimated(x[first:last], y[first:last], buckets) for first, last in pairwise(ends) if first < last]
        return np.concatenate([part for part, _ in parts]), np.concatenate([part for _, part in parts])
    if not is_thinned(y, buckets):
        return x, y
    size = -(-len(y) // buckets)
    rows = np.concatenate([y, np.full(-len(y) % size, y[-1])]).reshape(-1, size)
    begins = np.arange(len(rows)) * size
    places = np.concatenate([begins + rows.argmin(axis=1), begins + rows.argmax(axis=1), [0, len(y) - 1]])
    kept = np.unique(np.minimum(places, len(y) - 1))
    return x[kept], y[kept]


def bucket_ends(count: int, buckets: int = MEANS) -> NDArray[np.int64]:
    """Ends of buckets of about equal length: indices behind the last one of each."""
    return np.unique(np.linspace(0, count, min(buckets, count) + 1).astype(np.int64)[1:])


def sums(values: Floats, ends: NDArray[np.int64]) -> Floats:
    """Sums of buckets; NaN counts as 0."""
    return np.add.reduceat(np.nan_to_num(values), np.concatenate([[0], ends[:-1]])) if len(ends) else np.zeros(0)


def usual_top(curves: list[Floats]) -> float | None:
    """The top of a view that leaves out single peaks; None: the largest value is no such peak."""
    values = np.concatenate([curve[np.isfinite(curve)] for curve in curves] or [np.zeros(0)])
    if len(values) < 50:
        return None
    low, usual, most = (float(one) for one in np.quantile(values, (0.0, 0.99, 1.0)))
    return usual + 0.25 * (usual - low) if most - low > 2.5 * (usual - low) > 0 else None


def buckets_for(num_lines: int) -> int:
    return int(np.clip(MOST_POINTS // (2 * max(1, num_lines)), FEWEST_BUCKETS, MOST_BUCKETS))


def _base64(values: ArrayLike, dtype: str) -> str:
    return base64.b64encode(np.asarray(values).astype(dtype).tobytes()).decode()
