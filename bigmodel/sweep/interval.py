"""The interval of a predicted loss: noise between runs, and the error of extrapolation. numpy; no torch, no scipy.

In: finished runs, the law that is fitted to them, a target. Out: `Extrapolation`. A law that fits its runs can miss a
larger one by much more than they miss the law: an interval of its residuals alone held the target of 1 of 3 ladders on
the embedded corpus. So three forms are fitted, and each ladder tells how well each of them extrapolates:

    law         the fitted law
    power       the same with E = 0, of the half of the runs with more compute
    logarithm   L = a - b log x, of that half: the loss of a run's beginning, below all power laws

Errors: each form is fitted to the runs up to some compute and predicts all larger ones, for every such cut. An error is
taken as proportional to the distance in log compute, as that of a slope is: one number per form, its root mean square
error per distance. A form's weight is this number to the power of minus the cuts, the likelihood of normal errors.

Interval: a bootstrap of 500 sets for each form. Noise of the size of the law's residuals (its uncertainty by
chi-square with runs - numbers of the law degrees of freedom) is added to the fitted losses; each set is fitted; to its
prediction come the same noise, and the form's error at the target's distance (Student's t with as many degrees of
freedom, which is the number of cuts). Quantiles of all sets by weight. What no rung shows, a break beyond the largest
one, is not in it. `python -m tools.law_coverage` measures how often it holds the target.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bigmodel.sweep.law import FREE, Fit, Floats, Run, columns_of, losses_at, search

DRAWS = 500
SMALLEST = 1e-6  # nats per factor e of compute: errors below it count as this


FORMS = ("law", "power", "logarithm")


@dataclass(frozen=True)
class Extrapolation:
    """median: of the sets. forms: by name, the weight, the loss of the target in nats, and its error by the cuts."""

    interval: tuple[float, float]
    median: float
    forms: dict[str, tuple[float, float, float]]


def extrapolation(
    runs: Sequence[Run], fitted: Fit, parameters: float, tokens: float, share: float = 0.9
) -> Extrapolation | None:
    """The interval that has `share` of the predictions; None without degrees of freedom."""
    if fitted.degrees < 1:
        return None
    of = tuple(one.of for one in fitted.law.terms)
    ordered = sorted(runs, key=lambda run: run.parameters * run.tokens)
    columns, losses = columns_of(ordered, of), np.array([run.loss for run in ordered])
    place, compute = columns_of([Run(parameters, tokens, 0.0)], of), columns_of(ordered, ("compute",))[0]
    distance = max(np.log(6 * parameters * tokens / compute[-1]), 0.0)
    errors = np.array([max(_error(form, columns, losses, compute), SMALLEST) for form in FORMS])
    weights = errors ** -float(fitted.degrees) / (errors ** -float(fitted.degrees)).sum()
    random = np.random.default_rng(0)
    scales = fitted.deviation * np.sqrt(fitted.degrees / random.chisquare(fitted.degrees, DRAWS))
    found, points = [], []
    for form, error in zip(FORMS, errors, strict=True):
        means = _predicted(form, columns, losses[:, None], columns)
        sets = _predicted(form, columns, means + scales * random.standard_normal((len(runs), DRAWS)), place)[0]
        noise, wrong = random.standard_normal(DRAWS), random.standard_t(fitted.degrees, DRAWS)
        found.append(sets + scales * noise + error * distance * wrong)
        points.append(float(_predicted(form, columns, losses[:, None], place)[0, 0]))
    quantiles = _quantiles(np.array(found), weights, [(1 - share) / 2, 0.5, (1 + share) / 2])
    low, median, high = (max(0.0, one) for one in quantiles)
    rows = zip(FORMS, weights, points, errors * distance, strict=True)
    return Extrapolation((low, high), median, {form: (float(w), p, float(e)) for form, w, p, e in rows})


def _error(form: str, columns: Floats, losses: Floats, compute: Floats) -> float:
    """Root mean square error in nats per factor e of compute, over all cuts and all runs beyond them."""
    squares, distances = 0.0, 0.0
    for cut in range(FREE[("compute",) if len(columns) == 1 else ("parameters", "tokens")], len(losses)):
        found = _predicted(form, columns[:, :cut], losses[:cut, None], columns[:, cut:])[:, 0]
        squares += float(np.square(found - losses[cut:]).sum())
        distances += float(np.square(np.log(compute[cut:] / compute[cut - 1])).sum())
    return float(np.sqrt(squares / max(distances, 1e-12)))


def _predicted(form: str, columns: Floats, losses: Floats, places: Floats) -> Floats:
    """(places, sets) of losses (runs, sets) in order of compute."""
    if form != "law":
        kept = max(-(-losses.shape[0] // 2), 2 * len(columns) + 1)
        columns, losses = columns[:, -kept:], losses[-kept:]
    if form == "logarithm":
        return _design(places) @ np.linalg.pinv(_design(columns)) @ losses
    return losses_at(columns, *search(columns, losses, floor=form == "law"), places)


def _design(columns: Floats) -> Floats:
    return np.vstack([np.ones(columns.shape[1]), np.log(columns)]).T


def _quantiles(values: Floats, weights: Floats, shares: Sequence[float]) -> list[float]:
    """Of values (forms, draws), each with the weight of its form."""
    flat, each = values.ravel(), np.repeat(weights / values.shape[1], values.shape[1])
    order = flat.argsort()
    sums = each[order].cumsum()
    places = np.searchsorted(sums, shares).clip(0, len(flat) - 1)
    return [float(flat[order[place]]) for place in places]
