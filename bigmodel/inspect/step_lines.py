"""Steps of metrics.jsonl, many lines at once, so that a reader's loop is in C. Imports nothing of the project."""

from collections.abc import Iterator
from itertools import groupby

STEP = b'{"kind": "step", '  # the beginning of a step's line, as `Metrics.record_step` writes it


def runs_of_lines(block: bytes) -> Iterator[tuple[bool, list[bytes]]]:
    r"""Whole lines of a block: consecutive ones that are steps, then those that are not, and so on, all in order.

    >>> list(runs_of_lines(b'{"kind": "step", 1}\n{"kind": "step", 2}\n{"kind": "end"}\n'))
    [(True, [b'{"kind": "step", 1}', b'{"kind": "step", 2}']), (False, [b'{"kind": "end"}'])]
    """
    for are_steps, lines in groupby(block.split(b"\n")[:-1], lambda line: line.startswith(STEP)):
        yield are_steps, list(lines)
