"""Writers: the same numbers for TensorBoard and Weights & Biases.

In: the lines of metrics.jsonl as they come. Out: event files under the run directory: `tensorboard/`, `wandb/`
(offline; `wandb sync` uploads them). Optional: only writers in metrics.writers are used and their packages imported. A
resumed run continues in the same folders; TensorBoard drops the steps that are repeated.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from bigmodel.config.settings import UserError


class Writer(Protocol):
    """A destination for scalars."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN_DIR/tensorboard."""

    package = "tensorboard"

    def __init__(self, run_directory: Path, first_step: int) -> None:
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

    def __init__(self, run_directory: Path, first_step: int) -> None:
        import wandb

        self._run = wandb.init(
            mode="offline", dir=str(run_directory), project="bigmodel", name=run_directory.name, id=run_directory.name,
            resume="allow", settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({**scalars, "step": step})

    def close(self) -> None:
        self._run.finish()


WRITERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def open_writers(names: Sequence[str], run_directory: Path, first_step: int) -> list[Writer]:
    """Open the named writers. Raises `UserError` for a package that is not installed."""
    for name in names:
        if importlib.util.find_spec(WRITERS[name].package) is None:
            raise UserError(
                f'metrics.writers: "{name}" needs the package {WRITERS[name].package}, which is not installed; '
                f"pip install 'bigmodel[{name}]', or leave it out: metrics.jsonl has the same numbers"
            )
    return [WRITERS[name](run_directory, first_step) for name in names]


def scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The scalars of a line, with grouped names ("training/loss") for both programs."""
    if line["kind"] == "step":
        names = ("loss", "gradient_norm", "learning_rate", "z_loss", "loss_scale", "step_seconds", "data_wait_seconds")
        yield from ((f"training/{name}", line[name]) for name in names if line[name] is not None)
        yield "training/tokens_per_second", line["positions"] / line["step_seconds"]
        yield from (
            (f"training_loss/{part['objective']}/{part['source']}", part["nats"] / part["targets"])
            for part in line["parts"]
            if part["targets"]
        )
        for layers, norms in (line["norms"] or {}).items():
            yield from ((f"{name}/{layers}", value) for name, value in norms.items())
    elif line["kind"] == "evaluation":
        found = {name: line[name] for name in ("nats_per_token", "bits_per_byte")}
        yield from ((f"validation/{name}", value) for name, value in found.items() if value is not None)
    elif line["kind"] == "checkpoint":
        yield from ((f"checkpoint/{name}", line[name]) for name in ("bytes", "seconds"))
