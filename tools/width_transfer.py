"""The best learning rate at several widths, with muP (model.mup_base_width) and without.

    python -m tools.width_transfer                            # 25 runs on the embedded corpus, 6 CPU minutes
    python -m tools.width_transfer --steps 20 --rates 0.01 --out runs/short --work runs/short

Models of configs/tiny.toml's data with 2 layers and heads of equal size at every width, so that heads grow in number;
the narrowest width is muP's base, where both are the same run. Embedded tokens are multiplied by 10: with deviation
0.02 they are small beside what the blocks add, and all rates are worse. Each model trains in one process on one thread,
on the same packed sequences in the same order. The rate falls linearly to 0 after a warm-up of a tenth. Out: a table of
the validation losses and, for each width, the best rate by a parabola through the best one and its neighbours in
log2(rate); width_transfer.json and .png.

Resumable: a finished run is not repeated. Guarantee: the runs of a table differ in width, rule and rate only.
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from bigmodel.checks.plain_torch import PlainTraining
from bigmodel.config.settings import Settings, UserError, load_settings
from bigmodel.data.load.stream import Builder
from bigmodel.data.plan.order import Order
from bigmodel.data.store.shards import ShardStore
from bigmodel.distributed.world import ALONE
from bigmodel.evaluation.evaluate import Validation
from bigmodel.model.init import init_weights
from bigmodel.model.transformer import Transformer
from bigmodel.pictures import SERIES
from bigmodel.run_directory import EXIT_USER, append_json_line, read_json_lines, write_json
from tools.measure import Record

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
RUN_FILE = ROOT / "configs" / "tiny.toml"
HEAD = 32  # channels
RULES = {"plain": "one rate for all widths", "muP": "model.mup_base_width"}
Run = dict[str, Any]


def transfer(
    steps: Annotated[int, typer.Option(min=1, help="steps of each run")] = 200,
    widths: Annotated[str, typer.Option(help="separated by commas, rising; the first is muP's base")] = "64,128,256",
    rates: Annotated[str, typer.Option(help="learning rates")] = "0.002,0.004,0.008,0.016,0.032",
    override: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="for all runs")] = [],  # noqa: B006
    seeds: Annotated[str, typer.Option(help="seeds of initial weights; the table has means")] = "1",
    sequences: Annotated[int, typer.Option(min=1, help="packed validation sequences")] = 16,
    work: Annotated[Path, typer.Option(help="folder of the finished runs")] = ROOT / "runs" / "width-transfer",
    out: Annotated[Path, typer.Option(help="folder of the numbers and the picture")] = ROOT / "benchmarks",
) -> None:
    """Train what is not finished, then compare. Raises `UserError`."""
    torch.set_num_threads(1)
    sizes, tried = [int(one) for one in widths.split(",")], [float(one) for one in rates.split(",")]
    if wrong := [width for width in sizes if width % (2 * HEAD)]:
        raise UserError(f"--widths {widths}: {wrong[0]} is not a multiple of {2 * HEAD}, two heads of {HEAD} channels")
    work.mkdir(parents=True, exist_ok=True)
    head, batches = Record(out, "width_transfer", "cpu").head, list[Any]()
    runs = []
    for width in sizes:  # the narrowest first: a break leaves whole rows
        for rate in tried:
            for rule in RULES if width > sizes[0] else ["muP"]:
                for seed in map(int, seeds.split(",")):
                    settings = settings_of(width, rate, rule, seed, sizes[0], steps, override)
                    runs.append(finished(settings, rule, sequences, work, batches))
                    write_json(out / "width_transfer.json", head | {"runs": runs, "best": best_rates(runs)})
    show(runs)
    draw(runs, out / "width_transfer.png")


def settings_of(
    width: int, rate: float, rule: str, seed: int, base: int, steps: int, override: Sequence[str]
) -> Settings:
    model = {
        "num_layers": 2, "hidden_size": width, "num_heads": width // HEAD, "num_kv_heads": width // HEAD // 2,
        "intermediate_size": 3 * width, "tied_embeddings": False, "mup_base_width": base if rule == "muP" else 0,
        "embedding_scale": 10.0,
    }  # fmt: skip
    warmup = max(1, steps // 10)
    return load_settings(
        RUN_FILE,
        [
            *(f"model.{name}={json.dumps(value)}" for name, value in model.items()),
            f'schedule={{kind="wsd",warmup_steps={warmup},decay_steps={steps - warmup},final_ratio=0.0}}',
            f"training.steps={steps}",
            f"optimizer.learning_rate={rate}",
            f"run.seed={seed}",
            *override,
        ],
    )


def finished(settings: Settings, rule: str, sequences: int, work: Path, batches: list[Any]) -> Run:
    """The result of a run; trains it if it is not there. batches: of all runs, read at the first use."""
    model, steps = settings.model, settings.training.steps
    key = {
        "width": model.hidden_size, "rate": settings.optimizer.learning_rate, "rule": rule, "seed": settings.run.seed,
        "steps": steps, "base": model.mup_base_width, "settings": settings_digest(settings),
    }  # fmt: skip
    file = work / "runs.jsonl"
    for done in read_json_lines(file) if file.exists() else []:
        if key.items() <= done.items():
            return dict(done)
    store = ShardStore.of_run(settings.data, "train")
    if not batches:
        order, builder = Order.of_run(store, settings), Builder(store, settings.data, settings.run.seed)
        for step in range(steps):
            packs = order.next_step()
            batches.append(builder.build(packs, step, range(len(packs))))
    began = time.process_time()
    net = Transformer(model, store.manifest.vocabulary)
    init_weights(net, settings.run.seed)
    training, losses = PlainTraining(net, settings), []
    for step in range(steps):
        losses.append(training.accumulate([batches[step]], batches[step].num_labels))
        training.update(step)
        if not math.isfinite(losses[-1]):
            break
    loss = math.inf
    if math.isfinite(losses[-1]):
        with torch.no_grad():
            loss = Validation(settings.data, 4).run(net.eval(), ALONE, sequences).nats_per_token
    line = key | {
        "loss": loss,
        "training_loss": float(np.mean(losses[-max(1, steps // 10) :])),
        "tokens": steps * settings.training.global_batch_size * settings.data.sequence_length,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    append_json_line(file, line)
    print(json.dumps(line), flush=True)
    return line


def settings_digest(settings: Settings) -> str:
    text = settings.model_dump_json(include={"data", "model", "optimizer", "schedule", "training", "run"})
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def curves(runs: Sequence[Run]) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """(rule, width) -> rates, rising, with the mean loss over seeds. At the base both rules are one run."""
    base, found = min(run["width"] for run in runs), dict[tuple[str, int], dict[float, list[float]]]()
    for run in runs:
        for rule in RULES if run["width"] == base else [run["rule"]]:
            found.setdefault((rule, run["width"]), {}).setdefault(run["rate"], []).append(run["loss"])
    return {key: [(rate, float(np.mean(found[key][rate]))) for rate in sorted(found[key])] for key in sorted(found)}


def best_rates(runs: Sequence[Run]) -> list[dict[str, Any]]:
    return [
        {"rule": rule, "width": width, "best_rate": vertex(curve)[0], "loss_there": vertex(curve)[1]}
        for (rule, width), curve in curves(runs).items()
    ]


def vertex(curve: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Rate and loss at the least of the parabola through the best point and its neighbours in log2(rate); the best
    point itself at the end of the curve.

    >>> vertex([(1, 5.0), (2, 4.0), (4, 5.0)])
    (2.0, 4.0)
    """
    at = min(range(len(curve)), key=lambda number: curve[number][1])
    near = curve[max(0, at - 1) : at + 2]
    if len(near) < 3 or not all(math.isfinite(loss) for _, loss in near):
        return float(curve[at][0]), curve[at][1]
    square, slope, level = np.polyfit([math.log2(rate / curve[at][0]) for rate, _ in near], [one[1] for one in near], 2)
    place = -slope / (2 * square)
    return float(curve[at][0] * 2.0**place), float(level - slope**2 / (4 * square))


def show(runs: Sequence[Run]) -> None:
    table = Table(title="validation loss, nats per label", title_justify="left")
    found = curves(runs)
    tried = sorted({rate for curve in found.values() for rate, _ in curve})
    for name in ("rule", "width", *(f"{rate:g}" for rate in tried), "best rate"):
        table.add_column(name, justify="right")
    for (rule, width), curve in found.items():
        losses = dict(curve)
        cells = (f"{losses[rate]:.3f}" if rate in losses else "" for rate in tried)
        table.add_row(rule, str(width), *cells, f"{vertex(curve)[0]:.4f}")
    Console(highlight=False, markup=False, emoji=False, width=140).print(table)


def draw(runs: Sequence[Run], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), dpi=130, sharey=True, layout="constrained")
    found = curves(runs)
    widths = sorted({width for _, width in found})
    for axis, (rule, about) in zip(axes, RULES.items(), strict=True):
        for colour, width in zip(SERIES, widths, strict=False):
            if curve := found.get((rule, width)):
                axis.plot(*zip(*curve, strict=True), marker="o", color=colour, label=f"width {width}")
                axis.plot(*vertex(curve), marker="v", markersize=9, color=colour)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="learning rate", title=f"{rule}: {about}")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("validation loss, nats per label")
    axes[0].legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    try:
        typer.run(transfer)
    except (UserError, ValueError) as error:
        print(f"width_transfer: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER) from None


if __name__ == "__main__":
    main()
