"""tools/width_transfer.py: the best rate of a curve, and runs that are not repeated."""

import math
from pathlib import Path

import pytest

from bigmodel.run_directory import append_json_line
from tools.width_transfer import best_rates, finished, settings_digest, settings_of, vertex


def test_the_best_rate_is_the_vertex_of_the_parabola_through_the_best_neighbours() -> None:
    curve = [(2.0**power, (power - 3.25) ** 2 + 1) for power in range(7)]
    assert vertex(curve) == pytest.approx((2**3.25, 1.0))
    assert vertex(curve[:3]) == curve[2]
    assert vertex([(1.0, 3.0), (2.0, 2.0), (4.0, math.inf)]) == (2.0, 2.0)


def test_the_base_counts_for_both_rules_and_seeds_are_averaged() -> None:
    runs = [
        {"width": width, "rate": rate, "rule": rule, "loss": loss}
        for width, rule, rate, loss in (
            (64, "muP", 0.1, 3.0), (64, "muP", 0.1, 4.0), (64, "muP", 0.2, 5.0), (128, "plain", 0.1, 2.5),
        )
    ]  # fmt: skip
    found = {(one["rule"], one["width"]): (one["best_rate"], one["loss_there"]) for one in best_rates(runs)}
    assert found == {("muP", 64): (0.1, 3.5), ("plain", 64): (0.1, 3.5), ("plain", 128): (0.1, 2.5)}


def test_a_finished_run_is_not_repeated_and_another_one_is_not_taken_for_it(tmp_path: Path) -> None:
    one, other = (settings_of(128, 0.004, rule, 1, 64, 200, []) for rule in ("muP", "plain"))
    assert (one.model.mup_base_width, other.model.mup_base_width) == (64, 0)
    assert settings_digest(one) != settings_digest(other)
    key = {"width": 128, "rate": 0.004, "rule": "muP", "seed": 1, "steps": 200, "base": 64}
    append_json_line(tmp_path / "runs.jsonl", key | {"settings": settings_digest(one), "loss": 4.0})
    assert finished(one, "muP", 1, tmp_path, [])["loss"] == 4.0
