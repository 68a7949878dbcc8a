"""Writers: the same numbers for TensorBoard, Weights & Biases, Comet, MLflow and as CSV.

In: the lines of metrics.jsonl as they come. Out: files under the run directory: `tensorboard/`, `wandb/` (offline;
`wandb sync` uploads them), `csv/`, `comet/` (offline; `comet upload` uploads them), `mlflow/` (a file store). The
clients' own variables send them elsewhere: WANDB_MODE=online, COMET_START_ONLINE=1, MLFLOW_TRACKING_URI. Only writers
in metrics.writers are used and their packages imported. A resumed run continues in the same folders; TensorBoard and
CSV drop the steps that are repeated. Comet writes its archive when the run ends: kill -9 loses it, metrics.jsonl stays.

Guarantee: a writer that fails, at whatever it does, never ends a run. It is told once, on standard error and by the
event `writer_failed`, and not used again; metrics.jsonl has all numbers.
"""

import contextlib
import csv
import hashlib
import importlib.util
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from bigmodel.config.settings import MetricsSettings
from bigmodel.metrics.run_accounting import of_experts
from bigmodel.run_directory import record_event, write_atomically


class Writer(Protocol):
    """A destination for scalars."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN_DIR/tensorboard."""

    package = "tensorboard"

    def __init__(self, run_directory: Path, first_step: int, settings: MetricsSettings) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_directory / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run in RUN_DIR/wandb, offline unless WANDB_MODE says otherwise; each start is a part of the same run."""

    package = "wandb"

    def __init__(self, run_directory: Path, first_step: int, settings: MetricsSettings) -> None:
        import wandb

        self._run = wandb.init(
            mode=os.environ.get("WANDB_MODE", "offline"),
            dir=str(run_directory),
            project=settings.project,
            group=settings.group or None,
            entity=settings.team or None,
            name=run_directory.name,
            id=run_directory.name,
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({**scalars, "step": step})

    def close(self) -> None:
        self._run.finish()


class Csv:
    """A table per quantity in RUN_DIR/csv, such as training_loss.csv: a row per step."""

    package = "csv"  # Python's own

    def __init__(self, run_directory: Path, first_step: int, settings: MetricsSettings) -> None:
        self._folder = run_directory / "csv"
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.glob("*.csv"):
            head, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
            whole = [(row, row.split(",")[0]) for row in rows if row.endswith("\n")]
            kept = [row for row, step in whole if step.isdigit() and int(step) <= first_step]
            write_atomically(path, "".join([head, *kept]))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            with (self._folder / f"{re.sub(r'[^A-Za-z0-9-]', '_', name)}.csv").open("a", encoding="utf-8") as file:
                rows = csv.writer(file, lineterminator="\n")
                if file.tell() == 0:
                    rows.writerow(["step", name])
                rows.writerow([step, value])

    def close(self) -> None:
        """Each row was written at once."""


class Comet:
    """An archive in RUN_DIR/comet for each start; all belong to one experiment. With COMET_START_ONLINE=1 online."""

    package = "comet_ml"

    def __init__(self, run_directory: Path, first_step: int, settings: MetricsSettings) -> None:
        import comet_ml

        folder = run_directory / "comet"
        folder.mkdir(parents=True, exist_ok=True)
        quiet = dict.fromkeys(
            ("log_code", "log_graph", "log_git_metadata", "log_git_patch", "log_env_details", "parse_args"), False
        )
        self._experiment = comet_ml.start(
            online=os.environ.get("COMET_START_ONLINE", "").lower() in ("1", "true", "yes", "on"),
            project_name=settings.project,
            workspace=settings.team or None,
            experiment_key=hashlib.sha256(str(run_directory).encode()).hexdigest()[:32],
            experiment_config=comet_ml.ExperimentConfig(
                offline_directory=str(folder),
                name=run_directory.name,
                auto_output_logging=False,
                auto_param_logging=False,
                auto_metric_logging=False,
                display_summary_level=0,
                **quiet,
            ),
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._experiment.log_metrics(dict(scalars), step=step)

    def close(self) -> None:
        self._experiment.end()


class MlFlow:
    """A run in the file store RUN_DIR/mlflow, or at MLFLOW_TRACKING_URI; each start goes on with the same run."""

    package = "mlflow"

    def __init__(self, run_directory: Path, first_step: int, settings: MetricsSettings) -> None:
        local = (run_directory / "mlflow").resolve().as_uri()
        if "MLFLOW_TRACKING_URI" not in os.environ:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else MLflow 3.17 refuses a store of files
        # A server that does not answer stops training once for this long, not for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        import mlflow

        self._metric = mlflow.entities.Metric
        self._client = mlflow.MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", local))
        file = run_directory / "mlflow_run"
        if file.exists() and first_step:
            self._run = file.read_text(encoding="utf-8").strip()
            self._client.update_run(self._run, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(settings.project)
        experiment = found.experiment_id if found else self._client.create_experiment(settings.project)
        self._run = self._client.create_run(experiment, run_name=run_directory.name).info.run_id
        write_atomically(file, self._run)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        named = {re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII): value for name, value in scalars.items()}
        self._client.log_batch(self._run, [self._metric(name, value, now, step) for name, value in named.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run)


WRITERS: dict[str, Any] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "csv": Csv,
    "comet": Comet,
    "mlflow": MlFlow,
}


class Writers:
    """The writers of `settings` that work."""

    def __init__(self, settings: MetricsSettings, run_directory: Path, first_step: int) -> None:
        self._directory = run_directory
        self._open: dict[str, Writer] = {}
        for name in settings.writers:
            with self._kept(name, "begins"):
                package = WRITERS[name].package
                if importlib.util.find_spec(package) is None:
                    raise ModuleNotFoundError(f"{package} is not installed; pip install 'bigmodel[{name}]'")
                self._open[name] = WRITERS[name](run_directory, first_step, settings)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, writer in list(self._open.items()):
            with self._kept(name, f"writes step {step}"):
                writer.write(step, scalars)

    def close(self) -> None:
        for name, writer in list(self._open.items()):
            with self._kept(name, "ends"):
                writer.close()
        self._open.clear()

    @contextlib.contextmanager
    def _kept(self, name: str, when: str) -> Iterator[None]:
        """Training goes on whatever a writer raises; it is told, and the writer is not used again."""
        try:
            yield
        except (Exception, SystemExit) as error:  # of another library, which may raise anything
            self._open.pop(name, None)
            text = f"{type(error).__name__}: {error}"
            print(
                f"bigmodel: metrics.writers: {name} failed as it {when}: {text}; training goes on without it, and "
                "metrics.jsonl has the same numbers",
                file=sys.stderr,
                flush=True,
            )
            with contextlib.suppress(Exception):  # the run directory is gone: the next line of metrics.jsonl tells
                record_event(self._directory, "writer_failed", writer=name, when=when, error=text)


def scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The scalars of a line, with grouped names ("training/loss")."""
    if line["kind"] == "step":
        names = ("loss", "gradient_norm", "learning_rate", "z_loss", "loss_scale", "step_seconds", "data_wait_seconds")
        more = (
            *("unweighted_loss", "distillation_loss", "pruned_share", "sampled_share"),
            *("largest_attention_score", "device_joules", "host_joules"),
        )
        found = {name: line.get(name) for name in (*names, *more)} | of_experts(line)
        yield from ((f"training/{name}", value) for name, value in found.items() if value is not None)
        yield "training/tokens_per_second", line["positions"] / line["step_seconds"]
        yield from (
            (
                f"training_loss/{part['objective']}/{part['source']}",
                part["nats"] / (part.get("weight") or part["targets"]),
            )
            for part in line["parts"]
            if part["targets"]
        )
        for layers, norms in (line["norms"] or {}).items():
            yield from ((f"{name}/{layers}", value) for name, value in norms.items())
    elif line["kind"] == "evaluation":
        found = {name: line.get(name) for name in ("nats_per_token", "bits_per_byte", "accuracy", "calibration_error")}
        yield from ((f"validation/{name}", value) for name, value in found.items() if value is not None)
        yield from (
            (
                f"validation_loss/{part['objective']}/{part['source']}",
                part["nats"] / (part.get("weight") or part["targets"]),
            )
            for part in line.get("parts", ())
        )
        averages = {
            name: value for name, value in line.get("scores", {}).items() if name not in ("by_class", "accuracy")
        }
        yield from ((f"validation/{name}", value) for name, value in averages.items())
    elif line["kind"] == "tasks":
        for task, of in line["scores"].items():
            yield from ((f"tasks/{task}/{metric}", value) for metric, value in of.items())
    elif line["kind"] == "checkpoint":
        yield from ((f"checkpoint/{name}", line[name]) for name in ("bytes", "seconds"))
