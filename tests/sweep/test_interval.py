"""The interval of a predicted loss: it holds what it says to hold, and knows more than the noise of the runs."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from bigmodel.sweep.interval import Extrapolation, extrapolation
from bigmodel.sweep.law import Run, fit

PLACES = (0.0, 0.6, 1.2, 1.9, 2.6, 3.3)  # log compute of the rungs, of the target 2.1 more: 8 times the largest one's
SIZES = [(size, ratio * size) for size in (1e5, 3e5, 1e6) for ratio in (5, 20, 80)]
CURVES: dict[str, Callable[[float], float]] = {
    "law": lambda x: 1.5 + 3.5 * math.exp(-0.15 * x),
    "power": lambda x: 5 * math.exp(-0.1 * x),
    "logarithm": lambda x: 5 - 0.33 * x,
    "two powers": lambda x: 1.2 + 2 * math.exp(-0.3 * x) + 1.8 * math.exp(-0.08 * x),
}
# Validation losses of two ladders (compute in FLOPs), and of the run that they predict: benchmarks/sweep.json.
MEASURED = [
    (
        [(32152, 128000, 4.8982), (46192, 184320, 4.5720), (61896, 247808, 4.3173), (79264, 316416, 4.1410),
         (139192, 556032, 3.7922), (172384, 689152, 3.6347), (208904, 834560, 3.5098)],
        (604736, 2416640, 2.8146),
    ),
    (
        [(47256, 188416, 4.6460), (72976, 291840, 4.2323), (103688, 414720, 3.9890), (139392, 557056, 3.7884),
         (180088, 719872, 3.6107)],
        (604736, 2416640, 2.8146),
    ),
]  # fmt: skip


def at(place: float, loss: float) -> Run:
    side = math.sqrt(1e11 * math.exp(place) / 6)
    return Run(side, side, loss)


def found_in(runs: list[Run], target: Run) -> Extrapolation:
    found = extrapolation(runs, fit(runs), target.parameters, target.tokens)
    assert found is not None
    return found


def test_the_interval_holds_nine_targets_in_ten() -> None:
    """20 ladders of four curves, of which the law can be two only; 17 to 20 hold the target's loss."""
    random, inside = np.random.default_rng(2), 0
    for curve in CURVES.values():
        for _ in range(5):
            runs = [at(place, curve(place) + 0.02 * random.standard_normal()) for place in PLACES]
            target = at(PLACES[-1] + 2.1, curve(PLACES[-1] + 2.1) + 0.02 * random.standard_normal())
            low, high = found_in(runs, target).interval
            inside += low <= target.loss <= high
    assert 17 <= inside <= 20


@pytest.mark.parametrize(("rungs", "target"), MEASURED, ids=["7 rungs", "5 rungs"])
def test_the_interval_holds_losses_that_the_residuals_do_not(
    rungs: list[tuple[float, float, float]], target: tuple[float, float, float]
) -> None:
    low, high = found_in([Run(*one) for one in rungs], Run(*target)).interval
    assert low < target[2] < high
    assert high - low < 1.0


def test_the_form_that_predicts_larger_rungs_has_the_weight() -> None:
    """Losses straight in log compute: no power law with E >= 0 is as straight, and the law's error tells it."""
    noise = (0.002, -0.004, 0.002, 0.002, -0.002, 0.0)
    runs = [at(place, 5 - 0.5 * place + one) for place, one in zip(PLACES, noise, strict=True)]
    target = at(5.4, 5 - 0.5 * 5.4)
    found = found_in(runs, target)
    weights = {name: weight for name, (weight, _, _) in found.forms.items()}
    assert weights["logarithm"] > 0.9
    assert found.median == pytest.approx(target.loss, abs=0.05)
    assert found.forms["law"][1] - target.loss > 0.2
    assert found.forms["law"][2] > 0.1


def test_the_interval_grows_with_the_distance() -> None:
    runs = [Run(*one) for one in MEASURED[0][0]]
    near, far = (found_in(runs, Run(times * 2e5, times * 8e5, 0.0)).interval for times in (1.5, 10))
    assert far[1] - far[0] > 2 * (near[1] - near[0])


def test_several_numbers_of_tokens_per_parameter_have_an_interval() -> None:
    random = np.random.default_rng(0)
    runs = [
        Run(size, tokens, 1.5 + 60 / size**0.35 + 150 / tokens**0.37 + 0.01 * random.standard_normal())
        for size, tokens in SIZES
    ]
    low, high = found_in(runs, Run(3e6, 2.4e8, 0.0)).interval
    assert low < 1.5 + 60 / 3e6**0.35 + 150 / 2.4e8**0.37 < high < low + 1.0


def test_without_degrees_of_freedom_there_is_no_interval() -> None:
    runs = [at(place, CURVES["law"](place)) for place in PLACES[:3]]
    assert extrapolation(runs, fit(runs), 3e6, 6e7) is None
    assert math.isnan(fit(runs).deviation)
