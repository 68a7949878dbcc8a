"""A scaling law fitted to finished runs. numpy; no torch, no scipy. `bigmodel.sweep.interval` extrapolates it.

In: parameters, tokens and loss of runs. Out: a `Law`. Two forms:

    compute   L = E + K / C^c, C = 6 N D         runs with one number of tokens per parameter; holds for that only
    sizes     L = E + A / N^a + B / D^b          several of them (Hoffmann et al. 2022, approach 3)

Fit: least squares of the losses. At given exponents a law is linear in the other numbers, which must not be negative:
these are solved for exactly, and the exponents are searched on a grid, then on finer ones around the best (variable
projection, Golub & Pereyra 1973). So there is one answer and no start value.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bigmodel.planning.scaling import Law, Term

SAME_RATIO = 1.5  # tokens per parameter that differ by less count as one: steps are whole
FREE = {("compute",): 3, ("parameters", "tokens"): 5}  # numbers of a law
COARSE, FINE = {1: 60, 2: 24}, {1: 121, 2: 9}  # exponents on the two grids, by number of terms
LOWEST, HIGHEST = 0.02, 1.5  # exponents
ROUNDS = 4  # of finer grids for the law: exponents within 0.02%; one round: within 2.5%
Floats = NDArray[np.float64]


class Run(NamedTuple):
    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Fit:
    """deviation: of the residuals, nats; nan without degrees of freedom."""

    law: Law
    residuals: tuple[float, ...]
    deviation: float
    degrees: int


def form_of(runs: Sequence[Run]) -> tuple[str, ...]:
    """What the terms of the law are of. Empty: too few runs for any."""
    ratios = [run.tokens / run.parameters for run in runs]
    several = bool(runs) and max(ratios) > SAME_RATIO * min(ratios)
    form = ("parameters", "tokens") if several else ("compute",)
    return form if len(runs) >= FREE[form] else ()


def fit(runs: Sequence[Run]) -> Fit:
    """Raises `ValueError` for too few runs."""
    form = form_of(runs)
    if not form:
        raise ValueError("too few runs: 3 with one number of tokens per parameter, 5 with several")
    columns, losses = columns_of(runs, form), np.array([[run.loss] for run in runs])
    exponents, numbers = search(columns, losses, ROUNDS)
    law = _law(form, exponents[0], numbers[0], columns)
    residuals = [run.loss - law.loss(run.parameters, run.tokens) for run in runs]
    degrees = len(runs) - FREE[form]
    deviation = float(np.sqrt(np.square(residuals).sum() / degrees)) if degrees else float("nan")
    return Fit(law, tuple(residuals), deviation, degrees)


def columns_of(runs: Sequence[Run], form: tuple[str, ...]) -> Floats:
    """(terms, runs): what each term is of."""
    of = {
        "parameters": [run.parameters for run in runs],
        "tokens": [run.tokens for run in runs],
        "compute": [6 * run.parameters * run.tokens for run in runs],
    }
    return np.array([of[name] for name in form], dtype=np.float64)


def _law(form: tuple[str, ...], exponents: Floats, numbers: Floats, columns: Floats) -> Law:
    middles = _middles(columns)[:, 0]
    scaled = numbers[1:] * middles**exponents
    terms = (Term(*one) for one in zip(form, map(float, scaled), map(float, exponents), strict=True))
    return Law(float(numbers[0]), tuple(terms))


def _middles(columns: Floats) -> Floats:
    """(terms, 1): geometric means, in units of which the coefficients are found."""
    return np.exp(np.log(columns).mean(1, keepdims=True))


def losses_at(columns: Floats, exponents: Floats, numbers: Floats, places: Floats) -> Floats:
    """(places, sets): what `search` found, at `places` (terms, places)."""
    powers = (places / _middles(columns)).T[:, None, :] ** -exponents[None]  # places, sets, terms
    found: Floats = numbers[:, 0] + (powers * numbers[:, 1:]).sum(2)
    return found


def search(columns: Floats, losses: Floats, rounds: int = 1, floor: bool = True) -> tuple[Floats, Floats]:
    """For each column of `losses` (runs, sets): exponents (sets, terms), and E with the coefficients (sets, 1 + terms),
    these in units of the middles. `columns`: (terms, runs). Without `floor` E is 0."""
    terms = len(columns)
    coarse = np.geomspace(LOWEST, HIGHEST, COARSE[terms])
    exponents, numbers = _best(columns, losses, np.array([*product(coarse, repeat=terms)]), floor)
    width = coarse[1] / coarse[0]
    for _ in range(rounds):
        finer, steps = np.empty_like(exponents), np.geomspace(1 / width, width, FINE[terms])
        factors = np.array([*product(steps, repeat=terms)])
        for start in np.unique(exponents, axis=0):
            sets = (exponents == start).all(1)
            grid = (start * factors).clip(LOWEST, HIGHEST)
            finer[sets], numbers[sets] = _best(columns, losses[:, sets], grid, floor)
        exponents, width = finer, steps[1] / steps[0]
    return exponents, numbers


def _best(columns: Floats, losses: Floats, grid: Floats, floor: bool) -> tuple[Floats, Floats]:
    """The best row of `grid` (exponents, terms) for each column of `losses`, with the numbers that belong to it."""
    powers = (columns / _middles(columns))[None] ** -grid[:, :, None]  # grid, terms, runs
    ones = np.full_like(powers[:, :1], float(floor))
    design = np.concatenate([ones, powers], axis=1).transpose(0, 2, 1)
    numbers, errors = _not_negative(design, losses)
    best = errors.argmin(0)
    sets = np.arange(losses.shape[1])
    return grid[best], numbers[best, :, sets]


def _not_negative(design: Floats, losses: Floats) -> tuple[Floats, Floats]:
    """Least squares with numbers of at least 0: (grid, numbers, sets), and the sums of squares (grid, sets).

    There are at most three numbers: every subset of them is tried, the others being 0.
    """
    grids, _, free = design.shape
    numbers = np.zeros((grids, free, losses.shape[1]))
    errors = np.full((grids, losses.shape[1]), np.inf)
    for size in range(1, free + 1):
        for chosen in combinations(range(free), size):
            part = design[:, :, chosen]
            found = np.linalg.pinv(part) @ losses
            wrong = np.square(part @ found - losses).sum(1)
            better = (found >= 0).all(1) & (wrong < errors)
            errors = np.where(better, wrong, errors)
            whole = np.zeros_like(numbers)
            whole[:, chosen] = found
            numbers = np.where(better[:, None], whole, numbers)
    return numbers, errors
