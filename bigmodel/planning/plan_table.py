"""Parts of the plan and found settings as tables in the terminal. Imports no torch."""

from collections.abc import Sequence

from rich.box import SIMPLE, SIMPLE_HEAD
from rich.table import Column, Table

from bigmodel.planning.changes import Choice
from bigmodel.planning.fit import is_tight
from bigmodel.planning.memory import unit_of
from bigmodel.planning.part import Part
from bigmodel.planning.step_time import StepTime
from bigmodel.sizes import amount

TIGHT = "*"  # behind the bytes
SETTINGS = ("ZeRO", "activation\ncheck-\npointing", "micro-\nbatch", "sequence\nparallel")


def parts_table(parts: Sequence[Part]) -> Table:
    """A section for each part."""
    table = Table("", Column("", justify="right", no_wrap=True), "", box=SIMPLE, show_header=False)
    for part in parts:
        if part.rows:
            table.add_section()
            table.add_row(part.title.capitalize(), "", "", style="bold")
            for row in part.rows:
                table.add_row(row.name, row.value, row.note)
    return table


def found_table(found: Sequence[tuple[Choice, int, StepTime]], own: Choice, limit: int) -> Table:
    """Settings that fit, the fastest first; the run's own and what hardly fits are marked. 80 columns are enough."""
    name, unit = unit_of(limit)
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for one in (*SETTINGS, name, "s a\nstep", "tokens/s", "MFU", "days"):
        table.add_column(one, justify="right", no_wrap=True)
    for choice, size, step in found:
        settings = [str(value) for value in choice[:-1]]
        of_device = f"{amount(size / unit)}{TIGHT if is_tight(size, limit) else ''}"
        numbers = (of_device, f"{step.seconds:,.3g}", f"{step.tokens_per_second:,.0f}")
        days = amount(step.run_seconds / 86400)
        style = "bold" if choice == own else ""
        table.add_row(*settings, *numbers, f"{step.mfu_causal:.1%}", days, style=style)
    return table
