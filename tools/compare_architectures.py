"""RNN, LSTM, GRU and transformer at equal parameters, over tokens and over CPU seconds.

    python -m tools.compare_architectures                     # 300 CPU seconds each, on the embedded corpus
    python -m tools.compare_architectures --seconds 30 --work runs/short --out runs/short

Each model has about the parameters of configs/tiny.toml and trains on its data, in its order, with its optimizer, in
fp32 on one thread, until it has used its CPU seconds; evaluations are not counted. After a warm-up the learning rate is
constant, so that the curve of a long run begins with the curve of a short one. Out: a table (validation loss at equal
tokens, those of the slowest model, and at equal CPU seconds), compare_architectures.json and .png.

Resumable: after each evaluation the model is saved in `work`; the same command goes on from there, also with more
seconds. Guarantee: every model sees the same packed sequences at the same step.
"""

import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Column, Table

from bigmodel.config.settings import ModelSettings, Settings, UserError, load_settings
from bigmodel.data.load.stream import Builder
from bigmodel.data.plan.order import Order
from bigmodel.data.store.shards import ShardStore
from bigmodel.distributed.world import ALONE
from bigmodel.evaluation.evaluate import Validation
from bigmodel.inspect.memory import model_without_memory
from bigmodel.model.init import init_weights
from bigmodel.model.recurrent.model import build_model
from bigmodel.run_directory import EXIT_USER, read_json, write_json
from bigmodel.training.learning_rate import learning_rate
from bigmodel.training.optimizers.groups import build_optimizer
from tools.measure import Record

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
RUN_FILE = ROOT / "configs" / "tiny.toml"
KINDS = ("transformer", "lstm", "gru", "rnn")
LAYERS = 2  # of recurrent models
CONSTANT = ['schedule={kind="constant",warmup_steps=30}', "training.steps=1000000"]
Point = tuple[int, float, float]  # tokens, CPU seconds, nats per label of the validation


def compare(
    seconds: Annotated[float, typer.Option(min=1, help="CPU seconds of training for each model")] = 300.0,
    every: Annotated[int, typer.Option(min=1, help="steps between evaluations")] = 50,
    sequences: Annotated[int, typer.Option(min=1, help="packed validation sequences of an evaluation")] = 24,
    work: Annotated[Path, typer.Option(help="folder of the saved models")] = ROOT / "runs" / "architectures",
    out: Annotated[Path, typer.Option(help="folder of the numbers and the picture")] = ROOT / "benchmarks",
    run_file: Annotated[Path, typer.Option(help="whose data, optimizer and transformer are compared")] = RUN_FILE,
) -> None:
    """Train what is not finished, then compare. Raises `UserError`."""
    torch.set_num_threads(1)
    base = load_settings(run_file, CONSTANT)
    if base.model.kind != "decoder":
        raise UserError(
            f'--run-file {run_file}: its model.kind = "{base.model.kind}" is not a transformer that recurrent models '
            'are compared with; give a run file with kind = "decoder"'
        )
    if not (base.data.directory / "manifest.json").exists():
        subprocess.run([sys.executable, "-m", "bigmodel", "prepare", str(run_file)], check=True)
    work.mkdir(parents=True, exist_ok=True)
    head = Record(out, "compare_architectures", "cpu").head
    models = {kind: Contender(kind, base, work) for kind in KINDS}
    for one in models.values():
        one.train(seconds, every, sequences)
        curves = {kind: each.described() for kind, each in models.items() if each.points}
        write_json(out / "compare_architectures.json", {**head, "models": curves})
    found = read_json(out / "compare_architectures.json")["models"]
    show(found, equal_points(found))
    draw(found, out / "compare_architectures.png")


def sized(kind: str, base: Settings, vocabulary: int) -> ModelSettings:
    """The model of that kind whose number of parameters is nearest to the run file's transformer."""
    if kind == "transformer":
        return base.model
    wanted = parameters(base.model, base, vocabulary)

    def of(width: int) -> ModelSettings:
        table = {
            "kind": kind,
            "num_layers": LAYERS,
            "hidden_size": width,
            "tied_embeddings": base.model.tied_embeddings,
        }
        return ModelSettings.model_validate(table)

    widths = range(2, 8 * base.model.hidden_size)
    above = bisect_left(widths, wanted, key=lambda width: parameters(of(width), base, vocabulary))
    near = [of(width) for width in widths[max(0, above - 1) : above + 1]]
    return min(near, key=lambda one: abs(parameters(one, base, vocabulary) - wanted))


def parameters(model: ModelSettings, base: Settings, vocabulary: int) -> int:
    whole = model_without_memory(base.model_copy(update={"model": model}), vocabulary)
    return sum(parameter.numel() for parameter in whole.parameters())


class Contender:
    """A model in training, and its curve; continues what is saved in the folder."""

    def __init__(self, kind: str, base: Settings, work: Path) -> None:
        self.file, self.points, self.step = work / f"{kind}.pt", list[Point](), 0
        self.store = ShardStore.of_run(base.data, "train")
        vocabulary = self.store.manifest.vocabulary
        self.settings = base.model_copy(update={"model": sized(kind, base, vocabulary)})
        self.model = build_model(self.settings.model, vocabulary)
        init_weights(self.model, base.run.seed)
        self.optimizer = build_optimizer(self.model, base.optimizer)
        if self.file.exists():
            saved = torch.load(self.file, weights_only=True)
            if saved.get("settings", self.settings_text()) != self.settings_text():
                raise UserError(f"{self.file}: was trained with other settings; give another --work, or remove it")
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.points, self.step = [tuple(point) for point in saved["points"]], saved["step"]

    def settings_text(self) -> str:
        return self.settings.model_dump_json(include={"data", "model", "optimizer", "run"})

    def train(self, seconds: float, every: int, sequences: int) -> None:
        """Until the CPU seconds are used; an evaluation ends it."""
        order = Order.of_run(self.store, self.settings)
        for _ in range(self.step):
            order.next_step()
        builder = Builder(self.store, self.settings.data, self.settings.run.seed)
        validation = Validation(self.settings.data, 4)
        tokens, spent = self.points[-1][:2] if self.points else (0, 0.0)
        while spent < seconds:
            began = time.process_time()
            packs = order.next_step()
            batch = builder.build(packs, self.step, range(len(packs)))
            self.update(batch)
            self.step += 1
            spent += time.process_time() - began
            tokens += batch.num_labels
            if self.step % every == 0 or spent >= seconds:
                self.model.eval()
                with torch.no_grad():
                    loss = validation.run(self.model, ALONE, sequences).nats_per_token
                self.points.append((tokens, spent, loss))
                self.save()
                print(f"{self.file.stem}: {tokens:,} tokens, {spent:.0f} CPU seconds, {loss:.3f} nats", flush=True)

    def update(self, batch: Any) -> None:
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        (self.model(batch).sum() / batch.num_labels).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.optimizer.gradient_clipping)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.settings) * group["rate_factor"]
        self.optimizer.step()

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state["settings"] = self.settings_text()
        partial = self.file.with_suffix(".partial")
        torch.save(state | {"points": self.points, "step": self.step}, partial)
        partial.replace(self.file)

    def described(self) -> dict[str, Any]:
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "num_layers": self.settings.model.num_layers,
            "hidden_size": self.settings.model.hidden_size,
            "points": self.points,
        }


def equal_points(found: Mapping[str, Any]) -> tuple[float, float]:
    """Tokens and CPU seconds that every model has reached."""
    ends = [one["points"][-1] for one in found.values()]
    return min(end[0] for end in ends), min(end[1] for end in ends)


def loss_at(points: list[Any], column: int, value: float) -> float:
    """The loss at that many tokens (column 0) or CPU seconds (1), between two evaluations on a line.

    >>> loss_at([(100, 2.0, 6.0), (200, 4.0, 5.0)], 0, 150)
    5.5
    """
    return float(np.interp(value, [point[column] for point in points], [point[2] for point in points]))


def show(found: Mapping[str, Any], equal: tuple[float, float]) -> None:
    tokens, seconds = equal
    table = Table(Column("model", no_wrap=True), title="validation loss, nats per label", title_justify="left")
    columns = (
        "layers x width",
        "parameters",
        "tokens a CPU second",
        f"at {tokens:,.0f} tokens",
        f"at {seconds:.0f} CPU s",
    )
    for name in columns:
        table.add_column(name, justify="right")
    for kind in KINDS:
        one = found[kind]
        end, size = one["points"][-1], f"{one['num_layers']} x {one['hidden_size']}"
        losses = (loss_at(one["points"], column, value) for column, value in enumerate(equal))
        table.add_row(
            kind, size, f"{one['parameters']:,}", f"{end[0] / end[1]:,.0f}", *(f"{loss:.3f}" for loss in losses)
        )
    Console(highlight=False, markup=False, emoji=False).print(table)


def draw(found: Mapping[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), dpi=130, sharey=True, layout="constrained")
    for column, (axis, name) in enumerate(zip(axes, ("tokens", "CPU seconds"), strict=True)):
        for kind in KINDS:
            one = found[kind]
            columns = list(zip(*one["points"], strict=True))
            axis.plot(columns[column], columns[2], marker=".", label=f"{kind}, {one['parameters']:,} parameters")
        axis.set(xlabel=name)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("validation loss, nats per label")
    axes[0].legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    try:
        typer.run(compare)
    except UserError as error:
        print(f"compare_architectures: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER) from None


if __name__ == "__main__":
    main()
