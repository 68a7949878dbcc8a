"""A run's history as columns, read from metrics.jsonl bit by bit while the run goes on.

In: a run directory. Out: a float64 array per number of a step, the other lines, and seconds by cause over time.
Guarantees: `update` reads only what was appended, and everything again if the file was replaced, which each restart
does; a line that is half written is left for the next call. Costs: benchmarks/README.md, "The page of a long run".
Imports no torch.
"""

import json
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigmodel.inspect.growing_file import GrowingFile
from bigmodel.inspect.page.step_table import (
    Columns,
    by_expert,
    by_place,
    floats,
    leaves,
    of_experts,
    of_parts,
    read_steps,
)
from bigmodel.inspect.step_lines import runs_of_lines
from bigmodel.metrics.run_accounting import CAUSES, RunAccounting

Floats = NDArray[np.float64]
NUMBERS = (
    *("step", "time", "loss", "gradient_norm", "learning_rate", "targets", "positions", "padding", "documents"),
    *("step_seconds", "data_wait_seconds", "compile_seconds", "packs_document_limited", "fetched_bytes"),
    *("imbalance", "imbalance_undealt", "z_loss", "unweighted_loss", "loss_scale", "distillation_loss"),
    *("slowest_rank", "slowest_rank_lag_seconds", "pruned_share", "sampled_share"),
    *("device_joules", "host_joules", "largest_attention_score"),
)
SECONDS_BY_CAUSE = itemgetter("productive", *CAUSES)
NEEDED = ("step", "time", "lap", "data_wait_seconds", "compile_seconds")
FEWEST_LINES = 8  # that are read together
PART_LINES = 128  # read together where not all of a block can be
CHUNK_BYTES = 1 << 22  # arrays are made for each block, half of its cost at 256 kB
GROUPS = {"phases": "phase", "memory": "memory", "flops": "flops"}  # tables of numbers in a line -> prefix of a column
LISTS = ("lag_ms", "lag_ranks")  # lists of numbers in a line, a column for each place


class RunHistory:
    """Columns by name: those of NUMBERS, "phase/forward", "memory/...", "flops/...", "labels/OBJECTIVE/SOURCE" and
    "nats/...", "norm/LAYERS/...", "lag_ms/PLACE", "experts/LAYER" (`step_table.of_experts`), "experts/...". NaN: not in
    the line, or not finite."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.name = self.directory.resolve().name
        self._file = GrowingFile(self.directory / "metrics.jsonl", CHUNK_BYTES)
        self._begin_again()

    def _begin_again(self) -> None:
        self._columns: dict[str, array[float]] = {name: array("d") for name in NUMBERS}
        self._numbers = [self._columns[name] for name in NUMBERS]
        self._groups: dict[tuple[str, tuple[Any, ...]], list[array[float]]] = {}  # names in a line -> their columns
        self._ledger = RunAccounting()
        self._moments, self._seconds = array("d"), array("d")
        self._num_firm = 0  # lines up to the last one that is in its place in time, whatever steps a restart drops
        self.others: dict[str, list[dict[str, Any]]] = {}  # kind -> lines that are no steps
        self.num_steps = 0
        self.documents: dict[int, list[list[Any]]] = {}  # of steps, as `planned_documents` found them
        # Of the steps that measured it: step, and layer of the model -> (experts,) load in percent of the mean.
        self.loads_by_expert: list[tuple[float, dict[int, NDArray[np.int32]]]] = []

    def update(self) -> bool:
        """Read on; whether there was anything new."""
        more = self._file.has_more()
        if self._file.was_replaced:
            self._begin_again()
        for block in self._file.blocks() if more else ():
            for are_steps, lines in runs_of_lines(block):
                if not are_steps:
                    self._add_one_by_one(lines)
                elif not self._add_steps(lines):
                    self._add_in_parts(lines)
        return more or self._file.was_replaced

    def column(self, name: str) -> Floats:
        """(steps,) the numbers of this name, NaN where a line has none."""
        values = np.full(self.num_steps, np.nan)
        known = self._columns.get(name, ())
        values[: len(known)] = known
        return values

    def names(self, prefix: str) -> list[str]:
        """The columns that begin so, in order of their first line."""
        return [name for name in self._columns if name.startswith(prefix)]

    @property
    def began(self) -> float:
        """Unix time of the first process."""
        return self._ledger.began if self._ledger.began is not None else (self._moments or [0.0])[0]

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds of the whole run by cause, "productive" first."""
        return self._ledger.seconds

    def seconds_over_time(self) -> tuple[Floats, Floats]:
        """(lines,) Unix times, ascending, and (lines, causes) seconds by cause up to then, "productive" first."""
        moments = np.frombuffer(self._moments.tobytes(), dtype=np.float64)
        seconds = np.frombuffer(self._seconds.tobytes(), dtype=np.float64).reshape(-1, 1 + len(CAUSES))
        return np.maximum.accumulate(moments) if len(moments) else moments, seconds

    def starts(self) -> list[dict[str, Any]]:
        return self.others.get("start", [])

    def _add_in_parts(self, lines: Sequence[bytes]) -> None:
        """Add lines of steps that cannot be added all together: one of them is no plain step."""
        for first in range(0, len(lines), PART_LINES):
            part = lines[first : first + PART_LINES]
            if len(part) == len(lines) or not self._add_steps(part):
                self._add_one_by_one(part)

    def _add_one_by_one(self, lines: Iterable[bytes]) -> None:
        for text in lines:
            try:
                line = json.loads(text)
            except ValueError:  # a full disk or a crash has cut it
                continue
            if isinstance(line, dict) and "kind" in line:
                self._add(line)

    def _add_steps(self, lines: Sequence[bytes]) -> bool:
        """Add lines of steps in C. False, and nothing is added: they are to be added one by one."""
        columns = read_steps(lines, (*NUMBERS, "lap")) if len(lines) >= FEWEST_LINES else None
        if columns is None or not _are_plain(columns):
            return False
        steps, moments, laps, waited, compiled = (floats(columns[name]).tolist() for name in NEEDED)
        spent = {cause: np.nan_to_num(seconds).tolist() for cause, seconds in leaves(columns.get("spent"))}
        after = self._ledger.add_steps(steps, moments[-1], laps, waited, compiled, spent)
        if after is None:
            return False
        for name in NUMBERS:
            self._columns[name].frombytes(floats(columns[name]).tobytes())
        for group, prefix in {**GROUPS, "norms": "norm"}.items():
            for name, values in leaves(columns.get(group)):
                self._extend(f"{prefix}/{name}", values)
        for name, labels, nats in of_parts(columns["parts"]):
            self._extend(f"labels/{name}", labels)
            self._extend(f"nats/{name}", nats)
        for group in LISTS:
            for place, values in enumerate(by_place(columns.get(group))):
                self._extend(f"{group}/{place}", values)
        for name, values in of_experts(columns.get("expert_loads")):
            self._extend(f"experts/{name}", values)
        for place, found in by_expert(columns.get("loads_by_expert")):
            self._add_loads(steps[place], found)
        self.num_steps += len(lines)
        self._moments.extend(moments)
        causes = [after.get(cause, [self.seconds[cause]] * len(lines)) for cause in ("productive", *CAUSES)]
        self._seconds.frombytes(np.array(causes).T.tobytes())
        self._num_firm = len(self._moments)
        return True

    def _add_loads(self, step: float, loads: Mapping[str, Sequence[int]]) -> None:
        self.loads_by_expert.append(
            (float(step), {int(layer): np.array(one, np.int32) for layer, one in loads.items()})
        )

    def _extend(self, name: str, values: Floats) -> None:
        """Put the values of the lines behind the last ones, with NaN for lines before that had none."""
        column = self._columns.setdefault(name, array("d"))
        column.extend([math.nan] * (self.num_steps - len(column)))
        column.frombytes(values.tobytes())

    def _add(self, line: dict[str, Any]) -> None:
        if line["kind"] == "step":
            lap, waited, compiled = line["lap"], line["data_wait_seconds"], line["compile_seconds"]
            spent = line.get("spent", {})
            self._ledger.add_step_seconds(line["step"], line["time"], lap, waited, compiled, line["skipped"], spent)
            self._add_step(line)
        else:
            if line["kind"] == "start":  # what was before its process began: dropped steps, the time down
                if self._ledger.counted["step"] < line["carried"]["counted"]["step"]:
                    self._forget_what_followed_dropped_steps()
                self._told(line["began"], line["carried"]["seconds"])
            self._ledger.add(line)
            self.others.setdefault(line["kind"], []).append(line)
        if "lap" in line:
            self._told(line["time"], self._ledger.seconds)
        if line["kind"] not in ("checkpoint", "end"):
            self._num_firm = len(self._moments)

    def _told(self, moment: float, seconds: Mapping[str, float]) -> None:
        self._moments.append(moment)
        self._seconds.extend(SECONDS_BY_CAUSE(seconds))

    def _forget_what_followed_dropped_steps(self) -> None:
        """A save that ended later and the end of a failed start stay in the file; their seconds are without those of
        the steps before them that are to be repeated."""
        del self._moments[self._num_firm :]
        del self._seconds[self._num_firm * (1 + len(CAUSES)) :]

    def _add_step(self, line: dict[str, Any]) -> None:
        for column, value in zip(self._numbers, map(line.get, NUMBERS), strict=True):
            column.append(math.nan if value is None else value)
        for group, prefix in GROUPS.items():
            if table := line.get(group):
                self._put(prefix, tuple(table), table.values())
        if parts := line.get("parts"):
            names = tuple([(part["objective"], part["source"]) for part in parts])
            self._put("labels", names, [part["targets"] for part in parts])
            self._put("nats", names, [_mean(part) for part in parts])
        for layers, norms in (line.get("norms") or {}).items():
            self._put(f"norm/{layers}", tuple(norms), norms.values())
        for group in LISTS:
            if values := line.get(group):
                self._put(group, tuple(map(str, range(len(values)))), values)
        if loads := line.get("expert_loads"):
            first = loads.get("first_layer", 0)  # absent in lines of earlier versions
            layers = tuple(map(str, range(first, first + len(loads["largest"]))))
            told = {"entropy": min(loads["entropy"]), "router_z": loads["router_z"]}
            if loads.get("dropped_share") is not None:  # with a capacity
                told["dropped_share"] = loads["dropped_share"]
            self._put("experts", (*layers, *told), [*loads["largest"], *told.values()])
        if found := line.get("loads_by_expert"):
            self._add_loads(line["step"], found)
        self.num_steps += 1

    def _put(self, prefix: str, names: tuple[Any, ...], values: Iterable[float | None]) -> None:
        """The values of one line under these names, each a word or (objective, source)."""
        columns = self._groups.get((prefix, names))
        if columns is None:
            words = ["/".join(name) if isinstance(name, tuple) else name for name in names]
            columns = [self._columns.setdefault(f"{prefix}/{word}", array("d")) for word in words]
            self._groups[prefix, names] = columns
        for column, value in zip(columns, values, strict=True):
            if len(column) < self.num_steps:
                column.extend([math.nan] * (self.num_steps - len(column)))
            column.append(math.nan if value is None else value)


def _are_plain(columns: Columns) -> bool:
    """Whether no step is skipped and all have their seconds."""
    skipped = columns.get("skipped")
    if skipped is None or skipped.null_count or skipped.type != "bool" or skipped.true_count:
        return False
    return not any(columns[name].null_count for name in NEEDED)


def _mean(part: Mapping[str, Any]) -> float:
    """Nats per label."""
    return float(part["nats"] / (part.get("weight") or part["targets"] or math.nan))
