"""Checkpoint format and reading. A checkpoint is the whole state of a run, by parameter name; it appears complete or
not at all. saver.py writes it, remote.py copies it to an object store.

    checkpoints/step-00000100/
      rank-00000.safetensors ...   weight.NAME@START, exp_avg.NAME@START ...: the rank's shards of parameters, flat,
                                   fp32; START is the index of the first element in the flattened tensor. A shard
                                   of tensor-parallel ranks may be several ranges: `Place` in slices.py
      state.json                   step, updates, the caller's state (cursor, counters), model, optimizer, shapes, keys,
                                   the run's id (identity.py)
      manifest.json                bytes and checksum of every other file, world size, versions, its own checksum
      healthy                      a mark, later: training stayed on its course after it (health.py)

Example: a weight of shape (4, 3) in equal shards on 2 ranks: rank 0 has weight.NAME@0, 6 elements; rank 1
weight.NAME@6, 6 elements.

In: a folder on a file system shared by all ranks. Out: a verified checkpoint, loaded into an engine. Guarantees:
- Only bytes that match their checksums (checksum.py) are loaded. A damaged checkpoint is reported and the next older
  good one is used. If all are damaged, that is an error, never a silent start from step 0.
- The format is independent of world size, ZeRO stage and accumulation: a checkpoint loads under any of them.
- No pickle. torch.distributed.checkpoint is not used: its metadata is a pickle; it has no checksums and no publication.
Cost: each resume reads all bytes once, shared by the ranks; then each rank reads only its own shards.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bigmodel.config.expert_settings import TRAINING_ONLY
from bigmodel.config.model_settings import DRAWN
from bigmodel.config.renamed import new_keys
from bigmodel.config.sections import without_effect
from bigmodel.config.settings import SAVED, LoraSettings, ModelSettings, Settings, UserError
from bigmodel.distributed.world import ALONE, World
from bigmodel.run_directory import fsync_directory
from bigmodel.sizes import counted_noun
from bigmodel.training.checkpoint import checksum
from bigmodel.training.checkpoint import remote as store
from bigmodel.training.checkpoint.folder import path_of, read_manifest, remove_partials, steps
from bigmodel.training.checkpoint.health import go_back, usable_steps
from bigmodel.training.checkpoint.identity import require_own
from bigmodel.training.checkpoint.merged import MergedReader
from bigmodel.training.slices import Place, Run, one_range, parse_place, parts_of

Read = Callable[[str, str, int, int], Tensor]  # (name, key, start, numel) -> those elements, flat, fp32
Piece = tuple[str, str, int, str]  # "key.name", place (`START`, or a `Place`), numel, file name


class States(Protocol):
    """The part of the engine (bigmodel/training/zero/engine.py) that checkpoints use."""

    updates: int

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def keys(self, name: str) -> list[str]: ...
    def owned(self, name: str) -> Mapping[str, tuple[int | Place, Tensor]]: ...
    def write(self, read: Read, updates: int, scaler: dict[str, float]) -> None: ...
    def scaler_state(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `state` is the caller's state of the save."""

    path: Path
    parts: list[str]  # the tensor files named in the manifest; other files in the folder are not verified
    state: dict[str, Any]
    description: dict[str, Any]  # updates, model, optimizer, shapes, keys, scaler


def newest(
    directory: Path,
    world: World | None = None,
    report: Callable[[str], None] | None = None,
    remote: str = "",
    refused: Callable[[int], bool] = lambda step: False,
) -> Checkpoint | None:
    """The newest checkpoint with every byte verified; None if there is no checkpoint. Collective.

    world: of the run that owns the folder; staging folders left by a kill are removed, and after a divergence the
    checkpoints since then are set aside (health.py). None: one process that only reads, perhaps while the run
    continues. report: called on rank 0 for each damaged checkpoint; default: print to stderr. remote: a folder in a
    store; missing or damaged local checkpoints are fetched from it. A checkpoint that is damaged in both places is
    skipped. refused: steps whose copies in the store are not used.
    Raises `UserError` if all checkpoints are damaged, the store cannot be read, or the run that owns it is an average;
    and for a checkpoint of another step, run (identity.py) or format.
    """
    report = report or (lambda text: print(f"bigmodel: {text}", file=sys.stderr, flush=True))
    is_owner = world is not None
    if world:
        world.on_rank_zero(lambda: remove_partials(directory))
        if (line := world.on_rank_zero(lambda: go_back(directory, remote))) and world.rank == 0:
            report(line)
    world = world or ALONE
    here, there = world.on_rank_zero(
        lambda: (set(usable_steps(directory)), set(store.steps(remote)) if remote else set())
    )
    there = {step for step in there if not refused(step)}
    damage: list[str] = []
    for step in sorted(here | there, reverse=True):
        path = path_of(directory, step)
        problems = verify(path, world) if step in here else []
        if step in there and (problems or step not in here):
            copy = store.fetch(remote, path, world, read_manifest)
            problems = [*problems, *(f"in {remote}: {problem}" for problem in copy)] if copy else verify(path, world)
        if not problems:
            if world.rank == 0 and damage:
                report(f"using the older checkpoint {path} instead")
            found = world.on_rank_zero(partial(open_own, path, remote if step in there else ""))
            if is_owner:
                _refuse_average(found)
            return found
        damage.append(f"checkpoint {path} is damaged: {'; '.join(problems[:2])}")
        if world.rank == 0:
            report(damage[-1])
    if damage:
        anew = ", or start over with --fresh (which sets them aside)" if is_owner else ""
        raise UserError(
            f"{directory}: none of {counted_noun(len(damage), 'checkpoint')} is whole; {damage[0]}; restore one from a "
            f"copy{anew}"
        )
    return None


def of_run(run_directory: Path, best: bool = False) -> Checkpoint:
    """The newest good checkpoint of a run, or the best (`checkpoint.keep_best`). `UserError`: there is none."""
    directory = run_directory / "checkpoints"
    if not best:
        found = newest(directory)
        if found is None:
            raise UserError(f"{run_directory}: no checkpoint yet; train until checkpoint.every_steps is reached")
        return found
    step = best_step(directory)
    lost = max((_named_best(directory, saved) for saved in steps(directory)), default=0)
    if not step and lost:
        raise UserError(
            f"{path_of(directory, lost)}: --best: the best checkpoint is not here; copy this folder from where it is, "
            "as checkpoint.remote (a run that resumes from there fetches only the newest)"
        )
    if not step:
        raise UserError(
            f"{run_directory}: --best: no best checkpoint; train with checkpoint.keep_best and evaluation.every_steps"
        )
    if problems := verify(path_of(directory, step), ALONE):
        raise UserError(f"{path_of(directory, step)}: the best checkpoint is damaged: {'; '.join(problems[:2])}")
    return open_own(path_of(directory, step))


def best_step(directory: Path) -> int:
    """The step that the newest checkpoint calls the best, or an older one if that was never saved; 0: none."""
    saved = steps(directory)
    named = (_named_best(directory, step) for step in reversed(saved))
    return next((step for step in named if step in saved), 0)


def _named_best(directory: Path, step: int) -> int:
    """The step that the checkpoint of a step calls the best; 0: none, or it cannot be read."""
    with contextlib.suppress(OSError, ValueError, LookupError):
        return int(open_checkpoint(path_of(directory, step)).state.get("best", {}).get("step", 0))
    return 0


def verify(path: Path, world: World) -> list[str]:
    """The problems of a checkpoint, one line per file; empty if all checksums match. Collective.

    Each rank reads its share of the files.
    """
    manifest, problem = world.on_rank_zero(lambda: read_manifest(path))
    if problem:
        return [problem]
    problems = []
    for number, (name, facts) in enumerate(sorted(manifest["files"].items())):
        if number % world.size == world.rank:
            problems += _check_file(path / name, facts)
    return [line for part in world.gather_objects(problems) for line in part]


def load(checkpoint: Checkpoint, engine: States, settings: Settings, world: World) -> None:
    """Load a verified checkpoint into the engine, from any world size and ZeRO stage to any other. Collective.

    Raises `UserError` with the first model setting, optimizer or parameter that differs; the engine is unchanged then.
    """
    _compare_model(checkpoint, settings)
    _compare_adapters(checkpoint, settings)
    _compare_shapes(checkpoint, engine)
    mine = [chunk for name in checkpoint.parts[world.rank :: world.size] for chunk in _pieces(checkpoint.path / name)]
    chunks = [chunk for part in world.gather_objects(mine) for chunk in part]
    with Reader(checkpoint.path, chunks) as read:
        then = checkpoint.description
        engine.write(partial(_read_or_begin, then["keys"], read), then["updates"], then["scaler"])


@dataclass(frozen=True)
class WeightSource:
    """The fp32 weights of a checkpoint by parameter name, read when they are asked for. Not collective.

    key: "weight", or "ema" for the average of the weights over the updates, if the run kept one.
    """

    shapes: dict[str, list[int]]
    key: str
    reader: Read

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> list[int]:
        return self.shapes[name]

    def read(self, name: str, start: int, numel: int) -> Tensor:
        """(numel,) elements of the flattened weight from `start` on."""
        return self.reader(name, self.key, start, numel)


@contextlib.contextmanager
def weights(
    checkpoint: Checkpoint, key: str = "weight", merge: bool = True, kept_open: int = 64
) -> Iterator[WeightSource]:
    """Open the weights of a checkpoint, without an engine. merge: adapters are added to their weights. kept_open: most
    open files, whose pages stay in memory; 0: each is closed after a read."""
    description = checkpoint.description
    shapes = description["shapes"] if any(key in keys for keys in description["keys"].values()) else {}
    chunks = [chunk for name in checkpoint.parts for chunk in _pieces(checkpoint.path / name)]
    with Reader(checkpoint.path, chunks, kept_open) as read:
        found = partial(_read_or_begin, description["keys"], read)  # frozen weights have no average of their own
        if merge and "lora" in description:
            reader = MergedReader(found, shapes, lora_of(checkpoint).scale)
            yield WeightSource(reader.shapes, key, reader)
        else:
            yield WeightSource(shapes, key, found)


def lora_of(checkpoint: Checkpoint) -> LoraSettings:
    """The settings of a checkpoint's adapters; rank 0: it has none."""
    return LoraSettings.model_validate(checkpoint.description.get("lora", {}), context=SAVED)


def read_weights(checkpoint: Checkpoint, key: str = "weight") -> dict[str, Tensor]:
    """All weights of a checkpoint by parameter name, in memory."""
    with weights(checkpoint, key) as source:
        return {
            name: source.read(name, 0, torch.Size(shape).numel()).view(shape) for name, shape in source.shapes.items()
        }


def set_aside(directory: Path, remote: str = "") -> Path | None:
    """Rename the folder of checkpoints (for --fresh), so that no start resumes from it; returns the new path.

    Call it in one process. The old checkpoints stay readable under the new name until the user removes them.
    Raises `UserError` if the store has checkpoints: the next start would resume from them.
    """
    if remote and (there := store.steps(remote)):
        raise UserError(
            f"--fresh: checkpoint.remote = {remote} has the checkpoint of step {max(there)}; the next start would "
            "resume from it; give the new run another checkpoint.remote"
        )
    if not directory.exists():
        return None
    number = 1
    while (aside := directory.with_name(f"{directory.name}-set-aside-{number}")).exists():
        number += 1
    os.rename(directory, aside)
    fsync_directory(aside.parent)
    return aside


def _check_file(path: Path, facts: Mapping[str, Any]) -> list[str]:
    try:
        found: dict[str, Any] = {"bytes": path.stat().st_size}
        if found["bytes"] == facts["bytes"]:
            found = checksum.of_file(path, checksum.algorithm_of(facts))
    except OSError as error:
        return [f"{path.name} cannot be read: {error.strerror}"]
    return checksum.difference(path.name, facts, found)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint without verifying its files; `newest` verifies them."""
    description = json.loads((path / "state.json").read_bytes())
    parts = [name for name in sorted(read_manifest(path)[0]["files"]) if name.endswith(".safetensors")]
    return Checkpoint(path, parts, description["state"], description)


def open_own(path: Path, remote: str = "") -> Checkpoint:
    """Open a verified checkpoint of the run whose directory it is in. Raises `UserError` if it is not its own. remote:
    the store that has a copy."""
    found = open_checkpoint(path)
    require_own(path, found.description, path.parents[1], remote)
    return found


# --- the content


def _refuse_average(checkpoint: Checkpoint) -> None:
    if "average" in checkpoint.description:  # bigmodel/evaluation/average.py
        raise UserError(
            f"{checkpoint.path}: an average of checkpoints has no state of the optimizer, so its run cannot go on; "
            f"begin another run with model.from = {json.dumps(str(checkpoint.path.parents[1]))}"
        )


def _compare_model(checkpoint: Checkpoint, settings: Settings) -> None:
    """Model settings must equal those of the checkpoint. Exceptions: dropout and truncated back-propagation, which
    change no weight, and settings without effect there, which earlier versions accepted."""
    now = settings.model.model_dump(mode="json")
    saved = new_keys("model", checkpoint.description["model"])
    then = ModelSettings().model_dump(mode="json") | saved  # settings newer than the checkpoint have their default
    pairs = {f"model.{name}": (now.get(name), then.get(name)) for name in sorted(now.keys() | then.keys())}
    unread = without_effect(ModelSettings.model_construct(**then))
    free = {f"model.{name}" for name in (*DRAWN, "backpropagation_tokens", *unread)}
    pairs["optimizer.kind"] = (settings.optimizer.kind, checkpoint.description["optimizer"])
    pairs |= _pairs_of_experts(*pairs.pop("model.experts"))
    for name, (mine, its) in pairs.items():
        if name not in free and mine != its:
            raise UserError(
                f"{name} = {mine}, but checkpoint {checkpoint.path} was made with {its}; "
                "set it back, choose another run.directory, or start over with --fresh"
            )


def _pairs_of_experts(now: dict[str, Any] | None, then: dict[str, Any] | None) -> dict[str, tuple[Any, Any]]:
    """What may not change of them."""
    if not now or not then:
        return {"model.experts": (now, then)}
    names = sorted((now.keys() | then.keys()) - set(TRAINING_ONLY))
    return {f"model.experts.{name}": (now.get(name), then.get(name)) for name in names}


def _compare_adapters(checkpoint: Checkpoint, settings: Settings) -> None:
    """What adapters are added with; their shapes are compared as all others are."""
    now, then = settings.lora, lora_of(checkpoint)
    for name, mine, its in (("rank", now.rank, then.rank), ("scale", now.rank and now.scale, then.rank and then.scale)):
        if mine != its:
            given = f"lora.{name} = {mine}" if name == "rank" else f"lora.alpha / rslora give the scale {mine}"
            raise UserError(
                f"{given}, but checkpoint {checkpoint.path} was made with {its}; set it back, or begin another run "
                f"with model.from = {json.dumps(str(checkpoint.path.parents[1]))}"
            )


def _compare_shapes(checkpoint: Checkpoint, engine: States) -> None:
    then = {name: tuple(shape) for name, shape in checkpoint.description["shapes"].items()}
    now = {name: engine.shape(name) for name in engine.names()}
    for name in [*now, *then]:
        if now.get(name) != then.get(name):
            raise UserError(
                f"parameter {name} is {now.get(name, 'absent')} in this model and {then.get(name, 'absent')} in "
                f"checkpoint {checkpoint.path}; another vocabulary or model: use the data and settings of the "
                "checkpoint, or start over with --fresh"
            )
    for name in now:
        lacking = set(engine.keys(name)) - set(checkpoint.description["keys"][name]) - {"ema"}
        if lacking:
            raise UserError(
                f"optimizer.groups or training.freeze: {name} needs {', '.join(sorted(lacking))}, missing in "
                f"checkpoint {checkpoint.path}; set them back, or start over with --fresh"
            )


def _read_or_begin(
    keys: Mapping[str, Sequence[str]], read: Read, name: str, key: str, start: int, numel: int
) -> Tensor:
    """Read a tensor; an average that the checkpoint lacks begins with the weights."""
    return read(name, key if key in keys[name] else "weight", start, numel)


def _pieces(file: Path) -> list[Piece]:
    """The shards in a file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            found = [(name, tensors.get_slice(name).get_shape()[0]) for name in tensors.keys()]  # noqa: SIM118 - no dict
    except SafetensorError as error:
        raise UserError(f"{file}: not a safetensors file: {error}; restore it from a copy") from None
    return [(name.rpartition("@")[0], name.rpartition("@")[2], numel, file.name) for name, numel in found]


class Held(NamedTuple):
    """Elements of a whole tensor that a file holds: in its tensor `name`, from number `at` on."""

    run: Run
    at: int
    name: str
    file: str


class Reader:
    """Reads ranges of elements from the files that hold them; at most `kept_open` files are open."""

    def __init__(self, path: Path, chunks: Sequence[Piece], kept_open: int = 64) -> None:
        self._path = path
        self._held: dict[str, list[Held]] = {}
        for tensor, place, numel, file in chunks:
            start, runs = parse_place(place)
            at = 0
            for run in parts_of(runs, start, numel) if runs else [one_range(start, numel)]:
                self._held.setdefault(tensor, []).append(Held(run, at, f"{tensor}@{place}", file))
                at += run.numel
        for held in self._held.values():
            held.sort()
        self._file = lru_cache(maxsize=kept_open)(lambda name: safe_open(path / name, framework="pt"))

    def __enter__(self) -> Read:
        return self._read

    def __exit__(self, *error: object) -> None:
        self._file.cache_clear()

    def _read(self, name: str, key: str, start: int, numel: int) -> Tensor:
        parts = list(self._overlaps(f"{key}.{name}", start, start + numel))
        assert sum(run.numel for run, _ in parts) == numel, f"{self._path}: {key}.{name} is not all there"
        if len(parts) == 1:
            return parts[0][1]
        found = torch.empty(numel, dtype=torch.float32)
        for run, values in parts:
            run._replace(first=run.first - start).of(found).copy_(values.view(run.repeats, run.length))
        return found

    def _overlaps(self, tensor: str, start: int, end: int) -> Iterator[tuple[Run, Tensor]]:
        """What the files hold of the range: where it is in the whole, and the elements."""
        for held in self._held.get(tensor, []):
            if held.run.first >= end:
                return
            for number, run in held.run.within(start, end):
                low = held.at + number
                yield run, self._file(held.file).get_slice(held.name)[low : low + run.numel]
