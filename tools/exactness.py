"""The exactness suite in full, and the table of what is supported that follows from it.

    make exactness        (python -m tools.exactness; --quick runs the pairwise cases of CI)

Every combination of ZeRO stage, precision, optimizer, recomputation and offload, on every world size, with the other
settings dealt among them (each combination draws its own, by its hash), against plain torch in one process
(tests/support/exactness.py). Writes after each batch of cases, so that a run cut short keeps what it had, and the next
one goes on: benchmarks/exactness.json, and from it benchmarks/support.md. Exit code 0 where every case that ran was
exact."""

import hashlib
import json
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from bigmodel.config.deepspeed_json import VERSION
from tools.measure import ROOT, hardware

RESULTS = ROOT / "benchmarks" / "exactness.json"
TABLE = ROOT / "benchmarks" / "support.md"
MAIN = ("stage", "precision", "optimizer", "activation_checkpointing", "offload")
BATCH = 24  # cases in one process group
TITLES = {
    "precision": "precision",
    "optimizer": "optimizer",
    "activation_checkpointing": "activation checkpointing",
    "offload": "offload of",
    "packs_at_once": "packs in a micro-batch",
    "ema": "average of weights",
    "groups": "parameter groups",
    "tied": "tied embeddings",
    "persistence": "small weights kept whole",
    "hpz": "hpZ partition size",
    "sharing": "Ulysses: ranks that share a pack",
}
NOT_RUN = {
    "NCCL, any GPU": "no GPU was at hand; the same code, gloo on CPUs was run",
    "zero_quantized_weights, zero_quantized_gradients (ZeRO++)": "passed through; needs a GPU",
    "an NVMe disk": "offload to nvme ran on whatever disk holds /tmp; its speed was not measured",
    "overlap_comm = true": "passed through; its race is open upstream (DeepSpeed issue 5545)",
    "training.compile, in the cases above and on any GPU": "tests take its graphs in one process, without ZeRO and "
    "without its code generation; by hand, on CPUs with g++, 5 steps on 2 ranks at stages 1, 2, fp32, no dropout, had "
    "the losses of the run without it, and norms within 1e-6; refused at stage 3 and with Ulysses",
}
REFUSED = {
    "NVMe offload of weights": f"tried on two CPU ranks: in the forward pass DeepSpeed {VERSION}'s prefetch fails an "
    "assertion, and without prefetch a gather fails; offload_optimizer to nvme is offered",
    "Ulysses with encoder-decoders": "not offered",
    "SuperOffload, ZenFlow, DeepCompile": "not offered",
    "bf16 or fp16 at stage 0": f"DeepSpeed {VERSION} cannot add gradients up in fp32 there; use stage 1",
    "8-bit optimizers": "their state depends on where partitions begin: it could not move exactly",
}


def matrix(world_size: int, quick: bool) -> list[dict[str, Any]]:
    """The cases of one world size; four ranks are for hpZ and for sharing packs."""
    from tests.support.exactness import everything, pairwise

    if quick:
        cases = pairwise()
    else:
        first: dict[str, dict[str, Any]] = {}
        for case in sorted(everything(), key=lambda one: hashlib.sha256(json.dumps(one).encode()).hexdigest()):
            first.setdefault(json.dumps([case[name] for name in MAIN]), case)
        cases = list(first.values())
    plain = [case for case in cases if case["offload"] == "none"]
    few = plain[:4] if quick else plain
    shared = [case | {"sharing": ranks} for ranks in (2, 4) if ranks <= world_size for case in few]
    if world_size == 4:
        return [*shared, *(case | {"hpz": 2} for case in plain if case["stage"] == 3)]
    return [*cases, *shared]


def run_batch(cases: list[dict[str, Any]], world_size: int, folder: Path) -> list[dict[str, Any]]:
    """Rows: the case, how far it was from the oracle and may be, and what failed. `folder` keeps the oracles."""
    from tests.support.engine_worker import launch
    from tests.support.exactness import differences, failures, job_of, with_sequence

    jobs = [
        with_sequence(
            job_of(case, folder, **({"zero_hpz_partition_size": case["hpz"]} if "hpz" in case else {})),
            case.get("sharing", 1),
        )
        for case in cases
    ]
    outcome = launch(jobs, world_size, folder, timeout_seconds=60.0 * len(jobs))
    results = [job | one for job, one in zip(jobs, outcome, strict=True)]
    return [
        {"world_size": world_size, "case": case, "differences": differences(one), "failures": failures(one)}
        for case, one in zip(cases, results, strict=True)
    ]


def support_table(rows: list[dict[str, Any]], about: dict[str, str]) -> str:
    """Markdown: for each value of each setting and each stage, how many cases ran and whether all were exact."""
    lines = [
        "# What is supported",
        "",
        f"Written by `make exactness` on {about['date']}, commit {about['commit']}, {about['hardware']}, DeepSpeed "
        f"{VERSION}, gloo. A case trains 20 steps and is compared with plain torch in one process: fp32 gradients "
        "within 1e-5, norm and loss within 1e-6, weights within 1e-3 at the end; bf16 and fp16 within twice the error "
        "of one process of that precision against float64. The number is how many cases ran; `-`: refused or not run.",
        "",
        "| | ZeRO 0 | 1 | 2 | 3 |",
        "|---|---|---|---|---|",
        _row("all", rows),
        *(
            _row(f"on {size} rank(s)", [row for row in rows if row["world_size"] == size])
            for size in sorted({row["world_size"] for row in rows})
        ),
    ]
    for name, title in TITLES.items():
        values = sorted({row["case"][name] for row in rows if name in row["case"]}, key=str)
        lines += [
            _row(
                f"{title} {v if (name, v) != ('offload', 'none') else 'nothing'}",
                [r for r in rows if r["case"].get(name) == v],
            )
            for v in values
        ]
    lines += ["", "| not run | why |", "|---|---|", *(f"| {what} | {why} |" for what, why in NOT_RUN.items())]
    lines += ["", "| refused | why |", "|---|---|", *(f"| {what} | {why} |" for what, why in REFUSED.items())]
    wrong = [row for row in rows if row["failures"]]
    lines += ["", *(f"- wrong: {row['world_size']} ranks, {row['case']}: {row['failures']}" for row in wrong)]
    return "\n".join(lines).rstrip() + "\n"


def _row(title: str, rows: list[dict[str, Any]]) -> str:
    cells = []
    for stage in range(4):
        here = [row for row in rows if row["case"]["stage"] == stage]
        wrong = sum(bool(row["failures"]) for row in here)
        cells.append("-" if not here else f"{wrong} of {len(here)} wrong" if wrong else f"exact ({len(here)})")
    return f"| {title} | {' | '.join(cells)} |"


def main(
    worlds: Annotated[str, typer.Option(help="numbers of ranks")] = "1,2,4",
    quick: Annotated[bool, typer.Option(help="the pairwise cases of CI")] = False,
) -> None:
    from tools.measure import _commit

    about = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit().removesuffix("-dirty"),
        "hardware": hardware("cpu"),
    }
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = kept.get("rows", []) if kept.get("about", {}).get("commit") == about["commit"] else []
    done = {json.dumps([row["world_size"], row["case"]]) for row in rows}
    todo = [
        (size, case)
        for size in map(int, worlds.split(","))
        for case in matrix(size, quick)
        if json.dumps([size, case]) not in done
    ]
    batches = []  # a few of every world size in turn, so that a run cut short has seen all
    for size in {size: None for size, _ in todo}:
        cases = [case for other, case in todo if other == size]
        batches += [(first, size, cases[first : first + BATCH]) for first in range(0, len(cases), BATCH)]
    with Progress() as progress, tempfile.TemporaryDirectory(prefix="exactness-") as folder:
        bar = progress.add_task("cases", total=len(todo))
        for _, size, cases in sorted(batches, key=lambda batch: batch[0]):
            rows += run_batch(cases, size, Path(folder))
            progress.advance(bar, len(cases))
            part = RESULTS.with_suffix(".part")
            part.write_text(json.dumps({"about": about, "rows": rows}, indent=0) + "\n")
            os.replace(part, RESULTS)
            TABLE.write_text(support_table(rows, about))
    wrong = [row for row in rows if row["failures"]]
    for row in wrong:
        print(f"{row['world_size']} ranks, {row['case']}: {'; '.join(row['failures'])}")
    print(f"{len(rows)} cases, {len(wrong)} wrong; {TABLE.relative_to(ROOT)}")
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
