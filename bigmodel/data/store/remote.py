"""Remote: fetches a prepared folder from a store file by file, when a file is needed; uploads one.

In: the URL of the folder in the store (`data.remote`) and the folder on this node (`data.directory`).

Guarantees: a file appears in the node's folder by one rename, after size and SHA-256 were compared with the manifest.
Of all processes of a node that need it, one fetches it and the others wait. A killed process leaves only a hidden
`.NAME.part`, which the next run deletes unless a live process holds it. An upload writes the manifest last, so a folder
in the store that has one is whole. A name in the manifest, or a symbolic link, that leads outside the folder is an
error before that file is written or sent.

With a limit (`data.cache_bytes`) the least recently used shards are deleted before another is fetched: only shards that
were fetched from the store (`.fetched` lists them) and that the store still has in the right size.

Costs: a failed transfer is tried 5 times in all, each failure logged and counted, with 10 seconds of waits in total. A
client with retries of its own adds them, as that of S3 does at a host that does not answer.
"""

import contextlib
import errno
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
FETCHED = ".fetched"  # names of shards fetched from the store, one per line
BUSY_SECONDS = 30.0  # a shard used more recently is needed again soon: deleting it warns that the limit is too low

log = logging.getLogger(__name__)


class Remote:
    """Fetches files of one prepared folder. `num_files` and `num_bytes` count what was fetched, `num_failures` failed
    attempts, `num_deleted` shards deleted for room. `cache_bytes`: see above; 0: no limit."""

    def __init__(self, url: str, directory: Path, cache_bytes: int = 0) -> None:
        self.url, self.directory, self.cache_bytes = url, directory, cache_bytes
        self.num_files = self.num_bytes = self.num_failures = self.num_deleted = 0
        self._is_same_data = self._said_busy = False
        self._shards: dict[str, int] = {}

    def begin(self, manifest: Manifest) -> None:
        """Delete unfinished fetches of killed processes. Raises `UserError` if a single shard exceeds the limit."""
        self._shards = {name: file["bytes"] for name, file in manifest.files.items() if name.endswith(".mds")}
        largest = max(self._shards, key=lambda name: self._shards[name], default="")
        if largest and 0 < self.cache_bytes < self._shards[largest]:
            raise UserError(
                f"data.cache_bytes = {self.cache_bytes}: {largest} alone has {self._shards[largest]} bytes; raise it "
                "to the size of a few shards per lane, or prepare again with smaller prepare.shard_tokens"
            )
        for part in self.directory.glob("**/.*.part"):
            name = part.relative_to(self.directory).with_name(part.name[1 : -len(".part")])
            if name.as_posix() in manifest.files or name == Path(MANIFEST):
                _delete_unless_held(part)

    def fetch_manifest(self) -> None:
        """Put the store's manifest into the folder unless it has one: a folder with all files needs no request to the
        store. Raises `UserError` if the store has no manifest."""
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
        """Put one whole file into the folder, unless another process does so first. `recorded`: its entry in the
        manifest. Raises `UserError` after the last failed attempt."""
        path = Path(files.inside(str(self.directory), name))
        with _named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _held(path) as part:
                if find_damage(self.directory, name, recorded):  # no damage: another process was first
                    self._compare_manifests()
                    if name in self._shards and self.cache_bytes:
                        self._make_room()
                    self._retrying(self._download, name, recorded, part)
                    if name in self._shards:
                        with open(self.directory / FETCHED, "ab", opener=_no_link) as noted:
                            noted.write(f"{name}\n".encode())
                    _put_in_place(part, path)
                    self.num_files += 1
                    self.num_bytes += recorded["bytes"]

    def _make_room(self) -> None:
        """Delete shards, least recently used first, until the shards of this node and those being fetched by any of its
        processes are within the limit."""
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
                        "data.cache_bytes = %d is less than the shards in use: %s is deleted for room while in use and "
                        "will be fetched again; raise it",
                        self.cache_bytes,
                        name,
                    )
                with contextlib.suppress(FileNotFoundError):  # another thread or process was first
                    (self.directory / name).unlink()
                    self.num_deleted += 1
                excess -= self._shards[name]

    def has(self, name: str) -> bool:
        """Whether the store has the shard in the right size. False also if the store does not answer."""
        try:
            return files.size(files.inside(self.url, name)) == self._shards[name]
        except UserError:
            return False

    def _compare_manifests(self) -> None:
        """Once, before the first file. Raises `UserError` if store and folder hold different data."""
        if self._is_same_data:
            return
        if (self.directory / MANIFEST).read_bytes() != self._read_manifest():
            raise UserError(
                f"data.directory = {self.directory}: holds other data than data.remote = {self.url} (their {MANIFEST} "
                "differ); choose another data.directory, or delete this one to fetch it again"
            )
        self._is_same_data = True

    def _read_manifest(self) -> bytes:
        content = self._retrying(read_manifest, self.url)
        if content is None:
            raise UserError(without_manifest(self.url))
        return content

    def _download(self, name: str, recorded: dict[str, Any], part: BinaryIO) -> None:
        digest, location = hashlib.sha256(), files.inside(self.url, name)
        part.truncate(0)
        for chunk in files.chunks(location):
            part.write(chunk)
            digest.update(chunk)
        if (part.tell(), digest.hexdigest()) != (recorded["bytes"], recorded["sha256"]):
            raise UserError(
                f"{location}: the received file differs from the manifest ({part.tell()} bytes, {recorded['bytes']} "
                f"expected; SHA-256 {digest.hexdigest()[:12]}, {recorded['sha256'][:12]} expected); "
                f"list the damage with `bigmodel verify {self.url}`, then upload that file again"
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
    """The manifest of a folder in a store, or None."""
    location = files.join(url, MANIFEST)
    return b"".join(files.chunks(location)) if files.find(location) else None


def without_manifest(url: str) -> str:
    return (
        f"{url}: has no {MANIFEST}, so it is not a whole folder of prepared shards; "
        "upload one with `bigmodel upload RUN.toml`"
    )


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _put_in_place(part: BinaryIO, path: Path) -> None:
    part.flush()
    os.fsync(part.fileno())
    os.replace(part.name, path)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[BinaryIO]:
    """The open file that becomes `path`, locked against all other processes of this node. It is its own lock; the lock
    ends with the process."""
    name = _part_of(path)
    while True:
        part = open(name, "ab", opener=_no_link)  # noqa: SIM115 - closed below
        lock(part, str(name))
        if name.exists() and os.path.samestat(os.fstat(part.fileno()), name.stat()):
            break
        part.close()  # the process that held it renamed it to `path`
    with part:
        try:
            yield part
        finally:
            if name.exists() and os.path.samestat(os.fstat(part.fileno()), name.stat()):
                name.unlink()


def _no_link(path: str, flags: int) -> int:
    """Opens a file for writing, but none behind a symbolic link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _delete_unless_held(part: Path) -> None:
    """Delete an unfinished fetch, unless a live process holds it."""
    with contextlib.suppress(OSError), open(part, "ab", opener=_no_link) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), part.stat()):
            part.unlink()


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of writing name the file: missing permission, a link or a file in the way as a `UserError`, others (a full
    disk) as `OSError`."""
    try:
        yield
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path}: cannot be written: a file is in the place of its folder; delete that file") from None
    except PermissionError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}; data.directory must be writable where data.remote is set"
        ) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{error.filename}: is a symbolic link, which is not followed; delete it") from None
        raise OSError(error.errno, error.strerror, str(path)) from None


# ---- upload ----------------------------------------------------------------------------------------------------


def upload(directory: Path, url: str, progress: Progress) -> None:
    """Put a prepared folder into a store, the manifest last. Files that the store has undamaged are not sent again.

    Raises `UserError` for a local file that differs from the manifest, other data in the store, and an error of the
    store.
    """
    manifest = Manifest.read(directory)
    content = (directory / MANIFEST).read_bytes()
    there = files.sizes(url)
    if MANIFEST in there and read_manifest(url) != content:
        raise UserError(f"{url}: holds other prepared data; choose another data.remote, or delete that data")
    task = progress.add_task("uploading", total=sum(record["bytes"] for record in manifest.files.values()))

    def send(name: str) -> None:
        recorded = manifest.files[name]
        if there.get(name) != recorded["bytes"] or find_damage(url, name, recorded):
            files.write(files.inside(url, name), _checked(directory, name, recorded))
        progress.advance(task, recorded["bytes"])

    with ThreadPoolExecutor(UPLOADS_AT_ONCE) as pool:
        list(pool.map(send, manifest.files))
    files.write(files.join(url, MANIFEST), [content])


def _checked(directory: Path, name: str, recorded: dict[str, Any]) -> Iterator[bytes]:
    """The content of a file; raises `UserError` at its end if it differs from the manifest."""
    digest, location = hashlib.sha256(), files.inside(str(directory), name)
    for chunk in files.chunks(location):
        digest.update(chunk)
        yield chunk
    if digest.hexdigest() != recorded["sha256"]:
        raise UserError(f"{location}: differs from the manifest; prepare the data again, then upload it")
