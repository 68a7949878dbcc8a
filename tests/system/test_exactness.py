"""Every two settings of the engine together: gradient, norm and weights are those of plain torch in one process."""

import itertools
from typing import Any

import pytest

from tests.support.engine_worker import launch
from tests.support.exactness import FACTORS, everything, failures, job_of, name_of, pairwise

CASES = pairwise()
pytestmark = pytest.mark.timeout(600)  # all cases run in the first test's set-up


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("exactness")
    jobs = {name_of(case): job_of(case, folder) for case in CASES}
    outcome = launch(list(jobs.values()), 2, folder)
    return {name: jobs[name] | one for name, one in zip(jobs, outcome, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_it_is_plain_torch(results: dict[str, dict[str, Any]], case: dict[str, Any]) -> None:
    assert failures(results[name_of(case)]) == []


def test_every_valid_pair_of_settings_is_among_the_cases() -> None:
    assert len(CASES) < 40
    for one, two in itertools.combinations(FACTORS, 2):
        possible = {(case[one], case[two]) for case in everything()}
        assert {(case[one], case[two]) for case in CASES} == possible
