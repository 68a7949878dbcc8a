"""Averages of the weights of several checkpoints: model soups (Wortsman et al. 2022).

In: run directories, of which the newest checkpoints are taken, or of one the average over its updates
(`training.ema_decay`), which its newest checkpoint holds. Out: a run directory with one checkpoint, the mean of
the weights, that evaluate, generate, serve, export and `model.from` take as any other; training does not resume from
it, because moments have no mean. Adapters are merged first. Guarantees: sums are fp64, rounded once to fp32; the folder
appears whole. Costs: each checkpoint is verified and read once; memory of the largest weight in fp32 and about 150 MiB
(three checkpoints of 381 MiB with a largest weight of 125 MiB: 275 MiB more than after the imports, 5.4 CPU seconds).
Greedy: also one model, an evaluation of each checkpoint and one for each after the best, and for each of these the
weights that it averages are read.

Example, greedy: losses 2.40, 2.50, 2.45 of A, B, C. The order is A, C, B. A and C together have 2.38, not above 2.40:
C stays. With B it is 2.39: B is left out. The result is the mean of A and C.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from bigmodel.config.expert_settings import TRAINING_ONLY
from bigmodel.config.model_settings import DRAWN
from bigmodel.config.sections import SAVED
from bigmodel.config.settings import ModelSettings, Settings, UserError, settings_from_table
from bigmodel.data.load.batch import Batch
from bigmodel.data.store.shards import ShardStore
from bigmodel.distributed.world import ALONE
from bigmodel.evaluation.classify import make_validation
from bigmodel.model.huggingface.folder import write_weights
from bigmodel.model.recurrent.model import build_model
from bigmodel.run_directory import read_json, tokenizer_of, write_atomically
from bigmodel.training.checkpoint import checksum
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.checkpoint.folder import manifest_of, plain
from bigmodel.training.checkpoint.format import Checkpoint, WeightSource
from bigmodel.training.checkpoint.health import usable_steps

CHUNK = 1 << 21  # elements read at once
FILE = "rank-00000.safetensors"
FREE = (  # settings of the model that may differ: of training and the beginning; shapes are compared by themselves
    "from", *DRAWN, "vectors", "vectors_absent", "min_vocabulary", "vocabulary_multiple", "mtp_loss_weight",
    "backpropagation_tokens",
)  # fmt: skip

Candidate = TypeVar("Candidate")


@dataclass(frozen=True)
class Ingredient:
    """One checkpoint of a run, its weights open."""

    run: Path
    settings: Settings
    checkpoint: Checkpoint
    weights: WeightSource

    @property
    def name(self) -> str:
        return f"{self.run}, step {self.checkpoint.state['step']}"


class Mean:
    """The mean weights, by the names of a checkpoint's file; each is computed when it is asked for."""

    def __init__(self, sources: Sequence[WeightSource]) -> None:
        self._sources = sources
        self._names = {f"weight.{name}@0": name for name in sources[0].names()}

    def __iter__(self) -> Any:
        return iter(self._names)

    def __getitem__(self, name: str) -> Tensor:
        return self.weight(self._names[name])

    def shape(self, name: str) -> list[int]:
        return [math.prod(self._sources[0].shape(self._names[name]))]

    def dtype_of(self, name: str) -> torch.dtype:
        return torch.float32

    def weight(self, name: str) -> Tensor:
        """(numel,) fp32."""
        mean = torch.empty(math.prod(self._sources[0].shape(name)))
        for first, part in zip(range(0, len(mean), CHUNK), mean.split(CHUNK), strict=True):
            total = torch.zeros(len(part), dtype=torch.float64)
            for source in self._sources:
                total += source.read(name, first, len(part))
            part.copy_(total / len(self._sources))
        return mean


def average(
    runs: Sequence[Path],
    folder: Path,
    last: int = 0,
    greedy: bool = False,
    sequences: int = 0,
    say: Callable[[str], None] = print,
    updates: bool = False,
) -> list[str]:
    """Write the mean of checkpoints as a run directory; gives the names of those in it.

    last: newest checkpoints of each run; 0: all of a single run, the newest of each of several. greedy: only those that
    do not raise the validation loss, on `sequences` packed sequences (0: all) of the first run's validation split.
    updates: the average over the updates that the newest checkpoint of a single run holds, instead of a mean of
    checkpoints. Raises `UserError` for checkpoints that do not belong together.
    """
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another folder, or delete this one")
    if updates and (len(runs) > 1 or last or greedy):
        raise UserError("--updates: takes the newest checkpoint of one run; leave out --last, --greedy and other runs")
    with ExitStack() as closing:
        key, newest = ("ema", 1) if updates else ("weight", last or (0 if len(runs) == 1 else 1))
        found = [one for run in runs for one in _open(run, newest, key, closing)]
        if updates:
            _require_average(runs[0], found)
        else:
            _require_several(found)
        for one in found[1:]:
            _require_alike(found[0], one, say)
        chosen = found
        if greedy:
            judge = Judge(found[0], sequences)
            chosen = greedy_soup(found, judge.loss, lambda one: one.name, say)
        if any(one.settings.pruning.kind != "none" for one in chosen):
            _tell_zeros(chosen, say)
        _write(folder, chosen)
    return [one.name for one in chosen]


class Judge:
    """The validation loss of means, in nats per label."""

    def __init__(self, first: Ingredient, sequences: int) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = build_model(first.settings.model, first.weights.shape("embedding.weight")[0])
        self._model.eval().to(self._device)
        self._validation, self._sequences = make_validation(first.settings.data, packs_per_micro_batch=1), sequences

    def loss(self, ingredients: Sequence[Ingredient]) -> float:
        mean = Mean([one.weights for one in ingredients])
        for name, tensor in [*self._model.named_parameters(), *self._model.named_buffers()]:
            tensor.data.copy_(mean.weight(name).view(tensor.shape))
        return self._validation.run(self._forward, ALONE, packs=self._sequences).nats_per_token

    @torch.no_grad()
    def _forward(self, batch: Batch, output: str) -> Tensor:
        return self._model(batch.to(self._device), output)


def greedy_soup(
    candidates: Sequence[Candidate],
    loss_of: Callable[[Sequence[Candidate]], float],
    name_of: Callable[[Candidate], str],
    say: Callable[[str], None],
) -> list[Candidate]:
    """From the best candidate to the worst, keep each with which the mean's loss is not above the loss without it."""
    alone = sorted(((loss_of([one]), number) for number, one in enumerate(candidates)), key=_by_loss)
    loss, number = alone[0]
    if not math.isfinite(loss):
        raise UserError(f"no checkpoint has a finite validation loss; {name_of(candidates[number])} has {loss}")
    say(f"{name_of(candidates[number])}: {loss:.4f} nats, the best")
    chosen = [candidates[number]]
    for its, number in alone[1:]:
        tried = loss_of([*chosen, candidates[number]])
        is_kept = tried <= loss
        said = "kept" if is_kept else "left out"
        say(f"{name_of(candidates[number])}: {its:.4f} nats, with those before {tried:.4f}: {said}")
        if is_kept:
            chosen.append(candidates[number])
            loss = tried
    return chosen


def _by_loss(pair: tuple[float, int]) -> tuple[bool, float, int]:
    loss, number = pair
    return (math.isnan(loss), loss, number)


def _open(run: Path, last: int, key: str, closing: ExitStack) -> list[Ingredient]:
    """The newest `last` checkpoints of a run, or all (0), oldest first, verified; key: "weight" or "ema"."""
    saved = run / "settings.json"
    if not saved.exists():
        raise UserError(f"{run}: not a run directory (no settings.json); give the run.directory of a training run")
    settings = settings_from_table(read_json(saved), saved, saved=True)
    found = []
    for step in usable_steps(run / "checkpoints")[-last:]:
        path = checkpoint.path_of(run / "checkpoints", step)
        if problems := checkpoint.verify(path, ALONE):
            raise UserError(
                f"{path}: this checkpoint is damaged: {'; '.join(problems[:2])}; leave it out, or delete it"
            )
        opened = checkpoint.open_own(path)
        weights = closing.enter_context(checkpoint.weights(opened, key, kept_open=0))
        found.append(Ingredient(run, settings, opened, weights))
    return found


def _require_average(run: Path, found: Sequence[Ingredient]) -> None:
    if not found:
        raise UserError(f"{run}: there is no checkpoint; train first")
    if not found[0].weights.shapes:
        raise UserError(f"{found[0].name}: holds no average over updates; train with training.ema_decay, e.g. 0.999")


def _require_several(found: Sequence[Ingredient]) -> None:
    paths = [one.checkpoint.path.resolve() for one in found]
    if len(paths) < 2:
        has = f"{found[0].run} has one" if found else "there is none"
        raise UserError(
            f"an average needs at least 2 checkpoints, and {has}; keep more with checkpoint.keep, or name more runs"
        )
    if twice := next((path for number, path in enumerate(paths) if path in paths[:number]), None):
        raise UserError(f"{twice}: this checkpoint is named twice; name each run once")


def _require_alike(first: Ingredient, other: Ingredient, say: Callable[[str], None]) -> None:
    """Raises `UserError` where two checkpoints have different models, tokenizers or classes."""
    remedy = "only checkpoints of one model can be averaged; leave it out"
    theirs, its = ({**_saved_model(one), "classes": one.settings.classification.classes} for one in (first, other))
    for name in sorted(theirs):
        if name not in FREE and theirs[name] != its[name]:
            section = "classification" if name == "classes" else "model"
            raise UserError(
                f"{other.name}: {section}.{name} = {its[name]}, and {first.name} has {theirs[name]}: {remedy}"
            )
    shapes, its_shapes = first.weights.shapes, other.weights.shapes
    for name in [*shapes, *its_shapes]:
        if shapes.get(name) != its_shapes.get(name):
            raise UserError(
                f"{other.name}: {name} is {its_shapes.get(name, 'absent')}, and {shapes.get(name, 'absent')} in "
                f"{first.name}: {remedy}"
            )
    if first.run == other.run:
        return
    if _tokenizer(first) != _tokenizer(other):
        raise UserError(
            f"{other.name}: the tokenizer of its data ({other.settings.data.directory}) is not that of {first.name} "
            f"({first.settings.data.directory}): the same row of the embedding is another token; leave it out"
        )
    if not _have_one_beginning(first, other):
        say(
            f"warning: {first.run} and {other.run} began with other weights (run.seed, model.from); the mean of such "
            "runs is rarely any good: soups are of runs with one beginning"
        )


def _tokenizer(one: Ingredient) -> str:
    recorded = tokenizer_of(one.run)  # the folder may have been prepared again since
    return recorded or ShardStore.of_run(one.settings.data, "validation").manifest.tokenizer_sha256


def _saved_model(one: Ingredient) -> dict[str, Any]:
    """The model settings of a checkpoint, also those that its version did not have; of experts without the strengths
    of their balance, which are of training."""
    settings = ModelSettings.model_validate(one.checkpoint.description["model"], context=SAVED)
    return settings.model_dump(mode="json", exclude={"experts": set(TRAINING_ONLY)})


def _have_one_beginning(one: Ingredient, other: Ingredient) -> bool:
    """Also a run and one that began from it."""
    starts = [run.settings.model.start_folder for run in (one, other)]
    if starts == [None, None]:
        return one.settings.run.seed == other.settings.run.seed
    begins = {start.resolve() if start else run.run.resolve() for start, run in zip(starts, (one, other), strict=True)}
    return len(begins) == 1


def _tell_zeros(chosen: Sequence[Ingredient], say: Callable[[str], None]) -> None:
    """Warn if a pruned checkpoint has zeros that the mean lacks: a mean is 0 only where all are."""
    sources = [one.weights for one in chosen]
    its, shared = [0] * len(sources), 0
    for name in sources[0].names():
        zeros = [source.read(name, 0, math.prod(source.shape(name))) == 0 for source in sources]
        its = [before + int(mask.sum()) for before, mask in zip(its, zeros, strict=True)]
        shared += int(torch.stack(zeros).all(0).sum())
    most = max(range(len(its)), key=lambda number: its[number])
    if its[most] > shared:
        say(
            f"warning: {chosen[most].name} has {its[most]:,} weights that are 0, and the mean {shared:,}: checkpoints "
            "are pruned in other places; average those of one run after pruning.end_step"
        )


def _write(folder: Path, chosen: Sequence[Ingredient]) -> None:
    """The run directory: settings.json and one checkpoint, in a staging folder that is renamed at last."""
    staging = folder.parent / f"{folder.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    first, step = chosen[0], max(one.checkpoint.state["step"] for one in chosen)
    part = checkpoint.path_of(staging / "checkpoints", step)
    part.mkdir(parents=True)
    table = read_json(first.run / "settings.json")
    table["run"]["directory"] = str(folder)
    table.pop("lora", None)  # merged
    write_atomically(staging / "settings.json", json.dumps(table, indent=2) + "\n")
    if (record := first.run / "data_manifest.json").is_file():
        shutil.copyfile(record, staging / record.name)
    mean = Mean([one.weights for one in chosen])
    write_weights(part / FILE, mean, list(mean))
    then = first.checkpoint.description
    description = {
        **{name: then[name] for name in ("updates", "model", "optimizer")},
        "scaler": {},
        "shapes": first.weights.shapes,
        "keys": {name: ["weight"] for name in first.weights.names()},
        "state": {"step": step},
        "average": [{"run": str(one.run), "step": one.checkpoint.state["step"]} for one in chosen],
    }
    write_atomically(part / "state.json", plain(description))
    files = {name: checksum.of_file(part / name) for name in (FILE, "state.json")}
    write_atomically(part / "manifest.json", manifest_of(files, world_size=1))
    os.replace(staging, folder)
