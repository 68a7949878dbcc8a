"""Report of a run: a picture, a plot in the terminal and a table.

In: `metrics.jsonl` of a run directory and `summary.json` if it exists. Out: `loss.png` and plain text.
Works at any time, also during the run and after a kill. Imports no torch; matplotlib is imported only to draw a
picture (half a second).
"""

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bigmodel.config.settings import UserError
from bigmodel.inspect.braille import braille, smooth
from bigmodel.inspect.step_time import draw_times, step_time
from bigmodel.pictures import CURVES, GREY, INK, figure, quiet, title
from bigmodel.printed import one_line, shell_word
from bigmodel.run_directory import AGAIN, read_json, read_json_lines
from bigmodel.sizes import counted_noun
from bigmodel.training.checkpoint.folder import steps as checkpoint_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FROM_BEGINNING = " --checkpoint 0"
SHOWN = 5  # last rewinds and bad devices in the table


@dataclass(frozen=True)
class Curve:
    """Records of a run in order of steps. Losses in nats per label."""

    steps: list[int]
    losses: list[float]
    learning_rates: list[float]
    evaluated_steps: list[int]
    validation_losses: list[float]
    bits_per_nat: float | None  # (bits per byte of text) per (nat per token), from the last evaluation
    marks: dict[str, float]  # baselines: name -> bits per byte


def report(run_directory: Path) -> None:
    """Print a run's table, loss curve and times; draw loss.png and time.png."""
    run_directory = Path(run_directory)
    print(table(run_directory))
    print()
    print(terminal_curve(run_directory))
    print()
    print(step_time(run_directory))
    print(f"\npictures: {one_line(f'{loss_curve(run_directory)}, {draw_times(run_directory)}')}")


def read_curve(run_directory: Path) -> Curve:
    """Read the metrics.jsonl of `bigmodel.metrics.recorder`. Raises `UserError` if it has no step yet."""
    if not Path(run_directory).is_dir():
        raise UserError(f"{run_directory}: no such folder; give the run.directory of a training run")
    lines = list(read_json_lines(Path(run_directory) / "metrics.jsonl"))
    steps = [line for line in lines if line["kind"] == "step"]
    if not steps:
        raise UserError(
            f"{run_directory}: metrics.jsonl has no step yet; name a run directory whose training has begun"
        )
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    last = evaluations[-1] if evaluations else None
    return Curve(
        [line["step"] for line in steps],
        [line["loss"] for line in steps],
        [line["learning_rate"] for line in steps],
        [line["step"] for line in evaluations],
        [line["nats_per_token"] for line in evaluations],
        _bits_per_nat(last) if last else None,
        _marks(Path(run_directory) / "summary.json"),
    )


def loss_curve(run_directory: Path) -> Path:
    """Draw RUN_DIR/loss.png: training loss raw and smoothed, validation loss, baselines; learning rate below."""
    run_directory = Path(run_directory)
    curve = read_curve(run_directory)
    drawn = figure()
    loss_axes, rate_axes = drawn.subplots(2, 1, sharex=True, height_ratios=[5, 1])
    _draw_loss(loss_axes, curve)
    _draw_rate(rate_axes, curve)
    title(loss_axes, f"{run_directory.name}: loss over {_thousands(curve.steps[-1])} steps")
    path = run_directory / "loss.png"
    part = path.with_name(".loss.part.png")
    drawn.savefig(part)
    part.replace(path)
    return path


def terminal_curve(run_directory: Path, width: int | None = None, height: int = 12, beside: Path | None = None) -> str:
    """The smoothed training loss as text in braille dots: loss upward, steps to the right.

    `width` in characters, by default the terminal's; `height` in lines of the plot without axes. The axes also cover
    the run `beside`, so two plots can be compared.
    """
    width = width or shutil.get_terminal_size((80, 24)).columns
    known = _smoothed(run_directory)
    if not known:
        return "no finite loss to draw"
    steps, losses = zip(*known, *(_smoothed(beside) if beside else []), strict=True)
    first, last, low, high = min(steps), max(steps), min(losses), max(losses)
    bottom, top = ends_of_axis(low, high)
    gutter = max(len(bottom), len(top)) + 1
    columns = max(8, width - gutter - 2)
    rows = braille(known, (first, last), (low, high), columns, height)
    scale = {0: top, height - 1: bottom}
    body = [f"{scale.get(number, ''):>{gutter}} ┤{row}" for number, row in enumerate(rows)]
    axis = " " * (gutter + 1) + "└" + "─" * columns
    legend = " " * (gutter + 2) + str(first) + f"step {last}".rjust(columns - len(str(first)))
    return "\n".join(["training loss, nats per label (smoothed)", *body, axis, legend])


def ends_of_axis(low: float, high: float) -> tuple[str, str]:
    """Both numbers with two decimals, or as many as tell them apart.

    >>> ends_of_axis(2.0, 8.125), ends_of_axis(8.3312, 8.3318), ends_of_axis(2.0, 2.0)
    (('2.00', '8.12'), ('8.3312', '8.3318'), ('2.00', '2.00'))
    """
    decimals = 2
    while low != high and f"{low:.{decimals}f}" == f"{high:.{decimals}f}":
        decimals += 1
    return f"{low:.{decimals}f}", f"{high:.{decimals}f}"


def table(run_directory: Path) -> str:
    """The run in numbers: steps, tokens, times, loss and baselines. Plain text, aligned."""
    lines = list(read_json_lines(Path(run_directory) / "metrics.jsonl"))
    curve = read_curve(run_directory)
    steps = [line for line in lines if line["kind"] == "step"]
    seconds = sum(line["step_seconds"] for line in steps)
    positions = sum(line["positions"] for line in steps)
    padding = sum(line["padding"] for line in steps)
    waited = sum(line["data_wait_seconds"] for line in steps)
    rows = [
        ("steps", _thousands(len(steps))),
        ("tokens", _thousands(sum(line["targets"] for line in steps))),
        ("time in steps", f"{seconds:,.1f} s"),
        ("tokens per second", _thousands(positions / seconds) if seconds else "unknown"),
        ("waiting for data", _percent(waited, seconds)),
        ("padding", _percent(padding, positions + padding)),
        *_energy(steps, positions),
        ("training loss", f"{smooth(curve.losses)[-1]:.4f} nats per label (smoothed)"),
    ]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    if evaluations:
        last = evaluations[-1]
        rows.append(("validation loss", f"{last['nats_per_token']:.4f} nats per label at step {last['step']}"))
        bits = last["bits_per_byte"]
        rows.append(("validation", "bits per byte not counted" if bits is None else f"{bits:.4f} bits per byte"))
    rows += [(name, f"{bits:.4f} bits per byte") for name, bits in curve.marks.items()]
    if skipped := Counter(line["skip_reason"].replace("_", " ") for line in steps if line.get("skipped")):
        counted = ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
        rows.append(("not applied", one_line(f"{counted_noun(skipped.total(), 'step')}: {counted}")))
    events = list(read_json_lines(Path(run_directory) / "events.jsonl"))
    odd = [
        event["step"]
        for event in events
        if event.get("event") in ("step_skipped", "spike") and event.get("reason") != "left_out"
    ]
    if odd:
        command = replay_command(run_directory, odd[-1], events)
        before = odd[-1] - 1 if command.endswith(FROM_BEGINNING) else 0
        again = f"    # no older checkpoint: trains {counted_noun(before, 'step')} again" if before else ""
        rows.append((f"step {odd[-1]} explained", command + again))
    ends = [event for event in events if event.get("event") in AGAIN.values()]
    for event in ends[-SHOWN:]:
        rows.append((event["event"].replace("_", " "), one_line(f"step {event['step']}: {event['detail']}")))
    names = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{names}}  {value}" for name, value in rows)


def replay_command(run_directory: Path, step: int, events: Sequence[dict[str, Any]]) -> str:
    """The command that explains a step: from the initial weights, where no older checkpoint is kept.

    `events`: the run's. After a new plan the initial weights do not lead to the step."""
    planned_anew = any(event.get("event") == "new_plan" and event.get("first_step") for event in events)
    older = any(saved < step for saved in checkpoint_steps(Path(run_directory) / "checkpoints"))
    begin = "" if older or planned_anew else FROM_BEGINNING
    return f"bigmodel replay {shell_word(run_directory)} --step {step}{begin}"


def _energy(steps: Sequence[dict[str, Any]], positions: int) -> list[tuple[str, str]]:
    """A row, if the joules of every step are known."""
    known: dict[str, float] = {}
    for what, name in (("GPUs", "device_joules"), ("processors", "host_joules")):
        if all(line.get(name) is not None for line in steps):
            known[what] = sum(line[name] for line in steps)
    if not known or not positions:
        return []
    total = sum(known.values())
    return [("energy", f"{total / positions:.3g} joules per token, {total / 3.6e6:,.3g} kWh of {' and '.join(known)}")]


def _bits_per_nat(evaluation: dict[str, Any]) -> float | None:
    """None where the bytes are not known, or the loss is 0."""
    bits, nats = evaluation["bits_per_byte"], evaluation["nats_per_token"]
    return bits / nats if bits is not None and nats > 0 else None


def _marks(summary_file: Path) -> dict[str, float]:
    if not summary_file.exists():
        return {}
    summary: dict[str, Any] = read_json(summary_file)
    names = {"bigram model": "bigram_bits_per_byte", "xz -9": "xz_bits_per_byte"}
    return {name: float(summary[key]) for name, key in names.items() if summary.get(key) is not None}


def _draw_loss(axes: "Axes", curve: Curve) -> None:
    axes.plot(curve.steps, curve.losses, color=CURVES["each step"], linewidth=0.9, label="training, each step")
    axes.plot(curve.steps, smooth(curve.losses), color=CURVES["training"], linewidth=1.8, label="training, smoothed")
    if curve.evaluated_steps:
        axes.plot(
            curve.evaluated_steps,
            curve.validation_losses,
            color=CURVES["validation"],
            linewidth=1.2,
            marker="o",
            markersize=4.5,
            clip_on=False,
            label=f"validation, last {curve.validation_losses[-1]:.3f}",
        )
    axes.set_ylabel("loss (nats per label)", color=INK)
    axes.set_ylim(*_loss_range(curve))
    if curve.bits_per_nat:
        to_bits = partial(np.multiply, curve.bits_per_nat)
        bits = axes.secondary_yaxis("right", functions=(to_bits, partial(np.multiply, 1 / curve.bits_per_nat)))
        bits.set_ylabel("bits per byte of text", color=INK)
        bits.spines["right"].set_visible(False)
        bits.tick_params(labelsize=9, colors=INK)
        _draw_marks(axes, curve.marks, curve.bits_per_nat)
    quiet(axes)
    axes.legend(frameon=False, loc="upper right", fontsize=9)


def _draw_marks(axes: "Axes", marks: dict[str, float], bits_per_nat: float) -> None:
    """A dashed line per baseline, its name at the left end on white: early losses are far above."""
    for name, bits in marks.items():
        height = bits / bits_per_nat
        axes.axhline(height, color=GREY, linewidth=1.1, linestyle=(0, (5, 3)))
        axes.annotate(
            f"{name}, {bits:.2f} bits per byte",
            (0.005, height),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="left",
            fontsize=8.5,
            color=GREY,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0},
            zorder=5,
        )


def _draw_rate(axes: "Axes", curve: Curve) -> None:
    axes.fill_between(curve.steps, curve.learning_rates, color=GREY, alpha=0.25, linewidth=0)
    axes.plot(curve.steps, curve.learning_rates, color=GREY, linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.set_xlim(curve.steps[0], max(curve.steps[-1], curve.steps[0] + 1))
    axes.set_ylabel("learning\nrate", color=INK)
    axes.set_xlabel("optimizer step", color=INK)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    axes.yaxis.get_offset_text().set_fontsize(8)
    axes.locator_params(axis="y", nbins=2)
    quiet(axes, grid="")


def _loss_range(curve: Curve) -> tuple[float, float]:
    """From just below the lowest value to the smoothed start, so a single spike does not flatten the curve."""
    heights = [mark / curve.bits_per_nat for mark in curve.marks.values()] if curve.bits_per_nat else []
    calm = [value for value in (*smooth(curve.losses), *curve.validation_losses, *heights) if math.isfinite(value)]
    if not calm:
        return 0.0, 1.0
    low, high = min(*calm, *filter(math.isfinite, curve.losses), math.inf), max(calm)
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


def _smoothed(run_directory: Path) -> list[tuple[int, float]]:
    """(step, smoothed loss), finite values only."""
    curve = read_curve(run_directory)
    points = zip(curve.steps, smooth(curve.losses), strict=True)
    return [(step, loss) for step, loss in points if math.isfinite(loss)]


def _thousands(number: float) -> str:
    return f"{number:,.0f}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "unknown"
