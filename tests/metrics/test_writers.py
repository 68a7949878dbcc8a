"""A writer that fails never ends a run; MLflow's own client reads what was written."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from bigmodel.config.settings import MetricsSettings
from bigmodel.metrics import writers
from bigmodel.metrics.recorder import Metrics
from bigmodel.metrics.writers import Writers
from bigmodel.run_directory import read_json_lines
from tests.metrics.test_recorder import STEPS, record_all

ERRORS = {
    "bug": RuntimeError("no such host"),
    "full disk": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "exit": SystemExit(1),
}


class Client:
    """A foreign client that fails."""

    package = "csv"
    place = ""
    error: BaseException = RuntimeError()

    def __init__(self, run_directory: Path, first_step: int, settings: MetricsSettings) -> None:
        self.calls = 0
        self.may_fail("begins")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self.calls += 1
        if step >= 2:
            self.may_fail("writes step 2")

    def close(self) -> None:
        self.may_fail("ends")

    def may_fail(self, place: str) -> None:
        if place == self.place:
            raise self.error


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("place", ["begins", "writes step 2", "ends"])
def test_a_failing_writer_is_told_once_and_the_others_go_on(
    place: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Client, "place", place)
    monkeypatch.setattr(Client, "error", ERRORS[error])
    monkeypatch.setitem(writers.WRITERS, "wandb", Client)
    opened = Writers(MetricsSettings(writers=["wandb", "csv"]), tmp_path, 0)
    for step in (1, 2, 3):
        opened.write(step, {"training/loss": 1.0 / step})
    opened.close()
    (event,) = read_json_lines(tmp_path / "events.jsonl")
    assert (event["event"], event["writer"], event["when"]) == ("writer_failed", "wandb", place)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bigmodel: metrics.writers: wandb failed as it {place}: {type(ERRORS[error]).__name__}")
    assert line.endswith("training goes on without it, and metrics.jsonl has the same numbers")
    assert len((tmp_path / "csv" / "training_loss.csv").read_text().splitlines()) == 4


def test_a_writer_that_is_not_installed_is_told_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Client, "package", "no_such_package")
    monkeypatch.setitem(writers.WRITERS, "wandb", Client)
    with Metrics(tmp_path, MetricsSettings(writers=["wandb", "csv"])) as metrics:
        metrics.record_step(STEPS[0])
    assert "no_such_package is not installed; pip install 'bigmodel[wandb]'" in capsys.readouterr().err
    assert [event["event"] for event in read_json_lines(tmp_path / "events.jsonl")] == ["writer_failed"]
    assert len((tmp_path / "csv" / "training_loss.csv").read_text().splitlines()) == 2


def test_mlflow_has_the_numbers_of_both_starts_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed (optional): pip install 'bigmodel[mlflow]'")
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = MetricsSettings(writers=["mlflow"], project="tongues")
    with Metrics(tmp_path, settings) as metrics:
        record_all(metrics)
    with Metrics(tmp_path, settings, first_step=3) as metrics:
        metrics.record_step(STEPS[0])
    assert not (tmp_path / "events.jsonl").exists()
    client = MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("tongues").experiment_id])
    assert (run.info.run_name, run.info.status) == (tmp_path.name, "FINISHED")
    losses = [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "training/loss")]
    assert losses == [(1, 5.0), (2, 2.5), (3, 5.0 / 3), (1, 5.0)]
    assert client.get_metric_history(run.info.run_id, "validation/bits_per_byte")[-1].value == 1.5


def test_mlflow_goes_where_its_own_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed (optional): pip install 'bigmodel[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "elsewhere").as_uri())
    opened = Writers(MetricsSettings(writers=["mlflow"]), tmp_path, 0)
    opened.write(1, {"tasks/arc/acc,none": 0.5})
    opened.close()
    assert not (tmp_path / "mlflow").exists()
    assert list((tmp_path / "elsewhere").rglob("acc_none"))
