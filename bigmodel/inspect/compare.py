"""Comparison of two runs: the first step that differs, the value that differs, both loss curves.

In: metrics.jsonl and settings.json of two run directories. Out: text, and a PNG if a path is given.
Data and results of each step are compared to the last bit; seconds are not compared. Imports no torch.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigmodel.config.settings import UserError
from bigmodel.inspect.braille import smooth
from bigmodel.inspect.report import read_curve, terminal_curve
from bigmodel.pictures import BLUE, GREY, INK, ORANGE, figure, quiet, save_picture, title
from bigmodel.run_directory import Change, changes, read_json, read_json_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = 200  # points that are drawn large
COMPARED = ("positions", "targets", "documents", "padding", "learning_rate", "loss", "gradient_norm", "skipped")


@dataclass(frozen=True)
class Difference:
    """The first step that differs: the first different value, data before results, in both runs."""

    step: int
    name: str
    one: Any
    two: Any


def compare(one: Path, two: Path, png: Path | None = None) -> Difference | None:
    """Print the differences and both curves, draw them into `png` if given; return the first difference.

    Raises `UserError` if a directory is not a run.
    """
    difference, shared = first_difference(one, two)
    print(_sentence(difference, shared))
    for name, mine, its in setting_differences(one, two):
        print(f"setting {name}: {mine!r} and {its!r}")
    for run, other in ((one, two), (two, one)):
        print(f"\n{run}\n{terminal_curve(run, height=8, beside=other)}")
    if png:
        draw(one, two, difference, png)
        print(f"\npicture: {png}")
    return difference


def first_difference(one: Path, two: Path) -> tuple[Difference | None, int]:
    """The first difference among the steps in both runs, and the number of these steps."""
    mine, its = _steps(one), _steps(two)
    shared = sorted(mine.keys() & its.keys())
    if not shared:
        raise UserError(f"{one} and {two} have no step in common; compare runs that share steps")
    for step in shared:
        for name in COMPARED:
            a, b = mine[step].get(name), its[step].get(name)
            if a != b and not _both_nan(a, b):
                return Difference(step, name, a, b), len(shared)
    return None, len(shared)


def setting_differences(one: Path, two: Path) -> list[Change]:
    """(setting, value in one, value in two), without the name and directory of the run."""
    return changes(*(read_json(Path(run) / "settings.json") for run in (one, two)))


def draw(one: Path, two: Path, difference: Difference | None, png: Path) -> None:
    """Both smoothed losses above, their difference below, a vertical line at the first difference."""
    curves = [read_curve(run) for run in (one, two)]
    drawn = figure()
    above, below = drawn.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    looks = [{"color": BLUE, "linewidth": 2.6}, {"color": ORANGE, "linewidth": 1.2}]
    for run, curve, look in zip((one, two), curves, looks, strict=True):
        above.plot(curve.steps, smooth(curve.losses), label=str(run), **look)
    shared = _draw_apart(below, *(dict(zip(curve.steps, curve.losses, strict=True)) for curve in curves))
    for axes in (above, below) if difference else ():
        axes.axvline(difference.step if difference else 0, color=GREY, linewidth=1.0, linestyle=(0, (5, 3)))
    title(above, _title(difference, shared), 12)
    above.set_ylabel("loss, smoothed (nats per label)", color=INK)
    below.set_ylabel("difference, each step", color=INK)
    below.set_xlabel("optimizer step", color=INK)
    for axes in (above, below):
        quiet(axes)
    for text in above.legend(frameon=False, fontsize=9).get_texts():
        text.set_parse_math(False)
    save_picture(drawn, png)


def _draw_apart(axes: "Axes", one: dict[int, float], two: dict[int, float]) -> int:
    """A point per step whose losses differ, on a log axis, which has no 0; the number of steps in both runs.

    Points, because a step that differs between equal ones has no line to a neighbour."""
    shared = sorted(one.keys() & two.keys())
    apart = {step: abs(one[step] - two[step]) for step in shared}
    seen = [step for step, value in apart.items() if value > 0 and math.isfinite(value)]
    axes.set_xlim(shared[0] - 0.5, shared[-1] + 0.5)
    if not seen:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no loss differs", transform=axes.transAxes, ha="center", va="center", color=GREY)
        return len(shared)
    axes.set_yscale("log")
    heights = [apart[step] for step in seen]
    axes.set_ylim(min(heights) / 3, 3 * max(heights))
    axes.plot(seen, heights, color=INK, marker="o", markersize=4 if len(seen) < FEW else 1, linestyle="", zorder=3)
    return len(shared)


def _title(difference: Difference | None, shared: int) -> str:
    if difference is None:
        return f"equal to the last bit in all {shared} steps"
    return f"first different at step {difference.step}, in {difference.name}"


def _sentence(difference: Difference | None, shared: int) -> str:
    if difference is None:
        return f"the runs are equal to the last bit in all {shared} steps that both have"
    relative = ""
    numbers = (int, float)
    if isinstance(difference.one, numbers) and isinstance(difference.two, numbers) and difference.one:
        relative = f" ({abs(difference.two / difference.one - 1):.1e} relative)"
    return (
        f"the runs first differ at step {difference.step}, in {difference.name}: {difference.one} and {difference.two}"
        f"{relative}; {shared} steps are in both"
    )


def _steps(run: Path) -> dict[int, dict[str, Any]]:
    if not (Path(run) / "metrics.jsonl").exists():
        raise UserError(f"{run}: not a run directory (no metrics.jsonl); give the run.directory of a training run")
    lines = read_json_lines(Path(run) / "metrics.jsonl")
    return {line["step"]: line for line in lines if line["kind"] == "step"}


def _both_nan(one: Any, two: Any) -> bool:
    return all(isinstance(value, float) and math.isnan(value) for value in (one, two))
