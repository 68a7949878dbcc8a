"""The common look of all pictures: one colour per meaning, in the PNGs and on the page of `bigmodel report --html`.

Colours are those of Okabe and Ito (2008); where a picture needs more, those farthest from the others, as seen by all
readers and by those who do not see red or green (tests/test_pictures.py has the distances). Imports matplotlib only to
draw.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigmodel.config.user_error import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, INK, FAINT, GRID = "#0072b2", "#d55e00", "#8a8f98", "#22262e", "#a9cfe6", "#e6e8ec"

PHASES = {  # of a step
    "forward": "#0072b2",
    "backward": "#56b4e9",
    "optimizer": "#009e73",
    "communication": "#e69f00",
    "exchange": "#005555",
    "data": "#d55e00",
    "compile": "#cc79a7",
    "rest": "#b6bac2",
}
CAUSES = {  # of a second of the run; those of a step have the colours of its phases
    "productive": "#4b6a9b",
    "data": PHASES["data"],
    "compile": PHASES["compile"],
    "start": "#f0e442",
    "checkpoint": "#b176ff",
    "evaluation": "#d8c4ff",
    "replay": "#b1274e",
    "hang": "#841a00",
    "skipped": "#d8b176",
    "stopped": "#ebd8c4",
    "down": "#3b2789",
    "finish": "#c49deb",
}
MEMORY = {  # of a device
    "weights": "#0072b2",
    "teacher": "#841a00",
    "gathered weights": "#56b4e9",
    "gradients": "#d55e00",
    "reduce buckets": "#e69f00",
    "masters": "#009e73",
    "moments": "#89ffeb",
    "average of weights": "#ffeb00",
    "activations": "#cc79a7",
    "loss buffers": "#3b2789",
    "framework": "#4a4f58",
    "fragmentation": "#b6bac2",
}
CURVES = {  # of a run
    "training": BLUE,
    "validation": ORANGE,
    "each step": FAINT,
    "baseline": GREY,
    "all": "#5c6470",
}
# Sources, layers, runs and other names that no table knows: in this order, then again with another dash.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#761400", "#143b76")
DARK = {  # on a dark ground, instead
    "#5c6470": "#b9c0cc",
    "#a9cfe6": "#2f5a78",
    "#0072b2": "#3d9be0",
    "#56b4e9": "#9fd4f5",
    "#761400": "#763bff",
    "#143b76": "#d8ff89",
}
HEAT = ("#fff3c4", "#f5b94f", "#d55e00", "#7a1f3d")  # from nothing to the most, by lightness


def figure(width: float = 9, height: float = 5.6) -> "Figure":
    """An empty figure in inches, 150 dots each, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(made)
    return made


def save_picture(drawn: "Figure", path: Path, dpi: float | None = None) -> None:
    """Write it to exactly this file, in the format of its ending; without one as PNG. Raises `UserError` where that
    cannot be."""
    try:
        drawn.savefig(path, format=path.suffix[1:] or "png", dpi=dpi or "figure")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", "") or str(error)
        raise UserError(f"{path}: the picture cannot be written: {reason}; give a file ending in .png") from None


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
