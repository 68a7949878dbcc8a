"""The memory of each GPU by stage, as a table in the terminal and as bars. Imports no torch.

In: plans by stage (`bigmodel.planning.memory.memory_of`). Out: text or matplotlib axes.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Column, Table
from rich.text import Text

from bigmodel.pictures import INK, MEMORY, quiet
from bigmodel.planning.memory import PARTS, tensors_of, unit_of
from bigmodel.planning.state_memory import Plan
from bigmodel.sizes import amount

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def memory_table(by_stage: Mapping[str, Plan], limit: int) -> Table:
    """A column per stage. `limit`: bytes of a device; 0: not compared."""
    totals = [sum(plan.device.values()) for plan in by_stage.values()]
    name, unit = unit_of(max(map(tensors_of, by_stage.values())))
    stages = [stage.replace("ZeRO ", "").replace(", ", "\n").replace(" (", "\n(") for stage in by_stage]
    columns = [Column(stage, justify="right", no_wrap=True) for stage in stages]
    table = Table(Column(f"{name} on each GPU,\nby ZeRO stage", no_wrap=True), *columns)
    for part in PARTS:
        amounts = [plan.device.get(part, 0) for plan in by_stage.values()]
        if any(amounts):
            table.add_row(part, *(amount(number / unit) if number else "-" for number in amounts))
    table.add_section()
    table.add_row("on the device", *(amount(total / unit) for total in totals), style="bold")
    if limit:
        fits = ("fits" if total <= limit else Text("too large", "red") for total in totals)
        table.add_row(f"of {amount(limit / unit)}", *fits)
    if any(plan.host for plan in by_stage.values()):
        hosts = [sum(plan.host.values()) for plan in by_stage.values()]
        table.add_row("off the device", *(amount(host / unit) if host else "-" for host in hosts))
    return table


def draw_memory(axes: "Axes", by_stage: Mapping[str, Plan], limit: int) -> None:
    """A bar per stage, stacked by part; offloaded parts as a hatched bar below; a line at the device's memory."""
    name, unit = unit_of(max(map(tensors_of, by_stage.values())))
    bars = [(stage, plan.device, "") for stage, plan in by_stage.items()]
    bars += [(f"{stage}: off the device", plan.host, "//") for stage, plan in by_stage.items() if plan.host]
    for place, (_, parts, hatch) in enumerate(bars):
        left = 0.0
        for part, colour in MEMORY.items():
            width = parts.get(part, 0) / unit
            axes.barh(place, width, left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.4)
            left += width
        axes.annotate(f" {amount(left)}", (left, place), va="center", fontsize=9)
    for part, colour in MEMORY.items():
        if any(parts.get(part) for _, parts, _ in bars):
            axes.barh(0, 0, color=colour, label=part)
    if limit:
        axes.axvline(limit / unit, color=INK, linewidth=1.5, linestyle=(0, (5, 3)))
        foot = (limit / unit, 0.02)
        axes.annotate(" device", foot, xycoords=("data", "axes fraction"), color=INK, fontsize=9)
    axes.set_yticks(range(len(bars)), [stage for stage, _, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel(f"{name} on each GPU")
    axes.margins(x=0.08)
    quiet(axes, "x")
