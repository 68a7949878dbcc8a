"""Sources in stores: listed, read and prepared as local ones, by any process; what fails is named."""

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import fsspec
import pytest

from bigmodel.config import UserError
from bigmodel.data import corpus, files
from bigmodel.data import prepare as preparing
from bigmodel.data.prepare import prepare, quiet
from tests.tiny_corpus import LETTERS, NEWS, prepared, tiny_settings


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server on loopback with the tiny corpus in its bucket, found through the environment alone."""
    boto3 = pytest.importorskip("boto3")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        store = boto3.client("s3")
        store.create_bucket(Bucket="corpus")
        folder = tmp_path_factory.mktemp("store")
        for source in tiny_settings(folder).prepare.sources:
            store.upload_file(source.files[0], "corpus", f"text/{Path(source.files[0]).name}")
        store.put_object(Bucket="corpus", Key="text/deep/more.jsonl", Body=b'{"body": "deep"}\n')
        yield "s3://corpus"
    server.stop()
    files._connect.cache_clear()


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
    with pytest.raises(UserError, match=r"s3://corpus/text/letters.parquet has no column 'body'; it has 'text'"):
        prepared(tmp_path, sources=[source])
    with pytest.raises(UserError, match=r"'s3://nobody/\*.jsonl' matches nothing; give a path, URL or pattern"):
        prepared(tmp_path, sources=[source | {"files": ["s3://nobody/*.jsonl"]}])


def test_a_store_that_wants_other_credentials_is_named_with_the_variables_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refuses(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = answer

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    files._connect.cache_clear()
    try:
        for name in ("a.jsonl", "*.jsonl"):
            with pytest.raises(UserError) as error:
                files.find(f"s3://private/{name}")
            assert f"s3://private/{name}: cannot be read" in str(error.value)
            assert "credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in str(error.value)
    finally:
        server.shutdown()
        files._connect.cache_clear()


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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    location = f"s3://x/a.jsonl?endpoint_override={address}&scheme=http&region=us-east-1&access_key=a&secret_key=b"
    with pytest.raises(UserError, match="cannot be read"):
        files.find(location)
