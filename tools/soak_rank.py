"""A rank of `tools.soak`: training with a fault and a planted defect, its batches recorded. Imports little: it starts
often."""

from pathlib import Path

from tests.support.batches import record_batches
from tests.support.faulty import Fault, train


def train_recorded(fault: Fault, defect: str, batches: Path, arguments: list[str], output: Path) -> int:
    """batches: beside it the batches are recorded; output: see `tests.support.ranks.command`. Returns the exit code."""
    if defect:
        from tools.soak_defects import DEFECTS

        DEFECTS[defect]()
    record_batches(batches)
    return train(fault, arguments, output)
