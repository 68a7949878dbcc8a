"""Rates fitted to runs: of a run directory, of several sizes; a run that is predicted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigmodel.config.settings import Settings, UserError, to_toml_table
from bigmodel.launcher.cluster import Cluster
from bigmodel.planning.calibration import Measured, calibrated, fitted, measured_step, planned_seconds
from bigmodel.planning.context import Context, context_of
from bigmodel.planning.step_demand import step_demand
from bigmodel.planning.step_time import Rates, step_time
from tools.published_steps import ROWS, predicted

REPOSITORY = Path(__file__).parents[2]


def context(width: int, layers: int) -> Context:
    model = {"hidden_size": width, "num_layers": layers, "num_heads": 4, "intermediate_size": 3 * width}
    table = {"model": model, "data": {"sequence_length": 512, "max_document_length": 512}}
    return context_of(Settings.model_validate(table), Cluster(gpus_per_node=1), 2000)._replace(manifest=None)


def run_of(width: int, layers: int, rates: Rates, noise: float = 1.0) -> Measured:
    given = context(width, layers)
    return measured_step(str(width), given, step_demand(given), noise * step_time(given, rates).seconds)


SIZES = ((64, 2), (128, 3), (192, 4))
SLOW = Rates(slowdown=9000.0, bytes_slowdown=9000.0)


def test_one_run_gives_one_factor() -> None:
    found = fitted([run_of(128, 3, SLOW)])
    assert found.slowdown == pytest.approx(9000)
    assert found.bytes_slowdown == pytest.approx(9000)
    assert (found.seconds_per_block, found.seconds_per_step, found.measured) == (0, 0, ("128",))


def test_fixed_seconds_are_found_and_another_size_is_predicted() -> None:
    true = SLOW._replace(seconds_per_block=0.5)
    found = fitted([run_of(*size, true) for size in SIZES])
    assert found.seconds_per_block == pytest.approx(0.5)
    assert found.slowdown == pytest.approx(9000)
    assert step_time(context(320, 6), found).seconds == pytest.approx(step_time(context(320, 6), true).seconds)


def test_no_more_constants_are_fitted_than_the_runs_need() -> None:
    """Noise of 3% is no reason for fixed seconds."""
    runs = [run_of(*size, SLOW, noise) for size, noise in zip(SIZES, (1.03, 0.97, 1.02), strict=True)]
    found = fitted(runs)
    assert (found.seconds_per_block, found.seconds_per_step) == (0, 0)
    assert found.slowdown == pytest.approx(9000, rel=0.03)


# ---- a run directory ------------------------------------------------------------------------------------------------


def write_run(run: Path, seconds: list[float], **changes: Any) -> None:
    given = context(128, 3)
    run.mkdir()
    (run / "settings.json").write_text(json.dumps(to_toml_table(given.settings)))
    (run / "deepspeed.json").write_text(json.dumps(given.effective))
    (run / "data_manifest.json").write_text(json.dumps(MANIFEST))
    lines: list[dict[str, Any]] = [{"kind": "start", "world_size": 1, "device_peak_flops": 3e12}]
    steps = {"data_wait_seconds": 0.5, "compile_seconds": 0.0, "positions": 4090, "padding": 6} | changes
    lines += [{"kind": "step", "step_seconds": one + 0.5, **steps} for one in seconds]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


MANIFEST = {
    "tokenizer_sha256": "", "vocabulary": 2000, "bos": 0, "eos": 1, "dtype": "uint16", "counts": {}, "shards": {},
    "rows": {}, "row_bytes": {}, "statistics": {"histogram": {"512": 10}, "mean_tokens": 400.0}, "files": {},
    "recipe": {}, "corpus_sha256": "", "encoder": "", "python": "", "document": "[bos] text [eos]", "schema_version": 3,
}  # fmt: skip


def test_a_run_directory_is_read_without_waits_and_first_steps(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [9.0] * 5 + [2.0, 2.1, 1.9, 2.0, 7.0])
    found = calibrated([tmp_path / "run"], Cluster(gpus_per_node=1))
    assert found.measured == ("run",)
    given = context(128, 3)
    assert found.slowdown * step_time(given).seconds == pytest.approx(2.0, rel=0.05)  # other documents: 400 tokens
    planned = step_time(given, found)
    assert planned.mfu_causal == pytest.approx(planned.demand.model_flops[0] / (3e12 * planned.seconds))
    named = Cluster.model_validate({"gpus_per_node": 1, "hardware": {"gpu": "H200"}})
    assert calibrated([tmp_path / "run"], named).peak_flops == 0


@pytest.mark.parametrize("name", ["settings.json", "deepspeed.json", "data_manifest.json"])
def test_a_folder_that_is_no_run_is_named(name: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run", [2.0] * 10)
    (tmp_path / "run" / name).unlink()
    with pytest.raises(UserError, match=rf"^--measured .*run: {name} cannot be read .*; give a run directory$"):
        calibrated([tmp_path / "run"], Cluster(gpus_per_node=1))


def test_a_short_run_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [2.0] * 4)
    with pytest.raises(UserError, match="run: 4 steps of the last batch size; a calibration needs at least 5"):
        calibrated([tmp_path / "run"], Cluster(gpus_per_node=1))


# ---- what is published, and what was measured -----------------------------------------------------------------------


def test_published_steps_are_planned_within_15_percent() -> None:
    off = [predicted(row) / row.tokens_per_second_per_gpu - 1 for row in ROWS]
    assert len(off) == 36
    assert max(map(abs, off)) < 0.15
    assert float(np.median(np.abs(off))) < 0.05


def test_the_largest_of_four_sizes_is_predicted_from_the_others_within_15_percent() -> None:
    """CPU seconds that `tools.bench_plan` measured; a step of the last size takes several times that of the third."""
    rows = json.loads((REPOSITORY / "benchmarks/bench_plan.json").read_text())["rows"]
    runs = [Measured(**row["measured"]) for row in rows if "measured" in row]
    assert len(runs) == 4
    assert runs[-1].step_seconds > 2 * runs[-2].step_seconds
    for known in (runs[:-1], runs[1:-1], runs[2:-1]):
        assert planned_seconds(runs[-1], fitted(known)) == pytest.approx(runs[-1].step_seconds, rel=0.15)
