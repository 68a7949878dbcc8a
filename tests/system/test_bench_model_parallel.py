"""What the benchmarks of ranks that share a model or sequences count."""

from pathlib import Path

import numpy as np
import pytest

from bigmodel.config.settings import ModelSettings
from tools.bench_model_parallel import CASES, batch_of, rows_of, settings_of
from tools.bench_position_sharing import contiguous, needed


@pytest.mark.parametrize(
    ("cu_seqlens", "window", "share"),
    [([0, 16], 0, 0.5), ([0, 8, 16], 0, 0.0), ([0, 4, 16], 0, 0.25), ([0, 16], 3, 0.125)],
)
def test_only_earlier_keys_of_a_document_and_window_are_needed(
    cu_seqlens: list[int], window: int, share: float
) -> None:
    edges, model = np.array(cu_seqlens), ModelSettings(sliding_window=window)
    assert needed(edges, model, contiguous(edges, model, 2)) == share


def test_ratios_are_of_the_same_round_and_the_slowest_rank_is_over_the_mean() -> None:
    def ranks(*seconds: float) -> list[dict[str, float]]:
        return [{"cpu": one, "sent": 2e6, "peak": 1e6} for one in seconds]

    found = {"ZeRO 1": [ranks(1, 1), ranks(2, 2)], "tensors": [ranks(1, 3), ranks(4, 4)]}
    first, second = rows_of(CASES["quick"], found)
    assert (first["ratio"], first["slowest"]) == (1, 1)
    assert (second["ratio"], second["smallest"], second["largest"]) == (2, 2, 2)
    assert (second["slowest"], second["slowest_largest"]) == (1.25, 1.5)
    assert second["cpu_us_per_token"] == pytest.approx(6 / 128 * 1e6)


@pytest.mark.parametrize("name", CASES)
def test_every_case_has_valid_settings_and_as_many_tokens_as_it_says(name: str) -> None:
    case = CASES[name]
    assert [settings_of(case, one, Path("zero.json")) for one in case.contenders.values()]
    assert batch_of(case, range(len(case.packs))).num_labels == sum(map(sum, case.packs))
