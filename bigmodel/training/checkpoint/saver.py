"""Saving: a checkpoint appears complete or not at all, and is written while training continues.

In: an engine and a small plain state at the end of a step. Out: a published folder some steps later (format: see
bigmodel/training/checkpoint/format.py) and, with `checkpoint.remote`, its copy in a store.

    begin     every rank copies its shards (snapshot.py); a thread writes, syncs and reads back the file
    publish   after the reports of all ranks: state, manifest, sync, rename; then checkpoints beyond `keep` are removed
    step      both, at the end of a training step, if they are due

Example: a save begins at the end of step 100 in step-00000100.partial-1f2e3d4c. At the end of step 103 all ranks have
written their files, and the folder is renamed to step-00000100.

Guarantees:
- A folder gets the name step-... only after every rank has written, synced and read back its file. Until then it is a
  staging folder, step-....partial-TOKEN. A kill at any instant leaves the older checkpoints unchanged.
- A failure on one rank raises the same error on all ranks and removes the staging folder, nothing else.
- A process replaced by another start (`run_directory.take_over`) publishes nothing: it checks its restart generation
  before the rename, and the newer start renames the old staging folder before it reads the checkpoints.
- The newest good checkpoint is never removed: the newest is never removed, and every published one was read back; nor
  the newest healthy one, after which training stayed on its course (health.py).
- Only finite numbers are saved: the rank and the tensor are named, and the run ends.
Costs: training pauses for the copy and the publication; from the first step on, a rank's shards are twice in memory.
"""

import contextlib
import errno
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from bigmodel.config.settings import Settings, UserError
from bigmodel.distributed.world import World
from bigmodel.metrics.phases import Phases
from bigmodel.run_directory import fsync_directory, require_restart_generation, write_atomically
from bigmodel.training.checkpoint import checksum
from bigmodel.training.checkpoint import remote as store
from bigmodel.training.checkpoint.failures import DISK_FULL, NotFiniteError, SaveError
from bigmodel.training.checkpoint.faults import FAULT_VARIABLE as FAULT_VARIABLE
from bigmodel.training.checkpoint.faults import fault
from bigmodel.training.checkpoint.finite import not_finite
from bigmodel.training.checkpoint.folder import manifest_of, path_of, plain, size_of, steps
from bigmodel.training.checkpoint.format import States, open_checkpoint, verify
from bigmodel.training.checkpoint.health import Health
from bigmodel.training.checkpoint.identity import problem_of
from bigmodel.training.checkpoint.interval import Interval
from bigmodel.training.checkpoint.retention import retain
from bigmodel.training.checkpoint.snapshot import Snapshot


@dataclass(frozen=True)
class Saved:
    """The result of a save: bytes over all ranks, and seconds that it paused training.

    error: why nothing was published, else empty; reason: the same in one word (SaveError). ends_run: the error is
    fatal because of `checkpoint.on_failure` or because the run ends.
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
    """Training pauses from here until the save of a step ends."""

    step: int


@dataclass(frozen=True)
class _Report:
    """A rank's report on its file: size and checksum, or an error."""

    name: str
    bytes: int
    facts: dict[str, Any] = field(default_factory=dict)  # checksum.py
    error: str = ""
    code: int = 0  # errno; 0 if the error is not from the operating system
    is_finite: bool = True


class Saver:
    """Saves a run's checkpoints, one at a time. Make one on every rank; all methods but `written` are collective."""

    def __init__(
        self,
        directory: Path,
        settings: Settings,
        world: World,
        restart_generation: str = "",
        phases: Phases | None = None,
        run: str = "",
    ) -> None:
        """restart_generation: the result of `run_directory.take_over`; empty: no other start can replace this process.

        phases: the timers; `step` adds its seconds to "checkpoint". run: its id (identity.py), in each checkpoint.
        """
        self._directory, self._settings, self._world = Path(directory), settings, world
        self._restart_generation, self._run = restart_generation, run
        self._phases = phases or Phases(world.device)
        self._flight: _Flight | None = None
        self._snapshot = Snapshot()
        self._uploads = store.Uploads(settings.checkpoint.remote, self._directory.parent, restart_generation)
        self._interval = Interval(settings.checkpoint, world)
        self._health = Health(self._directory) if world.rank == 0 else None

    def step(
        self,
        engine: States,
        step: int,
        written_votes: float,
        ending: bool,
        state: Callable[[], dict[str, Any]],
        asked: bool = False,
        left_course: int = 0,
    ) -> Iterator[Saved | Waiting]:
        """Publish the save that is written, begin the save that is due. Yields each result as it comes.

        written_votes: number of ranks with `written`. ending: this is the run's last step; wait for its save.
        state: the state for `begin`; called only if a save begins. asked: save this step in any case, as the best.
        left_course: the first of the steps off course with which the run so far ends, 0: on course; read on rank 0.
        Exhaust the iterator: it does the work.
        Raises `SaveError`, after its `Saved`, if the run cannot continue; and what `begin` raises.
        """
        if self._health and self._health.see(step, left_course):
            with contextlib.suppress(OSError):  # of this rank alone; the next publication tries again
                self._retain(max((saved for saved in steps(self._directory) if saved <= step), default=step))
        due = self.due(step)  # called at each step, because it also times the steps
        begins = due or ending or asked
        waits = ending or not self._settings.checkpoint.asynchronous
        if not begins and not waits:
            self.prepare(engine)
        if begins or written_votes == self._world.size:  # one save at a time: publish the one in flight first
            yield from self._result_of(lambda: self.finish(must=False))
        if begins and waits:
            yield Waiting(step)
        if begins:
            yield from self._result_of(lambda: self.begin(engine, state()))
        if waits:
            yield from self._result_of(lambda: self.finish(must=ending))

    def next_step(self, step: int) -> int:
        """The next step after `step` with a save: of the interval, or the last of the run; 0: there is none."""
        last = self._settings.training.steps
        return min(self._interval.next_step(step), last) if step < last else 0

    def due(self, step: int) -> bool:
        """Whether the interval ends at this step; call it at the end of each step. Equal on all ranks."""
        return self._interval.due(step, self._flight is not None)

    @property
    def written(self) -> bool:
        """Whether this rank has written its file; if all ranks have, `finish` does not wait. Not collective."""
        return self._flight is not None and self._flight.is_written

    def prepare(self, engine: States) -> None:
        """Make the memory of the copies in a thread, so that the first save does not wait for it. Not collective."""
        self._snapshot.prepare(engine)

    def begin(self, engine: States, state: dict[str, Any]) -> None:
        """Start the save of step `state["step"]`. Finish the save in flight first.

        An existing good checkpoint of that step is kept; a damaged one is replaced, one of another run is an error.
        Raises `UserError` on every rank if another start has taken over, and if the folder cannot be made. With
        `checkpoint.on_failure` = "continue", `finish` returns that second error instead.
        """
        assert self._flight is None, "one save at a time"
        world, started = self._world, time.perf_counter()
        final = path_of(self._directory, state["step"])
        exists = world.broadcast_object(final.exists()) and not verify(final, world)
        make = self._require_own if exists else self._make_partial
        part, error = world.on_rank_zero(lambda: make(final, state["step"]))
        if error and self._settings.checkpoint.on_failure == "stop":
            raise error
        if error or exists:
            self._flight = _Flight(final, None, {}, started, error)
            return
        description = _describe(engine, state, self._settings) | ({"run": self._run} if self._run else {})
        self._flight = _Flight(final, part, description, started)
        self._snapshot.take(engine)
        self._flight.start(self._snapshot, world.rank)

    def finish(self, must: bool = True) -> Saved | None:
        """Wait for the save in flight and publish it; None if there is none.

        must: raise `UserError` on every rank if the save failed, whatever `checkpoint.on_failure` is.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return None
        try:
            saved = self._publish(flight)
        except SaveError as error:
            stops = self._settings.checkpoint.on_failure == "stop" and not error.is_gone
            if must or stops or isinstance(error, NotFiniteError):
                raise
            self._interval.plan(flight.step, flight.started, flight.held_seconds)
            return Saved(flight.final, flight.step, 0, flight.held_seconds, str(error), error.reason)
        self._interval.plan(flight.step, flight.started, saved.seconds)
        return saved

    def save(self, engine: States, state: dict[str, Any]) -> Saved:
        """Finish the save in flight, then `begin` and `finish`."""
        self.finish(must=False)
        self.begin(engine, state)
        saved = self.finish()
        assert saved is not None
        return saved

    def close(self) -> None:
        """Wait until the newest checkpoint is in the store. Not collective."""
        self._uploads.close()

    def _result_of(self, action: Callable[[], Saved | None]) -> Iterator[Saved]:
        """Yield the result of the action, if any; an error that ends the run is yielded before it is raised."""
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
        if self._health:
            self._health.published(flight.step)
        world.on_rank_zero(lambda: self._retain(flight.step))
        if settings.remote and world.rank == 0:
            self._uploads.begin(flight.final)
        held = flight.held_seconds + time.perf_counter() - waiting
        return Saved(flight.final, flight.step, total, held)

    def _retain(self, step: int) -> None:
        left = self._health.left_course if self._health else 0
        retain(self._directory, step, self._settings.checkpoint, self._uploads.under_way, left)

    def _require_own(self, final: Path, step: int) -> tuple[Path, SaveError | None]:
        problem = problem_of(final, open_checkpoint(final).description, self._directory.parent)
        return final, SaveError(problem, step, errno.EEXIST) if problem else None

    def _make_partial(self, final: Path, step: int) -> tuple[Path, SaveError | None]:
        """Make the staging folder; returns it, and the error or None."""
        require_restart_generation(self._directory.parent, self._restart_generation)
        part = final.with_name(f"{final.name}.partial-{secrets.token_hex(4)}")
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            part.mkdir()
        except OSError as error:
            return part, SaveError(
                f"run.directory: cannot make {part}: {error.strerror}; "
                "free some space, change the permissions, or choose another directory",
                step,
                error.errno or errno.EIO,
            )
        return part, None


class _Flight:
    """One save in flight on this rank."""

    def __init__(
        self,
        final: Path,
        part: Path | None,
        description: dict[str, Any],
        started: float,
        error: SaveError | None = None,
    ) -> None:
        """part None: nothing is written, because the checkpoint exists or its staging folder could not be made."""
        self.final, self.part, self.description, self.error = final, part, description, error
        self.step = int(final.name[5:])
        self.started = started
        self._report: _Report | None = None
        self._thread: threading.Thread | None = None
        self.held_seconds = time.perf_counter() - started

    def start(self, snapshot: Snapshot, rank: int) -> None:
        assert self.part is not None
        path = self.part / f"rank-{rank:05d}.safetensors"

        def run() -> None:
            self._report = write_share(path, snapshot, rank, self.step)

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()
        self.held_seconds = time.perf_counter() - self.started

    @property
    def is_written(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> _Report:
        if self._thread is not None:
            self._thread.join()
        assert self._report is not None, "the writing thread died without a report"
        return self._report


def save(directory: Path, engine: States, state: dict[str, Any], settings: Settings, world: World) -> Saved:
    """Write and publish one checkpoint before returning. Collective. Raises what `Saver` raises."""
    return Saver(directory, settings, world).save(engine, state)


def write_share(path: Path, snapshot: Snapshot, rank: int, step: int) -> _Report:
    """Write, sync and read back this rank's file. Errors of the disk and numbers that are not finite are reported, not
    raised."""
    fault(f"rank-{rank}-starts", step)
    if problem := not_finite(snapshot.tensors):
        return _Report(path.name, 0, error=f"rank {rank}: {problem}", is_finite=False)
    content = snapshot.content
    try:
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            fault(f"rank-{rank}-half", step)
            file.write(content[len(content) // 2 :])
            file.flush()
            os.fsync(file.fileno())
            with contextlib.suppress(OSError):  # drop the page cache, so that reading back reads the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        facts = checksum.of_bytes(content)
        if checksum.of_file(path) != facts:
            raise OSError(errno.EIO, "the bytes read back differ from the bytes written")
    except OSError as error:
        reason = f"rank {rank} could not write {path}: {error.strerror}"
        return _Report(path.name, len(content), error=reason, code=error.errno or errno.EIO)
    fault(f"rank-{rank}-wrote", step)
    return _Report(path.name, len(content), facts)


def _publish(
    part: Path,
    final: Path,
    reports: list[_Report],
    description: dict[str, Any],
    world_size: int,
    restart_generation: str,
) -> int:
    """State, manifest, sync, rename: the only place that publishes a checkpoint. Rank 0 only."""
    step = description["state"]["step"]
    fault("before-manifest", step)
    damaged = final.with_name(f"{final.name}.partial-{secrets.token_hex(4)}")
    try:
        state = plain(description)
        files = {one.name: one.facts for one in reports} | {"state.json": checksum.of_bytes(state)}
        write_atomically(part / "state.json", state)
        fault("before-rename-of-manifest", step)
        write_atomically(part / "manifest.json", manifest_of(files, world_size))  # also syncs all names in the folder
        fault("before-rename", step)
        total = size_of(part)
        require_restart_generation(final.parent.parent, restart_generation)
        if final.exists():  # `begin` found it damaged
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
    return total


def _abandon(part: Path, step: int, reports: list[_Report]) -> NoReturn:
    """Remove the staging folder; raise the first error, with the bytes needed and the bytes free."""
    directory = part.parent
    first = next(one for one in reports if one.error)
    needed = sum(one.bytes for one in reports)
    shutil.rmtree(part, ignore_errors=True)
    if wrong := next((one for one in reports if not one.is_finite), None):
        raise NotFiniteError(_refusal(directory, wrong.error, step), step)
    if not directory.is_dir():
        raise SaveError(
            f"checkpoint not saved: {directory} is gone, moved or deleted meanwhile; the next save makes it anew",
            step,
            errno.ENOENT,
        )
    free = shutil.disk_usage(directory).free
    kept = "the older checkpoints are untouched"
    if first.code not in DISK_FULL:
        raise SaveError(f"checkpoint not saved: {first.error}; {kept}; repair {directory} and resume", step, first.code)
    raise SaveError(
        f"checkpoint not saved: {first.error}; {directory} needs {needed:,} bytes and has {free:,} free (a quota or "
        f"file size limit may be lower); {kept}; free space, lower checkpoint.keep, or move run.directory, and resume",
        step,
        first.code,
    )


def _refusal(directory: Path, problem: str, step: int) -> str:
    saved = steps(directory)
    after = f"the next start resumes from {path_of(directory, saved[-1])}" if saved else "there is no older one"
    return (
        f"checkpoint of step {step} refused: {problem}; the older checkpoints are untouched, {after}. All applied "
        "gradients were finite: after an update with numbers too large for fp32 (a learning rate far too high) this "
        f"comes again at this step, else the device or the memory of {problem.partition(':')[0]} is to be checked"
    )


def _describe(engine: States, state: dict[str, Any], settings: Settings) -> dict[str, Any]:
    return {
        "state": state,
        "updates": engine.updates,
        "model": settings.model.model_dump(mode="json"),
        "optimizer": settings.optimizer.kind,
        **({"lora": settings.lora.model_dump(mode="json")} if settings.lora.rank else {}),
        "scaler": engine.scaler_state(),
        "shapes": {name: list(engine.shape(name)) for name in engine.names()},
        "keys": {name: engine.keys(name) for name in engine.names()},
    }
