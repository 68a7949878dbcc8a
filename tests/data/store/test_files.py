"""Sources in stores: listed, read and prepared as local ones, by any process; what fails is named."""

import ast
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import fsspec.implementations.local
import pytest

from bigmodel.config.settings import UserError
from bigmodel.data.prepare import corpus
from bigmodel.data.prepare import pipeline as preparing
from bigmodel.data.prepare.pipeline import prepare, quiet
from bigmodel.data.prepare.verify import verify
from bigmodel.data.store import files
from bigmodel.data.store.remote import upload
from bigmodel.data.store.shards import ShardStore
from bigmodel.launcher.network import free_port
from tests.support.s3 import put, refusing_server, s3_server
from tests.support.tiny_corpus import LETTERS, NEWS, prepared, tiny_settings


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server on loopback with the tiny corpus in its bucket, found through the environment alone."""
    with s3_server() as url:
        for source in tiny_settings(tmp_path_factory.mktemp("store")).prepare.sources:
            file = Path(source.files[0])
            put(f"{url}/text/{file.name}", file.read_bytes())
        put(f"{url}/text/deep/more.jsonl", b'{"body": "deep"}\n')
        yield url


def test_patterns_find_what_is_in_a_store(bucket: str) -> None:
    assert files.find(f"{bucket}/text/*") == [
        f"{bucket}/text/deep",
        f"{bucket}/text/letters.parquet",
        f"{bucket}/text/news.jsonl",
    ]
    assert files.find(f"{bucket}/**/*.jsonl") == [f"{bucket}/text/deep/more.jsonl", f"{bucket}/text/news.jsonl"]
    assert files.find(f"{bucket}/text/news.jsonl") == [f"{bucket}/text/news.jsonl"]
    assert files.find(f"{bucket}/text/none.jsonl") == files.find(f"{bucket}/none/*.jsonl") == []
    assert files.is_folder(f"{bucket}/text")
    assert files.size(f"{bucket}/text/deep/more.jsonl") == 17


def test_a_folder_whose_name_has_wildcards_is_taken_as_it_is_written(tmp_path: Path, bucket: str) -> None:
    names = ["crawl[1]/a.txt", "crawl[1]/deep/b.txt", "crawl1/c.txt", "crawl2/d[0].txt", "crawl2/d0.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
        put(f"{bucket}/odd/{name}", b"text")
    expected = {
        "crawl[1]/*.txt": ["crawl[1]/a.txt"],
        "crawl[1]/**/*.txt": ["crawl[1]/a.txt", "crawl[1]/deep/b.txt"],
        "crawl[1]/a.txt": ["crawl[1]/a.txt"],
        "crawl[1]/c.txt": ["crawl1/c.txt"],  # not there as it is written: a pattern
        "crawl[12]/*.txt": ["crawl1/c.txt", "crawl2/d0.txt", "crawl2/d[0].txt"],
        "crawl2/d[0].txt": ["crawl2/d[0].txt"],
        "crawl[3]/*.txt": [],
    }
    for place in (str(tmp_path), f"{bucket}/odd"):
        for pattern, found in expected.items():
            assert files.find(f"{place}/{pattern}") == [f"{place}/{name}" for name in found], pattern


# Where a name that is no constant is put behind a folder, and why it cannot lead outside.
NAMES_PUT_BEHIND_FOLDERS = {
    ("bigmodel/data/store/manifest.py", "name"),  # of a Manifest, which refuses the names of other files
    ("bigmodel/data/prepare/verify.py", "name"),  # the same, or found in the folder
    ("bigmodel/data/store/mds_index.py", "name"),  # of `read_index`, which refuses them too
    ("bigmodel/data/store/mds_index.py", "of_one[0]"),  # for a message; checked by read_index
    ("bigmodel/training/checkpoint/remote.py", "path.name"),  # of the checkpoint's own folder
    ("bigmodel/training/checkpoint/remote.py", "f'{path.name}/{place.name}'"),  # found in the folder
    ("bigmodel/training/checkpoint/remote.py", "f'{name}/{MANIFEST}'"),  # name: step-N, of a listing or made here
    ("bigmodel/training/checkpoint/remote.py", "f'{name}/{ABANDONED}'"),
    ("bigmodel/training/checkpoint/remote.py", "f'{name}/{file}'"),
}


def test_every_name_that_a_file_gives_is_held_to_its_folder() -> None:
    """A new place calls `files.inside`, or joins the table with its reason."""
    root, found = Path(files.__file__).parents[3], set()
    for path in (root / "bigmodel").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "files.join":
                name = ast.unparse(node.args[1])
                found |= set() if name.isupper() else {(path.relative_to(root).as_posix(), name)}
    assert found == NAMES_PUT_BEHIND_FOLDERS
    for name in ("../x", "/x", "", None, 5):
        with pytest.raises(UserError, match=r"^/data: .* is not the path of a file inside; make this folder anew"):
            files.inside("/data", name)


def test_a_store_is_prepared_into_the_same_shards_as_the_files_themselves(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = prepared(tmp_path / "local")
    sources = tiny_settings(tmp_path / "store").prepare.model_dump()["sources"]
    for source, name in zip(sources, ("news.jsonl", "letters.*"), strict=True):
        source["files"] = [f"{bucket}/text/{name}"]
    shutil.rmtree(tmp_path / "store")
    monkeypatch.setattr(preparing, "INLINE_BYTES", 0)
    monkeypatch.setattr(corpus, "UNIT_BYTES", 20_000)
    settings = tiny_settings(tmp_path / "store", sources=sources, workers=2)
    shutil.rmtree(tmp_path / "store" / "text")
    remote = prepare(settings, quiet())
    names = sorted(str(path.relative_to(local)) for path in local.rglob("*") if path.is_file())
    assert len(names) > 10
    assert names == sorted(str(path.relative_to(remote)) for path in remote.rglob("*") if path.is_file())
    for name in names:
        same = (local / name).read_bytes() == (remote / name).read_bytes()
        assert same == (name != "manifest.json"), name  # it names the sources
    assert prepare(settings, quiet()) == remote  # already prepared


def test_a_missing_column_and_a_missing_bucket_are_named(bucket: str, tmp_path: Path) -> None:
    source = {"name": "web", "files": [f"{bucket}/text/letters.parquet"], "column": "body"}
    with pytest.raises(UserError, match=rf"{bucket}/text/letters.parquet has no column 'body'; it has 'text'"):
        prepared(tmp_path, sources=[source])
    with pytest.raises(UserError, match=r"'s3://nobody/\*.jsonl' matches nothing; give a path, URL or pattern"):
        prepared(tmp_path, sources=[source | {"files": ["s3://nobody/*.jsonl"]}])


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_local_file_that_cannot_be_read_needs_no_credentials(scheme: str, tmp_path: Path) -> None:
    location = f"{scheme}{tmp_path}/gone.jsonl"
    with pytest.raises(UserError) as error:
        files.open_file(location)
    assert str(error.value) == (
        f"{location}: cannot be read: No such file or directory; restore the file or leave it out"
    )


def test_a_store_that_wants_other_credentials_is_named_with_the_variables_it_reads() -> None:
    with refusing_server():
        for name in ("a.jsonl", "*.jsonl"):
            with pytest.raises(UserError) as error:
                files.find(f"s3://private/{name}")
            assert f"s3://private/{name}: cannot be read" in str(error.value)
            assert "credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in str(error.value)


class KeepsListings(fsspec.implementations.local.LocalFileSystem):
    """A driver with fsspec's own cache of listings, as those of stores have."""

    protocol = "keeps-listings"

    def __init__(self, **options: Any) -> None:
        super().__init__(use_listings_cache=True, **options)

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:  # fsspec up to 2026.2 strips file:// and local:// alone
        return super()._strip_protocol(str(path).removeprefix(f"{cls.protocol}://"))

    def ls(self, path: str, detail: bool = False, **options: Any) -> list[Any]:
        path = self._strip_protocol(path)
        if path not in self.dircache:
            self.dircache[path] = super().ls(path, detail=True, **options)
        return self.dircache[path] if detail else [entry["name"] for entry in self.dircache[path]]

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.clear()


def test_new_files_are_seen_though_a_driver_keeps_its_listings(tmp_path: Path) -> None:
    fsspec.register_implementation("keeps-listings", KeepsListings, clobber=True)
    folder = f"keeps-listings://{tmp_path}"
    (tmp_path / "a").write_bytes(b"1")
    assert files.sizes(folder) == {"a": 1}
    (tmp_path / "b").write_bytes(b"22")
    assert files.sizes(folder) == {"a": 1, "b": 2}


def test_what_fsspec_has_a_driver_for_is_read_and_what_it_has_not_is_said(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for name, texts in (("a", NEWS[:50]), ("b", NEWS[50:])):
        store.pipe(f"/corpus/{name}.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    directory = prepared(tmp_path, sources=[{"name": "news", "files": ["memory://corpus/*.jsonl"]}])
    assert preparing.Manifest.read(directory).rows["news"]["kept"] == len(NEWS)
    assert len(LETTERS) < len(NEWS)
    with pytest.raises(UserError, match=r"gopher://hole/a.jsonl: no driver for this kind of URL"):
        files.find("gopher://hole/a.jsonl")


def test_a_host_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    location = f"s3://a:b@x/a.jsonl?endpoint_override=127.0.0.1:{free_port()}&scheme=http&region=us-east-1"
    with pytest.raises(UserError, match=r"cannot be read: .*onnect"):
        files.find(location)


def test_a_store_whose_driver_cannot_connect_is_told_from_one_without_a_driver() -> None:
    with pytest.raises(
        UserError, match=r"^ftp://127\.0\.0\.1:9/a\.jsonl: cannot be read: .*refused.*driver for ftp://"
    ):
        files.find("ftp://127.0.0.1:9/a.jsonl")


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("az://c/a.jsonl", ["no driver for this kind of URL", "adlfs"]),
        ("abfs://c/a.jsonl", ["cannot be read", "account name", "AZURE_TENANT_ID, AZURE_CLIENT_ID"]),
        ("hdfs://127.0.0.1:9/a.jsonl", ["cannot be read", "a Kerberos ticket, HADOOP_HOME and CLASSPATH"]),
        (
            "gs://anonymous@b/a.jsonl?scheme=http&endpoint_override=127.0.0.1:9&retry_limit_seconds=1",
            ["cannot be read", "GOOGLE_APPLICATION_CREDENTIALS"],
        ),
        ("gs://b/a.jsonl?sheme=http", ["cannot be read", "sheme"]),
    ],
)
def test_other_stores_without_driver_or_credentials_are_one_message(location: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        files.find(location)
    assert str(error.value).startswith(location)
    for word in words:
        assert word in str(error.value)


def test_a_store_of_google_that_does_not_answer_is_given_up_after_half_a_minute(monkeypatch) -> None:
    """Its client's own limit is 15 minutes."""
    asked: list[str] = []
    monkeypatch.setattr(files, "connect", lambda root: (asked.append(root), ("store", "b/"))[1])
    assert files.open_store("gs://b/a.jsonl") == ("store", "b/a.jsonl")
    assert files.open_store("gcs://b/a.jsonl?scheme=http") == ("store", "b/a.jsonl")
    files.open_store("gs://b/a.jsonl?retry_limit_seconds=5")
    assert asked == [
        "gs://b?retry_limit_seconds=30",
        "gcs://b?scheme=http&retry_limit_seconds=30",
        "gs://b?retry_limit_seconds=5",
    ]


def test_only_hdfs_has_a_root_folder(monkeypatch) -> None:
    """pyarrow says of a URL's beginning where it lies in the store: a bucket, nothing, or a slash."""
    for location, base, path in (
        ("s3://bucket/a/b.jsonl", "bucket", "bucket/a/b.jsonl"),
        ("abfs://account:key@127.0.0.1:10000/container/a/b.jsonl?enable_tls=false", "", "container/a/b.jsonl"),
        ("hdfs://host:8020/a/b.jsonl", "/", "/a/b.jsonl"),
    ):
        monkeypatch.setattr(files, "connect", lambda root, base=base: ("store", base))
        assert files.open_store(location) == ("store", path)


def test_secrets_in_a_url_are_neither_shown_nor_stored(tmp_path: Path, bucket: str) -> None:
    for url, shown in (
        ("s3://KEY:SECRET@b/a.jsonl", "s3://KEY:***@b/a.jsonl"),
        ("abfs://c:QUJD%2F%3D@x.dfs.core.windows.net/a", "abfs://c:***@x.dfs.core.windows.net/a"),
        ("x://b/a?access_key=K&secret_key=S&region=r", "x://b/a?access_key=***&secret_key=***&region=r"),
        ("/data/key=x/a@b.jsonl", "/data/key=x/a@b.jsonl"),
        ("s3://b/key=x/a@b:c.jsonl", "s3://b/key=x/a@b:c.jsonl"),
    ):
        assert str(UserError(f"{url}: cannot be read")) == f"{shown}: cannot be read"
    url = bucket.replace("s3://", "s3://a:TOPSECRET@")
    source = {"name": "news", "files": [f"{url}/text/news.*"], "column": "body"}
    directory = prepared(tmp_path, sources=[source])
    assert all(b"TOPSECRET" not in path.read_bytes() for path in directory.rglob("*") if path.is_file())
    again = prepared(tmp_path, sources=[source])  # already prepared
    assert preparing.Manifest.read(again).recipe["sources"][0]["files"] == [
        f"{url}/text/news.*".replace("TOPSECRET", "***")
    ]


@contextlib.contextmanager
def server(program: str, *options: str) -> Iterator[str]:
    """An emulator on a port of its own, if it is installed; `{port}` in its options is replaced. Gives its address."""
    found = shutil.which(program)
    if not found:
        pytest.skip(f"{program} is not installed")
    port = free_port()
    command = [found, *(option.format(port=port) for option in options)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(900):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def check_store(tmp_path: Path, root: str, settings: str) -> None:
    """Sources in a store become the same shards as local ones; put there, these are whole, and a node fetches them."""
    local = prepared(tmp_path)
    for name in ("news.jsonl", "letters.parquet"):
        files.write(f"{root}/text/{name}{settings}", [(tmp_path / "text" / name).read_bytes()])
    sources = tiny_settings(tmp_path).prepare.model_dump()["sources"]
    for source, name in zip(sources, ("news.*", "letters.parquet"), strict=True):
        source["files"] = [f"{root}/text/{name}{settings}"]
    made = prepared(tmp_path / "from-store", sources=sources)
    for name in ("train/news/shard.00000.mds", "train/letters/index.json", "tokenizer.json"):
        assert (made / name).read_bytes() == (local / name).read_bytes()
    url = f"{root}/made{settings}"
    upload(made, url, quiet())
    assert verify(url, quiet()) == []
    ShardStore(tmp_path / "node", "train", url).document("news", 0, 0)
    shard = "train/news/shard.00000.mds"
    assert (tmp_path / "node" / shard).read_bytes() == (made / shard).read_bytes()


def test_a_store_of_google_is_prepared_uploaded_and_fetched_from(tmp_path: Path) -> None:
    options = ("-scheme", "http", "-host", "127.0.0.1", "-port", "{port}", "-backend", "memory")
    with server("fake-gcs-server", *options, "-public-host", "127.0.0.1:{port}") as address:
        request = urllib.request.Request(f"http://{address}/storage/v1/b", b'{"name": "shards"}')
        request.add_header("Content-Type", "application/json")
        urllib.request.urlopen(request).close()
        check_store(tmp_path, "gs://anonymous@shards", f"?scheme=http&endpoint_override={address}")


def test_a_store_of_azure_is_prepared_uploaded_and_fetched_from(tmp_path: Path, monkeypatch) -> None:
    """Azurite's one account and its key are published."""
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
    options = (
        "--inMemoryPersistence",
        "--silent",
        "--disableTelemetry",
        "--skipApiVersionCheck",
        "--blobPort",
        "{port}",
    )
    with server("azurite-blob", *options) as address:
        monkeypatch.setenv("AZURE_STORAGE_KEY", key)
        root, settings = f"abfs://devstoreaccount1@{address}/shards", "?enable_tls=false"
        files.open_store(root + settings)[0].create_dir("shards")
        check_store(tmp_path, root, settings)
        monkeypatch.setenv("AZURE_STORAGE_KEY", key.replace("E", "F", 1))
        files.connect.cache_clear()
        with pytest.raises(UserError, match=r"cannot be read: .*AZURE_STORAGE_KEY"):
            files.find(f"{root}/text/*{settings}")
