"""What `tools.simulate_goodput` knows of failures, machines and this system: values with their origin.

Out: published failure rates, facts (published, assumed, or measured in a run directory), and the designs that follow.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from bigmodel.config.settings import UserError
from bigmodel.launcher.local import GRACE_SECONDS
from bigmodel.metrics.run_accounting import RunAccounting
from bigmodel.run_directory import read_json_lines
from tools.goodput_model import Design, spares_needed

DAY = 86400.0


class Rate(NamedTuple):
    """Unexpected failures per day of a job on `gpus` GPUs; proportional to the GPUs of another job."""

    per_day: float
    gpus: int
    source: str

    def mean_seconds(self, gpus: int) -> float:
        """Mean seconds between failures of a job."""
        return DAY / (self.per_day * gpus / self.gpus)


RATES = {
    "llama3": Rate(
        419 / 54, 16384, "419 unexpected interruptions in 54 days on 16,384 H100: Llama 3, arXiv 2407.21783, table 5"
    ),
    "rsc1": Rate(
        24 / 1.8, 16384, "mean 1.8 h to failure at 16,384 A100, projected from 11 months: Meta, arXiv 2410.21680"
    ),
    "rsc1-1024": Rate(
        24 / 7.9,
        1024,
        "mean 7.9 h to failure of jobs on 1,024 A100: Meta, arXiv 2410.21680; does not scale in practice",
    ),
}


class Fact(NamedTuple):
    value: float
    unit: str
    kind: str  # published, measured or assumed
    source: str


FACTS = {
    "parameters": Fact(405e9, "", "published", "Llama 3 405B, arXiv 2407.21783"),
    "bytes_per_parameter": Fact(12, "B", "measured", "a checkpoint's fp32 master weight and two moments"),
    "store_bandwidth": Fact(57e9, "B/s", "published", "BLOOM: 2.3 TB in 40 s (Llama 3's store: 2 TB/s)"),
    "copy_bandwidth": Fact(10e9, "B/s", "assumed", "from one GPU to its host"),
    "network_bandwidth": Fact(50e9, "B/s", "published", "400 Gb/s per GPU: Llama 3, arXiv 2407.21783"),
    "save_pause": Fact(0.08, "s", "measured", "pause of a save but for large states: median of 11 of `make train`"),
    "detect": Fact(GRACE_SECONDS, "s", "assumed", "a crash: the launcher's grace for ranks whose peer died"),
    "hang_detect": Fact(100, "s", "assumed", "a hang: ten steps of 10 s"),
    "hang_share": Fact(7 / 419, "", "published", "NCCL watchdog timeouts: Llama 3, table 5"),
    "start": Fact(11, "s", "measured", "process start to first step but for large jobs: median of 5 of `make train`"),
    "meet": Fact(30, "s", "published", "process groups of more than 10,000 GPUs: MegaScale, arXiv 2402.15627"),
    "requeue": Fact(121, "s", "measured", "SLURM's hold of a requeued job, and its start"),
    "node_share": Fact(0.78, "", "published", "hardware, confirmed or suspected: Llama 3, section 3.3.4"),
    "node_wait": Fact(300, "s", "published", "a cloud replaces a node: crusoe.ai, AutoClusters"),
    "repair_hours": Fact(96, "h", "assumed", "until a failed node is back; 3 to 5 days is said of hardware"),
    "gpus_per_node": Fact(8, "", "published", "Llama 3, arXiv 2407.21783"),
    "lost_share": Fact(0.05, "", "assumed", "failures that take a node and the neighbour with its copy"),
}
Facts = dict[str, Fact]
BUILT = ("plain", "background", "in place", "spares")  # of the designs; the others are simulated only


def facts_from(run: Path | None, settings: Mapping[str, float] = {}) -> Facts:
    """The facts; those measured in a run directory, then `settings`, replace the table's."""
    known = FACTS | (measured(run) if run else {})
    for name, value in settings.items():
        if name not in FACTS:
            raise UserError(f"--set {name}={value:g}: no such fact; choose one of {', '.join(FACTS)}")
        if not 0 <= value < math.inf:
            raise UserError(f"--set {name}={value:g}: give a number of at least 0")
        if value == 0 and name.endswith("_bandwidth"):
            raise UserError(f"--set {name}=0: nothing could be saved; give a number above 0")
        if value > 1 and name.endswith("_share"):
            raise UserError(f"--set {name}={value:g}: give a share of all failures, from 0 to 1")
        known = {**known, name: known[name]._replace(value=value, kind="given", source="--set")}
    return known


# ---- a run directory ----------------------------------------------------------------------------------------------


class Costs(NamedTuple):
    """Seconds in a run directory; empty where the run has none.

    pauses: training stood still for a save. writes: from the end of a save's step to its publication. detections:
    from a failure to the end of all ranks. restarts: from there to the first new step. step: median step. busy: share
    of the time while training ran that went into steps, not data, compilation or hanging.
    """

    pauses: list[float]
    writes: list[float]
    detections: list[float]
    restarts: list[float]
    starts: list[float]
    step: float
    busy: float


def costs_of(run: Path) -> Costs:
    """Read metrics.jsonl and events.jsonl. Raises `UserError` if there is no step."""
    accounting, lines = RunAccounting(), list(read_json_lines(run / "metrics.jsonl"))
    for line in lines:
        accounting.add(line)
    steps = [line for line in lines if line["kind"] == "step"]
    if not steps:
        raise UserError(f"{run}: metrics.jsonl has no step; name a run directory whose training has begun")
    ended_at = {line["step"]: line["time"] for line in steps}
    saves = [line for line in lines if line["kind"] == "checkpoint"]
    seconds = accounting.seconds
    running = sum(seconds[cause] for cause in ("productive", "data", "compile", "skipped", "replay"))
    starts = _starts(lines)
    failures = failures_of(run)
    until = [*(since for since, _ in failures[1:]), math.inf]
    return Costs(
        [line["seconds"] for line in saves],
        [line["time"] - ended_at[line["step"]] for line in saves if line["step"] in ended_at],
        [ended - since for since, ended in failures],
        [
            start.trained - ended
            for (_, ended), following in zip(failures, until, strict=True)
            for start in starts
            if ended < start.began and start.trained < following and start.trained
        ],
        [start.trained - start.began for start in starts if start.trained],
        statistics.median(line["step_seconds"] for line in steps),
        (seconds["productive"] + seconds["replay"]) / running,
    )


def failures_of(run: Path) -> list[tuple[float, float]]:
    """Unix times of the first death and of the end of all ranks, for each launch that failed."""
    events = read_json_lines(run / "events.jsonl")
    ends = [event for event in events if event.get("event") == "launch_ended" and event.get("since")]
    return [(event["since"], event["time"]) for event in ends if event["cause"] in ("failed", "hang")]


class _Start(NamedTuple):
    """Unix times at which a process and its first step began; 0 if the line of that step is gone."""

    began: float
    trained: float


def _starts(lines: list[dict[str, Any]]) -> list[_Start]:
    """A later start drops the lines of the steps that it repeats, so a first step may be gone."""
    marks = [number for number, line in enumerate(lines) if line["kind"] == "start"]
    found = []
    for first, end in zip(marks, [*marks[1:], len(lines)], strict=True):
        steps = [line for line in lines[first:end] if line["kind"] == "step"]
        kept = bool(steps) and steps[0]["step"] == lines[first]["step"] + 1
        found.append(_Start(lines[first]["began"], steps[0]["time"] - steps[0]["lap"] if kept else 0.0))
    return found


def measured(run: Path) -> Facts:
    """The facts that a run directory tells: medians."""
    costs = costs_of(run)
    known = {"save_pause": costs.pauses, "detect": costs.detections, "start": costs.starts}
    return {
        name: Fact(statistics.median(values), "s", "measured", f"median of {len(values)} in {run}")
        for name, values in known.items()
        if values
    }


# ---- designs ------------------------------------------------------------------------------------------------------


def designs(facts: Facts, gpus: int, mean_seconds: float) -> dict[str, Design]:
    """Each has what the one before has, and more.

    plain       training waits while a checkpoint is written; the job is requeued after a failure
    background  the write goes on beside training
    in place    the allocation is kept; a node that failed is waited for
    spares      another node takes over
    memory      each node holds the state of its neighbour: saved there often, in the store rarely
    """
    value = {name: fact.value for name, fact in facts.items()}
    state = value["parameters"] * value["bytes_per_parameter"]
    stored, copied = state / value["store_bandwidth"], state / gpus / value["copy_bandwidth"]
    sent = copied + state / gpus / value["network_bandwidth"]
    pause, begin, repair = value["save_pause"] + copied, value["start"] + value["meet"], value["repair_hours"] * 3600
    plain = Design(
        pause=value["save_pause"] + stored,
        write=value["save_pause"] + stored,
        detect=value["detect"],
        restart=begin + stored + value["requeue"],
        hang_share=value["hang_share"],
        hang_detect=value["hang_detect"],
        node_share=value["node_share"],
        node_wait=value["node_wait"],
    )
    background = replace(plain, pause=pause, write=pause + stored)
    in_place = replace(background, restart=begin + stored)
    spares = replace(in_place, spares=spares_needed(repair / mean_seconds * value["node_share"]), repair=repair)
    lost = value["lost_share"]
    memory = replace(
        spares,
        write=value["save_pause"] + sent,
        restart=begin + sent,
        lost_share=lost,
        store_interval=max(stored, math.sqrt(2 * pause * mean_seconds / lost) if lost else math.inf),
        store_pause=pause,
        store_write=background.write,
        store_restart=in_place.restart,
    )
    return {"plain": plain, "background": background, "in place": in_place, "spares": spares, "memory": memory}
