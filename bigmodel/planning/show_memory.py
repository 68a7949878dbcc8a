"""`bigmodel show memory RUN.toml`: the memory of the plan alone.

In: settings, number of ranks, memory of a device. Out: a table in the terminal, a picture. Imports no torch.
"""

import os
import sys
from pathlib import Path

from rich.console import Console

from bigmodel.config.settings import Settings
from bigmodel.pictures import figure, save_picture, title
from bigmodel.planning.changes import choice_of
from bigmodel.planning.context import cluster_of_ranks, context_of
from bigmodel.planning.fit import fit_of
from bigmodel.planning.memory import GIB, headlines, memory_of, stages_of
from bigmodel.planning.memory_table import draw_memory, memory_table

WIDTH = 120  # of lines into a pipe


def show_memory(settings: Settings, ranks: int, device_gib: float, png: Path | None, tokens: int) -> None:
    """Print the memory part of the plan alone. `device_gib`: 0: not compared. `tokens`: of the tokenizer; 0: known."""
    context = context_of(settings, cluster_of_ranks(ranks), tokens)
    by_stage, limit = {stage: memory_of(one) for stage, one in stages_of(context).items()}, int(device_gib * GIB)
    out = console()
    out.print(fit_of(context, limit).words(choice_of(context)), soft_wrap=True)
    for line in headlines(context):
        out.print(line, soft_wrap=True)
    out.print(memory_table(by_stage, limit))
    if png:
        drawn = figure(9, 4.2)
        axes = drawn.subplots()
        title(axes, "Memory of a GPU by ZeRO stage")
        draw_memory(axes, by_stage, limit)
        drawn.legend(frameon=False, ncols=4, loc="outside lower center", fontsize=9)
        save_picture(drawn, png)
        out.print(f"picture: {png}", soft_wrap=True)


class _Table(Console):
    """A reader that has gone, as head, ends what is printed and not the command: exit codes say whether a run fits."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in its buffer


def console() -> Console:
    """As wide as the terminal; into a pipe as wide as the notes need."""
    width = None if sys.stdout.isatty() else WIDTH
    return _Table(highlight=False, markup=False, emoji=False, width=width)
