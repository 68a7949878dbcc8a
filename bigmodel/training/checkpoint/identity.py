"""Whose checkpoint it is: the step in its name is the step inside, and it belongs to the run of its directory.

A run has an id, in `identity.json` of its directory and in each of its checkpoints. It is made at the first start and
by --fresh; a directory without one (copied checkpoints, another machine) takes that of the checkpoint it resumes. So a
copied run is a branch on purpose, and a checkpoint laid among another run's is refused. Checkpoints without an id, of
versions before it and averages, are taken: their step, model, data and plan are compared as always.
"""

import json
import secrets
from pathlib import Path
from typing import Any

from bigmodel.config.settings import UserError
from bigmodel.run_directory import read_json, write_json

FILE = "identity.json"


def id_of(run_directory: Path) -> str:
    """The id of the run; "": it has none yet."""
    file = run_directory / FILE
    if not file.exists():
        return ""
    return str(read_json(file, "delete it: the run takes the id of its newest checkpoint again", ["run"])["run"])


def settle(run_directory: Path, description: dict[str, Any] | None, fresh: bool = False) -> str:
    """The id of a start, written where there is none. description: of the checkpoint that it resumes; on rank 0."""
    known = "" if fresh else id_of(run_directory) or (description or {}).get("run", "")
    run = known or f"{run_directory.resolve().name}-{secrets.token_hex(4)}"
    if fresh or not id_of(run_directory):
        write_json(run_directory / FILE, {"run": run})
    return run


def problem_of(path: Path, description: dict[str, Any], run_directory: Path) -> str:
    """Why a whole checkpoint is not that of the step and the run that its place says; "": it is."""
    step, run, owner = description["state"]["step"], description.get("run", ""), id_of(run_directory)
    if int(path.name[5:]) != step:
        of_run = f" of run {run}" if run else ""
        return (
            f"{path}: inside is the checkpoint of step {step}{of_run}: the folder was renamed; give it the name "
            f"step-{step:08d} again, or move it out of {path.parent}"
        )
    if run and owner and run != owner:
        return (
            f"{path}: this checkpoint is of run {run}, and {run_directory} is run {owner}; move it out of "
            f"{path.parent}; another run begins with its weights by model.from = the run's directory "
            f"({json.dumps(str(run_directory))} goes on without it)"
        )
    return ""


def require_own(path: Path, description: dict[str, Any], run_directory: Path, remote: str = "") -> None:
    """Raises `UserError` naming both steps, or both runs. remote: the store that has a copy of this checkpoint."""
    if problem := problem_of(path, description, run_directory):
        copy = (
            f"; checkpoint.remote = {remote} has a copy, which would be fetched again: remove it, too, or change remote"
        )
        raise UserError(problem + copy * bool(remote))
