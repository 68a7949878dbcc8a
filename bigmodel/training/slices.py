"""Slices: a rank's part of a parameter that several ranks share, as ranges of the flattened whole.

In: shape of the whole, the dimension that is divided, number of ranks. Out: for any range of the part's own elements,
where these lie in the whole. A part by rows is one range, or one for each of several matrices in one (query, key and
value). A part by columns is many short ranges at equal distances. `Run` describes both, also in the names of tensors in
a checkpoint.

Example: columns of a matrix of shape (3, 8), rank 1 of 2: Run(first=4, length=4, pitch=8, repeats=3), elements 4-7,
12-15 and 20-23 of the whole.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """`repeats` ranges of `length` elements of a flattened whole, `pitch` apart; the first begins at `first`."""

    first: int
    length: int
    pitch: int
    repeats: int

    @property
    def numel(self) -> int:
        return self.length * self.repeats

    @property
    def span(self) -> int:
        """Elements of the whole from the first to the last."""
        return (self.repeats - 1) * self.pitch + self.length

    def of(self, whole: Tensor) -> Tensor:
        """(repeats, length): these elements of a flat contiguous tensor, as a view."""
        return whole.as_strided((self.repeats, self.length), (self.pitch, 1), whole.storage_offset() + self.first)

    def part(self, low: int, high: int) -> Iterator["Run"]:
        """Elements [low, high) of the run: at most a range, a run of whole ranges, and a range, in this order."""
        while low < high:
            row, column = divmod(low, self.length)
            first = self.first + row * self.pitch + column
            rows = 0 if column else (high - low) // self.length
            taken = rows * self.length or min(self.length - column, high - low)
            yield Run(first, self.length, self.pitch, rows) if rows > 1 else one_range(first, taken)
            low += taken

    def within(self, start: int, end: int) -> Iterator[tuple[int, "Run"]]:
        """What lies in [start, end) of the whole: number of the first element in this run, and the run there."""
        low = 0 if start <= self.first else -(-(start - self.first) // self.pitch)
        high = 0 if end < self.first + self.length else (end - self.length - self.first) // self.pitch + 1
        low, high = min(low, self.repeats), min(high, self.repeats)
        if low < high:
            yield low * self.length, Run(self.first + low * self.pitch, self.length, self.pitch, high - low)
        for row in {low - 1, max(low, high)}:
            begin = self.first + row * self.pitch
            first, last = max(start, begin), min(end, begin + self.length)
            if 0 <= row < self.repeats and first < last:
                yield row * self.length + first - begin, one_range(first, last - first)


def one_range(first: int, numel: int) -> Run:
    return Run(first, numel, max(1, numel), 1)


class Place(NamedTuple):
    """Elements of a part from `start` on, where the part is more than one range of the whole.

    As text, in a checkpoint: "5 of 4+4/8*3", or "0 of 0+16,64+8" for two ranges.
    """

    start: int
    runs: tuple[Run, ...]

    def __str__(self) -> str:
        return f"{self.start} of {','.join(map(_text, self.runs))}"

    def moved(self, by: int) -> "Place":
        return self._replace(start=self.start + by)


def _text(run: Run) -> str:
    return f"{run.first}+{run.length}" + (f"/{run.pitch}*{run.repeats}" if run.repeats > 1 else "")


def parse_place(text: str) -> tuple[int, tuple[Run, ...]]:
    """The inverse of `str`: of a `Place`, or of a number, which has no runs. `ValueError`: neither."""
    start, _, runs = text.partition(" of ")
    return int(start), tuple(map(_parse, runs.split(","))) if runs else ()


def _parse(text: str) -> Run:
    first, _, rest = text.partition("+")
    length, _, rest = rest.partition("/")
    pitch, _, repeats = rest.partition("*")
    return Run(int(first), int(length), int(pitch), int(repeats)) if rest else one_range(int(first), int(length))


def parts_of(runs: Sequence[Run], start: int, numel: int) -> Iterator[Run]:
    """Elements [start, start + numel) of runs that lie end to end in a part, in order."""
    begin, end = 0, start + numel
    for run in runs:
        low, high = max(start - begin, 0), min(end - begin, run.numel)
        yield from run.part(low, high)
        begin += run.numel


class Slice(NamedTuple):
    """This rank's part of a parameter of this shape: the runs lie in it end to end."""

    shape: tuple[int, ...]
    runs: tuple[Run, ...]

    @classmethod
    def of_rows(cls, shape: Sequence[int], size: int, rank: int, parts: Sequence[int] = ()) -> "Slice":
        """An equal part of the rows of each of the matrices in one; `parts`: rows of each, empty: it is one."""
        across, runs, begin = torch.Size(shape[1:]).numel(), [], 0
        for rows in parts or (shape[0],):
            mine = rows // size
            runs.append(one_range((begin + rank * mine) * across, mine * across))
            begin += rows
        return cls(tuple(shape), tuple(runs))

    @classmethod
    def of_columns(cls, shape: Sequence[int], size: int, rank: int) -> "Slice":
        rows, columns = shape
        mine = columns // size
        return cls(tuple(shape), (Run(rank * mine, mine, columns, rows),))

    @property
    def numel(self) -> int:
        return sum(run.numel for run in self.runs)

    def place(self, start: int) -> int | Place:
        """Of the part's elements from `start` on: a number in the whole if the part is one range of it."""
        if len(self.runs) == 1 and self.runs[0].repeats == 1:
            return self.runs[0].first + start
        return Place(start, self.runs)

    def take(self, whole: Tensor, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the part, flat, from the flat whole."""
        return torch.cat([run.of(whole).flatten() for run in parts_of(self.runs, start, numel)])

    def put(self, whole: Tensor, start: int, values: Tensor) -> None:
        """Write the part's elements from `start` on into the flat whole."""
        at = 0
        for run in parts_of(self.runs, start, values.numel()):
            run.of(whole).copy_(values[at : at + run.numel].view(run.repeats, run.length))
            at += run.numel
