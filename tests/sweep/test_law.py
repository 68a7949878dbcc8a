"""The fit of a scaling law: laws that made the losses are found again."""

import numpy as np
import pytest

from bigmodel.planning.scaling import Law, Term
from bigmodel.sweep.law import Run, fit, form_of

OF_COMPUTE = Law(1.2, (Term("compute", 300.0, 0.17),))
OF_SIZES = Law(1.5, (Term("parameters", 60.0, 0.35), Term("tokens", 150.0, 0.37)))
ONE_RATIO = [(size, 20 * size) for size in (3e4, 6e4, 1e5, 2e5, 4e5, 8e5)]
RATIOS = [(size, ratio * size) for size in (1e5, 3e5, 1e6) for ratio in (5, 20, 80)]


def runs_of(law: Law, sizes: list[tuple[float, float]], noise: float = 0.0, seed: int = 0) -> list[Run]:
    random = np.random.default_rng(seed)
    return [Run(*size, law.loss(*size) + noise * random.standard_normal()) for size in sizes]


def test_the_law_of_compute_is_found_again() -> None:
    found = fit(runs_of(OF_COMPUTE, ONE_RATIO))
    assert found.law.irreducible == pytest.approx(1.2, abs=0.02)
    assert found.law.terms[0].exponent == pytest.approx(0.17, abs=0.005)
    assert found.law.loss(3e6, 6e7) == pytest.approx(OF_COMPUTE.loss(3e6, 6e7), abs=0.003)
    assert found.degrees == 3


def test_the_law_of_sizes_is_found_again() -> None:
    found = fit(runs_of(OF_SIZES, RATIOS))
    assert [one.of for one in found.law.terms] == ["parameters", "tokens"]
    for size in ((1e7, 2e8), (3e6, 3e8)):
        assert found.law.loss(*size) == pytest.approx(OF_SIZES.loss(*size), abs=0.01)


def test_losses_without_noise_lie_on_the_law() -> None:
    law = Law(1.69, (Term("parameters", 406.4, 0.34), Term("tokens", 410.7, 0.28)))
    sizes = [(size, ratio * size) for size in (3e6, 1e7, 3e7, 1e8) for ratio in (5, 20, 80)]
    found = fit(runs_of(law, sizes))
    assert max(map(abs, found.residuals)) < 5e-4
    assert found.law.loss(1e9, 2e10) == pytest.approx(law.loss(1e9, 2e10), abs=5e-4)


def test_no_number_of_a_law_is_negative() -> None:
    """Losses that fall faster than any power: without bounds E would be far below 0."""
    found = fit(
        [Run(size, 20 * size, loss) for size, loss in zip((1e5, 2e5, 4e5, 8e5), (4, 3.5, 2.6, 1.2), strict=True)]
    )
    assert found.law.irreducible >= 0
    assert found.law.terms[0].coefficient >= 0


def test_the_form_follows_from_the_runs() -> None:
    assert form_of(runs_of(OF_COMPUTE, ONE_RATIO)) == ("compute",)
    assert form_of(runs_of(OF_SIZES, RATIOS)) == ("parameters", "tokens")
    assert form_of(runs_of(OF_COMPUTE, ONE_RATIO)[:2]) == form_of(runs_of(OF_SIZES, RATIOS)[:4]) == form_of([]) == ()
    with pytest.raises(ValueError, match=r"too few runs: 3 with one number of tokens per parameter"):
        fit(runs_of(OF_COMPUTE, ONE_RATIO)[:2])
