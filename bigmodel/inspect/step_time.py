"""Time of a run: phases of a step, and all seconds of the run by cause.

In: `metrics.jsonl` of a run directory. Out: `time.png` and plain text. Works during the run. Imports no torch.
Phases are those of rank 0, by the clock of its device (bigmodel/metrics/phases.py). "rest" is the time outside all
phases: the whole step if no phases were recorded. Causes are those of the run accounting, over all starts.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigmodel.config.settings import UserError
from bigmodel.metrics.run_accounting import RunAccounting
from bigmodel.pictures import CAUSES, PHASES, figure, quiet, title
from bigmodel.run_directory import read_json_lines

RECENT = 100  # steps in the printed mean
BINS = 200  # means in the picture
BLOCKS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class StepTimes:
    """Steps in order, each repeated step once: numbers, and seconds (steps,) by phase."""

    steps: list[int]
    seconds: dict[str, NDArray[np.float64]]
    causes: Mapping[str, float]  # seconds of the whole run, "productive" first


def read_times(run_directory: Path) -> StepTimes:
    """Raises `UserError` if there is no step yet."""
    ledger, by_step = RunAccounting(), {}
    for line in read_json_lines(Path(run_directory) / "metrics.jsonl"):
        if line["kind"] == "step":
            by_step[line["step"]] = line  # a step that is repeated has the line of its last time: a start drops others
        ledger.add(line)
    if not by_step:
        raise UserError(
            f"{run_directory}: metrics.jsonl has no step yet; name a run directory whose training has begun"
        )
    rows = [_row(line) for line in by_step.values()]
    seconds = {phase: np.array([row[phase] for row in rows]) for phase in PHASES}
    return StepTimes(list(by_step), seconds, ledger.seconds)


def _row(line: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by phase; evaluations and saves lie between steps and have lines of their own."""
    row = {phase: float(line.get("phases", {}).get(phase, 0.0)) for phase in PHASES}
    row["compile"] = line["compile_seconds"]
    row["forward"] -= min(row["forward"], row["compile"])  # the first forward pass compiles
    row["rest"] = max(0.0, line["step_seconds"] - sum(row.values()))
    return row


def step_time(run_directory: Path, width: int | None = None) -> str:
    """Text bars: the mean of the last steps by phase, the run by cause. `width` in characters."""
    times = read_times(run_directory)
    width = width or shutil.get_terminal_size((80, 24)).columns
    last = min(RECENT, len(times.steps))
    phases = {phase: float(values[-last:].mean()) for phase, values in times.seconds.items()}
    causes = {cause: seconds for cause, seconds in times.causes.items() if seconds > 0}
    step, run = sum(phases.values()), sum(causes.values())
    return "\n".join(
        [
            f"a step of rank 0, mean of the last {last}: {1000 * step:,.1f} ms",
            *_bars({phase: seconds for phase, seconds in phases.items() if seconds}, width, 1000.0, "ms"),
            "",
            f"the run's {run:,.1f} s, all starts",
            *_bars(causes, width, 1.0, "s"),
        ]
    )


def _bars(seconds: Mapping[str, float], width: int, factor: float, unit: str) -> list[str]:
    total = sum(seconds.values()) or 1.0
    room = max(10, width - 38)
    return [
        f"  {name:<14}{_bar(value / max(seconds.values()), room)} {factor * value:>10,.1f} {unit} {value / total:>6.1%}"
        for name, value in seconds.items()
    ]


def _bar(share: float, room: int) -> str:
    eighths = round(share * room * 8)
    return ("█" * (eighths // 8) + BLOCKS[eighths % 8].strip()).ljust(room)


def draw_times(run_directory: Path) -> Path:
    """Draw RUN_DIR/time.png: steps by phase above, the whole run by cause below."""
    run_directory = Path(run_directory)
    times = read_times(run_directory)
    drawn = figure()
    above, below = drawn.subplots(2, 1, height_ratios=[5, 1])
    bins = np.array_split(np.arange(len(times.steps)), min(BINS, len(times.steps)))
    ends = [times.steps[0] - 1, *(times.steps[bin_[-1]] for bin_ in bins)]
    floor = np.zeros(len(bins))
    for phase in PHASES:
        means = np.array([1000 * times.seconds[phase][bin_].mean() for bin_ in bins])
        if means.any():
            above.stairs(floor + means, ends, baseline=floor, fill=True, color=PHASES[phase], label=phase)
        floor = floor + means
    # The first step loads and compiles; it would flatten all others.
    above.set_ylim(0, 1.25 * max(float(np.quantile(floor, 0.98)), 1e-9))
    above.set_xlim(ends[0], ends[-1])
    above.set_ylabel("milliseconds per step, rank 0")
    above.set_xlabel("optimizer step")
    title(above, f"{run_directory.name}: where a step's time goes")
    above.legend(frameon=False, ncols=len(PHASES), loc="upper right", fontsize=9)
    causes = {cause: seconds for cause, seconds in times.causes.items() if seconds > 0}
    left, total = 0.0, sum(causes.values())
    for cause, seconds in causes.items():
        below.barh(0, seconds, left=left, color=CAUSES[cause], label=f"{cause} {seconds / total:.1%}")
        left += seconds
    below.set_yticks([])
    below.set_xlim(0, left)
    below.set_xlabel("seconds of the run, all starts, by cause")
    below.legend(frameon=False, ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.75), fontsize=9)
    for axes in (above, below):
        quiet(axes, grid="")
    path = run_directory / "time.png"
    part = path.with_name(".time.part.png")
    drawn.savefig(part)
    part.replace(path)
    return path
