"""Benchmark of `bigmodel plan`: predicted seconds of steps beside published ones, and beside steps on this CPU.

    python -m tools.bench_plan                       # 36 published steps, then a ladder of four sizes, 12 rounds
    python -m tools.bench_plan --rounds 0            # the published steps alone: arithmetic

Published: throughput of FSDP runs by others (tools/published_steps.py) beside the default rates; only attention has the
rate that fits those runs' kernel, Triton's of 2023. `fitted` rows chose the rates, the others are predictions.

Ladder: four sizes of model train in turn, each in a process of its own, on one thread; seconds are CPU seconds, medians
of the rounds. The plan is calibrated on the first three and predicts the last, as `bigmodel plan --measured` does.
"""

import contextlib
import statistics
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.settings import Settings
from bigmodel.launcher.cluster import Cluster
from bigmodel.planning.calibration import Measured, fitted, measured_step, planned_seconds
from bigmodel.planning.context import Context
from bigmodel.planning.pack_work import work_of_documents
from bigmodel.planning.step_demand import step_demand
from tools.bench_step import OURS, WARM_UP, Contender
from tools.measure import Record
from tools.published_steps import ROWS, predicted
from tools.step_contenders import LADDER, Case, batches


def published(record: Record) -> None:
    for row in ROWS:
        found = predicted(row)
        case = f"{row.model}, {row.gpus} x {row.gpu}, {row.sequence_length:,} tokens"
        record.add(
            {
                "case": case,
                "contender": "fitted" if row.fitted else "predicted",
                "published_tokens_per_second": row.tokens_per_second_per_gpu,
                "planned_tokens_per_second": round(found),
                "off_percent": 100 * (found / row.tokens_per_second_per_gpu - 1),
            }
        )


def measured_case(name: str, case: Case, cpu_seconds: float) -> Measured:
    """A step of the ladder, with the documents of its packs."""
    training = {"precision": "fp32", "global_batch_size": case.packs}
    data = {"sequence_length": case.sequence_length, "max_document_length": case.sequence_length}
    table = {"model": case.model, "training": training, "data": data}
    effective, settings = resolve_deepspeed(Settings.model_validate(table), 1)
    effective["train_micro_batch_size_per_gpu"] = case.packs
    context = Context(settings, effective, case.vocabulary, Cluster(gpus_per_node=1), 1, None)
    lengths = np.concatenate([pack.cu_seqlens.diff().numpy() for packs in batches(case) for pack in packs])
    demand = step_demand(context, of_pack=work_of_documents(settings, lengths[lengths > 0].astype(np.float64)))
    return measured_step(name, context, demand, cpu_seconds)


def ladder(rounds: int, record: Record) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in LADDER}
    with contextlib.ExitStack() as ending:
        contenders = {name: Contender(OURS, name) for name in LADDER}
        for contender in contenders.values():
            ending.callback(contender.end)
        for number in range(WARM_UP + rounds):
            for name, contender in contenders.items():
                step = contender.step()
                if number >= WARM_UP:
                    seconds[name].append(step["cpu"])
    runs = [measured_case(name, LADDER[name], statistics.median(found)) for name, found in seconds.items()]
    rates = fitted(runs[:-1])
    for run in runs:
        planned = planned_seconds(run, rates)
        found = seconds[run.name]
        record.add(
            {
                "case": f"CPU, {run.name}",
                "contender": "predicted" if run is runs[-1] else "fitted",
                "cpu_seconds": run.step_seconds,
                "smallest": min(found),
                "largest": max(found),
                "planned_seconds": planned,
                "off_percent": 100 * (planned / run.step_seconds - 1),
                "rounds": len(found),
                "measured": run._asdict(),
            }
        )


def main(
    rounds: Annotated[int, typer.Option(help="steps of each size of the ladder; 0: no ladder")] = 12,
    out: Annotated[Path, typer.Option(help="folder of the JSON")] = Path("benchmarks"),
) -> None:
    """Plan beside what was published and what is measured here."""
    record = Record(out, "bench_plan", "cpu")
    published(record)
    if rounds:
        ladder(rounds, record)
    columns = ["case", "contender", "published_tokens_per_second", "planned_tokens_per_second"]
    record.show([*columns, "cpu_seconds", "planned_seconds", "off_percent"])


if __name__ == "__main__":
    typer.run(main)
