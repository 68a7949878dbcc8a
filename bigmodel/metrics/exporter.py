"""The exporter: one process per node that serves the metrics of all its ranks. The only file that imports
prometheus_client.

In: the folder of rank records (bigmodel/metrics/rank_record.py) and a listening socket opened by local rank 0. Out:
http://host:port/metrics. Guarantees: it answers while any rank of its node lives; it ends within a second of the last
rank, removes the published address and deletes the folder, so a killed run leaves nothing. It passes profile requests
to the ranks (bigmodel/metrics/profiling.py), and names and ends ranks that hang (bigmodel/metrics/hang_watch.py).
Costs: half a second to start and 30 MB, because it imports no torch; at most ten renderings per second, however many
requests come.

    python -m bigmodel.metrics.exporter FOLDER SOCKET_NUMBER ERRORS_NUMBER   started by bigmodel/metrics/endpoint.py
"""

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from bigmodel.metrics.hang_watch import HangWatch, Limits, process_state
from bigmodel.metrics.health import Health
from bigmodel.metrics.metric_table import METRICS, PREFIX, SERVING, Metric
from bigmodel.metrics.profiling import Relay
from bigmodel.metrics.rank_record import is_alive, read_record

POLL_SECONDS = 0.25
PAGE_SECONDS = 0.1  # maximum age of a cached response
Samples = dict[str, list[list[Any]]]


class Ranks(Collector):
    """The last complete record of every rank of the node, as metric families."""

    def __init__(self, folder: Path, run_directory: Path) -> None:
        self._folder, self._health = folder, Health(run_directory)
        self.records: dict[int, dict[str, Any]] = {}
        self.named: Callable[[], set[int]] = set  # hanging ranks

    def read(self) -> None:
        for path in self._folder.glob("rank-*"):
            if record := read_record(path) or read_record(path):  # second try: the rank was writing during the first
                self.records[record["rank"]] = record

    def alive(self) -> list[int]:
        return [rank for rank, record in self.records.items() if is_alive(record)]

    def collect(self) -> Iterator[Any]:
        self.read()
        return families(self.samples())

    def samples(self) -> Samples:
        alive = self.alive()
        named = self.named()
        stopped = {rank for rank in alive if process_state(self.records[rank]["pid"]) == "T"}
        merged: Samples = {
            "rank_up": [[[str(rank)], int(rank in alive)] for rank in sorted(self.records)],
            "rank_hangs": [[[str(rank)], int(rank in stopped | named)] for rank in sorted(alive)],
        }
        for _, record in sorted(self.records.items()):
            for name, found in record["samples"].items():
                merged.setdefault(name, []).extend(found)
        for name, found in self._health.samples(self.records.values(), alive).items():
            merged.setdefault(name, []).extend(found)
        return merged


class Serving(Collector):
    """The measures of `bigmodel serve`, read at each scrape."""

    def __init__(self, read: Callable[[], Samples]) -> None:
        self._read = read

    def collect(self) -> Iterator[Any]:
        return families(self._read(), SERVING)


def page_of(collector: Collector, accepted: str) -> tuple[bytes, str]:
    """The page of one collector and its content type, in the format that the header Accept asks for."""
    registry = CollectorRegistry()
    registry.register(collector)
    encode, content_type = choose_encoder(accepted)
    return encode(registry), content_type


def families(samples: Samples, metrics: Sequence[Metric] = METRICS) -> Iterator[Any]:
    """The samples in the order of the table of metrics; every name must be in the table."""
    unknown = set(samples) - {metric.name for metric in metrics}
    assert not unknown, f"{', '.join(sorted(unknown))} not in bigmodel/metrics/metric_table.py"
    for metric in metrics:
        if not samples.get(metric.name):
            continue
        if metric.kind == "histogram":
            family: Any = HistogramMetricFamily(PREFIX + metric.name, metric.help, labels=metric.labels)
            for labels, (counts, total) in _over_ranks(samples[metric.name]).items():
                family.add_metric(
                    labels, list(zip(bucket_names(metric.buckets), _running_sums(counts), strict=True)), total
                )
        else:
            make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = make(PREFIX + metric.name, metric.help, labels=metric.labels)
            for labels, value in samples[metric.name]:
                family.add_metric(labels, value)
        yield family


def bucket_names(bounds: Sequence[float]) -> list[str]:
    return [*map(str, map(float, bounds)), "+Inf"]


def _over_ranks(histograms: list[list[Any]]) -> dict[tuple[str, ...], tuple[list[int], float]]:
    """Label values -> counts and sum; histograms of ranks with the same labels are added up."""
    found: dict[tuple[str, ...], tuple[list[int], float]] = {}
    for labels, (counts, total) in histograms:
        before, sum_before = found.get(tuple(labels), ([0] * len(counts), 0.0))
        found[tuple(labels)] = [a + b for a, b in zip(before, counts, strict=True)], sum_before + total
    return found


def _running_sums(counts: list[int]) -> list[int]:
    total = 0
    return [total := total + count for count in counts]


class Server(ThreadingHTTPServer):
    """HTTP over a socket that is already open; requests within `PAGE_SECONDS` share one response."""

    daemon_threads = True

    def __init__(self, listening: socket.socket, ranks: Ranks) -> None:
        super().__init__(listening.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self._registry = CollectorRegistry()
        self._registry.register(ranks)
        self._lock = threading.Lock()
        self._pages: dict[str, tuple[float, bytes]] = {}  # content type -> time of rendering, response

    def page(self, accepted: str) -> tuple[bytes, str]:
        encode, content_type = choose_encoder(accepted)
        with self._lock:
            made, page = self._pages.get(content_type, (0.0, b""))
            if time.monotonic() - made > PAGE_SECONDS:
                page = encode(self._registry)
                self._pages[content_type] = (time.monotonic(), page)
        return page, content_type


class Handler(BaseHTTPRequestHandler):
    """GET /metrics."""

    protocol_version = "HTTP/1.1"
    timeout = 30.0  # an idle connection is closed
    server: Server

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "only /metrics is served")
            return
        page, content_type = self.server.page(self.headers.get("Accept", ""))
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: scrapes are routine."""


def withdraw(page: dict[str, Any]) -> None:
    """Remove the published address, unless a later start has published its own."""
    for name in page["published"]:
        path = Path(name)
        try:
            ours = page["endpoint"] in path.read_text()
        except OSError:
            continue
        if ours:
            path.unlink(missing_ok=True)


def say(errors: int, text: str) -> None:
    """Print a line among the output of the node's first rank."""
    with suppress(OSError):  # the terminal is gone
        os.write(errors, text.encode() + b"\n")


def main(folder: Path, descriptor: int, errors: int) -> None:
    """descriptor: the listening socket. errors: standard error of the rank that started this."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # SLURM signals all processes of a job; serve on while the ranks save
    page = json.loads((folder / "page.json").read_text())
    ranks = Ranks(folder, Path(page["run_directory"]))
    server = Server(socket.socket(fileno=descriptor), ranks)
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    relay = Relay(folder, Path(page["run_directory"]))
    watch = HangWatch(folder, Path(page["run_directory"]), Limits(*page["limits"]), partial(say, errors))
    ranks.named = watch.named
    ranks.read()
    while alive := ranks.alive():
        relay.look([ranks.records[rank] for rank in alive])
        watch.look([ranks.records[rank] for rank in alive])
        time.sleep(POLL_SECONDS)
        ranks.read()
    withdraw(page)
    server.shutdown()
    server.server_close()  # before the folder is deleted: to the next start, no folder means that the port is free
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
