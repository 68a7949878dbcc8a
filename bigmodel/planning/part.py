"""A part of the plan of a run: what the table, the JSON and the picture say about one subject. Imports no torch."""

from typing import Any, NamedTuple


class Row(NamedTuple):
    """A line of the table: `value` with its unit, `note` where it comes from or what it assumes."""

    name: str
    value: str
    note: str = ""


class Part(NamedTuple):
    """`numbers`: for scripts, in SI units (bytes, seconds, FLOPs, joules), the unit at the end of each name."""

    title: str
    rows: list[Row]
    numbers: dict[str, Any]
