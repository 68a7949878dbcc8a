"""Writers: the same numbers for TensorBoard, Weights & Biases, Comet and as CSV.

In: the lines of metrics.jsonl as they come. Out: files under the run directory: `tensorboard/`, `wandb/` (offline;
`wandb sync` uploads them), `csv/`, `comet/` (offline; `comet upload` uploads them). Optional: only writers in
metrics.writers are used and their packages imported. A resumed run continues in the same folders; TensorBoard and CSV
drop the steps that are repeated. Comet writes its archive when the run ends: kill -9 loses it, metrics.jsonl stays.
"""

import csv
import hashlib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from bigmodel.config.settings import MetricsSettings, UserError
from bigmodel.run_directory import write_atomically


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
    """An offline run in RUN_DIR/wandb, named like the directory; each start is a part of the same run."""

    package = "wandb"

    def __init__(self, run_directory: Path, first_step: int, settings: MetricsSettings) -> None:
        import wandb

        self._run = wandb.init(
            mode="offline",
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
    """An offline archive in RUN_DIR/comet for each start; all belong to one experiment, named like the directory."""

    package = "comet_ml"

    def __init__(self, run_directory: Path, first_step: int, settings: MetricsSettings) -> None:
        import comet_ml

        folder = run_directory / "comet"
        folder.mkdir(parents=True, exist_ok=True)
        quiet = dict.fromkeys(
            ("log_code", "log_graph", "log_git_metadata", "log_git_patch", "log_env_details", "parse_args"), False
        )
        self._experiment = comet_ml.start(
            online=False,
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


WRITERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "csv": Csv, "comet": Comet}


def open_writers(settings: MetricsSettings, run_directory: Path, first_step: int) -> list[Writer]:
    """Open the writers of `settings`. Raises `UserError` with all packages that are not installed."""
    missing = [name for name in settings.writers if importlib.util.find_spec(WRITERS[name].package) is None]
    if missing:
        packages, names = ", ".join(WRITERS[name].package for name in missing), ", ".join(missing)
        raise UserError(
            f"metrics.writers (or a monitor of the DeepSpeed JSON): {names} needs {packages}, which is not installed; "
            f"pip install 'bigmodel[{','.join(missing)}]', or leave {names} out: metrics.jsonl has the same numbers"
        )
    return [WRITERS[name](run_directory, first_step, settings) for name in settings.writers]


def scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The scalars of a line, with grouped names ("training/loss")."""
    if line["kind"] == "step":
        names = ("loss", "gradient_norm", "learning_rate", "z_loss", "loss_scale", "step_seconds", "data_wait_seconds")
        more = ("unweighted_loss", "distillation_loss", "pruned_share", "sampled_share")
        found = {name: line.get(name) for name in (*names, *more)}
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
