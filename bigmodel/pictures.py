"""The common look of all pictures: one colour per meaning, in the PNGs and on the page of `bigmodel report --html`.

Colours are those of Okabe and Ito (2008), and of Paul Tol's "muted" and "bright" schemes where a picture needs more:
readers who do not see red or green can tell those of one picture apart. Imports nothing of the project; matplotlib
only to draw.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, INK, FAINT, GRID = "#0072b2", "#d55e00", "#8a8f98", "#22262e", "#a9cfe6", "#e6e8ec"

PHASES = {  # of a step
    "forward": "#0072b2",
    "backward": "#56b4e9",
    "optimizer": "#009e73",
    "communication": "#e69f00",
    "data": "#d55e00",
    "compile": "#cc79a7",
    "rest": "#b6bac2",
}
CAUSES = {  # of a second of the run; those of a step have the colours of its phases
    "productive": "#4b6a9b",
    "data": PHASES["data"],
    "compile": PHASES["compile"],
    "start": "#f0e442",
    "checkpoint": "#44aa99",
    "evaluation": "#88ccee",
    "replay": "#aa4499",
    "hang": "#882255",
    "skipped": "#999933",
    "stopped": "#ddcc77",
    "down": "#3d3d3d",
    "finish": "#bbbbbb",
}
MEMORY = {  # of a device
    "weights": "#0072b2",
    "teacher": "#999933",
    "gathered weights": "#56b4e9",
    "gradients": "#d55e00",
    "reduce buckets": "#e69f00",
    "masters": "#117733",
    "moments": "#44aa99",
    "average of weights": "#ddcc77",
    "activations": "#aa4499",
}
CURVES = {  # of a run
    "training": BLUE,
    "validation": ORANGE,
    "each step": FAINT,
    "baseline": GREY,
    "all": "#5c6470",
}
# Sources, layers, runs and other names that no table knows: in this order, then again with another dash.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#882255", "#999933")
DARK = {  # on a dark ground, instead
    "#5c6470": "#b9c0cc",
    "#0072b2": "#3d9be0",
    "#a9cfe6": "#2f5a78",
    "#56b4e9": "#9fd4f5",
    "#882255": "#d1558f",
    "#aa4499": "#cf74c0",
    "#4b6a9b": "#6f8fc4",
    "#3d3d3d": "#7d8696",
    "#117733": "#3aa85f",
}
HEAT = ("#fff3c4", "#f5b94f", "#d55e00", "#7a1f3d")  # from nothing to the most, by lightness


def figure(width: float = 9, height: float = 5.6) -> "Figure":
    """An empty figure in inches, 150 dots each, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(made)
    return made


def title(axes: "Axes", text: str, size: float = 13) -> None:
    """`text` is not a formula: names of runs may hold a dollar sign."""
    axes.set_title(text, loc="left", fontsize=size, color=INK, fontweight="bold", parse_math=False)


def quiet(axes: "Axes", grid: Any = "y") -> None:
    """Axes without a box, with faint lines across ("x", "y", "both"; "": none)."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=INK)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=GRID, linewidth=0.8)
