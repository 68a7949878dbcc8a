"""The results of an ablation: means and spreads over seeds, differences to the baseline, a table, curves.

In: finished jobs. Out: table.md, results.json, and pictures of the losses, in the folder of the ablation; the table in
the terminal. A spread is the standard deviation over seeds (n - 1). A difference is the mean, over the seeds that both
have, of variant minus baseline, with the 95 % interval of Student's t. Imports no torch.
"""

import math
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from bigmodel.inspect.report import GREY, INK, read_curve, smooth
from bigmodel.run_directory import read_json, read_json_lines, write_atomically, write_json
from tools.ablation_variants import Job, Variant
from tools.ablation_work import cost_of, finished

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONFIDENCE = 0.95
LINES_IN_A_PICTURE = 8  # beside the baseline; more variants get more pictures
ROOT = Path(__file__).parents[1]


# ---- statistics


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (nan for one value) of values."""

    mean: float
    deviation: float

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if math.isnan(self.deviation) else f" ± {self.deviation:.4f}")


def spread(values: Sequence[float]) -> Spread:
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan)


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences; half the width of its interval, nan for one pair."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        if math.isnan(self.half_width):
            return f"{self.mean:+.4f}"
        return f"{self.mean:+.4f} [{self.mean - self.half_width:+.4f}, {self.mean + self.half_width:+.4f}]"


def paired_difference(ours: dict[int, float], baseline: dict[int, float]) -> Difference | None:
    """By seed; None where no seed is in both."""
    apart = [ours[seed] - baseline[seed] for seed in sorted(ours.keys() & baseline.keys())]
    if not apart:
        return None
    if len(apart) == 1:
        return Difference(apart[0], math.nan)
    error = statistics.stdev(apart) / math.sqrt(len(apart))
    return Difference(statistics.fmean(apart), t_quantile((1 + CONFIDENCE) / 2, len(apart) - 1) * error)


def t_probability(t: float, degrees: int) -> float:
    """P(|T| < t) of Student's t with whole degrees of freedom (Abramowitz & Stegun 26.7.3, 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for power in range(1 + odd, degrees, 2):  # the sum has (degrees - odd) / 2 terms
        total += term
        term *= cosine**2 * power / (power + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(probability: float, degrees: int) -> float:
    """The t below which a share `probability` >= 0.5 lies, by bisection."""
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < 2 * probability - 1:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) < 2 * probability - 1 else (low, middle)
    return high


# ---- rows


@dataclass(frozen=True)
class Row:
    """The finished seeds of a variant: seed -> numbers of its result."""

    variant: Variant
    jobs: list[Job]
    results: dict[int, dict[str, Any]]

    def of(self, name: str) -> dict[int, float]:
        return {seed: found[name] for seed, found in self.results.items() if found.get(name) is not None}


def rows_of(jobs: Sequence[Job]) -> list[Row]:
    rows = []
    for name in dict.fromkeys(job.variant.name for job in jobs):
        mine = [job for job in jobs if job.variant.name == name]
        done = [job for job in mine if finished(job)]
        rows.append(Row(mine[0].variant, done, {job.seed: read_json(job.beside("result.json")) for job in done}))
    return rows


def table_of(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and cells. Scores only for classifications, bits per byte only where tokenizers may differ."""
    by_name, baseline = {row.variant.name: row for row in rows}, rows[0].variant.against if rows else ""
    scores = [name for name in ("accuracy", "macro_f1") if any(row.of(name) for row in rows)]
    folders = {str(job.settings().data.directory) for row in rows if not row.variant.commands for job in row.jobs[:1]}
    scores += ["bits_per_byte"] if len(folders) > 1 and any(row.of("bits_per_byte") for row in rows) else []
    notes = any(row.variant.note for row in rows)
    head = ["variant", "validation loss", "difference, 95 % interval", *(name.replace("_", " ") for name in scores)]
    head += ["tokens per CPU second", "parameters", "seeds", *(["note"] if notes else [])]
    cells = []
    for row in rows:
        losses, against = row.of("loss"), by_name.get(row.variant.against)
        apart = paired_difference(losses, against.of("loss")) if against and against is not row else None
        other = "" if row.variant.against == baseline else f" to {row.variant.against}"
        cells.append(
            [
                row.variant.name,
                str(spread(list(losses.values()))) if losses else "",
                f"{apart}{other}" if apart else "",
                *(str(spread(list(row.of(name).values()))) if row.of(name) else "" for name in scores),
                _mean(row.of("tokens_per_cpu_second")),
                _mean(row.of("parameters")),
                str(len(losses)) if losses else "none finished",
                *([row.variant.note] if notes else []),
            ]
        )
    return head, cells


def _mean(values: dict[int, float]) -> str:
    return f"{statistics.fmean(values.values()):,.0f}" if values else ""


def markdown_of(rows: Sequence[Row], about: dict[str, str]) -> str:
    head, cells = table_of(rows)
    lines = [f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *map(_escaped, cells)]]
    told = f"`{about['command']}`, commit {about['commit']}, {about['date']}, {about['processor']}."
    return "\n".join([told, "", *lines]) + "\n"


def _escaped(cells: list[str]) -> list[str]:
    return [" ".join(cell.replace("|", "\\|").splitlines()) for cell in cells]


def write_table(jobs: Sequence[Job], out: Path, command: str) -> None:
    """table.md and results.json of what is finished, also by another process while this one writes."""
    about, done = origin(command), -1
    while done < (now := sum(map(finished, jobs))):
        done, rows = now, rows_of(jobs)
        write_atomically(out / "table.md", markdown_of(rows, about))
        results = {
            row.variant.name: {"set": list(row.variant.overrides), "against": row.variant.against, "seeds": row.results}
            for row in rows
        }
        write_json(out / "results.json", about | {"variants": results})


def show_table(jobs: Sequence[Job], console: Console) -> None:
    """The finished rows; numbers of parameters and notes are in table.md."""
    head, cells = table_of([row for row in rows_of(jobs) if row.results])
    kept = [number for number, name in enumerate(head) if name not in ("parameters", "note")]
    table = Table(box=SIMPLE)
    for number in kept:
        table.add_column(head[number], justify="right" if number else "left", overflow="fold")
    for line in cells:
        table.add_row(*(line[number] for number in kept))
    console.print(table)


def origin(command: str) -> dict[str, str]:
    words = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "command": command,
        "commit": commit or "unknown",
        "date": datetime.now(UTC).date().isoformat(),
        "processor": names[0] if names else platform.machine(),
    }


# ---- pictures


@dataclass(frozen=True)
class Band:
    """A loss at steps that all seeds have: mean, standard deviation (0 for one seed); mean CPU seconds."""

    steps: list[int]
    seconds: np.ndarray
    means: np.ndarray
    deviations: np.ndarray


def band(curves: Sequence[tuple[Sequence[int], Sequence[float]]], costs: Sequence[np.ndarray]) -> Band:
    """Of one (steps, losses) per seed. `costs`: CPU seconds of a seed at each of its steps."""
    tables = [dict(zip(steps, losses, strict=True)) for steps, losses in curves]
    seconds = [dict(zip(steps, cost.tolist(), strict=True)) for (steps, _), cost in zip(curves, costs, strict=True)]
    shared = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    values = np.array([[table[step] for step in shared] for table in tables])
    spent = np.array([[table[step] for step in shared] for table in seconds])
    deviations = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(len(shared))
    return Band(shared, spent.mean(axis=0), values.mean(axis=0), deviations)


def bands_of(row: Row) -> dict[str, Band]:
    """Validation loss and smoothed training loss."""
    found: dict[str, tuple[list[tuple[Sequence[int], Sequence[float]]], list[np.ndarray]]]
    found = {"validation": ([], []), "training": ([], [])}
    for job in row.jobs:
        cost, curve = cost_of(list(read_json_lines(job.beside("cpu.jsonl")))), read_curve(job.directory)
        training = dict(zip(curve.steps, smooth(curve.losses), strict=True))
        validation = dict(zip(curve.evaluated_steps, curve.validation_losses, strict=True))
        for name, losses in (("validation", validation), ("training", training)):
            curves, costs = found[name]
            curves.append((list(losses), list(losses.values())))
            costs.append(np.interp(list(losses), cost.steps, cost.seconds))
    return {name: band(*some) for name, some in found.items()}


def draw(jobs: Sequence[Job], out: Path) -> list[Path]:
    """curves.png, or curves-1.png and on: losses against steps and CPU seconds, mean line, band of one deviation."""
    from matplotlib import color_sequences
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows_of(jobs) if row.jobs and not row.variant.commands]
    if not rows:
        return []
    baseline, others = rows[:1], rows[1:]
    groups = [others[at : at + LINES_IN_A_PICTURE] for at in range(0, len(others), LINES_IN_A_PICTURE)] or [[]]
    bands = {row.variant.name: bands_of(row) for row in rows}
    colours = {row.variant.name: color_sequences["tab10"][n % LINES_IN_A_PICTURE] for n, row in enumerate(others)}
    paths = []
    for number, group in enumerate(groups, start=1):
        figure = Figure(figsize=(12, 8), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(2, 2, sharey="row", sharex="col")
        for axes_of_kind, kind in zip(grid, ("validation", "training"), strict=True):
            for axes, unit in zip(axes_of_kind, ("steps", "seconds"), strict=True):
                for row in [*baseline, *group]:
                    name = row.variant.name
                    _draw_band(axes, bands[name][kind], unit, name, colours.get(name, INK))
                _finish(axes, bands, [*baseline, *group], kind)
            axes_of_kind[0].set_ylabel(f"{kind} loss{', smoothed' if kind == 'training' else ''}", color=INK)
        grid[1][0].set_xlabel("optimizer step", color=INK)
        grid[1][1].set_xlabel("CPU seconds of training", color=INK)
        for text in grid[0][0].legend(frameon=False, fontsize=8).get_texts():
            text.set_parse_math(False)
        path = out / ("curves.png" if len(groups) == 1 else f"curves-{number}.png")
        part = path.with_name(f".{path.stem}.{os.getpid()}.part.png")
        figure.savefig(part)
        part.replace(path)
        paths.append(path)
    return paths


def _draw_band(axes: "Axes", shown: Band, unit: str, name: str, colour: Any) -> None:
    places = shown.steps if unit == "steps" else shown.seconds
    marker = "o" if len(shown.steps) < 20 else ""
    axes.plot(places, shown.means, color=colour, linewidth=1.3, marker=marker, markersize=3, label=name)
    low, high = shown.means - shown.deviations, shown.means + shown.deviations
    axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)


def _finish(axes: "Axes", bands: dict[str, dict[str, Band]], rows: Sequence[Row], kind: str) -> None:
    """The last nine tenths of a run fill the height: the fall at the start would flatten the differences."""
    means = [bands[row.variant.name][kind].means for row in rows]
    calm = np.concatenate([values[len(values) // 10 :] for values in means])
    calm = calm[np.isfinite(calm)]
    if len(calm) and calm.max() > calm.min():
        margin = 0.05 * (calm.max() - calm.min())
        axes.set_ylim(calm.min() - margin, calm.max() + margin)
    axes.grid(color="#e6e8ec", linewidth=0.8)
    axes.tick_params(labelsize=9, colors=GREY)
    axes.spines[["top", "right"]].set_visible(False)
