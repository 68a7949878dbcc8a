"""The guarantees, proved on a user's own settings and data: `bigmodel check RUN.toml [PROMISE]`.

Each guarantee is a function from settings to findings: a claim, whether it holds, and the number behind it. The
tests run the same functions, with the guarded code broken, to see them fail.

    leak    a document cannot influence another one in its pack: outputs, loss, gradients
    order   the batches of each step are the same bytes at any world size; each position of an epoch occurs once
    loss    loss and gradient norm of the same steps agree over ranks, also where these share packs
    resume  killed and resumed, a run retraces the uninterrupted one, to the last bit
    accounting  every token, second and FLOP of a run that was killed and resumed is accounted for
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from bigmodel.checks.audit import Finding
from bigmodel.checks.leak import check_leak
from bigmodel.checks.order import check_order
from bigmodel.checks.runs import check_accounting, check_loss, check_resume

GUARANTEES: dict[str, Callable[[Path, Sequence[str]], list[Finding]]] = {
    "leak": check_leak,
    "order": check_order,
    "loss": check_loss,
    "resume": check_resume,
    "accounting": check_accounting,
}


def run_checks(run_file: Path, overrides: Sequence[str], guarantees: Sequence[str]) -> int:
    """Run the named guarantees, print each finding, give the number of broken claims."""
    console = Console(highlight=False, markup=False)
    broken = 0
    for guarantee in guarantees:
        for finding in GUARANTEES[guarantee](run_file, overrides):
            mark = ("holds ", "green") if finding.holds else ("BROKEN", "red")
            console.print(Text.assemble(mark, f" {guarantee}: {finding.claim} ({finding.evidence})"))
            broken += not finding.holds
    return broken
