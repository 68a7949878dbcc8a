"""Saves and failures of a planned run: bytes, pauses, the interval, goodput. Imports no torch.

In: a context and its `StepTime`. Out: a part of the plan. A save pauses training while shards are copied to the host
(`checkpoint.asynchronous`), else while they are written. Failures come at random with the mean of the cluster file, or
of `checkpoint.hours_between_failures`; goodput is `bigmodel.planning.save_interval.expected_ratio`. The wait for a new
node is not in it: `tools.simulate_goodput` has it.
"""

from typing import TYPE_CHECKING, Any

from bigmodel.planning.hardware import GB, GPU_HOURS_BETWEEN_FAILURES
from bigmodel.planning.part import Part, Row
from bigmodel.planning.save_interval import best_interval_seconds, expected_ratio
from bigmodel.planning.step_time import StepTime
from bigmodel.sizes import byte_size, short_duration

if TYPE_CHECKING:
    from bigmodel.planning.context import Context

COPY_RATE = 10e9  # bytes per second from a GPU to its host: assumed
PAUSE_SECONDS = 0.08  # of a save beside the copy: median of 11 of `make train`
# From a crash to the first new step, without reading the checkpoint: the launcher's grace for ranks whose peer died, a
# start (median of 5 of `make train`), process groups of more than 10,000 GPUs (MegaScale, arXiv 2402.15627).
DETECT_SECONDS, START_SECONDS, MEET_SECONDS = 15.0, 11.0, 30.0
LONGEST = 500.0  # times the mean between failures: no run gets through


def reliability_part(context: "Context", found: StepTime) -> Part:
    numbers = reliability(context, found)
    saving, every = context.settings.checkpoint, numbers["interval_seconds"]
    mean, chosen = numbers["seconds_between_failures"], "measured" if saving.hours_between_failures else "every_steps"
    rows = [
        Row("a checkpoint", byte_size(numbers["checkpoint_bytes"]), "fp32: weights, optimizer's states, average"),
        Row(
            "written in",
            short_duration(numbers["write_seconds"]),
            f"{found.hardware.storage_rate / GB:,.3g} GB/s, all nodes; {saving.keep} kept: "
            f"{byte_size(saving.keep * numbers['checkpoint_bytes'])}",
        ),
        Row(
            "a save pauses training for",
            f"{numbers['pause_seconds']:.2g} s",
            f"copied to the host at {COPY_RATE / GB:.0f} GB/s" if saving.asynchronous else "asynchronous = false",
        ),
        Row("a failure every", short_duration(mean), _source(context, found)),
        Row("failures in the run", "no end" if numbers["failures"] is None else f"{numbers['failures']:,.3g}"),
        Row("time between saves", short_duration(every), _chosen(chosen, context)),
        Row("best time between saves", short_duration(numbers["best_interval_seconds"]), "Daly 2006, eq. 37"),
        Row(
            "from a failure to a step",
            short_duration(numbers["recovery_seconds"]),
            "detection, start, reading; a node is free",
        ),
        Row(
            "goodput", f"{numbers['goodput_ratio']:.1%}", f"{numbers['best_goodput_ratio']:.1%} with the best interval"
        ),
    ]
    return Part("saves and failures", rows, numbers)


def reliability(context: "Context", found: StepTime) -> dict[str, Any]:
    """Seconds, bytes and ratios."""
    saving, hardware, size = context.settings.checkpoint, found.hardware, found.demand.checkpoint_bytes
    write = size / hardware.storage_rate
    copy = size / context.ranks / COPY_RATE + PAUSE_SECONDS
    pause = copy if saving.asynchronous else copy + write
    mean = 3600 * saving.hours_between_failures or hardware.job_failure_seconds
    best = max(found.seconds, best_interval_seconds(pause, mean))
    interval = best if saving.hours_between_failures else saving.every_steps * found.seconds
    recovery = DETECT_SECONDS + START_SECONDS + write + (MEET_SECONDS if hardware.nodes > 1 else 0.0)
    goodput = _ratio(interval, pause, copy + write, recovery, mean)
    return {
        "checkpoint_bytes": size,
        "write_seconds": write,
        "pause_seconds": pause,
        "interval_seconds": interval,
        "best_interval_seconds": best,
        "seconds_between_failures": mean,
        "recovery_seconds": recovery,
        "goodput_ratio": goodput,
        "best_goodput_ratio": _ratio(best, pause, copy + write, recovery, mean),
        "failures": found.run_seconds / goodput / mean if goodput else None,
    }


def _ratio(interval: float, pause: float, write: float, recovery: float, mean: float) -> float:
    if max(interval + write, recovery) > LONGEST * mean:
        return 0.0
    return expected_ratio(interval, pause, write, recovery, mean)


def _source(context: "Context", found: StepTime) -> str:
    if context.settings.checkpoint.hours_between_failures:
        return "checkpoint.hours_between_failures"
    if context.cluster.hardware.hours_between_failures_per_gpu:
        return "of the cluster file"
    return f"{GPU_HOURS_BETWEEN_FAILURES:,.0f} h / {context.ranks:,} GPUs: Llama 3, 419 in 54 days on 16,384"


def _chosen(chosen: str, context: "Context") -> str:
    every = context.settings.checkpoint.every_steps
    return f"checkpoint.every_steps = {every:,}" if chosen == "every_steps" else "computed in the run from its saves"
