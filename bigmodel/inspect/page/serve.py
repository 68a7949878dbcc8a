"""`bigmodel report RUN [RUN ...] --serve`: the page on 127.0.0.1, which renews itself while the runs go on.

In: run directories, which need not exist yet. Out: HTTP: `/` is the page, `/data.json` its data with an ETag.
Guarantees: only what was appended to metrics.jsonl is read again; data are made at most once per change, however many
pages are open. Costs: a tenth of a core at most, because the next reading waits ten times as long as the last one took.
"""

import gzip
import json
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from bigmodel.config.settings import UserError
from bigmodel.inspect.page.drawing import Range
from bigmodel.inspect.page.page import content, open_run, page
from bigmodel.printed import one_line

ASK_SECONDS = 5.0  # between two questions of an open page
REST = 10.0  # times the last reading's seconds, until the next one
LOCAL = ("127.0.0.1", "localhost", "[::1]")


class LiveData:
    """The page's data of runs that go on. `latest` may be called by several threads."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self._runs = [open_run(directory, waits=True) for directory in directories]
        self._lock = threading.Lock()
        self._data: dict[str, Any] = {}
        self._tag, self._next_reading = "", 0.0
        self._near: tuple[str, dict[str, Any]] = ("", {})  # the last zoom that was asked for: its tag, its data
        self.rest = REST

    def latest(self, near: Range | None = None) -> tuple[dict[str, Any], str]:
        """The data, with more points at the steps of `near`, and a tag that changes with them."""
        with self._lock:
            began = time.monotonic()
            if began >= self._next_reading:
                news = [run.update() for run in self._runs]
                if any(news) or not self._tag:
                    self._data = content(self._runs)
                    self._tag = f'"{time.time_ns():x}"'
                self._next_reading = time.monotonic() + self.rest * (time.monotonic() - began)
            if not near:
                return self._data, self._tag
            tag = f'"{self._tag[1:-1]}-{near[0]}-{near[1]}"'
            if self._near[0] != tag:
                self._near = tag, content(self._runs, near)
            return self._near[1], tag


def make_server(directories: Sequence[Path], host: str, port: int) -> ThreadingHTTPServer:
    """A server that listens, not yet serving. `port` 0: a free one. Raises `UserError` if the address is taken."""
    live = LiveData(directories)
    live.latest()

    class Handler(_Handler):
        data = live
        hosts = LOCAL if host in LOCAL else ()

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"--host {host} --port {port}: {reason}; choose another port, 0 for a free one") from None


def serve(directories: Sequence[Path], host: str, port: int) -> None:
    """Serve until Ctrl-C. A run that has not started is waited for."""
    server = make_server(directories, host, port)
    for directory in directories:
        if not (directory / "metrics.jsonl").exists():
            print(f"{one_line(directory)}: not started yet; the page shows it as soon as it begins", flush=True)
    shown = f"[{host}]" if ":" in host else host
    print(f"report on http://{shown}:{server.server_address[1]}/ until Ctrl-C", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def steps_of(query: str) -> Range | tuple[()] | None:
    """The steps in view.

    >>> [steps_of(query) for query in ("from=10&to=20.5", "", "from=a&to=2", "from=2&to=1", "from=nan&to=2")]
    [(10.0, 20.5), None, (), (), ()]
    """
    if not query:
        return None
    try:
        words = dict(parse_qsl(query))
        first, last = float(words["from"]), float(words["to"])
    except (ValueError, KeyError):
        return ()
    return (first, last) if first <= last else ()


class _Handler(BaseHTTPRequestHandler):
    data: LiveData
    hosts: Sequence[str] = ()  # the names that a browser may have asked for; empty: all

    def do_GET(self) -> None:
        asked = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host") or ""
        path, query = urlsplit(self.path).path, urlsplit(self.path).query
        if self.hosts and asked not in self.hosts:  # another site's name that was pointed at this machine
            self.send_error(HTTPStatus.FORBIDDEN)
        elif path not in ("/", "/data.json"):
            self.send_error(HTTPStatus.NOT_FOUND)
        elif (near := steps_of(query)) == ():
            self.send_error(HTTPStatus.BAD_REQUEST)
        else:
            data, tag = self.data.latest(near or None)
            if path == "/data.json" and self.headers.get("If-None-Match") == tag:
                self.send_response(HTTPStatus.NOT_MODIFIED)
                self.send_header("ETag", tag)
                self.end_headers()
            elif path == "/":
                self._send(page(data, ASK_SECONDS).encode(), "text/html; charset=utf-8", "")
            else:
                self._send(json.dumps(data, allow_nan=False).encode(), "application/json", tag)

    def _send(self, body: bytes, kind: str, tag: str) -> None:
        packed = "gzip" in (self.headers.get("Accept-Encoding") or "")
        body = gzip.compress(body, 1) if packed else body
        self.send_response(HTTPStatus.OK)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-cache"}
        headers |= {"X-Content-Type-Options": "nosniff"}
        headers |= {"ETag": tag} if tag else {}
        headers |= {"Content-Encoding": "gzip"} if packed else {}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: a line per question would hide what matters."""
