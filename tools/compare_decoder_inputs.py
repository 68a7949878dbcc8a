"""Decoder inputs of a seq2seq run, compared: true, later, replaced, masked, dropped, fixed.

    python -m tools.compare_decoder_inputs                      # 150 steps of configs/seq2seq.toml, two seeds
    python -m tools.compare_decoder_inputs --steps 20 --seeds 1 --work runs/short --out runs/short

Each form trains as a run of its own with `bigmodel launch local`, on one rank. Then its model is scored on the whole
validation split with the true inputs, neither masked, dropped, replaced nor cut; only target_ahead stays, because such
a model reads no other inputs. Its speed is that of training steps alone: tokens per CPU second of one thread, forward
and backward. Out: a table, compare_decoder_inputs.json.

Restartable: what is finished is not repeated, and a run that was killed goes on from its checkpoint.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import get_terminal_size
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Column, Table

from bigmodel.config.settings import DataSettings, Settings, UserError, load_settings
from bigmodel.data.load.stream import Builder
from bigmodel.data.plan.order import Order
from bigmodel.data.store.shards import ShardStore
from bigmodel.distributed.world import ALONE
from bigmodel.evaluation.evaluate import Validation
from bigmodel.run_directory import EXIT_USER, read_json, write_json
from bigmodel.training.load_model import Trained, load_trained
from tools.ablate import numbers_of
from tools.measure import Record

ROOT = Path(__file__).parents[1]
RUN_FILE = ROOT / "configs" / "seq2seq.toml"
TIMED_STEPS = 8
SAMPLING = "training.scheduled_sampling={{ schedule = '{}', {}share = 0.25 }}"
FORMS: dict[str, list[str]] = {
    "true inputs": [],
    "target_ahead = 2": ["data.target_ahead=2"],
    "sampled, linear": [SAMPLING.format("linear", "steps = {steps}, ")],
    "sampled, linear, drawn": [SAMPLING.format("linear", "steps = {steps}, choice = 'drawn', ")],
    "sampled, constant": [SAMPLING.format("constant", "")],
    "masked_decoder_share = 0.15": ["data.masked_decoder_share=0.15"],
    "dropped_decoder_share = 0.3": ["data.dropped_decoder_share=0.3"],
    "fixed_target_tokens = 48": ["data.fixed_target_tokens=48"],
}


def compare(
    steps: Annotated[int, typer.Option(min=2, help="steps of each run")] = 150,
    seeds: Annotated[str, typer.Option(help="seeds, separated by commas")] = "1,2",
    work: Annotated[Path, typer.Option(help="folder of the runs")] = ROOT / "runs" / "decoder-inputs",
    out: Annotated[Path, typer.Option(help="folder of the numbers")] = ROOT / "benchmarks",
    run_file: Annotated[Path, typer.Option(help="run file of an encoder-decoder")] = RUN_FILE,
) -> None:
    """Train what is not finished, then compare. Raises `UserError`."""
    numbers, settings = numbers_of(seeds), load_settings(run_file)
    if settings.model.kind != "encoder_decoder":
        raise UserError(
            f'--run-file {run_file}: its model.kind = "{settings.model.kind}" does not have all these inputs; give a '
            'run file with kind = "encoder_decoder"'
        )
    if not (settings.data.directory / "manifest.json").exists():
        subprocess.run([sys.executable, "-m", "bigmodel", "prepare", str(run_file)], check=True)
    head = Record(out, "compare_decoder_inputs", "cpu").head
    found: dict[str, list[dict[str, float]]] = {}
    for seed in numbers:
        for name in FORMS:
            result = result_of(run_file, name, seed, steps, work)
            found.setdefault(name, []).append(result)
            print(f"{name}, seed {seed}: {result['loss']:.4f} nats", flush=True)
            write_json(out / "compare_decoder_inputs.json", {**head, "steps": steps, "forms": found})
    show(found, steps)


def result_of(run_file: Path, name: str, seed: int, steps: int, work: Path) -> dict[str, float]:
    """Train, score and time a form, unless its result is there."""
    place = work / f"{run_file.stem}-{steps}-steps" / f"{sorted(FORMS).index(name)}-seed-{seed}"
    file = place.with_suffix(".json")
    if file.exists():
        return read_json(file)
    words = [f"run.directory={place}", *overrides(name, seed, steps)]
    given = [word for one in words for word in ("--set", one)]
    launch = [sys.executable, "-m", "bigmodel", "launch", "local", str(run_file), "--ranks", "1", *given]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads that wait for each other slow a busy machine down
    if ended := subprocess.run(launch, stdout=subprocess.DEVNULL, env=alone).returncode:
        raise SystemExit(ended)  # the run has said why
    trained = load_trained(place)
    result = {"loss": true_loss(trained), "tokens_per_cpu_second": speed(trained)}
    write_json(file, result)
    return result


def overrides(name: str, seed: int, steps: int) -> list[str]:
    shape = [f"training.steps={steps}", f"schedule.warmup_steps={steps // 15}", f"schedule.decay_steps={steps // 2}"]
    rest = ["evaluation.every_steps=0", "evaluation.at_end=false", f"run.seed={seed}"]
    return [*shape, *rest, *(one.replace("{steps}", str(steps)) for one in FORMS[name])]


def with_true_inputs(data: DataSettings) -> DataSettings:
    return data.model_copy(update={"masked_decoder_share": 0.0, "dropped_decoder_share": 0.0, "fixed_target_tokens": 0})


def true_loss(trained: Trained) -> float:
    """Nats per label of the validation split, with the true inputs."""
    return Validation(with_true_inputs(trained.settings.data), 1).run(trained.forward, ALONE).nats_per_token


def speed(trained: Trained) -> float:
    """Tokens of both sides per CPU second of forward and backward, at the schedule's last step."""
    settings, model, threads = trained.settings, trained.model.train(), torch.get_num_threads()
    torch.set_num_threads(1)
    batches = batches_of(settings)
    tokens, began = 0, 0.0
    for number, batch in enumerate(batches):
        if number == 1:  # the first one warms up
            tokens, began = 0, time.process_time()
        model.zero_grad(set_to_none=True)
        (model(batch.to(trained.device)).sum() / batch.num_labels).backward()
        tokens += batch.num_tokens + batch.source.num_tokens
    seconds = time.process_time() - began
    torch.set_num_threads(threads)
    return tokens / seconds


def batches_of(settings: Settings) -> list[Any]:
    """Training batches of one packed sequence, sampled as in the last step."""
    store = ShardStore.of_run(settings.data, "train")
    order, sampling = Order.of_run(store, settings), settings.training.scheduled_sampling
    builder = Builder(store, settings.data, settings.run.seed, sampling=sampling)
    return [builder.build([order.next_step()[0]], settings.training.steps, [0]) for _ in range(TIMED_STEPS + 1)]


def spread(values: Sequence[float]) -> float:
    """Half the distance between the largest and the smallest value.

    >>> spread([1.0, 3.0])
    1.0
    """
    return (max(values) - min(values)) / 2


def show(found: Mapping[str, Sequence[Mapping[str, float]]], steps: int) -> None:
    title = f"{steps} steps; mean and half the range over seeds"
    table = Table(Column("decoder inputs", no_wrap=True), title=title, title_justify="left")
    for name in ("validation loss with true inputs, nats", "to true inputs, by seed", "tokens per CPU second"):
        table.add_column(name, justify="right")
    plain = [one["loss"] for one in found["true inputs"]]
    for name, results in found.items():
        losses, speeds = ([one[key] for one in results] for key in ("loss", "tokens_per_cpu_second"))
        differences = [loss - other for loss, other in zip(losses, plain, strict=True)]
        table.add_row(
            name,
            f"{fmean(losses):.4f} ± {spread(losses):.4f}",
            f"{fmean(differences):+.4f} ± {spread(differences):.4f}",
            f"{fmean(speeds):,.0f} ± {spread(speeds):,.0f}",
        )
    Console(highlight=False, markup=False, emoji=False, width=max(100, get_terminal_size().columns)).print(table)


def main() -> None:
    try:
        typer.run(compare)
    except UserError as error:
        print(f"compare_decoder_inputs: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER) from None


if __name__ == "__main__":
    main()
