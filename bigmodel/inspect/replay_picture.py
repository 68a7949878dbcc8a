"""The picture of a replay: the step among its neighbours, and its documents.

In: the recorded steps of a run, the parts of one. Out: replay.png. Imports no torch; matplotlib is imported only here.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigmodel.pictures import BLUE, INK, ORANGE, figure, quiet, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AROUND, LONGEST = 150, 84  # steps on each side; characters of a document's name


def draw(lines: Mapping[int, dict[str, Any]], step: int, documents: Sequence[tuple[float, str]], path: Path) -> Path:
    """lines: of metrics.jsonl by step. documents: gradient norm and name, the largest first."""
    drawn = figure(11, 5.6)
    grid = drawn.add_gridspec(2, 2, width_ratios=[1, 1.25])
    of_norm = drawn.add_subplot(grid[0, 0])
    of_loss = drawn.add_subplot(grid[1, 0], sharex=of_norm)
    near = {number: line for number, line in sorted(lines.items()) if abs(number - step) <= AROUND}
    _draw_steps(of_norm, near, step, "gradient_norm", "gradient norm")
    _draw_steps(of_loss, near, step, "loss", "loss, nats per label")
    of_loss.set_xlabel("step", color=INK)
    _draw_documents(drawn.add_subplot(grid[:, 1]), step, documents)
    drawn.savefig(path)
    return path


def _draw_steps(axes: "Axes", near: Mapping[int, dict[str, Any]], step: int, key: str, label: str) -> None:
    known = [(number, line[key]) for number, line in near.items() if math.isfinite(line[key])]
    axes.plot(*zip(*known, strict=True) if known else ((), ()), color=BLUE, linewidth=0.9)
    axes.axvline(step, color=ORANGE, linewidth=3, alpha=0.35)
    axes.set_ylabel(label, color=INK)
    quiet(axes, "both")


def _draw_documents(axes: "Axes", step: int, documents: Sequence[tuple[float, str]]) -> None:
    norms = [norm if math.isfinite(norm) else 0.0 for norm, _ in documents]
    places = range(len(documents))
    axes.barh(places, norms, height=0.45, color=[ORANGE if place == 0 else BLUE for place in places])
    for place, (norm, name) in enumerate(documents):
        words = name[:LONGEST] if math.isfinite(norm) else f"not finite: {name}"[:LONGEST]
        axes.text(0, place - 0.3, words, fontsize=7, color=INK, parse_math=False, va="bottom")
    axes.set_ylim(max(4, len(documents)) - 0.5, -0.8)
    axes.set_yticks([])
    title(axes, f"step {step}: gradient norm by document", 11)
    quiet(axes, "x")
