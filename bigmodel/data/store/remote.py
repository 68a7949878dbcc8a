"""Remote: a prepared folder in a store, brought to a node file by file as files are needed, or put there.

Takes the URL of the folder in the store (`data.remote`) and the folder of this node (`data.directory`).

Guarantees: a file appears in the node's folder by one rename, after its size and SHA-256 were compared with the
manifest; of all processes of a node that want it one fetches it and the others wait; a process killed on the way
leaves only a hidden `.NAME.part`, which the next run deletes, but not while a live process holds it. In the store the
manifest is written last, so a folder that has one is whole.

With a limit (`data.cache_bytes`) the shards used longest ago are deleted before another is fetched: those alone that
were fetched from the store (`.fetched` lists them), and that the store has in the right size when it is asked.

Costs: a transfer that fails is tried 5 times, each failure logged and counted; the waits between are 10 seconds in
all, and a client that retries by itself, as that of S3 does at a host that does not answer, adds its own.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import tenacity
from rich.progress import Progress

from bigmodel.config.settings import UserError
from bigmodel.data.store import files
from bigmodel.data.store.manifest import MANIFEST, Manifest, find_damage
from bigmodel.run_directory import lock

ATTEMPTS = 5
FIRST_WAIT_SECONDS = 0.5  # doubled after every attempt
UPLOADS_AT_ONCE = 8
FETCHED = ".fetched"  # names of shards that came from the store, a line each
BUSY_SECONDS = 30.0  # a shard used within is missed soon after it is deleted: the limit is too low, which is said

log = logging.getLogger(__name__)


class Remote:
    """Fetches files of one prepared folder. `num_files`, `num_bytes`, `num_failures` and `num_deleted` count what it
    did. `cache_bytes`: see above; 0: no limit."""

    def __init__(self, url: str, directory: Path, cache_bytes: int = 0) -> None:
        self.url, self.directory, self.cache_bytes = url, directory, cache_bytes
        self.num_files = self.num_bytes = self.num_failures = self.num_deleted = 0
        self._is_same_data = self._said_busy = False
        self._shards: dict[str, int] = {}

    def begin(self, manifest: Manifest) -> None:
        """Delete what killed processes left of fetches. Raises `UserError` where a shard alone is above the limit."""
        self._shards = {name: file["bytes"] for name, file in manifest.files.items() if name.endswith(".mds")}
        largest = max(self._shards, key=lambda name: self._shards[name], default="")
        if largest and 0 < self.cache_bytes < self._shards[largest]:
            raise UserError(
                f"data.cache_bytes = {self.cache_bytes}: {largest} alone has {self._shards[largest]} bytes; raise it "
                "to what a few shards for every lane take, or prepare again with smaller prepare.shard_tokens"
            )
        for part in self.directory.glob("**/.*.part"):
            name = part.relative_to(self.directory).with_name(part.name[1 : -len(".part")])
            if name.as_posix() in manifest.files or name == Path(MANIFEST):
                _delete_unless_held(part)

    def fetch_manifest(self) -> None:
        """Put the store's manifest into the folder, unless there is one already: where all files are there too, the
        store is not asked for anything. Raises `UserError` if the store has none."""
        path = self.directory / MANIFEST
        if not path.exists():
            content = self._read_manifest()
            with _named(path):
                self.directory.mkdir(parents=True, exist_ok=True)
                with _held(path) as part:
                    part.truncate(0)
                    part.write(content)
                    _put_in_place(part, path)

    def fetch(self, name: str, recorded: dict[str, Any]) -> None:
        """Put one file into the folder, whole, unless another process does so first. `recorded`: its entry in the
        manifest. Raises `UserError` when every attempt failed."""
        path = self.directory / name
        with _named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _held(path) as part:
                if find_damage(self.directory, name, recorded):  # none: another process was first
                    self._compare_manifests()
                    if name in self._shards and self.cache_bytes:
                        self._make_room()
                    self._retrying(self._download, name, recorded, part)
                    if name in self._shards:
                        with open(self.directory / FETCHED, "a") as noted:
                            noted.write(f"{name}\n")
                    _put_in_place(part, path)
                    self.num_files += 1
                    self.num_bytes += recorded["bytes"]

    def _make_room(self) -> None:
        """Delete shards, those used longest ago first, until what is here and on its way, to whichever process of this
        node, is within the limit."""
        noted = self.directory / FETCHED
        fetched = set(noted.read_text().split("\n")) if noted.exists() else set()
        here, excess = [], -self.cache_bytes
        for name, num_bytes in self._shards.items():
            path = self.directory / name
            with contextlib.suppress(FileNotFoundError):
                here.append((path.stat().st_mtime, name))
                excess += num_bytes
            if _part_of(path).exists():
                excess += num_bytes
        for used, name in sorted(here):
            if excess <= 0:
                break
            if name in fetched and self.has(name):
                if time.time() - used < BUSY_SECONDS and not self._said_busy:
                    self._said_busy = True
                    log.warning(
                        "data.cache_bytes = %d is less than what is read at the same time: %s is deleted for room "
                        "while it is in use, and will be fetched again; raise it",
                        self.cache_bytes,
                        name,
                    )
                with contextlib.suppress(FileNotFoundError):  # another thread or process was first
                    (self.directory / name).unlink()
                    self.num_deleted += 1
                excess -= self._shards[name]

    def has(self, name: str) -> bool:
        """Whether the store has a shard, in its size. False also where it does not answer."""
        try:
            return files.size(files.join(self.url, name)) == self._shards[name]
        except UserError:
            return False

    def _compare_manifests(self) -> None:
        """Once, before the first file. Raises `UserError` where the store holds other data than the folder."""
        if self._is_same_data:
            return
        if (self.directory / MANIFEST).read_bytes() != self._read_manifest():
            raise UserError(
                f"data.directory = {self.directory}: holds other data than data.remote = {self.url} (their {MANIFEST} "
                "differ); choose another data.directory, or delete this one to fetch it anew"
            )
        self._is_same_data = True

    def _read_manifest(self) -> bytes:
        content = self._retrying(read_manifest, self.url)
        if content is None:
            raise UserError(without_manifest(self.url))
        return content

    def _download(self, name: str, recorded: dict[str, Any], part: BinaryIO) -> None:
        digest, location = hashlib.sha256(), files.join(self.url, name)
        part.truncate(0)
        for chunk in files.chunks(location):
            part.write(chunk)
            digest.update(chunk)
        if (part.tell(), digest.hexdigest()) != (recorded["bytes"], recorded["sha256"]):
            raise UserError(
                f"{location}: what came is not the file of the manifest ({part.tell()} bytes, {recorded['bytes']} "
                f"expected; SHA-256 {digest.hexdigest()[:12]}, {recorded['sha256'][:12]} expected); "
                f"see what is damaged with `bigmodel verify {self.url}`, then put that file there anew"
            )

    def _retrying(self, function: Any, *arguments: Any) -> Any:
        def note(state: tenacity.RetryCallState) -> None:
            assert state.outcome is not None
            self.num_failures += 1
            log.warning("%s; attempt %d of %d failed", state.outcome.exception(), state.attempt_number, ATTEMPTS)

        return tenacity.Retrying(
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_exponential(FIRST_WAIT_SECONDS) + tenacity.wait_random(0, FIRST_WAIT_SECONDS),
            retry=tenacity.retry_if_exception_type(UserError),
            before_sleep=note,
            reraise=True,
        )(function, *arguments)


def read_manifest(url: str) -> bytes | None:
    """The manifest of a folder in a store; None if it has none."""
    location = files.join(url, MANIFEST)
    return b"".join(files.chunks(location)) if files.find(location) else None


def without_manifest(url: str) -> str:
    return (
        f"{url}: has no {MANIFEST}, so it is not a whole folder of prepared shards; "
        "put one there with `bigmodel upload RUN.toml`"
    )


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _put_in_place(part: BinaryIO, path: Path) -> None:
    part.flush()
    os.fsync(part.fileno())
    os.replace(part.name, path)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[BinaryIO]:
    """The file that becomes `path`, held against every other process of this node; it is its own lock, and the lock
    ends with the process."""
    name = _part_of(path)
    while True:
        part = open(name, "ab")  # noqa: SIM115 - closed below
        lock(part, str(name))
        if name.exists() and os.path.samestat(os.fstat(part.fileno()), name.stat()):
            break
        part.close()  # the process before us renamed it: it is `path` now
    with part:
        try:
            yield part
        finally:
            if name.exists() and os.path.samestat(os.fstat(part.fileno()), name.stat()):
                name.unlink()


def _delete_unless_held(part: Path) -> None:
    """Delete the rest of a fetch, unless a live process is at it."""
    with contextlib.suppress(OSError), open(part, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), part.stat()):
            part.unlink()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """A full disk is reported with the file's name; what else keeps the folder from being written is a `UserError`."""
    try:
        yield
    except PermissionError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}; data.directory must be writable where data.remote is set"
        ) from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


# ---- the other way --------------------------------------------------------------------------------------------


def upload(directory: Path, url: str, progress: Progress) -> None:
    """Put a prepared folder into a store, the manifest last. What is there already and right is not sent again.

    Raises `UserError` for a file that is not as the manifest says, for other data in the store, and for what the
    store refuses.
    """
    manifest = Manifest.read(directory)
    content = (directory / MANIFEST).read_bytes()
    there = files.sizes(url)
    if MANIFEST in there and read_manifest(url) != content:
        raise UserError(f"{url}: holds other prepared data; choose another data.remote, or delete what is there")
    task = progress.add_task("uploading", total=sum(record["bytes"] for record in manifest.files.values()))

    def send(name: str) -> None:
        recorded = manifest.files[name]
        if there.get(name) != recorded["bytes"] or find_damage(url, name, recorded):
            files.write(files.join(url, name), _checked(directory, name, recorded))
        progress.advance(task, recorded["bytes"])

    with ThreadPoolExecutor(UPLOADS_AT_ONCE) as pool:
        list(pool.map(send, manifest.files))
    files.write(files.join(url, MANIFEST), [content])


def _checked(directory: Path, name: str, recorded: dict[str, Any]) -> Iterator[bytes]:
    """The content of a file; raises `UserError` at its end if it is not what the manifest says."""
    digest, location = hashlib.sha256(), str(directory / name)
    for chunk in files.chunks(location):
        digest.update(chunk)
        yield chunk
    if digest.hexdigest() != recorded["sha256"]:
        raise UserError(f"{location}: differs from the manifest; prepare the data again, then upload it")
