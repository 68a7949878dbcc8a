"""How often the interval of `bigmodel sweep` holds the loss that it predicts.

    python -m tools.law_coverage                     # 200 synthetic ladders of ten curves, and the measured ones
    python -m tools.law_coverage --ladders 5 --out runs/short

Synthetic ladders: 4 to 8 rungs (of two terms: 3 sizes at 3 ratios) over a factor of 8 to 100 of compute, noise of
0.005 to 0.03 nats, a target of 8 times the largest rung's compute with noise of the same size. Curves: laws of the
fitted form, and others: straight in log compute, a sum of two powers, powers that break in the upper part of the ladder
or beyond it, a bump at the beginning. Measured ladders: benchmarks/sweep.json. Out: law_coverage.json; the share of
targets inside the interval, and medians of its width and of the error of the law and of the interval's median.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

from bigmodel.run_directory import write_json
from bigmodel.sweep.interval import extrapolation
from bigmodel.sweep.law import Run, fit

MEASURED = Path(__file__).parents[1] / "benchmarks" / "sweep.json"
START, TIMES = 1e11, 8.0  # FLOPs of the smallest rung; compute of the target over the largest rung's
TWO_TERMS = "sizes"  # curves whose name begins so are of parameters and tokens


class Ladder(NamedTuple):
    runs: list[Run]
    target: Run


def broken(first: float, second: float, place: float = 4.0, sharpness: float = 2.0) -> Callable[[float], float]:
    """A power of exponent `first` that becomes `second` at `place`, in log compute over the smallest rung's."""
    return lambda x: (
        5 * math.exp(-first * x) * (1 + math.exp(sharpness * (x - place))) ** ((first - second) / sharpness)
    )


CURVES: dict[str, Callable[[float], float]] = {  # of x = log(compute / START)
    "1.5 + 3.5 / C^0.15": lambda x: 1.5 + 3.5 * math.exp(-0.15 * x),
    "2.5 + 2.5 / C^0.3": lambda x: 2.5 + 2.5 * math.exp(-0.3 * x),
    "5 / C^0.1": lambda x: 5 * math.exp(-0.1 * x),
    "4 / C^0.05": lambda x: 4 * math.exp(-0.05 * x),
    "5 - 0.33 log C": lambda x: 5 - 0.33 * x,
    "1.2 + 2 / C^0.3 + 1.8 / C^0.08": lambda x: 1.2 + 2 * math.exp(-0.3 * x) + 1.8 * math.exp(-0.08 * x),
    "exponent 0.12, then 0.06": broken(0.12, 0.06),
    "exponent 0.06, then 0.11": broken(0.06, 0.11),
    "1.5 + 3.8 / C^0.2 (1 + 0.25 / C)": lambda x: 1.5 + 3.8 * math.exp(-0.2 * x) * (1 + 0.25 * math.exp(-x)),
}
SIZES: dict[str, Callable[[float, float], float]] = {
    "sizes: 1.5 + 60 / N^0.35 + 150 / D^0.37": lambda n, d: 1.5 + 60 / n**0.35 + 150 / d**0.37,
}


def coverage(
    ladders: Annotated[int, typer.Option(min=1, help="synthetic ladders of each curve")] = 20,
    seed: int = 1,
    out: Annotated[Path, typer.Option(help="folder of the result")] = Path("benchmarks"),
) -> None:
    """Measure how often the interval of a sweep holds the target."""
    random = np.random.default_rng(seed)
    rows = [row_of(name, [synthetic(name, random) for _ in range(ladders)]) for name in [*CURVES, *SIZES]]
    inside = sum(row["inside"] for row in rows)
    print(f"all: {inside:g} of {len(rows) * ladders}")
    found = [measured_row(*one) for one in measured()]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "law_coverage.json", {"seed": seed, "ladders": ladders, "synthetic": rows, "measured": found})


def synthetic(name: str, random: np.random.Generator) -> Ladder:
    noise = float(random.choice([0.005, 0.01, 0.02, 0.03]))
    if name in SIZES:
        sizes = [(size, ratio * size) for size in (1e5, 3e5, 1e6) for ratio in (5.0, 20.0, 80.0)]
        sizes.append((math.sqrt(TIMES) * 1e6, math.sqrt(TIMES) * 80e6))
        losses = [SIZES[name](*one) for one in sizes]
    else:
        rungs = int(random.integers(4, 9))
        spread = np.linspace(0, math.log(random.uniform(8, 100)), rungs) + random.uniform(-0.1, 0.1, rungs)
        places = [*map(float, sorted(spread)), float(max(spread)) + math.log(TIMES)]
        sides = [math.sqrt(START * math.exp(place) / 6) for place in places]
        sizes, losses = [(side, side) for side in sides], [CURVES[name](place) for place in places]
    runs = [Run(*size, loss + noise * random.standard_normal()) for size, loss in zip(sizes, losses, strict=True)]
    return Ladder(runs[:-1], runs[-1])


def row_of(name: str, ladders: list[Ladder]) -> dict[str, Any]:
    inside, widths, of_law, of_median = 0, [], [], []
    for ladder in ladders:
        fitted, target = fit(ladder.runs), ladder.target
        found = extrapolation(ladder.runs, fitted, target.parameters, target.tokens)
        assert found, "four rungs have an interval"
        low, high = found.interval
        inside += bool(low <= target.loss <= high)
        widths.append(high - low)
        of_law.append(abs(fitted.law.loss(target.parameters, target.tokens) - target.loss))
        of_median.append(abs(found.median - target.loss))
    row = {"curve": name, "inside": inside, "of": len(ladders)}
    row |= {"width": float(np.median(widths)), "law_error": float(np.median(of_law))}
    row |= {"median_error": float(np.median(of_median))}
    print(
        f"{name:40s} inside {inside} of {len(ladders)}, width {row['width']:.3f}, error of the law "
        f"{row['law_error']:.3f}, of the median {row['median_error']:.3f}"
    )
    return row


def measured() -> Iterator[tuple[str, Ladder]]:
    for sweep in json.loads(MEASURED.read_text())["sweeps"]:
        target = sweep["target"]
        name = f"{target['num_layers']} x {target['width']}, {len(sweep['rungs'])} rungs"
        runs = [Run(one["parameters"], one["tokens"], one["loss"]) for one in (*sweep["rungs"], target)]
        yield name, Ladder(runs[:-1], runs[-1])


def measured_row(name: str, ladder: Ladder) -> dict[str, Any]:
    """Of a ladder that was trained, with each form's weight, prediction and error."""
    fitted, target = fit(ladder.runs), ladder.target
    found = extrapolation(ladder.runs, fitted, target.parameters, target.tokens)
    assert found, "four rungs have an interval"
    law = fitted.law.loss(target.parameters, target.tokens)
    low, high = found.interval
    print(f"{name}: measured {target.loss:.3f}, law {law:.3f}, median {found.median:.3f}, {low:.3f} to {high:.3f}")
    row = {"ladder": name, "measured": target.loss, "law": law, "median": found.median, "interval": found.interval}
    return row | {"forms": found.forms}


if __name__ == "__main__":
    typer.run(coverage)
