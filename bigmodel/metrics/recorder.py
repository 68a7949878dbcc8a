"""Records a run's events: one JSON line per event, and the metrics endpoint that Prometheus scrapes.

In: one record per step, evaluation and checkpoint on every rank. Rank 0 writes the lines. Each rank keeps a small
record in its node's memory. On each node a separate process, the exporter, serves these records; it outlives any rank.
Guarantees:
- All metrics of the run follow from metrics.jsonl by the fold in `bigmodel.metrics.run_accounting`.
- Totals continue over restarts and never decrease.
- The address is removed when the run ends, also if all ranks were killed; if the exporters were killed too (scancel,
  node failure), the next start removes it.
Costs: benchmarks/README.md, "Metrics".

    RUN_DIR/metrics.jsonl            {"kind": "step", "time": ..., "step": 1, "loss": ..., ...} one line per event
    RUN_DIR/metrics_endpoint         host:port of node 0's endpoint, while the run lives
    RUN_DIR.node-N.prometheus.json   the endpoint of each node for Prometheus' file_sd, with the labels of this run;
                                     beside the run directory, because file_sd allows wildcards only in file names

Every line has `lap`, the wall seconds since the previous line or since the process began: the laps have no gaps.
"""

import contextlib
import glob
import json
import resource
import secrets
import shutil
import sys
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from bigmodel import __version__
from bigmodel.config.settings import MetricsSettings, UserError
from bigmodel.metrics.beat import Beat
from bigmodel.metrics.endpoint import MetricsEndpoint
from bigmodel.metrics.hang_watch import Limits
from bigmodel.metrics.line_file import LineFile
from bigmodel.metrics.metric_table import STEP_BUCKETS_SECONDS
from bigmodel.metrics.rank_record import RankRecord, folder_of, process_start_time
from bigmodel.metrics.run_accounting import RunAccounting, Samples
from bigmodel.metrics.slow_rank import Slow
from bigmodel.metrics.writers import Writers, scalars
from bigmodel.run_directory import read_json_lines, write_atomically


@dataclass(frozen=True, slots=True)
class LossGroup:
    """The part of a step's loss from one objective on one source, over all ranks."""

    objective: str  # as in the run file: "causal", "span_corruption", ...
    source: str
    nats: float  # loss summed over the labels, each with its weight
    targets: int  # number of labels
    weight: float | None = None  # sum of the labels' weights; None: all are 1


class Flops(NamedTuple):
    """Floating-point operations of a step over all ranks: see `bigmodel.metrics.flops`."""

    causal: float  # of the model, attention over the pairs that the masks allow
    full: float  # of the model, as if each packed sequence were one sequence without a mask
    hardware: float  # operations computed


class ExpertLoads(NamedTuple):
    """Of a step's tokens, over all ranks, without padding. Tuples: by layer with experts."""

    largest: tuple[float, ...]  # the largest load of an expert, divided by the mean load: 1 is even
    entropy: tuple[float, ...]  # of the loads, divided by that of even loads: 1 is even, 0 all to one expert
    router_z: float  # mean of logsumexp(logits)^2 over labels and layers
    first_layer: int = 0  # the layer of the first numbers, as in blocks.N of the model; the others follow it
    dropped: tuple[int, ...] | None = None  # choices beyond an expert's capacity; None: there is no limit
    dropped_share: float | None = None  # of all choices of all layers


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimizer step, over all ranks. Counts are of this step only."""

    step: int  # optimizer steps done, this one included: the first is 1
    loss: float  # nats per label, mean over the step by the labels' weights
    gradient_norm: float  # before clipping
    learning_rate: float
    targets: int  # number of labels
    positions: int  # tokens, without padding
    padding: int  # padding tokens
    documents: int  # documents, or chunks of long ones
    step_seconds: float  # wall time since the previous event, including the wait for data: `Metrics.lap`
    data_wait_seconds: float  # part of step_seconds: waiting for the next batch
    compile_seconds: float = 0.0  # part of step_seconds: compiling
    packs_document_limited: int = 0
    fetched_bytes: int = 0  # by rank 0 from data.remote since this process began
    fetch_failures: int = 0  # transfers that rank 0 retried since this process began
    imbalance: float = 1.0  # of attention work in rank 0's node: 1 is even
    imbalance_undealt: float = 1.0  # the same in canonical order
    flops: Flops | None = None
    weight: float | None = None  # sum of the labels' weights, the divisor of the loss; None: all are 1
    skipped: bool = False  # no update
    skip_reason: str = "not_finite"  # if skipped: one of a few words
    parts: tuple[LossGroup, ...] = ()  # the loss by objective and source; their labels add up to `targets`
    z_loss: float | None = None  # mean of logsumexp(logits)^2 over the labels, also if training.z_loss is 0
    unweighted_loss: float | None = None  # nats per document, without class weights and focal factor; None: `loss`
    loss_scale: float | None = None  # of fp16
    distillation_loss: float | None = None  # mean divergence from the teacher over the labels, times temperature^2
    slowest_rank: int | None = None  # of the previous step, because it is summed together with this step's loss
    slowest_rank_lag_seconds: float | None = None
    lag_ms: tuple[float, ...] = ()  # of all ranks, in order, or of `lag_ranks`; of the previous step: `phases.lags`
    lag_ranks: tuple[int, ...] = ()  # of more than 64 ranks, the slowest first
    slow_rank: Slow | None = None  # over the last steps; a line of metrics.jsonl has [rank, excess]
    norms: dict[str, dict[str, float]] | None = None  # layers -> weight_norm ..., at measured steps
    pruned_share: float | None = None  # of zeros in the matrices of [pruning], counted when it last pruned
    largest_attention_score: float | None = None  # over layers, heads and documents, before bias and cap
    clipped_heads: int | None = None  # query heads whose scores optimizer.qk_clip limits in this step
    sampled_share: float | None = None  # of decoder inputs that scheduled sampling replaces
    expert_loads: ExpertLoads | None = None  # of a model with experts
    loads_by_expert: dict[str, list[int]] | None = None  # layer -> in percent of its mean load, at measured steps
    device_joules: float | None = None  # of all GPUs since the step before; None: not all have a counter
    host_joules: float | None = None  # the same of all nodes' processors


class Seat(NamedTuple):
    """The place of this process: `local_rank` of the `local_size` consecutive ranks of `node`."""

    rank: int = 0
    world_size: int = 1
    node: int = 0
    local_rank: int = 0
    local_size: int = 1


def new_start(run_directory: Path) -> str:
    """A random token for this start of a run. Removes the addresses of earlier starts, also of nodes no longer in use.

    Call it on one rank, before any rank makes its `Metrics`.
    """
    directory = Path(run_directory).resolve()
    published = directory.parent.glob(f"{glob.escape(directory.name)}.node-*.prometheus.json")
    for path in (directory / "metrics_endpoint", *published):
        path.unlink(missing_ok=True)
    return secrets.token_hex(4)


class Metrics:
    """Records a run's events until `close`; make one on every rank. Rank 0 writes metrics.jsonl.

    `first_step`: steps done before this start. Lines of later steps are dropped, because these steps are repeated;
    their counts stay. `start`: a token shared by all ranks of this start and unique to it (`new_start`). `fresh` drops
    all lines. `endpoint` is the host:port of the metrics endpoint. Raises `UserError` on node 0, before anything is
    written, if the address cannot be opened; other nodes then take a free port.
    """

    def __init__(
        self,
        run_directory: Path,
        settings: MetricsSettings = MetricsSettings(),  # noqa: B008 - immutable
        first_step: int = 0,
        seat: Seat = Seat(),  # noqa: B008 - immutable
        start: str = "alone",
        fresh: bool = False,
        facts: Mapping[str, Any] = {},
        limits: Limits = Limits(),  # noqa: B008 - immutable
    ):
        """`facts`: planned_steps, parameters, device_peak_flops and peak_is_measured, for the line of this start.
        `limits`: of the watch for hanging ranks."""
        self._directory, self._seat = Path(run_directory).resolve(), seat
        self._lines = self._directory / "metrics.jsonl"
        self._file = LineFile(self._lines)
        self._writers = Writers(settings, self._directory, first_step) if seat.rank == 0 else None
        self._lap_began = time.perf_counter()
        self._spent: dict[str, float] = {}
        self._rank = _RankCounts()
        self.folder = folder_of(self._directory, seat.node, start)
        self._page = self._open_page(settings, limits) if seat.local_rank == 0 else None
        self.endpoint = self._page.endpoint if self._page else ""
        self._ledger = self._open_ledger(first_step, fresh, facts) if seat.rank == 0 else None
        self._record = RankRecord(self.folder, seat.rank)
        self._beat = _open_beat(self.folder, seat.rank, first_step)
        self._tell_exporter({})
        if self._page:
            self._page.start()

    def lap(self) -> float:
        """Wall seconds since the last call. All events are timed with it, so no time is lost between two events."""
        before, self._lap_began = self._lap_began, time.perf_counter()
        return self._lap_began - before

    def spent(self, cause: str) -> None:
        """Count the time since the last event for one of `run_accounting.CAUSES`; written with the next event."""
        self._spent[cause] = self._spent.get(cause, 0.0) + self.lap()

    def enter(self, phase: str) -> None:
        """Tell the watch for hanging ranks the phase of this rank."""
        if self._beat:
            self._beat.enter(phase)

    @property
    def utilization(self) -> float | None:
        """`RunAccounting.utilization` on rank 0; None on other ranks."""
        return self._ledger.utilization if self._ledger else None

    @property
    def gpu(self) -> str:
        """The UUID of this rank's GPU; "": none."""
        return self._rank.device().get("gpu", "")

    @property
    def writes(self) -> bool:
        """Whether this process writes the run's files, that is, is rank 0."""
        return self._seat.rank == 0

    def record_step(self, record: StepRecord, phases: Mapping[str, float] = {}) -> None:
        """`phases`: this rank's seconds by phase since the last call, evaluations and saves included."""
        if self._beat:
            self._beat.step_done(record.step)
        self._rank.add_step(record, phases)
        line = {**asdict(record), "lap": record.step_seconds}
        line["flops"] = record.flops._asdict() if record.flops else None
        line["expert_loads"] = record.expert_loads._asdict() if record.expert_loads else None
        line["phases"] = {name: round(seconds, 6) for name, seconds in phases.items()}
        line["memory"] = self._rank.memory() if self.writes else {}
        self._tell("step", line)

    def begins(self, cause: str, step: int) -> None:
        """Record the beginning of an evaluation or save that training waits for: if it never ends, its time has this
        cause."""
        if self._ledger:
            line = {"kind": "begin", "time": self._unix_time + self._lap_began, "cause": cause, "step": step}
            self._file.add(line)
            self._ledger.add(line)

    def record_spike(self, step: int, signals: Sequence[str]) -> None:
        """`signals`: "loss", "gradient_norm". A line of its own, because a rewind ends the run before the step's."""
        if self._ledger:
            line = {"kind": "spike", "time": self._unix_time + time.perf_counter(), "step": step, "signals": signals}
            self._file.add(line)
            self._ledger.add(line)

    def record_evaluation(
        self, step: int, nats_per_token: float, bits_per_byte: float | None, seconds: float, **more: Any
    ) -> None:
        """`bits_per_byte` None: the bytes behind the labels are not known. `more`: accuracy, calibration_error,
        parts, a list of objective, source, nats and targets, and scores, `ClassScores.numbers`."""
        values = {"step": step, "nats_per_token": nats_per_token, "bits_per_byte": bits_per_byte, "seconds": seconds}
        self._tell("evaluation", {**values, **more, "lap": self.lap()})

    def record_tasks(self, step: int, scores: Mapping[str, Mapping[str, float]], seconds: float) -> None:
        """`scores`: task -> metric -> value."""
        self._tell("tasks", {"step": step, "scores": scores, "seconds": seconds, "lap": self.lap()})

    def record_checkpoint(self, step: int, written_bytes: int, seconds: float) -> None:
        self._tell("checkpoint", {"step": step, "bytes": written_bytes, "seconds": seconds, "lap": self.lap()})

    def record_failed_checkpoint(self, step: int, reason: str) -> None:
        """`reason`: one of `run_accounting.SAVE_FAILURES`."""
        self._tell("failed_checkpoint", {"step": step, "reason": reason, "lap": self.lap()})

    def close(self, ending: str = "failed") -> None:
        """Stop serving and remove the address. `ending`: "finished", "stopped" or "failed". May be called again."""
        if self._ledger and not self._closed:
            with contextlib.suppress(
                *([OSError, UserError] if ending == "failed" else [])
            ):  # must not hide the first error
                self._tell("end", {"ending": ending, "lap": self.lap()})
                self._file.close()
        if self._page:
            self._page.close()
        if not self._closed:
            self._record.close()
            if self._writers:
                self._writers.close()
        self._closed = True

    _closed = False

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("failed" if kind else "finished")

    def _open_page(self, settings: MetricsSettings, limits: Limits) -> MetricsEndpoint:
        seat = self._seat
        ranks = range(seat.rank, seat.rank + seat.local_size)
        try:
            return MetricsEndpoint(self._directory, self.folder, seat.node, ranks, settings, limits)
        except UserError:
            shutil.rmtree(self.folder, ignore_errors=True)  # it may hold the records of other ranks
            raise

    def _open_ledger(self, first_step: int, fresh: bool, facts: Mapping[str, Any]) -> RunAccounting:
        """Fold the existing lines, append the line of this start, and drop the lines of steps to be repeated."""
        lines = [] if fresh else list(read_json_lines(self._lines))
        before, run_accounting, began = RunAccounting(), RunAccounting(), process_start_time()
        for line in lines:
            before.add(line)
        kept = [line for line in lines if line["kind"] in ("start", "end") or line.get("step", 0) <= first_step]
        carried = before.carry(began, *how_it_ended(self._directory, lines))
        now, self._lap_began = time.time(), time.perf_counter()
        self._unix_time = now - self._lap_began  # Unix time of perf_counter's zero: setting the clock moves no line
        start = {
            "kind": "start",
            "time": now,
            "step": first_step,
            "began": began,
            "lap": now - began,
            "world_size": self._seat.world_size,
            "parameters": facts.get("parameters"),
            **_peak(facts, lines),
            "planned_steps": facts.get("planned_steps"),
            "carried": carried,
        }
        write_atomically(self._lines, "".join(json.dumps(line) + "\n" for line in (*kept, start)))
        for line in (*kept, start):
            run_accounting.add(line)
        return run_accounting

    def _tell(self, kind: str, values: dict[str, Any]) -> None:
        if self._ledger:
            line = {"kind": kind, "time": self._unix_time + self._lap_began, **values, "spent": self._spent}
            self._spent = {}
            self._file.add(line)
            self._ledger.add(line)
            if self._writers and kind != "end":
                self._writers.write(line["step"], dict(scalars(line)))
        if kind != "end":
            self._tell_exporter(values)
        if self._page:
            self._page.revive()

    def _tell_exporter(self, values: Mapping[str, Any]) -> None:
        samples = self._rank.samples(str(self._seat.rank))
        if self._ledger:
            samples |= self._ledger.samples() | {"build_info": [[[__version__], 1]]}
            samples["delayed_lines"] = [[[], self._file.num_delayed]]
        with contextlib.suppress(OSError):  # shared memory is full: an incomplete endpoint must not end the run
            self._record.write({"samples": samples, **self._rank.device()})


def _peak(facts: Mapping[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The devices' peak; of measured ones the largest of all starts: a busy machine measures less."""
    peak = facts.get("device_peak_flops")
    is_measured = bool(peak and facts.get("peak_is_measured"))
    if is_measured:
        peak = max([peak, *(line["device_peak_flops"] for line in lines if line.get("peak_is_measured"))])
    return {"device_peak_flops": peak, "peak_is_measured": is_measured}


def how_it_ended(run_directory: Path, lines: list[dict[str, Any]]) -> tuple[str | None, float | None]:
    """The ending of the last start in these lines, None if there was no start; and its Unix time, if known.

    The ending that the start recorded itself; else "died", at the time that the launcher recorded in events.jsonl. A
    user's watchdog records there that it ended a hanging run: an event `launch_ended` with cause "hang".
    """
    marks = [line for line in lines if line["kind"] in ("start", "end")]
    if not marks:
        return None, None
    if marks[-1]["kind"] == "end":
        return marks[-1]["ending"], None
    events = _since_last_start(list(read_json_lines(Path(run_directory) / "events.jsonl")))
    ends = [event for event in events if event.get("event") == "launch_ended"]
    if hangs := [end for end in ends if end.get("cause") == "hang"]:
        return "hang", hangs[0]["time"]
    return "died", ends[0].get("since") if ends else None


def _since_last_start(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events after the last "start" event, by place in the file, because clocks are set back. If the launch before
    this one did not reach a "start", only the events since that launch."""
    places: dict[str, list[int]] = {"start": [], "launch": []}
    for place, event in enumerate(events):
        places.get(event.get("event", ""), []).append(place)
    first = places["start"][-1] + 1 if places["start"] else 0
    earlier = [place for place in places["launch"][:-1] if place >= first]
    return events[earlier[-1] if earlier else first :]


def _open_beat(folder: Path, rank: int, step: int) -> Beat | None:
    try:
        return Beat(folder, rank, step)
    except OSError:  # shared memory is full: a hanging rank is then found by the collective timeout
        return None


class _RankCounts:
    """This rank's own counters, since its start."""

    def __init__(self) -> None:
        self._buckets = [0] * (len(STEP_BUCKETS_SECONDS) + 1)
        self._seconds, self._step = 0.0, 0
        self._phases: dict[str, float] = {}
        self._phase_buckets: dict[str, list[int]] = {}
        self._cuda: Any = None
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
            self._cuda = sys.modules["torch"].cuda

    def add_step(self, record: StepRecord, phases: Mapping[str, float]) -> None:
        self._buckets[bisect_left(STEP_BUCKETS_SECONDS, record.step_seconds)] += 1
        self._seconds += record.step_seconds
        self._step = record.step
        for phase, seconds in phases.items():
            self._phases[phase] = self._phases.get(phase, 0.0) + seconds
            buckets = self._phase_buckets.setdefault(phase, [0] * len(self._buckets))
            buckets[bisect_left(STEP_BUCKETS_SECONDS, seconds)] += 1

    def memory(self) -> dict[str, int]:
        """Bytes of this process in main memory, and on its GPU: in use, held by torch's allocator, most in use."""
        found = {"resident_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()}
        if self._cuda:
            counts = self._cuda.memory_stats()
            keys = {"allocated": "allocated_bytes.all.current", "reserved": "reserved_bytes.all.current"}
            keys["peak"] = "allocated_bytes.all.peak"
            found |= {f"device_{name}_bytes": counts.get(key, 0) for name, key in keys.items()}
        return found

    def samples(self, rank: str) -> Samples:
        busy = sum(self._phases.get(phase, 0.0) for phase in ("forward", "backward", "optimizer"))
        samples: Samples = {
            "rank_heartbeat_timestamp_seconds": [[[rank], time.time()]],
            "rank_step": [[[rank], self._step]],
            "step_duration_seconds": [[[rank], [self._buckets, self._seconds]]],
            "phase_seconds": [[[rank, phase], seconds] for phase, seconds in self._phases.items()],
            "phase_duration_seconds": [
                [[phase], [buckets, self._phases[phase]]] for phase, buckets in self._phase_buckets.items()
            ],
            "rank_busy_seconds": [[[rank], busy]],
        }
        if self._cuda:
            counts = self._cuda.memory_stats()
            for name, key in (
                ("allocated_bytes", "allocated_bytes.all.current"),
                ("reserved_bytes", "reserved_bytes.all.current"),
                ("peak_bytes", "allocated_bytes.all.peak"),
                ("retries", "num_alloc_retries"),
            ):
                samples[f"device_memory_{name}"] = [[[rank], counts.get(key, 0)]]
        return samples

    def device(self) -> dict[str, str]:
        """The GPU's UUID, for the exporter's queries to the driver."""
        if not self._cuda:
            return {}
        return {"gpu": f"GPU-{self._cuda.get_device_properties(self._cuda.current_device()).uuid}"}
