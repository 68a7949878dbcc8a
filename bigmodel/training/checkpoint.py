"""Checkpoints: the whole state of a run, by parameter name, visible only when it is complete.

    checkpoints/step-00000100/
      rank-00000.safetensors ...   weight.NAME, exp_avg.NAME, exp_avg_sq.NAME, whole and in fp32;
                                   parameters are dealt to the ranks by bytes, each rank writes its share
      state.json                   step, updates, the caller's state (cursor, counters), model, shapes
      manifest.json                bytes and sha256 of every other file, world size, versions, its own sha256

Takes an engine and a small plain state; gives folders on a file system that all ranks see. Guarantees:
- a folder is named step-... only after every rank has written and synced its file and reported its hash; until
  then it is step-....partial-TOKEN. A kill at any instant leaves the older checkpoints as they were;
- a failure on one rank is the same error on all ranks, removes the partial folder and touches nothing else;
- nothing is loaded whose bytes are not those that were written; a damaged checkpoint is named and the next older
  good one is used; where none is good there is an error, never a silent start from step 0;
- world size, ZeRO stage and accumulation do not occur in the format: load at any of them. No pickle.
Costs: one collective per tensor, the rank's share twice in memory, and a read of all bytes at every resume.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from bigmodel.config import ModelSettings, Settings, UserError
from bigmodel.rundir import fsync_directory, package_versions, write_atomically
from bigmodel.training.distributed import ALONE, World

FORMAT = 1
FAULT_VARIABLE = "BIGMODEL_FAULT"  # tests: "POINT@STEP" kills the process at that point of the save of that step
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHUNK_BYTES = 1 << 22


class States(Protocol):
    """What a checkpoint needs of the engine (bigmodel/training/engine.py)."""

    updates: int

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read_state(self, name: str) -> dict[str, Tensor]: ...
    def write_states(self, state_of: Callable[[str], Mapping[str, Tensor]], updates: int) -> None: ...


@dataclass(frozen=True)
class Saved:
    """A checkpoint just written: its size in bytes over all ranks, and how long it took."""

    path: Path
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `state` is what was given to `save`."""

    path: Path
    state: dict[str, Any]
    description: dict[str, Any]  # updates, model, shapes


def save(directory: Path, engine: States, state: dict[str, Any], settings: Settings, world: World) -> Saved:
    """Write the checkpoint of step `state["step"]` and remove the oldest beyond `checkpoint.keep`. Collective.

    A good checkpoint of that step that is there already is left alone; a damaged one is replaced.
    Raises `UserError` on every rank where a rank cannot write: full disk, missing permission, a broken disk.
    """
    started = time.perf_counter()
    step = state["step"]
    final = _path(directory, step)
    if world.broadcast_object(final.exists()) and not verify(final, world):
        return Saved(final, world.broadcast_object(_size(final)), time.perf_counter() - started)
    part = world.on_rank_zero(lambda: _make_partial(directory, final))
    _fault(f"rank-{world.rank}-starts", step)
    report = _write_share(part, engine, world)
    _fault(f"rank-{world.rank}-wrote", step)
    reports = world.gather_objects(report)
    if any(one.error for one in reports):
        world.on_rank_zero(lambda: _abandon(part, reports))
    total = world.on_rank_zero(lambda: _publish(part, final, reports, _describe(engine, state, settings), world.size))
    world.on_rank_zero(lambda: _retain(directory, step, settings.checkpoint.keep))
    return Saved(final, total, time.perf_counter() - started)


def newest(
    directory: Path, world: World | None = None, report: Callable[[str], None] | None = None
) -> Checkpoint | None:
    """The newest checkpoint whose every byte is as written; None where there is none at all. Collective.

    world: of the run that owns the folder; it also removes the partial folders that a kill left. None: one process
    that only looks, perhaps while the run goes on. report: told (on rank 0) of each damaged checkpoint that is
    passed over; by default it goes to stderr.
    Raises `UserError` where there are checkpoints and all are damaged.
    """
    report = report or (lambda text: print(f"bigmodel: {text}", file=sys.stderr, flush=True))
    if world:
        world.on_rank_zero(lambda: _remove_partials(directory))
    world = world or ALONE
    paths = world.on_rank_zero(lambda: [_path(directory, step) for step in reversed(_steps(directory))])
    damage: list[str] = []
    for path in paths:
        problems = verify(path, world)
        if not problems:
            if world.rank == 0 and damage:
                report(f"using the older checkpoint {path} instead")
            return world.on_rank_zero(partial(_open, path))
        damage.append(f"checkpoint {path} is damaged: {problems[0]}")
        if world.rank == 0:
            report(damage[-1])
    if damage:
        raise UserError(
            f"{directory}: none of {len(damage)} checkpoint(s) is whole; {damage[0]}; "
            "restore one from a copy, or start over with --fresh (which sets them aside)"
        )
    return None


def verify(path: Path, world: World) -> list[str]:
    """What is wrong with a checkpoint, one line per file; empty when every byte is as written. Collective.

    The files are dealt to the ranks, so the reading is shared.
    """
    manifest, problem = world.on_rank_zero(lambda: _read_manifest(path))
    if problem:
        return [problem]
    problems = []
    for number, (name, facts) in enumerate(sorted(manifest["files"].items())):
        if number % world.size == world.rank:
            problems += _check_file(path / name, facts)
    return [line for part in world.gather_objects(problems) for line in part]


def load(checkpoint: Checkpoint, engine: States, settings: Settings, world: World) -> None:
    """Put a verified checkpoint into the engine. Collective; works from any world size and stage to any other.

    Raises `UserError` naming the first model setting or parameter that differs; nothing is changed then.
    """
    _compare_model(checkpoint, settings)
    places = _places(checkpoint.path)
    _compare_shapes(checkpoint, engine, places)
    with _Reader(places) as read:
        engine.write_states(
            lambda name: {key: read(f"{key}.{name}") for key in ("weight", "exp_avg", "exp_avg_sq")},
            checkpoint.description["updates"],
        )


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The fp32 weights of a checkpoint by parameter name, for use without an engine. No collective."""
    places = _places(checkpoint.path)
    with _Reader(places) as read:
        return {name.removeprefix("weight."): read(name) for name in places if name.startswith("weight.")}


def set_aside(directory: Path) -> Path | None:
    """Rename the folder of checkpoints (for --fresh), so that nothing resumes from it; gives the new name.

    One process only. The old checkpoints stay readable under the new name until the user removes them.
    """
    if not directory.exists():
        return None
    number = 1
    while (aside := directory.with_name(f"{directory.name}-set-aside-{number}")).exists():
        number += 1
    os.rename(directory, aside)
    fsync_directory(aside.parent)
    return aside


# --- writing


@dataclass(frozen=True)
class _Report:
    """What a rank has to say of its file: size and hash, or what went wrong."""

    name: str
    bytes: int
    sha256: str = ""
    error: str = ""
    code: int = 0  # errno, 0 for what is not the operating system's


def _make_partial(directory: Path, final: Path) -> Path:
    part = final.with_name(f"{final.name}.partial-{secrets.token_hex(4)}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        part.mkdir()
    except OSError as error:
        raise UserError(
            f"run.directory: cannot make {part}: {error.strerror}; free space or permission, or another directory"
        ) from None
    return part


def _write_share(part: Path, engine: States, world: World) -> _Report:
    """Read every parameter (collective), keep this rank's, write and sync them. Never raises for the disk."""
    name = f"rank-{world.rank:05d}.safetensors"
    mine = set(shares({n: _numel(engine.shape(n)) for n in engine.names()}, world.size)[world.rank])
    tensors: dict[str, Tensor] = {}
    for parameter in engine.names():
        state = engine.read_state(parameter)
        if parameter in mine:
            tensors |= {f"{key}.{parameter}": tensor.cpu().contiguous() for key, tensor in state.items()}
    content = to_safetensors(tensors)
    try:
        with open(part / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = f"rank {world.rank} could not write {part / name}: {error.strerror}"
        return _Report(name, len(content), error=reason, code=error.errno or errno.EIO)
    return _Report(name, len(content), hashlib.sha256(content).hexdigest())


def shares(sizes: Mapping[str, int], num_ranks: int) -> list[list[str]]:
    """Deal names to ranks so that the largest share is small: the largest first, each to the lightest rank."""
    dealt: list[list[str]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        lightest = loads.index(min(loads))
        dealt[lightest].append(name)
        loads[lightest] += sizes[name]
    return dealt


def _publish(part: Path, final: Path, reports: list[_Report], description: dict[str, Any], world_size: int) -> int:
    """State, manifest, sync, rename: the one place where a checkpoint becomes visible. Rank 0 only."""
    step = description["state"]["step"]
    _fault("before-manifest", step)
    try:
        state = _plain(description)
        files = {one.name: {"bytes": one.bytes, "sha256": one.sha256} for one in reports}
        files["state.json"] = {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}
        write_atomically(part / "state.json", state)
        write_atomically(part / "manifest.json", _manifest(files, world_size))
        fsync_directory(part)
        _fault("before-rename", step)
        damaged = final.with_name(f"{final.name}.partial-{secrets.token_hex(4)}")
        if final.exists():  # seen to be damaged at the start of the save
            os.rename(final, damaged)
        os.rename(part, final)
        fsync_directory(final.parent)
        shutil.rmtree(damaged, ignore_errors=True)
    except OSError as error:
        code = error.errno or errno.EIO
        _abandon(part, [*reports, _Report("manifest.json", 0, error=f"rank 0: {error}", code=code)])
    _fault("after-rename", step)
    return _size(final)


def _abandon(part: Path, reports: list[_Report]) -> NoReturn:
    """Remove the partial folder and say what failed first, how much room is needed and how much there is."""
    directory = part.parent
    first = next(one for one in reports if one.error)
    needed = sum(one.bytes for one in reports)
    free = shutil.disk_usage(directory).free
    shutil.rmtree(part, ignore_errors=True)
    kept = "the older checkpoints are untouched"
    if first.code not in DISK_FULL:
        raise UserError(f"checkpoint not saved: {first.error}; {kept}; see to {directory} and resume")
    raise UserError(
        f"checkpoint not saved: {first.error}; {directory} needs {needed:,} bytes and has {free:,} free (a quota or "
        f"file size limit may be lower); {kept}; free some, lower checkpoint.keep, or move run.directory, and resume"
    )


def _describe(engine: States, state: dict[str, Any], settings: Settings) -> dict[str, Any]:
    return {
        "state": state,
        "updates": engine.updates,
        "model": settings.model.model_dump(mode="json"),
        "shapes": {name: list(engine.shape(name)) for name in engine.names()},
    }


def _manifest(files: dict[str, Any], world_size: int) -> bytes:
    content: dict[str, Any] = {"format": FORMAT, "files": files, "world_size": world_size}
    content["versions"] = package_versions()
    content["sha256"] = hashlib.sha256(_plain(content)).hexdigest()
    return _plain(content)


def _plain(value: Any) -> bytes:
    """JSON of one form only, so that equal content is equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _retain(directory: Path, step: int, keep: int) -> None:
    """Remove the oldest beyond `keep`, counting from the one just saved; only what looks whole counts.

    Later steps than the saved one were passed over as damaged: they neither count nor are removed.
    """
    kept = 1
    for older in reversed([other for other in _steps(directory) if other < step]):
        path = _path(directory, older)
        if kept < keep:
            kept += _looks_whole(path)
            continue
        doomed = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


# --- reading


def _read_manifest(path: Path) -> tuple[dict[str, Any], str]:
    """The manifest, and what is wrong with it or nothing. Its bytes must be the ones that its content gives."""
    try:
        raw = (path / "manifest.json").read_bytes()
        manifest = json.loads(raw)
        content = {key: value for key, value in manifest.items() if key != "sha256"}
        if raw != _plain(manifest) or manifest["sha256"] != hashlib.sha256(_plain(content)).hexdigest():
            return {}, "manifest.json does not have the content that it was written with"
        if manifest["format"] != FORMAT:
            return {}, f"manifest.json has format {manifest['format']}, this version reads {FORMAT}"
        return manifest, ""
    except OSError as error:
        return {}, f"manifest.json cannot be read: {error.strerror}"
    except (ValueError, KeyError, AttributeError):
        return {}, "manifest.json is not a manifest"


def _check_file(path: Path, facts: Mapping[str, Any]) -> list[str]:
    try:
        size = path.stat().st_size
        if size != facts["bytes"]:
            return [f"{path.name} has {size:,} bytes instead of {facts['bytes']:,}"]
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        if digest.hexdigest() != facts["sha256"]:
            return [f"{path.name} has other content than was written (its sha256 differs)"]
    except OSError as error:
        return [f"{path.name} cannot be read: {error.strerror}"]
    return []


def _looks_whole(path: Path) -> bool:
    """Manifest right and every file of its size: cheap, for retention; loading checks every byte."""
    manifest, problem = _read_manifest(path)
    if problem:
        return False
    return all(
        (path / name).exists() and (path / name).stat().st_size == facts["bytes"]
        for name, facts in manifest["files"].items()
    )


def newest_state(directory: Path) -> dict[str, Any] | None:
    """The state of the newest checkpoint, its weights left unread; None where there is none that can be read."""
    for step in reversed(_steps(directory)):
        with contextlib.suppress(OSError, ValueError, LookupError):
            return _open(_path(directory, step)).state
    return None


def _open(path: Path) -> Checkpoint:
    description = json.loads((path / "state.json").read_bytes())
    return Checkpoint(path, description["state"], description)


def _compare_model(checkpoint: Checkpoint, settings: Settings) -> None:
    """Model settings must be those of the checkpoint, but for dropout, which changes no weight."""
    now = settings.model.model_dump(mode="json")
    then = ModelSettings().model_dump(mode="json") | checkpoint.description["model"]  # newer settings had their default
    for name in sorted(now.keys() | then.keys()):
        if name != "dropout" and now.get(name) != then.get(name):
            raise UserError(
                f"model.{name} = {now.get(name)}, but checkpoint {checkpoint.path} was made with {then.get(name)}; "
                "set it back, choose another run.directory, or start over with --fresh"
            )


def _compare_shapes(checkpoint: Checkpoint, engine: States, places: Mapping[str, Path]) -> None:
    then = {name: tuple(shape) for name, shape in checkpoint.description["shapes"].items()}
    now = {name: engine.shape(name) for name in engine.names()}
    for name in [*now, *then]:
        if now.get(name) != then.get(name):
            raise UserError(
                f"parameter {name} is {now.get(name, 'absent')} in this model and {then.get(name, 'absent')} in "
                f"checkpoint {checkpoint.path}; another vocabulary or model: use the data and settings that it was "
                "made with, or start over with --fresh"
            )
    missing = [f"{key}.{name}" for name in now for key in ("weight", "exp_avg", "exp_avg_sq")]
    assert all(name in places for name in missing), f"{checkpoint.path} verified but lacks a tensor"


def _places(path: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    places: dict[str, Path] = {}
    for file in sorted(path.glob("rank-*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                places |= dict.fromkeys(tensors.keys(), file)
        except SafetensorError as error:
            raise UserError(f"{file}: not a safetensors file: {error}; restore it from a copy") from None
    return places


class _Reader:
    """Reads tensors by name; each file is opened once and mapped into memory."""

    def __init__(self, places: Mapping[str, Path]) -> None:
        self._places = places
        self._files: dict[Path, Any] = {}

    def __enter__(self) -> "Callable[[str], Tensor]":
        self._files = {file: safe_open(file, framework="pt") for file in set(self._places.values())}
        for file in self._files.values():
            file.__enter__()
        return lambda name: self._files[self._places[name]].get_tensor(name)

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.__exit__(None, None, None)


# --- the folder


def _path(directory: Path, step: int) -> Path:
    return Path(directory) / f"step-{step:08d}"


def _steps(directory: Path) -> list[int]:
    """Steps of the published checkpoints, ascending."""
    found = Path(directory).glob("step-*") if Path(directory).is_dir() else iter(())
    return sorted(int(path.name[5:]) for path in found if path.is_dir() and path.name[5:].isdecimal())


def _partials(directory: Path) -> Iterator[Path]:
    return Path(directory).glob("step-*.partial-*") if Path(directory).is_dir() else iter(())


def _remove_partials(directory: Path) -> None:
    for path in _partials(directory):
        shutil.rmtree(path, ignore_errors=True)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _fault(point: str, step: int) -> None:
    if os.environ.get(FAULT_VARIABLE) == f"{point}@{step}":
        os.kill(os.getpid(), signal.SIGKILL)
