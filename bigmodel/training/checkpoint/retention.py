"""Which checkpoints stay: pure of their steps, marks, ages and the settings; what else there is, is removed.

Guarantees: the newest stays, and the newest healthy one (health.py): there is always one from which training is known
to go on. Checkpoints of another format, of other steps and of other names are not touched.
"""

import math
import os
import secrets
import shutil
import time
from pathlib import Path

from bigmodel.config.settings import CheckpointSettings
from bigmodel.training.checkpoint.faults import fault
from bigmodel.training.checkpoint.folder import is_unreadable_here, looks_whole, path_of, read_manifest, steps
from bigmodel.training.checkpoint.format import best_step
from bigmodel.training.checkpoint.health import last_good, newest_healthy


def retain(
    directory: Path, step: int, settings: CheckpointSettings, uploading: Path | None = None, left_course: int = 0
) -> None:
    """Remove the oldest checkpoints beyond `checkpoint.keep`, counted back from `step`; only complete ones count.

    The newest healthy checkpoint is kept, too; off course (since step `left_course`) at least the newest one from
    before; and the best one (`checkpoint.keep_best`). Checkpoints of later steps were found damaged at the start: they
    do not count and are not removed.
    """
    healthy = last_good(directory, left_course) if left_course else newest_healthy(directory, step + 1)
    kept, best = 1, best_step(directory) if settings.keep_best else 0
    for older in reversed([other for other in steps(directory) if other < step]):
        path = path_of(directory, older)
        if is_unreadable_here(path) or (settings.keep_every_steps and older % settings.keep_every_steps == 0):
            continue
        if kept < settings.keep:
            kept += looks_whole(path)
            continue
        if older in (best, healthy) or path == uploading or _age_hours(path) < settings.keep_hours:
            continue
        fault("before-removal", step)
        doomed = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}.doomed")
        os.rename(path, doomed)
        fault("in-removal", step)
        shutil.rmtree(doomed, ignore_errors=True)


def _age_hours(path: Path) -> float:
    """Hours since the checkpoint was saved; infinite if its manifest is not valid."""
    manifest, problem = read_manifest(path)
    return math.inf if problem else (time.time() - manifest["saved_at"]) / 3600
