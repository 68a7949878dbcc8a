"""The plan as a picture: memory by stage with the device's line, the step by phase, the days of the run.

In: plans by stage, a step's time, the parts. Out: a PNG. Raises `UserError` where it cannot be written.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bigmodel.pictures import CAUSES, PHASES, figure, quiet, save_picture, title
from bigmodel.planning.memory_table import draw_memory
from bigmodel.planning.part import Part
from bigmodel.planning.state_memory import Plan
from bigmodel.planning.step_time import StepTime
from bigmodel.sizes import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DAY = 86400


def draw_plan(png: Path, by_stage: Mapping[str, Plan], limit: int, step: StepTime, parts: Mapping[str, Part]) -> None:
    drawn = figure(10, 8)
    grid = drawn.add_gridspec(2, 2, height_ratios=(1.25, 1))
    memory = drawn.add_subplot(grid[0, :])
    draw_memory(memory, by_stage, limit)
    title(memory, f"memory of a GPU: {step.hardware.name}")
    memory.legend(frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.45, -0.13), fontsize=9)
    _draw_step(drawn.add_subplot(grid[1, 0]), step)
    _draw_days(drawn.add_subplot(grid[1, 1]), step, parts)
    save_picture(drawn, png)


def _draw_step(axes: "Axes", step: StepTime) -> None:
    phases = sorted(step.phases.items(), key=lambda one: one[1])
    names = [name.replace("_", "-") for name, _ in phases]
    colours = [
        PHASES["communication" if name in step.sent_bytes or "all_to" in name else "forward"] for name, _ in phases
    ]
    axes.barh(names, [seconds for _, seconds in phases], color=colours)
    for place, (_, seconds) in enumerate(phases):
        axes.annotate(f" {seconds / step.seconds:.0%}", (seconds, place), va="center", fontsize=9)
    title(axes, f"a step: {step.seconds:.3g} s, MFU {step.mfu_causal:.0%}")
    axes.set_xlabel("seconds")
    axes.margins(x=0.12)
    quiet(axes, "x")


def _draw_days(axes: "Axes", step: StepTime, parts: Mapping[str, Part]) -> None:
    cost = parts["cost"].numbers
    whole = cost["seconds"] or step.run_seconds
    amounts = {
        "productive": step.run_seconds - step.evaluation_seconds,
        "evaluation": step.evaluation_seconds,
        "down": whole - step.run_seconds,
    }
    said = {"productive": "training", "evaluation": "evaluation", "down": "saves and failures"}
    left = 0.0
    for cause, seconds in amounts.items():
        axes.barh(0, seconds / DAY, left=left, color=CAUSES[cause], label=f"{said[cause]}: {duration(seconds)}")
        left += seconds / DAY
    facts = [f"{cost['tokens'] / 1e9:,.4g} billion tokens"]
    if cost["seconds"]:
        facts += [f"{cost['gpu_hours']:,.0f} GPU hours", f"{cost['node_joules'] / 3.6e9:,.3g} MWh"]
        facts += [f"money {cost['money']:,.0f}"] if cost["money"] else []
    axes.set_xlabel("days\n" + ", ".join(facts[:2]) + "\n" + ", ".join(facts[2:]))
    axes.set_yticks([])
    axes.set_ylim(-0.8, 1.6)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    title(axes, f"the run: {whole / DAY:,.3g} days" if cost["seconds"] else "the run does not end: too many failures")
    quiet(axes, "x")
