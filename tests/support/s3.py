"""S3 servers on loopback, found through the environment: a real one, a refusing one, a faulty one."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from bigmodel.data.store import files

BUCKET = "shards"
STATUS = {"refused": 403, "busy": 503}  # fault -> HTTP status


@contextmanager
def s3_server() -> Iterator[str]:
    """The URL of a fresh bucket; the environment has its address and keys, also for child processes."""
    boto3 = pytest.importorskip("boto3")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with _environment(f"http://{host}:{port}"):
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}"
    server.stop()


@contextmanager
def refusing_server() -> Iterator[None]:
    """A store that answers every request with 403, as for unknown credentials."""

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
    with _environment(f"http://127.0.0.1:{server.server_port}"):
        yield
    server.shutdown()


@contextmanager
def faulty_server(seconds: float, failures: int, of: str, fault: str = "refused") -> Iterator[list[str]]:
    """The store of the environment, behind a proxy that takes `seconds` per answer.

    The first `failures` requests of files whose names end with `of` fail: with 403, which no client retries; with 503
    (`fault` "busy"); or with half the content and a closed connection ("cut"). Yields the list of requested paths,
    which grows.
    """
    store = urlsplit(os.environ["AWS_ENDPOINT_URL"]).netloc
    asked: list[str] = []

    class Door(BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked.append(self.path)
            time.sleep(seconds)
            fails = sum(path.endswith(of) for path in asked) <= failures and self.path.endswith(of)
            if fails and fault in STATUS:
                status, headers, body = STATUS[fault], [], b""
            else:
                behind = HTTPConnection(store)
                behind.request(self.command, self.path, headers=dict(self.headers))
                response = behind.getresponse()
                status, headers, body = response.status, response.getheaders(), response.read()
            self.send_response(status)
            for name, value in headers or [("Content-Length", "0")]:
                if name.lower() not in ("transfer-encoding", "connection", "server", "date"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if fails and fault == "cut" else body)

        do_GET = do_HEAD = answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Door)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with _environment(f"http://127.0.0.1:{server.server_port}"):
        yield asked
    server.shutdown()


@contextmanager
def _environment(endpoint: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        files.connect.cache_clear()
        yield
    files.connect.cache_clear()


def get(url: str) -> bytes:
    import boto3

    bucket, _, key = url.removeprefix("s3://").partition("/")
    return boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()


def put(url: str, content: bytes) -> None:
    import boto3

    bucket, _, key = url.removeprefix("s3://").partition("/")
    boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=content)


def delete(url: str) -> None:
    import boto3

    bucket, _, key = url.removeprefix("s3://").partition("/")
    boto3.client("s3").delete_object(Bucket=bucket, Key=key)
