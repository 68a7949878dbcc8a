"""Saving: a checkpoint that appears whole or not at all, written while training goes on.

Takes an engine and a small plain state at the end of a step, gives a published folder (its format is described in
bigmodel/training/checkpoint/format.py) some steps later, and a copy of it in a store if one is named.

    begin     every rank copies what it owns, and a thread writes it, syncs it, reads it back and hashes it
    publish   once every rank has reported: state, manifest, sync, rename; then the oldest beyond what is kept go
    step      both of them at the end of a training step, where they are due

Guarantees:
- a folder is named step-... only after every rank has written, synced and read back its file; until then it is
  step-....partial-TOKEN. A kill at any instant leaves the older checkpoints as they were;
- a failure on one rank is the same error on all ranks, removes the partial folder and touches nothing else;
- a process that another start has replaced (`run_directory.take_over`) publishes nothing: it looks before the rename,
and
  the newer start has renamed its partial folder before reading what there is;
- the newest is never removed, and every published one was read back, so the newest good one is never removed.
Costs: the loop is held for the copy and the publication; a rank's share twice in memory while it is written.
"""

import contextlib
import errno
import hashlib
import math
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from bigmodel.config.settings import CheckpointSettings, Settings, UserError
from bigmodel.distributed.world import World
from bigmodel.metrics.phases import Phases
from bigmodel.run_directory import fsync_directory, package_versions, require_restart_generation, write_atomically
from bigmodel.training.checkpoint import remote as store
from bigmodel.training.checkpoint.format import (
    FORMAT,
    States,
    hash_file,
    looks_whole,
    path_of,
    plain,
    read_manifest,
    size_of,
    steps,
    verify,
)
from bigmodel.training.checkpoint.interval import Interval

FAULT_VARIABLE = "BIGMODEL_FAULT"  # tests: "POINT@STEP" kills the process at that point of the save of that step
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class SaveError(UserError):
    """The checkpoint of a step was not saved; `reason` is one of `ledger.SAVE_FAILURES`."""

    def __init__(self, message: str, step: int = 0, code: int = errno.EIO) -> None:
        super().__init__(message)
        self.step = step
        self.reason = "disk_full" if code in DISK_FULL else "permission" if code in FORBIDDEN else "io_error"


@dataclass(frozen=True)
class Saved:
    """A checkpoint just published: its size in bytes over all ranks, and how long training was held for it.

    error: why it was not; reason: the same in a word (SaveError). ends_run: `checkpoint.on_failure` or the end of the
    run make the error fatal.
    """

    path: Path
    step: int
    bytes: int
    seconds: float
    error: str = ""
    reason: str = ""
    ends_run: bool = False


@dataclass(frozen=True)
class Waiting:
    """Training stands still from here on until the save of a step ends."""

    step: int


@dataclass(frozen=True)
class _Report:
    """What a rank has to say of its file: size and hash, or what went wrong."""

    name: str
    bytes: int
    sha256: str = ""
    error: str = ""
    code: int = 0  # errno, 0 for what is not the operating system's


class Saver:
    """Saves a run's checkpoints, one at a time. Make one on every rank; all methods but `written` are collective."""

    def __init__(
        self,
        directory: Path,
        settings: Settings,
        world: World,
        restart_generation: str = "",
        phases: Phases | None = None,
    ) -> None:
        """restart_generation: what `run_directory.take_over` gave; empty: nobody can replace this process.

        phases: the timers in which `step` counts its seconds, as "checkpoint".
        """
        self._directory, self._settings, self._world = Path(directory), settings, world
        self._restart_generation = restart_generation
        self._phases = phases or Phases(world.device)
        self._flight: _Flight | None = None
        self._uploads = store.Uploads(settings.checkpoint.remote, self._directory.parent, restart_generation)
        self._interval = Interval(settings.checkpoint, world)

    def step(
        self, engine: States, step: int, written_votes: float, ending: bool, state: Callable[[], dict[str, Any]]
    ) -> Iterator[Saved | Waiting]:
        """The saves of one training step: publish what is written, begin what is due. Every result, as it comes.

        written_votes: on how many ranks `written` held. ending: this step is the run's last; its save is waited for.
        state: of this step, for `begin`; called only where a save begins. Use up the iterator: the work is in it.
        Raises `SaveError` after its `Saved` where the run cannot go on, and what `begin` raises.
        """
        due = self.due(step)  # at each step: it times them
        begins = due or ending
        waits = ending or not self._settings.checkpoint.asynchronous
        if begins or written_votes == self._world.size:  # one save at a time: what is in flight is published first
            yield from self._result_of(lambda: self.finish(must=False))
        if begins and waits:
            yield Waiting(step)
        if begins:
            yield from self._result_of(lambda: self.begin(engine, state()))
        if waits:
            yield from self._result_of(lambda: self.finish(must=ending))

    def due(self, step: int) -> bool:
        """Whether the interval ends at this step; asked at the end of each. Equal on all ranks."""
        return self._interval.due(step, self._flight is not None)

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write: when all say so, `finish` does not wait."""
        return self._flight is not None and self._flight.is_written

    def begin(self, engine: States, state: dict[str, Any]) -> None:
        """Start the save of step `state["step"]`. One in flight must be finished first.

        A good checkpoint of that step that is there already is left alone; a damaged one will be replaced.
        Raises `UserError` on every rank where another start has taken over, and where the folder cannot be made unless
        `checkpoint.on_failure` lets the run go on: then `finish` tells.
        """
        assert self._flight is None, "one save at a time"
        world, started = self._world, time.perf_counter()
        final = path_of(self._directory, state["step"])
        if world.broadcast_object(final.exists()) and not verify(final, world):
            self._flight = _Flight(final, None, {}, started)
            return
        part, error = world.on_rank_zero(lambda: self._make_partial(final, state["step"]))
        if error:
            if self._settings.checkpoint.on_failure == "stop":
                raise error
            self._flight = _Flight(final, None, {}, started, error)
            return
        description = _describe(engine, state, self._settings)
        self._flight = _Flight(final, part, description, started)
        self._flight.start(_copy(engine), world.rank)

    def finish(self, must: bool = True) -> Saved | None:
        """Wait for the save in flight and publish it; None where there is none.

        must: raise `UserError` on every rank when it failed, whatever `checkpoint.on_failure` says.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return None
        try:
            saved = self._publish(flight)
        except SaveError as error:
            if must or self._settings.checkpoint.on_failure == "stop":
                raise
            self._interval.plan(flight.step, flight.started, flight.held_seconds)
            return Saved(flight.final, flight.step, 0, flight.held_seconds, str(error), error.reason)
        self._interval.plan(flight.step, flight.started, saved.seconds)
        return saved

    def save(self, engine: States, state: dict[str, Any]) -> Saved:
        """`begin` and `finish`, after whatever is in flight."""
        self.finish(must=False)
        self.begin(engine, state)
        saved = self.finish()
        assert saved is not None
        return saved

    def close(self) -> None:
        """Wait until the newest checkpoint is in the store. Not collective."""
        self._uploads.close()

    def _result_of(self, action: Callable[[], Saved | None]) -> Iterator[Saved]:
        """What the action gives, if it does; a save that ends the run is a result before it is raised."""
        with self._phases("checkpoint"):
            try:
                saved = action()
            except SaveError as error:
                path = path_of(self._directory, error.step)
                yield Saved(path, error.step, 0, 0.0, str(error), error.reason, ends_run=True)
                raise
            if saved:
                yield saved

    def _publish(self, flight: "_Flight") -> Saved:
        world, settings = self._world, self._settings.checkpoint
        waiting = time.perf_counter()
        if flight.error:
            raise flight.error
        if flight.part is None:
            return Saved(flight.final, flight.step, world.broadcast_object(size_of(flight.final)), flight.held_seconds)
        part, reports = flight.part, world.gather_objects(flight.wait())
        if any(one.error for one in reports):
            world.on_rank_zero(lambda: _abandon(part, flight.step, reports))
        total = world.on_rank_zero(
            lambda: _publish(part, flight.final, reports, flight.description, world.size, self._restart_generation)
        )
        world.on_rank_zero(lambda: retain(self._directory, flight.step, settings, self._uploads.under_way))
        if settings.remote and world.rank == 0:
            self._uploads.begin(flight.final)
        held = flight.held_seconds + time.perf_counter() - waiting
        return Saved(flight.final, flight.step, total, held)

    def _make_partial(self, final: Path, step: int) -> tuple[Path, SaveError | None]:
        """The partial folder, and why it could not be made or nothing."""
        require_restart_generation(self._directory.parent, self._restart_generation)
        part = final.with_name(f"{final.name}.partial-{secrets.token_hex(4)}")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            part.mkdir()
        except OSError as error:
            return part, SaveError(
                f"run.directory: cannot make {part}: {error.strerror}; free space or permission, or another directory",
                step,
                error.errno or errno.EIO,
            )
        return part, None


class _Flight:
    """One save under way on this rank."""

    def __init__(
        self,
        final: Path,
        part: Path | None,
        description: dict[str, Any],
        started: float,
        error: SaveError | None = None,
    ) -> None:
        """part None: nothing is written, for the checkpoint is there already or its folder could not be made."""
        self.final, self.part, self.description, self.error = final, part, description, error
        self.step = int(final.name[5:])
        self.started = started
        self._report: _Report | None = None
        self._thread: threading.Thread | None = None
        self.held_seconds = time.perf_counter() - started

    def start(self, tensors: dict[str, Tensor], rank: int) -> None:
        assert self.part is not None
        path = self.part / f"rank-{rank:05d}.safetensors"

        def run() -> None:
            self._report = write_share(path, tensors, rank, self.step)
            tensors.clear()

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()
        self.held_seconds = time.perf_counter() - self.started

    @property
    def is_written(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> _Report:
        if self._thread is not None:
            self._thread.join()
        assert self._report is not None, "the thread that writes died without a word"
        return self._report


def save(directory: Path, engine: States, state: dict[str, Any], settings: Settings, world: World) -> Saved:
    """One checkpoint, written and published before this returns. Collective. Raises what `Saver` raises."""
    return Saver(directory, settings, world).save(engine, state)


def _copy(engine: States) -> dict[str, Tensor]:
    """What this rank owns, on the CPU, apart from what training will change."""
    tensors: dict[str, Tensor] = {}
    for name in engine.names():
        for key, (start, tensor) in engine.owned(name).items():
            tensors[f"{key}.{name}@{start}"] = tensor.detach().to("cpu", torch.float32, copy=True).flatten()
    return tensors


def write_share(path: Path, tensors: dict[str, Tensor], rank: int, step: int) -> _Report:
    """Write, sync and read back. Never raises for the disk."""
    fault(f"rank-{rank}-starts", step)
    content = to_safetensors(tensors)
    digest = hashlib.sha256(content).hexdigest()
    try:
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            fault(f"rank-{rank}-half", step)
            file.write(content[len(content) // 2 :])
            file.flush()
            os.fsync(file.fileno())
            with contextlib.suppress(OSError):  # so that reading back asks the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if hash_file(path) != digest:
            raise OSError(errno.EIO, "what was read back is not what was written")
    except OSError as error:
        reason = f"rank {rank} could not write {path}: {error.strerror}"
        return _Report(path.name, len(content), error=reason, code=error.errno or errno.EIO)
    fault(f"rank-{rank}-wrote", step)
    return _Report(path.name, len(content), digest)


def _publish(
    part: Path,
    final: Path,
    reports: list[_Report],
    description: dict[str, Any],
    world_size: int,
    restart_generation: str,
) -> int:
    """State, manifest, sync, rename: the one place where a checkpoint becomes visible. Rank 0 only."""
    step = description["state"]["step"]
    fault("before-manifest", step)
    damaged = final.with_name(f"{final.name}.partial-{secrets.token_hex(4)}")
    try:
        state = plain(description)
        files = {one.name: {"bytes": one.bytes, "sha256": one.sha256} for one in reports}
        files["state.json"] = {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}
        write_atomically(part / "state.json", state)
        fault("before-rename-of-manifest", step)
        write_atomically(part / "manifest.json", _manifest(files, world_size))  # syncs the folder, all names in it
        fault("before-rename", step)
        require_restart_generation(final.parent.parent, restart_generation)
        if final.exists():  # seen to be damaged at the start of the save
            os.rename(final, damaged)
        os.rename(part, final)
        fault("after-rename", step)
        fsync_directory(final.parent)
        shutil.rmtree(damaged, ignore_errors=True)
    except OSError as error:
        code = error.errno or errno.EIO
        _abandon(part, step, [*reports, _Report("manifest.json", 0, error=f"rank 0: {error}", code=code)])
    except UserError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return size_of(final)


def _abandon(part: Path, step: int, reports: list[_Report]) -> NoReturn:
    """Remove the partial folder and say what failed first, how much room is needed and how much there is."""
    directory = part.parent
    first = next(one for one in reports if one.error)
    needed = sum(one.bytes for one in reports)
    shutil.rmtree(part, ignore_errors=True)
    free = shutil.disk_usage(directory).free
    kept = "the older checkpoints are untouched"
    if first.code not in DISK_FULL:
        raise SaveError(f"checkpoint not saved: {first.error}; {kept}; see to {directory} and resume", step, first.code)
    raise SaveError(
        f"checkpoint not saved: {first.error}; {directory} needs {needed:,} bytes and has {free:,} free (a quota or "
        f"file size limit may be lower); {kept}; free some, lower checkpoint.keep, or move run.directory, and resume",
        step,
        first.code,
    )


def _describe(engine: States, state: dict[str, Any], settings: Settings) -> dict[str, Any]:
    return {
        "state": state,
        "updates": engine.updates,
        "model": settings.model.model_dump(mode="json"),
        "optimizer": settings.optimizer.kind,
        "scaler": engine.scaler_state(),
        "shapes": {name: list(engine.shape(name)) for name in engine.names()},
        "keys": {name: engine.keys(name) for name in engine.names()},
    }


def _manifest(files: dict[str, Any], world_size: int) -> bytes:
    content: dict[str, Any] = {"format": FORMAT, "files": files, "world_size": world_size, "saved_at": time.time()}
    content["versions"] = package_versions()
    content["sha256"] = hashlib.sha256(plain(content)).hexdigest()
    return plain(content)


def retain(directory: Path, step: int, settings: CheckpointSettings, uploading: Path | None = None) -> None:
    """Remove the oldest beyond what the settings keep, counting from the one just saved; only what looks whole counts.

    Later steps than the saved one were passed over as damaged: they neither count nor are removed.
    """
    kept = 1
    for older in reversed([other for other in steps(directory) if other < step]):
        path = path_of(directory, older)
        if settings.keep_every_steps and older % settings.keep_every_steps == 0:
            continue
        if kept < settings.keep:
            kept += looks_whole(path)
            continue
        if path == uploading or _age_hours(path) < settings.keep_hours:
            continue
        fault("before-removal", step)
        doomed = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}.doomed")
        os.rename(path, doomed)
        fault("in-removal", step)
        shutil.rmtree(doomed, ignore_errors=True)


def _age_hours(path: Path) -> float:
    """Since the checkpoint was saved; without end where its manifest does not say."""
    manifest, problem = read_manifest(path)
    return math.inf if problem else (time.time() - manifest["saved_at"]) / 3600


def fault(point: str, step: int) -> None:
    if os.environ.get(FAULT_VARIABLE) == f"{point}@{step}":
        os.kill(os.getpid(), signal.SIGKILL)
