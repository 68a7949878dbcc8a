"""The copy of checkpoints in an object store: put there after each save, fetched where a node has lost its own.

Takes the URL of a folder (`checkpoint.remote`; the file systems of bigmodel/data/files.py). Guarantees: the manifest
is written last, so a checkpoint without one is none; what is fetched appears under its name by one rename, after its
files' sizes and hashes were compared with the manifest. Nothing is ever deleted there: leave that to the store's own
rules of expiry.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import tenacity

from bigmodel.config import UserError
from bigmodel.data import files
from bigmodel.rundir import fsync_directory
from bigmodel.training.distributed import World

MANIFEST = "manifest.json"
ATTEMPTS = 5
FIRST_WAIT_SECONDS = 0.5  # doubled after every attempt


def steps(url: str) -> list[int]:
    """Steps of the whole checkpoints there, ascending. Raises `UserError` where the store cannot be read."""
    found = (re.fullmatch(rf"step-(\d{{8,}})/{re.escape(MANIFEST)}", name) for name in _retrying(files.sizes, url))
    return sorted(int(match[1]) for match in found if match)


def upload(path: Path, url: str) -> None:
    """Copy a published checkpoint, its manifest last. Raises `UserError` when every attempt failed."""
    names = sorted((file.name for file in path.iterdir()), key=lambda name: (name == MANIFEST, name))
    for name in names:
        _retrying(_put, path / name, files.join(url, f"{path.name}/{name}"))


def fetch(url: str, path: Path, world: World) -> None:
    """Bring a checkpoint back to `path`, in place of a damaged one. Collective: the files are dealt to the ranks.

    Raises `UserError` on every rank where one could not be fetched.
    """
    source = files.join(url, path.name)
    part, manifest = world.on_rank_zero(lambda: _begin(source, path))
    names = sorted(manifest["files"])[world.rank :: world.size]
    errors = [error for name in names if (error := _try_get(source, part, name, manifest["files"][name]))]
    told = [error for some in world.gather_objects(errors) for error in some]
    world.on_rank_zero(lambda: _finish(source, part, path, told))


def _begin(source: str, path: Path) -> tuple[Path, dict[str, Any]]:
    part = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
    part.mkdir(parents=True)
    raw = _retrying(_get, files.join(source, MANIFEST))
    (part / MANIFEST).write_bytes(raw)
    try:
        return part, json.loads(raw)
    except ValueError:
        raise UserError(f"{source}: its {MANIFEST} is damaged; delete that folder in the store") from None


def _finish(source: str, part: Path, path: Path, errors: list[str]) -> None:
    if errors:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{source}: cannot be fetched: {errors[0]}; nothing was changed here")
    for file in part.iterdir():
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    fsync_directory(part)
    damaged = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
    if path.exists():
        os.rename(path, damaged)
    os.rename(part, path)
    fsync_directory(path.parent)
    shutil.rmtree(damaged, ignore_errors=True)


def _try_get(source: str, part: Path, name: str, facts: dict[str, Any]) -> str:
    """Empty when the file is here and as the manifest says."""
    try:
        content = _retrying(_get, files.join(source, name))
        if (len(content), hashlib.sha256(content).hexdigest()) != (facts["bytes"], facts["sha256"]):
            return f"{name} there is not the file of its manifest (its size or SHA-256 differs)"
        (part / name).write_bytes(content)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{part / name}: {error.strerror}"
    return ""


def _put(path: Path, location: str) -> None:
    with open(path, "rb") as file:
        files.write(location, iter(lambda: file.read(files.CHUNK_BYTES), b""))


def _get(location: str) -> bytes:
    return b"".join(files.chunks(location))


def _retrying(function: Any, *arguments: Any) -> Any:
    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_exponential(FIRST_WAIT_SECONDS) + tenacity.wait_random(0, FIRST_WAIT_SECONDS),
        retry=tenacity.retry_if_exception_type(UserError),
        reraise=True,
    )(function, *arguments)
