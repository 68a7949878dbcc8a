"""Files on this machine or in a store named by a URL.

In: paths and URLs. s3://, gs://, abfs:// and hdfs:// go through pyarrow, other schemes through their fsspec driver.
Credentials come from the environment, as each store's own tools expect them; pyarrow's settings of a store follow the
question mark of a URL.

Guarantees: a file that cannot be found or read raises a `UserError` that names it.

Tested: s3:// against moto's server; gs:// against fake-gcs-server and abfs:// against Azurite where these are
installed (else the tests are skipped); fsspec's memory://; of hdfs:// only the error without a JVM.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import fsspec
import pyarrow
from fsspec.utils import glob_translate
from pyarrow import fs

from bigmodel.config.settings import UserError
from bigmodel.data.store import tree

PYARROW_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs")
GS_RETRY_SECONDS = 30  # the client's default is 15 minutes without a message
CHUNK_BYTES = 4 << 20  # per read: a store answers each read separately
NEVER_IN_NAMES = re.compile(r"[?#\\\x00-\x1f\x7f]")  # ? and # begin settings of a URL, as that of its host
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL for a store other than Amazon's",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "abfs": "AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET, or AZURE_STORAGE_KEY",
    "hdfs": "a Kerberos ticket, HADOOP_HOME and CLASSPATH",
}


def is_remote(location: str) -> bool:
    return "://" in location


def is_local(location: str) -> bool:
    """Whether a path, or a URL of the scheme file, names it."""
    return not is_remote(location) or urlsplit(location).scheme == "file"


def without_settings(location: str) -> str:
    """A URL without its question mark and settings; a path unchanged."""
    return location.partition("?")[0] if is_remote(location) else location


def absolute(location: str) -> str:
    """The same file under a name that is valid in any working directory of the machine."""
    return location if is_remote(location) else os.path.abspath(location)


def find(pattern: str, say: Callable[[str], None] = lambda _: None) -> list[str]:
    """Files that match a path, URL or glob pattern, sorted; below `**` of a local one, each real file once, and `say`
    gets a line about what was passed over.

    An existing folder or file whose name contains wildcards is taken literally: `/data/crawl[1]/*.txt`.
    """
    if not is_remote(pattern):
        found = (tree.matching(start, rest, say) for start, rest in _readings(pattern, "*?["))
        return sorted(next(filter(None, found), []))
    parts = urlsplit(pattern)
    if parts.scheme == "file":
        return [f"file://{name}" for name in find(parts.path, say)]
    store, path = open_store(pattern)
    with readable(pattern):
        names = next(filter(None, (_matching(store, start, rest) for start, rest in _readings(path, "*["))), [])
    start = path.removesuffix(parts.path.lstrip("/"))  # bucket or container; the URL names it in its own form
    query = f"?{parts.query}" if parts.query else ""
    return [f"{parts.scheme}://{parts.netloc}/{name.removeprefix(start)}{query}" for name in names]


def _readings(path: str, wildcards: str) -> Iterator[tuple[str, str]]:
    """Splits of a path into a literal beginning and a pattern, longest beginning first.

    >>> list(_readings("crawl[1]/*.txt", "*?["))
    [('crawl[1]/*.txt', ''), ('crawl[1]/', '*.txt'), ('', 'crawl[1]/*.txt')]
    """
    yield path, ""
    parts = path.split("/")
    for number in reversed(range(len(parts))):
        if any(letter in parts[number] for letter in wildcards):
            yield "".join(f"{part}/" for part in parts[:number]), "/".join(parts[number:])


def _matching(store: fs.FileSystem, start: str, rest: str) -> list[str]:
    """Files below `start` that match the pattern `rest`; with an empty `rest`, `start` itself if it exists.

    fsspec's own glob is not used: without permission it finds nothing and raises nothing.
    """
    if not rest:
        return [] if store.get_file_info(start).type == fs.FileType.NotFound else [start]
    deeper = "**" in rest or "/" in rest
    selector = fs.FileSelector(start.rstrip("/"), allow_not_found=True, recursive=deeper)
    pattern = re.compile(glob_translate(rest))
    found = store.get_file_info(selector)
    names = (entry.path for entry in found if entry.is_file or not tree.is_whole(rest))
    return sorted(name for name in names if pattern.match(name.removeprefix(start)))


def is_folder(location: str) -> bool:
    if not is_remote(location):
        return os.path.isdir(location)
    store, path = open_store(location)
    with readable(location):
        return store.get_file_info(path).type == fs.FileType.Directory


def join(folder: str, name: str) -> str:
    """A file below a folder; a URL's settings stay at its end."""
    path, mark, settings = folder.partition("?") if is_remote(folder) else (folder, "", "")
    return f"{path.rstrip('/')}/{name}{mark}{settings}"


def parent(location: str) -> str:
    """The folder of a file; a URL's settings stay at its end."""
    path, mark, settings = location.partition("?") if is_remote(location) else (location, "", "")
    return f"{path.rpartition('/')[0] or '.'}{mark}{settings}"


def is_inside(name: Any) -> bool:
    """Whether a name that was read from a file (a manifest, an index) is a path inside that file's folder.

    >>> [is_inside(name) for name in ("train/web/shard.00000.mds", "../x", "a/../../x", "/etc/x", "")]
    [True, False, False, False, False]
    """
    plain = isinstance(name, str) and not NEVER_IN_NAMES.search(name)
    return plain and all(part not in ("", ".", "..") for part in name.split("/"))


def inside(folder: str, name: str) -> str:
    """The location of a file in a folder, by a name that was read from a file. Links within the folder are followed.

    Raises `UserError` for a name that leads outside, by itself or through a symbolic link.
    """
    if not is_inside(name):
        raise UserError(f"{folder}: {name!r} is not the path of a file inside; make this folder anew")
    location = join(folder, name)
    if is_local(folder):
        root, target = (os.path.realpath(without_settings(one).removeprefix("file://")) for one in (folder, location))
        if os.path.commonpath([root, target]) != root:
            raise UserError(
                f"{location}: leads outside {folder}, through a symbolic link to {target}; put the file itself there "
                "(cp -rL makes such a copy of a folder)"
            )
    return location


def sizes(folder: str) -> dict[str, int]:
    """Bytes of every file below a folder by relative path, sorted; empty without such a folder."""
    if is_remote(folder):
        store, path = open_store(folder)
    else:
        store, path = fs.LocalFileSystem(), os.path.abspath(folder)
    start = path.rstrip("/") + "/"
    with readable(folder):
        entries = store.get_file_info(fs.FileSelector(start.rstrip("/"), allow_not_found=True, recursive=True))
    found = {entry.path.removeprefix(start): entry.size for entry in entries if entry.type == fs.FileType.File}
    return dict(sorted(found.items()))


def size(location: str) -> int:
    """Bytes as stored."""
    with readable(location):
        if not is_remote(location):
            return os.path.getsize(location)
        store, path = open_store(location)
        information = store.get_file_info(path)
        if information.type == fs.FileType.NotFound:
            raise FileNotFoundError("no such file")
        return information.size


def identity(location: str) -> str:
    """Size and time of the last change: detects a changed file without reading it."""
    store, path = open_store(location) if is_remote(location) else (fs.LocalFileSystem(), location)
    with readable(location):
        information = store.get_file_info(path)
        return f"{information.size} bytes of {information.mtime_ns}"


def open_file(location: str) -> pyarrow.NativeFile:
    """The file as stored, open for random access."""
    with readable(location):
        if not is_remote(location):
            return pyarrow.OSFile(location)
        store, path = open_store(location)
        return store.open_input_file(path)


def chunks(location: str) -> Iterator[bytes]:
    """The content of a file in blocks, from start to end."""
    with readable(location), open_file(location) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def write(location: str, content: Iterable[bytes]) -> None:
    """Create a file in a store. Raises `UserError` naming it; errors of `content` pass through."""
    store, path = open_store(location)
    try:
        if not isinstance(store, (fs.S3FileSystem, fs.GcsFileSystem)):  # these have no folders
            store.create_dir(path.rpartition("/")[0], recursive=True)
        with store.open_output_stream(path) as stream:
            for chunk in content:
                stream.write(chunk)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{location}: cannot be written: {_reason(location, error)}; {_remedy(location)}") from None


@contextmanager
def readable(location: str) -> Iterator[None]:
    """Errors of reading this file become a `UserError` with its name and the remedy."""
    try:
        yield
    except (OSError, EOFError, pyarrow.ArrowException) as error:
        raise UserError(f"{location}: cannot be read: {_reason(location, error)}; {_remedy(location)}") from None


def _reason(location: str, error: BaseException) -> str:
    """Of a local file in the system's words: pyarrow's message repeats its path."""
    if isinstance(error, OSError) and error.errno and is_local(location):
        return os.strerror(error.errno)
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _remedy(location: str) -> str:
    if is_local(location):
        return "restore the file or leave it out"
    scheme = {"gcs": "gs", "abfss": "abfs"}.get(urlsplit(location).scheme, urlsplit(location).scheme)
    where = CREDENTIALS.get(scheme, f"those of fsspec's driver for {scheme}://")
    return f"check that it exists and that the environment has the credentials ({where})"


def open_store(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URL and the file's path in it."""
    parts = urlsplit(location)
    if parts.scheme == "file":
        return fs.LocalFileSystem(), parts.path
    if parts.scheme not in PYARROW_SCHEMES:
        return _fsspec_store(location)
    query = parts.query
    if parts.scheme in ("gs", "gcs") and "retry_limit_seconds" not in query:
        query = "&".join([*([query] if query else []), f"retry_limit_seconds={GS_RETRY_SECONDS}"])
    root = f"{parts.scheme}://{parts.netloc}" + (f"?{query}" if query else "")
    with readable(location):
        store, base = connect(root)
    path = base.rstrip("/") + parts.path
    return store, path if parts.scheme == "hdfs" else path.lstrip("/")  # only hdfs has a root folder


@lru_cache(maxsize=16)
def connect(root: str) -> tuple[fs.FileSystem, str]:
    """Connect once per process and bucket: connecting may query the bucket's region over the network."""
    key = os.environ.get("AZURE_STORAGE_KEY")
    if not key or urlsplit(root).scheme not in ("abfs", "abfss") or "credential_kind" in root:
        return fs.FileSystem.from_uri(root)
    # pyarrow accepts no key in a URL and would query Azure's identity service instead, which requires TLS.
    store, base = fs.FileSystem.from_uri(f"{root}{'&' if '?' in root else '?'}credential_kind=anonymous")
    _, (options,) = store.__reduce__()
    return fs.AzureFileSystem(**options | {"account_key": key}), base


def _fsspec_store(location: str) -> tuple[fs.FileSystem, str]:
    with readable(location):  # some drivers connect here
        try:
            driver, path = fsspec.core.url_to_fs(location)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"{location}: no driver for this kind of URL: {_first_line(error)}; name a path, or a URL of "
                f"{', '.join(PYARROW_SCHEMES)}"
            ) from None
    driver.invalidate_cache()  # fsspec keeps drivers, and many keep their listings: new files would stay unseen
    return fs.PyFileSystem(fs.FSSpecHandler(driver)), path
