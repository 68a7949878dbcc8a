"""Rates of a plan fitted to runs that exist (`bigmodel plan --measured RUN`), to predict another one. Imports no torch.

In: run directories (settings.json, deepspeed.json, metrics.jsonl, data_manifest.json), the hardware they ran on. Out:
`Rates`. A run's step is its median, without data waits and compilation, over the second half of its steps with the last
batch size. It is taken apart as the plan does:

    seconds = collectives + a * products and attention + b * elements and optimizer + c * blocks + d

with blocks = blocks * micro-batches. Of the constants, none below 0, only as many are fitted as it takes to meet every
run within 5%, and fewer than there are runs, so that noise of a run does not become a constant: one run or two give
a = b, three of different sizes also c, d or b.
"""

import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bigmodel.config.settings import UserError, settings_from_table
from bigmodel.data.objectives.examples import num_special_tokens
from bigmodel.data.store.manifest import Manifest
from bigmodel.launcher.cluster import Cluster
from bigmodel.planning.context import Context
from bigmodel.planning.hardware import hardware_of
from bigmodel.planning.step_demand import Demand, step_demand
from bigmodel.planning.step_time import Rates, computed_seconds, sent_seconds
from bigmodel.run_directory import read_json_lines

MET = 0.05  # of a run's seconds: enough constants
LEAST_STEPS = 5
OF_FLOPS = ("products", "attention", "recomputation")
# Which constants are fitted, the fewest first; a row is one constant, its columns are a, b, c, d.
BOTH, FLOPS, BYTES, BLOCK, STEP = (1, 1, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)
DESIGNS = [
    (BOTH,),
    *((BOTH, BLOCK), (BOTH, STEP), (FLOPS, BYTES)),
    *((FLOPS, BYTES, BLOCK), (FLOPS, BYTES, STEP), (BOTH, BLOCK, STEP)),
    (FLOPS, BYTES, BLOCK, STEP),
]


class Measured(NamedTuple):
    """A run's step: seconds of its parts at the default rates, and its seconds in all. `blocks`: blocks times
    micro-batches."""

    name: str
    flops_seconds: float
    bytes_seconds: float
    sent_seconds: float
    blocks: int
    step_seconds: float
    peak_flops: float = 0.0  # of the device; 0: not known


def calibrated(runs: Sequence[Path], cluster: Cluster) -> Rates:
    """Fitted to these runs, on the hardware of the cluster file. Raises `UserError`."""
    measured = [read_run(run, cluster) for run in runs]
    is_named = cluster.hardware.gpu or cluster.hardware.peak_tflops
    return fitted(measured)._replace(peak_flops=0.0 if is_named else measured[-1].peak_flops)


def read_run(run: Path, cluster: Cluster) -> Measured:
    """Raises `UserError` with the file that is missing."""
    settings = settings_from_table(_json_of(run, "settings.json"), run / "settings.json", saved=True)
    effective = _json_of(run, "deepspeed.json")
    manifest = Manifest.parse(_bytes_of(run, "data_manifest.json"), str(run / "data_manifest.json"))
    lines = list(read_json_lines(run / "metrics.jsonl"))
    starts = [line for line in lines if line["kind"] == "start"]
    if not starts:
        raise UserError(f"{run}: metrics.jsonl has no start; name a run directory whose training has begun")
    ranks = int(starts[-1]["world_size"])
    nodes = _nodes_of(run, ranks)
    machines = cluster.model_copy(update={"nodes": nodes, "ranks_per_node": 0, "gpus_per_node": ranks // nodes})
    vocabulary = settings.model.num_rows(manifest.vocabulary + num_special_tokens(settings.data))
    context = Context(settings, effective, vocabulary, machines, ranks, manifest)
    found = measured_step(run.name, context, step_demand(context), _step_seconds(run, lines))
    return found._replace(peak_flops=starts[-1].get("device_peak_flops") or 0.0)


def fitted(runs: Sequence[Measured]) -> Rates:
    """Multiples of the seconds that the default rates give."""
    parts = np.array([_parts(run) for run in runs])  # (runs, constants), of one second of step
    wanted = np.array([1 - run.sent_seconds / run.step_seconds for run in runs])
    best, error = (1.0, 1.0, 0.0, 0.0), np.inf
    for count, designs in itertools.groupby(DESIGNS, len):
        if count > max(1, len(runs) - 1) or error < MET:
            break
        for design in designs:
            values, off = _least_squares(parts @ np.array(design).T, wanted)
            if off < error:
                best, error = tuple((values @ np.array(design)).tolist()), off
    return Rates(
        slowdown=best[0],
        bytes_slowdown=best[1],
        seconds_per_block=best[2],
        seconds_per_step=best[3],
        measured=tuple(run.name for run in runs),
    )


def _least_squares(parts: Any, wanted: Any) -> tuple[Any, float]:
    """Values, and the largest error of a run; infinite where a value would not be positive."""
    values, *_ = np.linalg.lstsq(parts, wanted, rcond=None)
    return values, float(np.abs(parts @ values - wanted).max()) if (values > 0).all() else np.inf


def measured_step(name: str, context: Context, demand: Demand, step_seconds: float) -> Measured:
    cluster, rates = context.cluster, Rates()
    hardware = hardware_of(cluster.hardware, cluster.nodes, context.ranks // cluster.nodes)
    computed = computed_seconds(demand, hardware, rates)
    of_flops = sum(computed[name] for name in OF_FLOPS)
    of_bytes = sum(computed.values()) - of_flops
    sent = sum(sent_seconds(context, demand, hardware, rates).values())
    return Measured(name, of_flops, of_bytes, sent, demand.blocks * demand.micro_batches, step_seconds)


def planned_seconds(run: Measured, rates: Rates) -> float:
    """Of the run's step under these rates."""
    fixed = rates.seconds_per_step + rates.seconds_per_block * run.blocks
    return rates.slowdown * run.flops_seconds + rates.bytes_slowdown * run.bytes_seconds + fixed + run.sent_seconds


def _parts(run: Measured) -> list[float]:
    """What one unit of each constant contributes to a second of the run's step."""
    return [part / run.step_seconds for part in (run.flops_seconds, run.bytes_seconds, run.blocks, 1.0)]


def _step_seconds(run: Path, lines: Iterable[dict[str, Any]]) -> float:
    steps = [line for line in lines if line["kind"] == "step"]
    sizes = [line["positions"] + line["padding"] for line in steps]
    last = [line for line, size in zip(steps, sizes, strict=True) if size == sizes[-1]]
    seconds = [line["step_seconds"] - line["data_wait_seconds"] - line["compile_seconds"] for line in last]
    if len(seconds) < LEAST_STEPS:
        raise UserError(
            f"{run}: {len(seconds)} steps of the last batch size; a calibration needs at least {LEAST_STEPS}"
        )
    return statistics.median(seconds[len(seconds) // 2 :])


def _nodes_of(run: Path, ranks: int) -> int:
    """1 where the launcher left no map of ranks."""
    try:
        homes = json.loads((run / "launch.json").read_text())["node_of_rank"]
    except (OSError, ValueError, LookupError):
        return 1
    nodes = max(homes, default=0) + 1
    return nodes if ranks % nodes == 0 else 1


def _json_of(run: Path, name: str) -> dict[str, Any]:
    content = _bytes_of(run, name)
    try:
        table = dict(json.loads(content))
    except (ValueError, TypeError) as error:
        raise UserError(f"{run / name}: damaged: {error}; name another run directory") from None
    return table


def _bytes_of(run: Path, name: str) -> bytes:
    try:
        return (run / name).read_bytes()
    except OSError as error:
        raise UserError(f"--measured {run}: {name} cannot be read ({error.strerror}); give a run directory") from None
