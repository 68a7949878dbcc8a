"""Copies of checkpoints in an object store: uploaded after each save, fetched if the local checkpoint is lost.

In: the URL of a folder (`checkpoint.remote`; file systems of bigmodel/data/store/files.py). Guarantees:
- The manifest is uploaded last; a folder without a manifest is not a checkpoint.
- A fetched checkpoint gets its name by one rename, after all sizes and checksums match the manifest.
- A damaged checkpoint and a store that does not answer are different errors.
- Nothing is deleted in the store; use the store's own lifecycle rules.
Cost: the upload runs in a thread beside training.
"""

import hashlib
import logging
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tenacity

from bigmodel.config.settings import UserError
from bigmodel.data.store import files
from bigmodel.distributed.world import World
from bigmodel.run_directory import fsync_directory, require_restart_generation
from bigmodel.training.checkpoint import checksum

MANIFEST = "manifest.json"
ABANDONED = "abandoned"  # SHA-256 of the manifest that no start takes any more: saved after a divergence
ATTEMPTS = 5
FIRST_WAIT_SECONDS = 0.5  # doubled after every attempt

log = logging.getLogger(__name__)

ReadManifest = Callable[[Path], tuple[dict[str, Any], str]]  # folder -> its manifest, the manifest's problem or ""


def steps(url: str) -> list[int]:
    """Steps of the complete checkpoints in the store, ascending, without abandoned ones.

    Raises `UserError` if the store cannot be read.
    """
    names = _retrying(files.sizes, url)
    found = (re.fullmatch(rf"(step-(\d{{8,}}))/{re.escape(MANIFEST)}", name) for name in names)
    return sorted(
        int(match[2])
        for match in found
        if match and not (f"{match[1]}/{ABANDONED}" in names and _is_abandoned(url, match[1]))
    )


def abandon(url: str, name: str) -> None:
    """Leave the checkpoint of this folder name out from now on; one that is uploaded there later counts again."""
    manifest = _retrying(_get, files.join(url, f"{name}/{MANIFEST}"))
    digest = hashlib.sha256(manifest).hexdigest().encode()
    _retrying(files.write, files.join(url, f"{name}/{ABANDONED}"), [digest])


def _is_abandoned(url: str, name: str) -> bool:
    manifest, digest = (_retrying(_get, files.join(url, f"{name}/{file}")) for file in (MANIFEST, ABANDONED))
    return digest == hashlib.sha256(manifest).hexdigest().encode()


def upload(path: Path, url: str) -> None:
    """Copy a published checkpoint, its manifest last. Raises `UserError` if every attempt fails, and
    before the first if a symbolic link leads outside the folder."""
    names = sorted((file.name for file in path.iterdir()), key=lambda name: (name == MANIFEST, name))
    places = [Path(files.inside(str(path), name)) for name in names]
    for place in places:
        _retrying(put, place, files.join(url, f"{path.name}/{place.name}"))


class Uploads:
    """Uploads published checkpoints in a thread, one at a time. Not collective.

    During an upload only the newest checkpoint waits. A failed upload is logged, never raised: the local checkpoint is
    good.
    """

    def __init__(self, url: str, run_directory: Path, restart_generation: str) -> None:
        self._url, self._run_directory, self._restart_generation = url, run_directory, restart_generation
        self._thread: threading.Thread | None = None
        self._path: Path | None = None  # the checkpoint that the thread copies
        self._waiting: Path | None = None

    @property
    def under_way(self) -> Path | None:
        """The checkpoint that is being uploaded; it must not be removed."""
        return self._path if self._thread and self._thread.is_alive() else None

    def begin(self, path: Path) -> None:
        self._waiting = None
        if self.under_way:
            self._waiting = path
            log.warning("%s: waits for its upload to checkpoint.remote: the previous upload is still running", path)
            return
        self._path = path
        self._thread = threading.Thread(target=self._copy, args=(path,), name="checkpoint upload", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait until the newest checkpoint is in the store."""
        while self._thread:
            self._thread.join()
            self._thread = None
            if self._waiting:
                self.begin(self._waiting)

    def _copy(self, path: Path) -> None:
        try:
            require_restart_generation(self._run_directory, self._restart_generation)
            upload(path, self._url)
        except (UserError, OSError) as error:
            log.warning("%s: not uploaded to checkpoint.remote: %s", path, error)


def fetch(url: str, path: Path, world: World, read_manifest: ReadManifest) -> list[str]:
    """Fetch a checkpoint to `path`; it replaces a damaged one. Collective: each rank fetches its share of the files.

    Returns the problems of the remote checkpoint, one line per file; then nothing local has changed. Raises `UserError`
    on every rank if a file cannot be fetched or the disk is full.
    """
    source = files.join(url, path.name)
    part, manifest, problems = world.on_rank_zero(lambda: _begin(source, path, read_manifest))
    errors: list[str] = []
    for name in [] if problems else sorted(manifest["files"])[world.rank :: world.size]:
        try:
            problems += _get_file(source, part, name, manifest["files"][name])
        except (UserError, OSError) as error:
            errors.append(str(error))
    told = world.gather_objects((problems, errors))
    problems, errors = (list(dict.fromkeys(line for some in kind for line in some)) for kind in zip(*told, strict=True))
    world.on_rank_zero(lambda: _finish(source, part, path, problems, errors))
    return problems


def _begin(source: str, path: Path, read_manifest: ReadManifest) -> tuple[Path, dict[str, Any], list[str]]:
    part = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
    part.mkdir(parents=True)
    (part / MANIFEST).write_bytes(_retrying(_get, files.join(source, MANIFEST)))
    try:
        manifest, problem = read_manifest(part)
    except UserError as error:  # of another format
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(str(error).replace(str(part), source)) from None
    if problem:
        return part, {}, [problem]
    there = _retrying(files.sizes, source)
    return part, manifest, [f"{name} is not there" for name in manifest["files"] if name not in there]


def _finish(source: str, part: Path, path: Path, problems: list[str], errors: list[str]) -> None:
    if problems or errors:
        shutil.rmtree(part, ignore_errors=True)
        if not problems:
            raise UserError(f"{source}: cannot be fetched: {errors[0]}; nothing was changed here")
        return
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


def _get_file(source: str, part: Path, name: str, facts: dict[str, Any]) -> list[str]:
    """Fetch a file; returns its problems, none if it matches the manifest."""
    content = _retrying(_get, files.inside(source, name))
    if problems := checksum.difference(name, facts, checksum.of_bytes(content, checksum.algorithm_of(facts))):
        return problems
    (part / name).write_bytes(content)
    return []


def put(path: Path, location: str) -> None:
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
