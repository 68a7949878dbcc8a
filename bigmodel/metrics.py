"""Metrics: what a run did, as one JSON line per event and as a page that Prometheus scrapes.

Takes one record per step, evaluation and checkpoint (rank 0 only), gives `RUN_DIR/metrics.jsonl` and an HTTP page.
Guarantees: every number on the page follows from the lines of metrics.jsonl, so after a restart the totals go on
where the resumed checkpoint left them; steps that are replayed are counted once. Costs about 50 microseconds a step
and, at a restart, one read of the file. This is the only file that imports prometheus_client.

Counters may therefore step back at a restart, from the killed run's last step to its last checkpoint; Prometheus
takes that as the reset it is.

    RUN_DIR/metrics.jsonl            {"kind": "step", "time": ..., "step": 1, "loss": ..., ...} one line per event
    RUN_DIR/metrics_endpoint         host:port of the page, while the run is alive
    RUN_DIR.prometheus.json          the same for Prometheus' file_sd, with the labels of this run; beside the run
                                     directory, for file_sd takes a wildcard in a file's name only, not in a folder's
"""

import json
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from bigmodel import __version__
from bigmodel.config import UserError
from bigmodel.rundir import append_json_line, read_json_lines, write_atomically, write_json


@dataclass(frozen=True, slots=True)
class LossPart:
    """What one objective on one source contributed to a step, over all ranks."""

    objective: str  # as in the run file: "causal", "span_corruption", ...
    source: str  # of the data
    nats: float  # loss summed over the targets
    targets: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimizer step, over all ranks. Counts are those of this step alone."""

    step: int  # optimizer steps done so far, this one included: the first is 1
    loss: float  # nats per target token, mean over the step
    gradient_norm: float  # before clipping
    learning_rate: float
    targets: int  # tokens that were predicted
    positions: int  # positions that held a token
    padding: int  # positions that held none
    documents: int  # documents or fragments of one
    step_seconds: float  # wall time from the step before, waiting for data included
    data_wait_seconds: float  # of that, waiting for the next batch
    fetched_bytes: int = 0  # by rank 0 from data.remote since this process began
    fetch_failures: int = 0  # of these, transfers that were tried again
    imbalance: float = 1.0  # of attention work in rank 0's node: 1 is even
    imbalance_undealt: float = 1.0  # what it would be in canonical order
    skipped: bool = False  # the update was left out: loss or gradient was not finite
    parts: tuple[LossPart, ...] = ()  # the loss by objective and source; their targets add up to `targets`
    z_loss: float | None = None  # mean of logsumexp(logits)^2 over the targets, where the head gives it
    loss_scale: float | None = None  # of fp16


class Metric(NamedTuple):
    """A line of the table: its name on the page is `bigmodel_` + `name`, for counters with `_total` after it."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


# Every metric there is. Base units (seconds, bytes, nats), no unbounded labels: run, job and rank are labels of the
# scraped target (RUN_DIR.prometheus.json), never of a metric.
METRICS = (
    Metric("build_info", "gauge", "Always 1; the label is the version of bigmodel that runs", ("version",)),
    Metric("steps", "counter", "Steps done by this run, restarts and skipped updates included"),
    Metric("steps_skipped", "counter", "Steps whose update was left out: loss or gradient not finite"),
    Metric("target_tokens", "counter", "Tokens predicted in training"),
    Metric("positions", "counter", "Positions trained on that held a token"),
    Metric("padding_positions", "counter", "Positions computed that held no token"),
    Metric("documents", "counter", "Documents, or pieces of long ones, trained on"),
    Metric("data_wait_seconds", "counter", "Time in which rank 0 waited for its next batch"),
    Metric("data_fetched_bytes", "gauge", "Bytes that rank 0 fetched from data.remote since it started"),
    Metric("data_fetch_failures", "gauge", "Transfers that failed and were tried again, by rank 0 since it started"),
    Metric(
        "attention_imbalance_ratio", "gauge", "Attention time of rank 0's node in the last step over an even deal's"
    ),
    Metric("attention_imbalance_undealt_ratio", "gauge", "The same, were packs left in their canonical order"),
    Metric("step_duration_seconds", "histogram", "Wall time of an optimizer step, waiting for data included"),
    Metric("last_step_timestamp_seconds", "gauge", "Unix time at which the last step ended; old means stalled"),
    Metric("training_loss_nats", "gauge", "Mean training loss of the last step, nats per target token"),
    Metric("gradient_norm", "gauge", "Global gradient norm of the last step, before clipping"),
    Metric("learning_rate", "gauge", "Learning rate of the last step"),
    Metric("evaluations", "counter", "Evaluations on the validation split"),
    Metric("evaluation_seconds", "counter", "Time spent in evaluations"),
    Metric("validation_loss_nats", "gauge", "Validation loss, nats per target token"),
    Metric("validation_compression_ratio", "gauge", "Validation loss as coded bytes per byte of text; times 8: bits"),
    Metric("checkpoints", "counter", "Checkpoints saved"),
    Metric("checkpoint_written_bytes", "counter", "Bytes written in checkpoints"),
    Metric("checkpoint_seconds", "counter", "Time spent saving checkpoints"),
    Metric("last_checkpoint_timestamp_seconds", "gauge", "Unix time at which the last checkpoint was complete"),
    Metric("last_checkpoint_step", "gauge", "Step of the last checkpoint"),
)
PREFIX = "bigmodel_"
STEP_BUCKETS_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
SCRAPED_JOB = "bigmodel"


class Metrics:
    """Records a run's events and serves them on http://host:port/metrics until `close`. Use it on rank 0 only.

    `first_step` is how many steps the run goes on from (0: a new run). What metrics.jsonl says of later steps is
    dropped, for they are done again; the page starts with the totals of what is kept. `port` 0 takes any free one;
    `endpoint` and RUN_DIR/metrics_endpoint say which. Raises `UserError`, before anything is written, if the
    address cannot be opened.
    """

    def __init__(self, run_directory: Path, port: int = 0, host: str = "127.0.0.1", first_step: int = 0):
        self._directory = Path(run_directory).resolve()
        self._lines = self._directory / "metrics.jsonl"
        kept = [line for line in read_json_lines(self._lines) if line["step"] <= first_step]
        registry, self._table = _make_table()
        for line in kept:
            _count(self._table, line)
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise UserError(_address_problem(port, host, error)) from None
        write_atomically(self._lines, "".join(json.dumps(line) + "\n" for line in kept))
        self.endpoint = f"{_advertised(host)}:{self._server.server_port}"
        self._published = (
            self._directory / "metrics_endpoint",
            self._directory.with_name(self._directory.name + ".prometheus.json"),
        )
        target = {"targets": [self.endpoint], "labels": {"job": SCRAPED_JOB, "run": self._directory.name, "rank": "0"}}
        write_atomically(self._published[0], self.endpoint + "\n")
        write_json(self._published[1], [target])

    def record_step(self, record: StepRecord) -> None:
        self._record("step", asdict(record))

    def record_evaluation(self, step: int, nats_per_token: float, bits_per_byte: float, seconds: float) -> None:
        values = {"step": step, "nats_per_token": nats_per_token, "bits_per_byte": bits_per_byte, "seconds": seconds}
        self._record("evaluation", values)

    def record_checkpoint(self, step: int, written_bytes: int, seconds: float) -> None:
        self._record("checkpoint", {"step": step, "bytes": written_bytes, "seconds": seconds})

    def close(self) -> None:
        """Stop serving and withdraw the address. A run that is killed leaves it; the next start replaces it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for path in self._published:
            path.unlink(missing_ok=True)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _record(self, kind: str, values: Mapping[str, Any]) -> None:
        line = {"kind": kind, "time": time.time(), **values}
        append_json_line(self._lines, line)
        _count(self._table, line)


Table = dict[str, Any]  # metric name without prefix -> Counter, Gauge or Histogram


def _make_table() -> tuple[CollectorRegistry, Table]:
    registry = CollectorRegistry()
    table: Table = {}
    for metric in METRICS:
        name = PREFIX + metric.name
        if metric.kind == "histogram":
            table[metric.name] = Histogram(
                name, metric.help, metric.labels, registry=registry, buckets=STEP_BUCKETS_SECONDS
            )
        else:
            make = Counter if metric.kind == "counter" else Gauge
            table[metric.name] = make(name, metric.help, metric.labels, registry=registry)
    table["build_info"].labels(version=__version__).set(1)
    return registry, table


def _count(table: Table, line: Mapping[str, Any]) -> None:
    """Enter one line of metrics.jsonl into the table; a kind we do not know is left to those who do."""
    if line["kind"] in _COUNTERS:
        _COUNTERS[line["kind"]](table, line)


def _count_step(table: Table, line: Mapping[str, Any]) -> None:
    table["steps"].inc()
    table["steps_skipped"].inc(bool(line["skipped"]))
    table["target_tokens"].inc(line["targets"])
    table["positions"].inc(line["positions"])
    table["padding_positions"].inc(line["padding"])
    table["documents"].inc(line["documents"])
    table["data_wait_seconds"].inc(line["data_wait_seconds"])
    for name, entry in (
        ("data_fetched_bytes", "fetched_bytes"),
        ("data_fetch_failures", "fetch_failures"),
        ("attention_imbalance_ratio", "imbalance"),
        ("attention_imbalance_undealt_ratio", "imbalance_undealt"),
    ):
        table[name].set(line.get(entry, 0))  # lines of older versions have none
    table["step_duration_seconds"].observe(line["step_seconds"])
    table["last_step_timestamp_seconds"].set(line["time"])
    table["training_loss_nats"].set(line["loss"])
    table["gradient_norm"].set(line["gradient_norm"])
    table["learning_rate"].set(line["learning_rate"])


def _count_evaluation(table: Table, line: Mapping[str, Any]) -> None:
    table["evaluations"].inc()
    table["evaluation_seconds"].inc(line["seconds"])
    table["validation_loss_nats"].set(line["nats_per_token"])
    table["validation_compression_ratio"].set(line["bits_per_byte"] / 8)  # bytes are Prometheus' unit, not bits


def _count_checkpoint(table: Table, line: Mapping[str, Any]) -> None:
    table["checkpoints"].inc()
    table["checkpoint_written_bytes"].inc(line["bytes"])
    table["checkpoint_seconds"].inc(line["seconds"])
    table["last_checkpoint_timestamp_seconds"].set(line["time"])
    table["last_checkpoint_step"].set(line["step"])


_COUNTERS = {"step": _count_step, "evaluation": _count_evaluation, "checkpoint": _count_checkpoint}


def _advertised(host: str) -> str:
    """The name others reach us by: our own where we listen on every address."""
    name = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
    return f"[{name}]" if ":" in name else name


def _address_problem(port: int, host: str, error: OSError) -> str:
    return (
        f"metrics.host = {host!r}, metrics.port = {port}: the metrics page cannot listen there: "
        f"{error.strerror or error}; choose another, or any free port with --set metrics.port=0"
    )
