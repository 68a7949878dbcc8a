"""A month of training on many GPUs that fail: the share of time that is training, by design of saves and restarts.

    python -m tools.simulate_goodput                          # 9,600, 16,384 and 100,000 GPUs
    python -m tools.simulate_goodput --run runs/my            # with the costs that this run measured
    python -m tools.simulate_goodput --rates rsc1 --set node_wait=900 --set store_bandwidth=2e12

Out: the facts with their origin, a table of designs at their best intervals, what each size needs for the goal;
simulate_goodput.json and .png in `out`. All designs meet the same failures. `tools/goodput_model.py` has the model,
`tools/goodput_facts.py` the facts and designs; `tools.goodput_experiment` checks the model against a real run.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bigmodel.config.settings import UserError
from bigmodel.run_directory import write_json
from tools.goodput_facts import BUILT, DAY, RATES, Facts, designs, facts_from
from tools.goodput_model import LOSSES, Array, Design, Failures, draw_failures, simulate
from tools.measure import ROOT, Record

INTERVALS = np.geomspace(10, 6 * 3600, 48)  # seconds
COLOURS = {"plain": "#c8373f", "background": "#e0701a", "in place": "#8a5fc0", "spares": "#1f5fbf", "memory": "#2f9e77"}
RECOVERIES = np.geomspace(1, 2000, 120)  # seconds, of which the longest that meets the goal is looked for


class Result(NamedTuple):
    """A design on a number of GPUs. low, high: between them lie 90% of the months."""

    gpus: int
    name: str
    design: Design
    curve: Array  # mean ratio by interval
    low: Array
    high: Array
    best: int  # number of the best interval
    lost: dict[str, float]  # there, by cause
    needed: float | None  # longest recovery that meets the goal, at its best interval

    def described(self, gpus_per_node: int) -> dict[str, Any]:
        best, spare_gpus = self.best, self.design.spares * gpus_per_node
        return {
            "gpus": self.gpus,
            "design": self.name,
            "built": self.name in BUILT,
            "best_interval_seconds": round(float(INTERVALS[best]), 1),
            "ratio": round(float(self.curve[best]), 5),
            "ratio_90_percent_of_months": [round(float(side[best]), 5) for side in (self.low, self.high)],
            "ratio_of_gpus_with_spares": round(float(self.curve[best]) * self.gpus / (self.gpus + spare_gpus), 5),
            "lost": {cause: round(share, 5) for cause, share in self.lost.items()},
            "recovery_seconds": round(recovery_of(self.design), 1),
            "longest_recovery_for_goal_seconds": self.needed and round(self.needed, 1),
            "spares": self.design.spares,
            "curve": [round(float(ratio), 5) for ratio in self.curve],
        }


def main(
    gpus: Annotated[str, typer.Option(help="sizes of the job")] = "9600,16384,100000",
    run: Annotated[Path | None, typer.Option(help="run directory whose measured costs are used")] = None,
    rates: Annotated[str, typer.Option(help=f"published failure rate: {', '.join(RATES)}")] = "llama3",
    set_: Annotated[list[str], typer.Option("--set", help="NAME=NUMBER: another value of a fact")] = [],  # noqa: B006
    days: Annotated[float, typer.Option(min=0.01, help="length of the run")] = 30.0,
    seeds: Annotated[int, typer.Option(min=2, help="months that are simulated")] = 32,
    goal: Annotated[float, typer.Option(min=0, max=1, help="wanted ratio")] = 0.97,
    out: Annotated[Path, typer.Option(help="folder of the numbers and the picture")] = ROOT / "benchmarks",
) -> None:
    try:
        sizes = [_number(text, "--gpus", int) for text in gpus.split(",")]
        facts = facts_from(run, dict(_setting(text) for text in set_))
        if rates not in RATES:
            raise UserError(f"--rates {rates}: choose one of {', '.join(RATES)}")
    except UserError as error:
        print(f"simulate_goodput: {error}")
        raise typer.Exit(2) from None
    results = [one for size in sizes for one in results_of(facts, rates, size, days * DAY, seeds, goal)]
    head = Record(out, "simulate_goodput", "cpu").head
    described = [one.described(int(facts["gpus_per_node"].value)) for one in results]
    known = {name: fact._asdict() for name, fact in facts.items()}
    settings = {"rates": RATES[rates]._asdict(), "days": days, "seeds": seeds, "goal": goal}
    intervals = [round(float(interval), 1) for interval in INTERVALS]
    content = {**head, **settings, "facts": known, "interval_seconds": intervals, "results": described}
    write_json(out / "simulate_goodput.json", content)
    show(facts, rates, described, goal)
    draw(results, rates, goal, out / "simulate_goodput.png")
    print(f"{out / 'simulate_goodput.json'}, {out / 'simulate_goodput.png'}")


def _number(text: str, option: str, kind: type = float) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not value > 0 and option == "--gpus":
        raise UserError(f"{option} {text}: give whole numbers above 0, with commas between them")
    return value


def _setting(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise UserError(f"--set {text}: write NAME=NUMBER, for example --set node_wait=900") from None


def results_of(facts: Facts, rates: str, gpus: int, seconds: float, seeds: int, goal: float) -> list[Result]:
    mean = RATES[rates].mean_seconds(gpus)
    failures, fewer = draw_failures(mean, seconds, seeds), draw_failures(mean, seconds, min(seeds, 8))
    found = []
    for name, design in designs(facts, gpus, mean).items():
        outcome = simulate(design, failures, INTERVALS, seconds, design.restart)
        curve = outcome.ratio.mean(axis=0)
        best = int(curve.argmax())
        low, high = np.quantile(outcome.ratio, (0.05, 0.95), axis=0)
        lost = {cause: float(share[:, best].mean()) for cause, share in outcome.lost.items()}
        needed = longest_recovery(design, fewer, seconds, goal)
        found.append(Result(gpus, name, design, curve, low, high, best, lost, needed))
    return found


def recovery_of(design: Design) -> float:
    """Mean seconds from a failure to the first new step, if a free spare is there."""
    waits = 0.0 if design.spares else design.node_share * design.node_wait
    detect = design.hang_share * design.hang_detect + (1 - design.hang_share) * design.detect
    return detect + waits + design.lost_share * design.store_restart + (1 - design.lost_share) * design.restart


def longest_recovery(design: Design, failures: Failures, seconds: float, goal: float) -> float | None:
    """The longest recovery, the same after each failure, with which the design meets the goal; None: none does."""
    low, high = 0, len(RECOVERIES)  # those below `low` meet it
    while low < high:
        middle = (low + high) // 2
        changed = replace(
            design, detect=0.0, hang_share=0.0, node_share=0.0, restart=RECOVERIES[middle],
            store_restart=RECOVERIES[middle],
        )  # fmt: skip
        meets = simulate(changed, failures, INTERVALS[::3], seconds).ratio.mean(axis=0).max() >= goal
        low, high = (middle + 1, high) if meets else (low, middle)
    return float(RECOVERIES[low - 1]) if low else None


# ---- text and picture ---------------------------------------------------------------------------------------------


def show(facts: Facts, rates: str, results: Sequence[dict[str, Any]], goal: float) -> None:
    console = Console(markup=False, emoji=False, width=150)
    table = Table("fact", "value", "kind", "source", title=f"failures: {RATES[rates].source}")
    for name, fact in facts.items():
        table.add_row(name, f"{fact.value:,.4g} {fact.unit}", fact.kind, fact.source)
    console.print(table)
    columns = (
        "GPUs", "design", "best interval", "ratio", "90% of months", *LOSSES, "recovery", f"needed for {goal:.0%}",
        "spares",
    )  # fmt: skip
    title = "effective training-time ratio; shares of the time lost by cause"
    table = Table(*columns, title=title, caption="* not built: simulated only")
    for number, one in enumerate(results):
        last = number + 1 == len(results) or results[number + 1]["gpus"] != one["gpus"]
        needed = one["longest_recovery_for_goal_seconds"]
        table.add_row(
            f"{one['gpus']:,}",
            one["design"] + "*" * (not one["built"]),
            f"{one['best_interval_seconds']:,.0f} s",
            f"{one['ratio']:.2%}",
            "{:.1%} to {:.1%}".format(*one["ratio_90_percent_of_months"]),
            *(f"{one['lost'][cause]:.2%}" for cause in LOSSES),
            f"{one['recovery_seconds']:,.0f} s",
            f"{'over ' * (needed >= RECOVERIES[-1])}{needed:,.0f} s" if needed else "not reached",
            str(one["spares"]),
            end_section=last,
        )
    console.print(table)


def draw(results: Sequence[Result], rates: str, goal: float, path: Path) -> None:
    """A panel per size: ratio over interval, a line per design, the best interval as a dot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(one.gpus for one in results))
    figure = Figure(figsize=(4.6 * len(sizes), 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        for one in (one for one in results if one.gpus == size):
            colour, built = COLOURS[one.name], one.name in BUILT
            label = one.name + " (not built)" * (not built)
            axes.plot(INTERVALS, one.curve, color=colour, label=label, ls="-" if built else "--")
            axes.fill_between(INTERVALS, one.low, one.high, color=colour, alpha=0.12, lw=0)
            axes.plot(INTERVALS[one.best], one.curve[one.best], "o", color=colour, ms=5)
        axes.axhline(goal, color="#8a8f98", lw=0.8, ls=":")
        mean = RATES[rates].mean_seconds(size) / 3600
        axes.set_title(f"{size:,} GPUs: a failure each {mean:.1f} h", loc="left", fontsize=11, fontweight="bold")
        axes.set_xscale("log")
        axes.set_xticks([10, 60, 600, 3600, 21600], ["10 s", "1 min", "10 min", "1 h", "6 h"])
        axes.minorticks_off()
        axes.set_xlabel("interval between saves")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("effective training-time ratio")
    panels[0].set_ylim(max(0.0, min(float(one.curve[one.best]) for one in results) - 0.15), 1)
    panels[0].legend(frameon=False, fontsize=9, loc="lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    typer.run(main)
