"""`bigmodel plan RUN.toml --cluster CLUSTER.toml`: memory, time, failures, cost, data and scaling of a run to come.

In: settings, a cluster, measured runs or none. Out: a table in the terminal, JSON for scripts, a picture. The first
line says whether it fits. Imports no torch; needs neither data nor a GPU. Costs: about 1 s of one core, the picture one
more.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bigmodel.config.settings import UserError
from bigmodel.launcher.cluster import Cluster, hosts_and_slots, load_cluster
from bigmodel.planning.calibration import calibrated
from bigmodel.planning.changes import Choice, choice_of, search
from bigmodel.planning.context import Context, cluster_of_ranks
from bigmodel.planning.cost import cost_part
from bigmodel.planning.data_needs import data_part
from bigmodel.planning.fit import MARGIN, Fit, fit_of, is_tight
from bigmodel.planning.memory import GIB, headlines, memory_of, memory_part, stages_of
from bigmodel.planning.memory_table import memory_table
from bigmodel.planning.part import Part
from bigmodel.planning.plan_picture import draw_plan
from bigmodel.planning.plan_table import TIGHT, found_table, parts_table
from bigmodel.planning.reliability import reliability_part
from bigmodel.planning.scaling import Law, read_law, scaling_part
from bigmodel.planning.show_memory import console
from bigmodel.planning.state_memory import Plan
from bigmodel.planning.step_time import Rates, StepTime, step_time, time_part

VERSION = 1  # of the JSON
RANKS = 8  # without a cluster file
SHOWN = 10  # of what --search finds


class Planned(NamedTuple):
    """`parts`: by name. `found`: of --search, with bytes and the step's time."""

    context: Context
    fit: Fit
    step: StepTime
    by_stage: dict[str, Plan]
    parts: dict[str, Part]
    found: list[tuple[Choice, int, StepTime]]


class Output(NamedTuple):
    """What is asked for beside the table; `as_json`: instead of it."""

    as_json: bool = False
    png: Path | None = None
    search: bool = False


def plan(context: Context, measured: Sequence[Path], law: Path | None, output: Output) -> bool:
    """Print the plan. `measured`: runs to calibrate the times with; `law`: result of a sweep. Returns whether the run
    fits. Raises `UserError`."""
    rates = calibrated(measured, context.cluster) if measured else None
    planned = planned_of(context, rates, read_law(law) if law else None, output.search)
    if output.png:
        draw_plan(output.png, planned.by_stage, planned.fit.limit, planned.step, planned.parts)
    if output.as_json:
        console().print(json.dumps(numbers_of(planned), indent=2), soft_wrap=True)
    else:
        print_plan(planned, output)
    return planned.fit.fits is not False


def planned_of(
    context: Context, rates: Rates | None = None, law: Law | None = None, is_searched: bool = False
) -> Planned:
    step = step_time(context, rates)
    limit = int(step.hardware.memory_gib * GIB)
    reliability = reliability_part(context, step)
    parts = {
        "memory": memory_part(context),
        "time": time_part(context, step),
        "reliability": reliability,
        "cost": cost_part(context, step, reliability),
        "data": data_part(context, step),
        "scaling": scaling_part(context, law),
    }
    found = search(context, limit, lambda one: step_time(one, rates)) if is_searched else []
    by_stage = {stage: memory_of(one) for stage, one in stages_of(context).items()}
    return Planned(context, fit_of(context, limit), step, by_stage, parts, found)


def print_plan(planned: Planned, output: Output) -> None:
    context, out, own = planned.context, console(), choice_of(planned.context)
    assumed = "" if context.cluster.hardware.gpu else ", assumed: [hardware] gpu is not set"
    out.print(planned.fit.words(own, planned.step.hardware.name + assumed), soft_wrap=True)
    for line in headlines(context):
        out.print(line, soft_wrap=True)
    out.print(memory_table(planned.by_stage, planned.fit.limit))
    out.print(parts_table([part for name, part in planned.parts.items() if name != "memory"]))
    if planned.found:
        number = min(SHOWN, len(planned.found))
        offloaded = ", with the optimizer offloaded" if planned.found[0][0].offloads else ""
        out.print(
            f"The fastest {number} of {len(planned.found)} settings that fit{offloaded}; days without failures:\n"
        )
        out.print(found_table(planned.found[:number], own, planned.fit.limit))
        if any(is_tight(size, planned.fit.limit) for _, size, _ in planned.found[:number]):
            out.print(f"{TIGHT} less than {MARGIN:.0%} of the GPU to spare: try it first, or take the next")
    elif output.search:
        out.print("No settings fit; more GPUs, a smaller model or shorter packed sequences would help.")
    if output.png:
        out.print(f"picture: {output.png}", soft_wrap=True)


def numbers_of(planned: Planned) -> dict[str, Any]:
    """For scripts: SI units, the unit at the end of each name."""
    context, own = planned.context, choice_of(planned.context)
    run = {"ranks": context.ranks, "nodes": context.cluster.nodes, "vocabulary": context.vocabulary}
    found = [
        choice._asdict()
        | {
            "device_bytes": size,
            "is_tight": is_tight(size, planned.fit.limit),
            "step_seconds": step.seconds,
            "tokens_per_second": step.tokens_per_second,
        }
        for choice, size, step in planned.found
    ]
    return (
        {"version": VERSION}
        | planned.fit.numbers()
        | {"run": run | own._asdict() | {"gpu": planned.step.hardware.name}}
        | {name: part.numbers for name, part in planned.parts.items()}
        | ({"search": found} if found else {})
    )


def cluster_of(file: Path | None, ranks: int) -> Cluster:
    """Of a cluster file, or of a number of ranks; 0: not given. Hosts of the file are counted, without spare ones."""
    if file is None:
        return cluster_of_ranks(ranks or RANKS)
    if ranks:
        raise UserError(f"--ranks {ranks} with --cluster {file}: the file says how many ranks there are; give only one")
    cluster = load_cluster(file)
    if cluster.hosts or cluster.ssh.hostfile:
        hosts, slots = hosts_and_slots(cluster)
        nodes = max(1, len(hosts) - cluster.restart.spare_nodes)
        return cluster.model_copy(update={"nodes": nodes, "gpus_per_node": slots, "ranks_per_node": 0})
    if not cluster.gpus_per_node:
        raise UserError(f"{file}: gpus_per_node = 0: a plan is about GPUs; set nodes and gpus_per_node")
    return cluster
