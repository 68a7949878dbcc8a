"""Exact check: the run's first steps under its own DeepSpeed JSON, against plain torch in one process.

In: a run file. Out: findings, and a table of losses, gradient norms, gradients and weights with their bounds. The
gradient norm is compared under every ZeRO stage that the JSON allows. Costs: the steps twice in plain torch, in float64
and in the run's precision, and once on two ranks: minutes for a small model. A large one is refused.
"""

import contextlib
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from bigmodel.checks.audit import Finding
from bigmodel.checks.exact_rank import Effective, Job
from bigmodel.checks.exact_steps import Reference, Row, Trace, first_steps, new_start
from bigmodel.checks.plain_torch import PlainTraining
from bigmodel.checks.runs import PROCESS_SECONDS, finish, num_ranks, started
from bigmodel.checks.scratch import scratch_folder
from bigmodel.config.deepspeed_config import ZEROPP, agree, packs_per_micro_batch, resolve_deepspeed
from bigmodel.config.deepspeed_json import Source, value_at
from bigmodel.config.settings import Settings, UserError, load_settings
from bigmodel.data.plan.sharing import Place
from bigmodel.distributed.world import ALONE
from bigmodel.inspect.memory import activation_bytes, model_without_memory, state_bytes
from bigmodel.planning.context import vocabulary_of
from bigmodel.planning.memory import GIB
from bigmodel.run_directory import read_json_lines, write_json
from bigmodel.sizes import counted_noun

STEPS = 20
PLAIN_SECONDS = 300  # after which a training in plain torch ends early
LEAST_STEPS = 2
WIDEST_HEAD = 256  # channels that the GPU kernels take
WHOLE = {"zero_optimization": {"stage": 0}}  # nothing partitioned
Say = Callable[[str], None]


def check_exact(run_file: Path, overrides: Sequence[str]) -> list[Finding]:
    """Train in plain torch, then under DeepSpeed; print the table."""
    console = Console(highlight=False, markup=False, emoji=False)
    settings = agree(load_settings(run_file, overrides))
    ranks = num_ranks(settings)
    on_cpu = torch.cuda.device_count() < ranks
    with scratch_folder() as folder, _live(console) as say:
        job = prepare(run_file, overrides, ranks, folder, "cpu" if on_cpu else "cuda", say)
        with started(["-m", "bigmodel.checks.exact_rank", str(folder)], ranks, folder, on_cpu) as processes:
            _wait(processes, folder, say)
        report = read_report(folder)
    console.print(_table(settings, job, ranks, report))
    return findings(job, ranks, report)


@contextlib.contextmanager
def _live(console: Console) -> Iterator[Say]:
    """What is done now, as a line in a terminal."""
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("")
        yield lambda words: progress.update(task, description=words)


def prepare(
    run_file: Path, overrides: Sequence[str], ranks: int, folder: Path, device: str, say: Say = lambda words: None
) -> Job:
    """Train in plain torch; write the job and the reference of the ranks into `folder`.

    device: of plain torch in the run's precision. Raises `UserError` for a run that cannot be compared.
    """
    settings = agree(load_settings(run_file, overrides))
    effective, by_stage = resolve(settings, ranks, folder), _by_stage(settings, ranks, folder)
    _refuse(run_file, settings, [effective, *by_stage.values()], ranks, device)
    steps = min(STEPS, settings.training.steps)
    wide = _Plain(settings, effective, "cpu", True, steps, say)
    reference = wide.save(folder / "reference.safetensors")
    steps, wanted = len(wide.losses), Trace(wide.losses, wide.norms)
    del wide
    rounding = _Plain(settings, effective, device, False, steps, say, math.inf).compared(reference)
    job = Job(str(run_file), list(overrides), steps, effective, by_stage, list(wanted), list(rounding))
    write_json(folder / "job.json", job._asdict())
    return job


def findings(job: Job, ranks: int, report: dict[str, list[Any]]) -> list[Finding]:
    """report: of the ranks."""
    stage = job.effective["zero_optimization"]["stage"]
    exact = Finding(
        f"{counted_noun(job.steps, 'step')} under ZeRO {stage} on {counted_noun(ranks, 'rank')} are those of plain "
        "torch in one process",
        all(row.holds for row in report["rows"]),
        _evidence(report["rows"]) + _explanation(job, report),
    )
    norms = [row.found for row in report["norms"]]
    same = Finding(
        f"the gradient norm of step 1 is plain torch's under ZeRO {', '.join(job.by_stage)}; so is the one by which "
        "DeepSpeed clips (its issue 7718)",
        all(row.holds for row in report["norms"]),
        f"{min(norms):.7g} to {max(norms):.7g}",
    )
    return [exact, same]


def read_report(folder: Path) -> dict[str, list[Any]]:
    """What the ranks found: rows, keys of the JSON that explain a difference, norms by stage."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return report | {name: [Row(*row) for row in report[name]] for name in ("rows", "norms")}


class _Plain:
    """A training in plain torch, with what is compared of it."""

    def __init__(
        self,
        settings: Settings,
        effective: Effective,
        device: str,
        wide: bool,
        steps: int,
        say: Say,
        seconds: float = PLAIN_SECONDS,
    ) -> None:
        alone = settings.training.model_copy(update={"expert_parallel_ranks": 1, "tensor_parallel_ranks": 1})
        model, exact = new_start(settings.model_copy(update={"training": alone}), WHOLE, ALONE)
        training = PlainTraining(model.to(device), settings, wide, exact)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.start = training.weights()
        began = time.monotonic()
        with contextlib.closing(first_steps(settings, effective, Place(0, 1), steps)) as stream:
            for step in stream:
                if len(self.losses) >= LEAST_STEPS and time.monotonic() - began > seconds:
                    break
                kind = "float64" if wide else settings.training.precision
                say(f"plain torch in {kind}: step {step.number + 1} of {steps}")
                self.losses.append(training.accumulate((one.to(device) for one in step.micro_batches), step.weight))
                if step.number == 0:
                    self.gradients = training.gradients()
                self.norms.append(training.update(step.number))
                if not math.isfinite(self.norms[-1]):
                    raise UserError(
                        f"step {step.number + 1}: in plain torch in {kind} the gradient norm is {self.norms[-1]}; "
                        "there is nothing to compare with, so lower optimizer.learning_rate or check the data"
                    )
        self.weights, self.averages = training.weights(), training.averages()

    def save(self, path: Path) -> Reference:
        """As the reference."""
        tensors = {f"gradient.{name}": gradient.float() for name, gradient in self.gradients.items()}
        tensors |= {f"start.{name}": start.float() for name, start in self.start.items()}
        for key, last in (("weight", self.weights), ("average", self.averages)):
            tensors |= {f"{key}.{name}": (value - self.start[name]).float() for name, value in last.items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        return Reference(path, Trace(self.losses, self.norms))

    def compared(self, reference: Reference) -> Trace:
        names = list(self.weights)

        def moved(key: str, last: dict[str, Tensor]) -> float:
            return reference.moved(key, names, last.__getitem__)

        averages = moved("average", self.averages) if self.averages else None
        gradient = reference.gradient(names, self.gradients.__getitem__)
        return Trace(self.losses, self.norms, gradient, moved("weight", self.weights), averages)


def _by_stage(settings: Settings, ranks: int, folder: Path) -> dict[str, Effective]:
    """The run's configuration under each ZeRO stage that goes with the rest of it."""
    found = {}
    for stage in range(3 if settings.training.compile else 4):
        with contextlib.suppress(UserError):
            found[str(stage)] = resolve(settings, ranks, folder, stage)
    return found


def resolve(settings: Settings, ranks: int, folder: Path, stage: int | None = None) -> Effective:
    """The configuration on this number of ranks, which may be written for more: without the sizes that depend on it.

    stage: instead of the run's own; keys that only ZeRO 3 has are left out below.
    """
    given, copy = settings.training.deepspeed, folder / "deepspeed.json"
    config = Source(given).read()
    for name in ("gradient_accumulation_steps", "train_batch_size"):
        config.pop(name, None)
    if stage is not None:
        zero = {**(config.get("zero_optimization") or {}), "stage": stage}
        outside = () if stage == 3 else ("offload_param", *ZEROPP)
        config["zero_optimization"] = {name: value for name, value in zero.items() if name not in outside}
    write_json(copy, config)
    training = settings.training.model_copy(update={"deepspeed": copy})
    try:
        return resolve_deepspeed(settings.model_copy(update={"training": training}), ranks)[0]
    except UserError as error:
        raise UserError(str(error).replace(str(copy), str(given or "the default DeepSpeed configuration"))) from None


def _refuse(run_file: Path, settings: Settings, configurations: Sequence[Effective], ranks: int, device: str) -> None:
    """Raises `UserError` for a run that cannot be compared here."""
    if settings.distillation.teacher:
        raise UserError(
            f"{run_file}: distillation.teacher = {settings.distillation.teacher}: a distillation is not compared with "
            "plain torch; check the same run without [distillation]"
        )
    vocabulary = vocabulary_of(settings)
    numel = sum(parameter.numel() for parameter in model_without_memory(settings, vocabulary).parameters())
    needed = _plain_bytes(settings, configurations[0], vocabulary, numel)
    if device == "cpu":
        needed = max(needed, ranks * _rank_bytes(settings, configurations, vocabulary, ranks))
    free = psutil.virtual_memory().available
    if needed > free:
        fewer = "check fewer layers of the same model: --set model.num_layers=2"
        remedy = "use a machine with more" if settings.model.start_folder else fewer
        raise UserError(
            f"{run_file}: a model of {numel:,} parameters needs {needed / GIB:,.1f} GiB of memory for this comparison; "
            f"{free / GIB:,.1f} GiB are free: {remedy}"
        )


def _plain_bytes(settings: Settings, effective: Effective, vocabulary: int, numel: int) -> int:
    """Most memory of plain torch in float64."""
    state = state_bytes(settings, effective | WHOLE, vocabulary, 1).device
    moments = 2 * (state.get("moments", 0) + state.get("average of weights", 0))  # in fp32 there
    weights = 8 * numel * 8  # model and masters, their gradients and a sum; the first gradient, first and last weights
    alone: dict[str, Any] = {"precision": "fp32", "activation_checkpointing": "none"}
    alone |= {"sequence_parallel_ranks": 1, "expert_parallel_ranks": 1, "tensor_parallel_ranks": 1}
    narrow = settings.model_copy(update={"training": settings.training.model_copy(update=alone)})
    return moments + weights + 2 * _activations(narrow, effective, vocabulary)


def _rank_bytes(settings: Settings, configurations: Sequence[Effective], vocabulary: int, ranks: int) -> int:
    """Most memory of a rank without a GPU."""
    plans = [state_bytes(settings, effective, vocabulary, ranks) for effective in configurations]
    state = max(sum(plan.device.values()) + sum(plan.host.values()) for plan in plans)
    return state + _activations(settings, configurations[0], vocabulary)


def _activations(settings: Settings, effective: Effective, vocabulary: int) -> int:
    if settings.model.resolved_head_dim > WIDEST_HEAD and not settings.model.is_recurrent:
        return 0  # not known: the plan is that of a GPU, whose kernels refuse such heads
    return activation_bytes(settings, effective, vocabulary)


def _wait(processes: Sequence[subprocess.Popen], folder: Path, say: Say) -> None:
    """Until all ranks have ended. Raises `UserError` if one fails, or if there is no step for long."""
    done, since = -1, time.monotonic()
    while all(process.poll() is None for process in processes):
        steps = sum(1 for _ in read_json_lines(folder / "progress.jsonl"))
        if steps > done:
            done, since = steps, time.monotonic()
            say(f"DeepSpeed on {counted_noun(len(processes), 'rank')}: {counted_noun(done, 'step')} done")
        if time.monotonic() - since > PROCESS_SECONDS:
            raise UserError(f"the ranks of a check have made no step in {PROCESS_SECONDS} s; check a smaller model")
        time.sleep(0.1)
    finish(processes, folder)


def _evidence(rows: Sequence[Row]) -> str:
    """The rows out of bounds, or the one nearest to its bound."""
    shown = [row for row in rows if not row.holds] or [max(rows, key=lambda row: row.difference / row.bound)]
    return ", ".join(f"{row.what} of {row.where}: {row.difference:.1e}, bound {row.bound:.1e}" for row in shown)


def _explanation(job: Job, report: dict[str, list[Any]]) -> str:
    if all(row.holds for row in report["rows"]):
        return ""
    keys = [f"{key} = {json.dumps(value_at(job.effective, key))}" for key in report["keys"]]
    if not keys:
        return "; it stays with the defaults of all other keys of the DeepSpeed JSON"
    return f"; because of {' and '.join(keys)}: with the default every row is within its bound"


def _table(settings: Settings, job: Job, ranks: int, report: dict[str, list[Any]]) -> Table:
    stage, packs = job.effective["zero_optimization"]["stage"], packs_per_micro_batch(job.effective)
    early = f" (of {STEPS}: plain torch is slow here)" if job.steps < min(STEPS, settings.training.steps) else ""
    pruned = "; pruning is left out" if settings.pruning.kind != "none" else ""
    table = Table(
        title=f"{counted_noun(job.steps, 'step')}{early}, {settings.training.precision}, {settings.optimizer.kind}, "
        f"ZeRO {stage}, {counted_noun(ranks, 'rank')}, micro-batches of {counted_noun(packs, 'packed sequence')}"
        f"{pruned}",
        title_justify="left",
    )
    for name in ("", "plain torch", "DeepSpeed", "difference, bound"):
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    for part in (report["rows"], report["norms"]):
        for row in part:
            numbers = ("" if one is None else f"{one:.7g}" for one in (row.wanted, row.found))
            difference = f"{row.difference:.1e} {'<=' if row.holds else '> '} {row.bound:.1e}"
            table.add_row(f"{row.what}, {row.where}", *numbers, difference, style="" if row.holds else "red")
        table.add_section()
    return table
