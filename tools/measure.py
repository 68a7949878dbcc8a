"""Shared code of the benchmarks: timing, peak memory, and a record that survives a kill.

In: functions; out: milliseconds and bytes. In: rows; out: a JSON file, a table and a plot. Guarantees: the file is
complete after each row, so a run cut short keeps its rows. On a GPU, time is measured between two CUDA events around
a call: for very small kernels that is the launch time of Python, not the kernel's time.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from bigmodel.kernels.triton_import import triton

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
WARM_UP = 3
REPEATS = {"gpu": 50, "cpu": 10, "quick": 5}
INPUT_SETS = 3  # inputs are rotated, so no call finds its inputs in the cache
Row = dict[str, Any]


def milliseconds(call: Callable[[int], Any], device: str, repeats: int) -> float:
    """The median of `repeats` calls; the argument of a call is the number of its input set."""
    for number in range(WARM_UP):
        call(number % INPUT_SETS)
    if device == "cpu":
        return statistics.median(seconds_of(call, number % INPUT_SETS) for number in range(repeats)) * 1e3
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for number, (start, end) in enumerate(pairs):
        start.record()
        call(number % INPUT_SETS)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def seconds_of(call: Callable[[int], Any], number: int) -> float:
    started = time.perf_counter()
    call(number)
    return time.perf_counter() - started


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """Peak memory of a call above the memory in use before it; None on a CPU, which has no counter."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def relative_error(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest |ours - exact| / |exact| of several tensors, in the L2 norm."""
    pairs = zip(ours, exact, strict=True)
    return max(((one.double() - truth).norm() / truth.norm()).item() for one, truth in pairs)


def sizes(device: str, quick: bool) -> str:
    """Name of the sizes to run: "gpu", "cpu" (about a thirtieth) or "quick"."""
    return "quick" if quick else {"cuda": "gpu"}.get(device, device)


def check_device(device: str) -> None:
    """End the program with one line if the device is missing."""
    if device not in ("cpu", "cuda"):
        raise SystemExit(f"--device {device}: choose cuda or cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here; --device cpu --quick runs small sizes on the CPU")


class Record:
    """The rows of one benchmark in `directory`/`name`.json, with command, date, commit and hardware."""

    def __init__(self, directory: Path, name: str, device: str) -> None:
        self.rows: list[Row] = []
        self.path = directory / f"{name}.json"
        self.head = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": f"python -m tools.{name.removesuffix('_cpu')} {' '.join(sys.argv[1:])}",
            "commit": _commit(),
            "device": hardware(device),
            "torch": torch.__version__,
            "triton": getattr(triton, "__version__", None),
        }
        directory.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        text = ",\n  ".join(json.dumps(row) for row in self.rows)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.head, indent=1).removesuffix("\n}") + f',\n "rows": [\n  {text}\n ]\n}}\n')
        os.replace(partial, self.path)
        print(f"{row['case']}: {row['contender']}: {row.get('not_run', 'done')}", flush=True)

    def show(self, columns: Sequence[str]) -> None:
        """Print the rows as a table with a line between cases; below it contenders that never ran, with the reason."""
        able = {row["contender"] for row in self.rows if "not_run" not in row}
        absent = {row["contender"]: row["not_run"] for row in self.rows if row["contender"] not in able}
        shown = [row for row in self.rows if row["contender"] not in absent]
        notes = "; ".join(f"{contender}: {reason}" for contender, reason in absent.items())
        title = f"{self.path.name}: {self.head['device']}, commit {self.head['commit']}"
        table = Table(title=title, caption=f"not run here: {notes}" if notes else None)
        for number, column in enumerate(columns):
            table.add_column(column.replace("_", " "), justify="left" if number < 2 else "right", no_wrap=True)
        for row, following in zip(shown, [*shown[1:], None], strict=False):
            cells: list[str | Text] = [_cell(row.get(column)) for column in columns]
            if "not_run" in row:
                cells[2] = Text(row["not_run"], "dim")
            table.add_row(*cells, end_section=following is None or row["case"] != following["case"])
        Console(markup=False, emoji=False, width=max(200, shutil.get_terminal_size().columns)).print(table)

    def plot(self, panels: dict[str, str], unit: str) -> str:
        """Bar chart: a panel per item of `panels` (column: title), a group per case, a colour per contender.

        Returns the path of the picture, or the reason why there is none.
        """
        able = [row for row in self.rows if "not_run" not in row]
        cases, contenders = _in_order(able, "case"), _in_order(able, "contender")
        panels = {column: title for column, title in panels.items() if any(row.get(column) for row in able)}
        if not panels:
            return "no picture: nothing ran"
        values = {(row["case"], row["contender"]): row for row in self.rows}
        height = 1.2 + 0.22 * len(cases) * (len(contenders) + 1)
        figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), height), sharey=True, squeeze=False)
        colours = matplotlib.color_sequences["tab10"]
        for axis, (column, title) in zip(axes[0], panels.items(), strict=True):
            for place, contender in enumerate(contenders):
                widths = [values.get((case, contender), {}).get(column) or 0.0 for case in cases]
                places = [number * (len(contenders) + 1) + place for number in range(len(cases))]
                bars = axis.barh(places, widths, height=0.9, color=colours[place % 10], label=contender)
                axis.bar_label(bars, [_cell(width) if width else "" for width in widths], padding=2, fontsize=7)
            axis.set_yticks([n * (len(contenders) + 1) + (len(contenders) - 1) / 2 for n in range(len(cases))], cases)
            axis.set_title(title, fontsize=10)
            axis.set_xlabel(unit)
            axis.margins(x=0.14, y=0.01)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0][0].invert_yaxis()
        figure.legend(
            *axes[0][0].get_legend_handles_labels(), loc="upper center", ncols=min(4, len(contenders)),
            bbox_to_anchor=(0.5, 0.0), frameon=False, fontsize=9,
        )  # fmt: skip
        figure.suptitle(
            f"{self.head['device']}, torch {self.head['torch']}, commit {self.head['commit']}",
            y=1.0, va="bottom", fontsize=10,
        )  # fmt: skip
        figure.tight_layout()
        path = self.path.with_suffix(".png")
        figure.savefig(path, dpi=120, bbox_inches="tight")
        plt.close(figure)
        return str(path)


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"CPU only ({model}, {torch.get_num_threads()} threads): says nothing of a GPU"


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _in_order(rows: Sequence[Row], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if value != 0 and abs(value) < 1e-2:
        return f"{value:.1e}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
