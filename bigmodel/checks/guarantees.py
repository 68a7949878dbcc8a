"""Checks of the guarantees on a user's settings and data: `bigmodel check RUN.toml [GUARANTEE]`.

Each check is a function from settings to findings: a claim, whether it holds, and the evidence in numbers. Tests
break the guarded code and see the same functions fail.

    leak    a document cannot influence another one in its packed sequence: outputs, loss, gradients; also on ranks that
            share packed sequences, experts or matrices
    order   the batches of each step are the same bytes at any world size; each position of an epoch occurs once
    loss    loss and gradient norm of a step agree on any number of ranks, also if ranks share packed sequences
    resume  a killed and resumed run equals the uninterrupted one to the last bit
    accounting  every token, second and FLOP of a killed and resumed run is accounted for
    exact   not one of the five: 20 steps under the run's DeepSpeed JSON are those of plain torch in one process
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from bigmodel.checks.audit import Finding
from bigmodel.checks.exact import check_exact
from bigmodel.checks.leak import check_leak
from bigmodel.checks.order import check_order
from bigmodel.checks.runs import check_accounting, check_loss, check_resume

Check = Callable[[Path, Sequence[str]], list[Finding]]

GUARANTEES: dict[str, Check] = {
    "leak": check_leak,
    "order": check_order,
    "loss": check_loss,
    "resume": check_resume,
    "accounting": check_accounting,
}
CHECKS: dict[str, Check] = {**GUARANTEES, "exact": check_exact}


def run_checks(run_file: Path, overrides: Sequence[str], names: Sequence[str]) -> int:
    """Run these of `CHECKS`, print each finding, return the number of broken claims."""
    console = Console(highlight=False, markup=False, emoji=False)
    broken = 0
    for name in names:
        if sys.stderr.isatty():
            print(f"checking: {name}", file=sys.stderr, flush=True)
        for finding in CHECKS[name](run_file, overrides):
            mark = ("holds ", "green") if finding.holds else ("BROKEN", "red")
            console.print(Text.assemble(mark, f" {name}: {finding.claim} ({finding.evidence})"))
            broken += not finding.holds
    return broken
