"""Healthy checkpoints: those after which training stayed on its course.

In: the steps of a run (`Course`, bigmodel/training/divergence.py). Out: the mark `healthy`, an empty file in a
checkpoint's folder; after a divergence, the checkpoint that the next start resumes from.

That all numbers of a checkpoint are finite is not enough: weights of 5e29 are finite and lost. So the mark comes
later: after ten steps from the checkpoint on, or when the next one is published if that is sooner, and only while no
step is skipped and no loss is far out. Guarantees: the newest healthy checkpoint stays (retention.py). A divergence is
recorded in `diverged.json` before the run ends; the next start sets the checkpoints after the newest healthy one
aside, as step-....diverged, also in the store, and resumes from it. They are removed when the run has a healthy
checkpoint at their step. Cost: one empty file a save; nothing in other steps.

Example: checkpoints 100, 200, 300; from step 305 on no step is finite. At 210 step 200 became healthy, 300 never did.
The run ends at step 314; the next start resumes at 200.
"""

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bigmodel.config.settings import UserError
from bigmodel.run_directory import fsync_directory, read_json, record_event, write_json
from bigmodel.training.checkpoint import remote as store
from bigmodel.training.checkpoint.folder import is_unreadable_here, looks_whole, path_of, steps

MARK, RECORD, ASIDE = "healthy", "diverged.json", "diverged"
PROVING_STEPS = 10


class Health:
    """Gives the marks, on rank 0. A mark that cannot be written is tried again with the next checkpoint."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._unproven: list[int] | None = None  # ascending; None: no step seen yet
        self._step, self._left_course = 0, 0

    @property
    def left_course(self) -> int:
        """The first step of those off course with which the steps so far end; 0: on course."""
        return self._left_course

    def see(self, step: int, left_course: int) -> bool:
        """After each step. Whether a checkpoint has become healthy."""
        self._step, self._left_course = step, left_course
        if self._unproven is None:
            self._unproven = [older for older in steps(self._directory) if older < step and not self._is_marked(older)]
        return self._prove(step - PROVING_STEPS)

    def published(self, step: int) -> None:
        """The checkpoint before this one need not wait any longer."""
        self._prove(self._step - 1)
        if self._unproven is not None:
            self._unproven.append(step)

    def _prove(self, last: int) -> bool:
        """Mark the newest unproven checkpoint up to step `last`, unless the run is off course."""
        proven = [step for step in self._unproven or () if step <= last]
        if not proven or self._left_course:
            return False
        self._unproven = [step for step in self._unproven or () if step > last]
        with contextlib.suppress(OSError):  # removed in the meantime, or the disk is full
            mark(path_of(self._directory, proven[-1]))
            _remove_aside(self._directory, proven[-1])
            return True
        return False

    def _is_marked(self, step: int) -> bool:
        return is_healthy(path_of(self._directory, step))


def mark(path: Path) -> None:
    (path / MARK).touch()
    fsync_directory(path)


def is_healthy(path: Path) -> bool:
    return (path / MARK).exists()


def newest_healthy(directory: Path, before: int) -> int:
    """The newest whole checkpoint of a step below `before` that is marked; 0: none."""
    saved = (step for step in reversed(steps(directory)) if step < before)
    paths = ((step, path_of(directory, step)) for step in saved)
    return next((step for step, path in paths if is_healthy(path) and _is_whole(path)), 0)


def last_good(directory: Path, first: int, remote: str = "") -> int:
    """Where to resume after a divergence that began at step `first`; 0: no checkpoint from before is left.

    The newest healthy one. If none has the mark: the newest one whose weights a step on course has used, also in the
    store; the update of step `first` - 1 made the weights that step `first` could not use.
    """
    if found := newest_healthy(directory, first - 1):
        return found
    saved = {*steps(directory), *(store.steps(remote) if remote else ())}
    return max((step for step in saved if step < first - 1), default=0)


# --- after a divergence


@dataclass(frozen=True)
class Divergence:
    first: int  # the first step off course
    last_good: int  # where to resume
    suspect: list[int]  # later checkpoints, here and in the store


def record_divergence(directory: Path, first: int, remote: str = "") -> tuple[Divergence, str]:
    """Record what the next start has to do; gives it, and why it could not be recorded, or "". On rank 0.

    Without a checkpoint from before nothing is recorded.
    """
    good = last_good(directory, first, remote)
    saved = {*steps(directory), *(store.steps(remote) if remote else ())}
    found = Divergence(first, good, sorted(step for step in saved if step > good))
    try:
        if good:
            write_json(directory / RECORD, {"first": first, "last_good": good, "suspect": found.suspect})
    except OSError as error:
        return found, f"{directory / RECORD}: {error.strerror}"
    return found, ""


def recorded_divergence(directory: Path) -> Divergence | None:
    file = directory / RECORD
    if not file.exists():
        return None
    remedy = f"delete it, and the checkpoints from after the divergence in {directory}"
    found: dict[str, Any] = read_json(file, remedy, ["first", "last_good", "suspect"])
    return Divergence(found["first"], found["last_good"], found["suspect"])


def usable_steps(directory: Path) -> list[int]:
    """Steps of the published checkpoints, without those from after a divergence that no start has gone back from."""
    found = recorded_divergence(directory)
    return [step for step in steps(directory) if not found or step not in found.suspect]


def go_back(directory: Path, remote: str = "") -> str:
    """Set the checkpoints from after a recorded divergence aside, here and in the store; a line for the user, or "".

    On rank 0. May be killed and repeated. Raises `UserError` if the checkpoint to go back to is gone.
    """
    found = recorded_divergence(directory)
    if not found:
        return ""
    here, there = steps(directory), store.steps(remote) if remote else []
    if found.last_good not in (*here, *there):
        raise UserError(
            f"{path_of(directory, found.last_good)} is gone: the run diverged at step {found.first}, and this is the "
            f"newest checkpoint from before; put it back, or start over with --fresh (delete {directory / RECORD} to "
            "go on from a later checkpoint)"
        )
    for step in found.suspect:
        path = path_of(directory, step)
        if step in here and not is_unreadable_here(path):
            aside = path.with_name(f"{path.name}.{ASIDE}")
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier divergence
            os.rename(path, aside)
        if step in there:
            store.abandon(remote, path.name)
    (directory / RECORD).unlink()
    fsync_directory(directory)
    suspect = ", ".join(map(str, found.suspect))
    with contextlib.suppress(OSError):
        record_event(directory.parent, "went_back", step=found.last_good, diverged=found.first, set_aside=found.suspect)
    return (
        f"the run diverged at step {found.first}: it resumes from the newest healthy checkpoint, of step "
        f"{found.last_good}; {f'those of steps {suspect} are set aside as step-....{ASIDE}' if suspect else ''}"
    ).removesuffix("; ")


def _remove_aside(directory: Path, step: int) -> None:
    """Remove checkpoints of abandoned courses, up to a step that the run has now reached in good health."""
    for path in directory.glob(f"step-*.{ASIDE}"):
        number = path.name[5:].removesuffix(f".{ASIDE}")
        if number.isdecimal() and int(number) <= step:
            shutil.rmtree(path, ignore_errors=True)


def _is_whole(path: Path) -> bool:
    return not is_unreadable_here(path) and looks_whole(path)
