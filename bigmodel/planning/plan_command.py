"""`bigmodel plan RUN.toml --cluster CLUSTER.toml`: memory, time, reliability, cost, data and scaling of a run to come.

In: settings, a cluster, a measured run or none. Out: a table in the terminal, JSON for scripts, a picture; whether it
fits is the first line. Imports no torch; needs neither data nor a GPU. Costs: under 2 s of one core, the picture one
more.
"""

from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from bigmodel.config.settings import Settings
from bigmodel.planning.changes import Choice, bytes_of_gpu, choice_of, nearest
from bigmodel.planning.context import Context, cluster_of_ranks, context_of
from bigmodel.planning.memory import GIB, headline, memory_of, stages_of, unit_of
from bigmodel.planning.memory_table import draw_memory, memory_table
from bigmodel.sizes import amount

VERSION = 1  # of the JSON


class Fit(NamedTuple):
    """`limit`: bytes of a device, 0 if it is not known. `others`: what would fit, if it does not."""

    needed: int
    limit: int
    others: list[tuple[Choice, int]]

    @property
    def fits(self) -> bool | None:
        return self.needed <= self.limit if self.limit else None

    def words(self, own: Choice) -> str:
        """
        >>> own = Choice(1, "none", 4, 1, False)
        >>> Fit(61 * GIB, 80 * GIB, []).words(own)
        'fits: 61.00 of 80.00 GiB'
        >>> Fit(92 * GIB, 80 * GIB, [(own._replace(stage=2), 71 * GIB)]).words(own)
        'does not fit: 92.00 of 80.00 GiB; nearest that do: ZeRO 2 (71.00)'
        """
        name, unit = unit_of(max(self.needed, self.limit))
        needed, limit = amount(self.needed / unit), amount(self.limit / unit)
        if not self.limit:
            return f"needs {needed} {name}; not compared with a device"
        if self.fits:
            return f"fits: {needed} of {limit} {name}"
        said = "; ".join(f"{choice.words(own)} ({amount(size / unit)})" for choice, size in self.others)
        return f"does not fit: {needed} of {limit} {name}; " + (
            f"nearest that do: {said}" if said else "no other stage, checkpointing, micro-batch or offload does either"
        )


def fit_of(context: Context, limit: int) -> Fit:
    needed = bytes_of_gpu(context)
    return Fit(needed, limit, nearest(context, limit) if 0 < limit < needed else [])


def console() -> Console:
    return Console(highlight=False, markup=False, emoji=False)


def show_memory(settings: Settings, ranks: int, device_gib: float, png: Path | None, tokens: int) -> None:
    """Print the memory part of the plan alone. `device_gib`: 0: not compared. `tokens`: of the tokenizer; 0: known."""
    context = context_of(settings, cluster_of_ranks(ranks), tokens)
    by_stage = {stage: memory_of(one) for stage, one in stages_of(context).items()}
    out = console()
    out.print(headline(context), soft_wrap=True)
    out.print(fit_of(context, int(device_gib * GIB)).words(choice_of(context)), soft_wrap=True)
    out.print(memory_table(by_stage, int(device_gib * GIB)))
    if png:
        from bigmodel.pictures import figure

        drawn = figure(9, 4.2)
        draw_memory(drawn.subplots(), by_stage, int(device_gib * GIB))
        drawn.legend(frameon=False, ncols=4, loc="outside lower center", fontsize=9)
        drawn.savefig(png)
        out.print(f"picture: {png}", soft_wrap=True)
