"""The full exactness suite, and the support table made from its results.

    make exactness             run the missing cases, publish when the full matrix is complete
    python -m tools.exactness --quick    the pairwise cases of CI
    python -m tools.exactness publish    write benchmarks/exactness.jsonl and benchmarks/support.md from the results;
                                         --partial: also of some cases; --add: beside those of other commits
    python -m tools.exactness table      write benchmarks/support.md again from benchmarks/exactness.jsonl

Compares every combination of ZeRO stage, precision, optimizer, recomputation and offload, on every world size, with
plain torch in one process (tests/support/exactness.py). Each combination draws the other settings by its hash. Results
are kept under runs/exactness/ after each batch of cases (tools/exactness_state.py), so a stopped run can go on. Exit
code 0: all cases that ran were exact; 1: one was not; 2: nothing can be published.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from bigmodel.checks.scratch import scratch_folder
from bigmodel.config.deepspeed_json import VERSION
from bigmodel.config.settings import UserError
from bigmodel.sizes import counted_noun
from tools.exactness_state import Run, State, key_of, read_runs, read_sources, write_runs
from tools.measure import ROOT, hardware

STATE = ROOT / "runs" / "exactness"
RESULTS = ROOT / "benchmarks" / "exactness.jsonl"
TABLE = ROOT / "benchmarks" / "support.md"
MAIN = ("stage", "precision", "optimizer", "activation_checkpointing", "offload")
WORLD_SIZES = (1, 2, 4)
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
    "experts": "experts",
    "persistence": "small weights kept whole",
    "hpz": "hpZ partition size",
    "sharing": "Ulysses: ranks that share a pack",
    "tensors": "tensor parallel: ranks that share matrices",
    "gathering": "gathered keys: ranks that share a pack",
    "sharing_experts": "ranks that share experts",
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
    "Ulysses or gathered keys with encoder-decoders": "not offered",
    "SuperOffload, ZenFlow, DeepCompile": "not offered",
    "bf16 or fp16 at stage 0": f"DeepSpeed {VERSION} cannot add gradients up in fp32 there; use stage 1",
    "8-bit optimizers": "their state depends on where partitions begin: it could not move exactly",
}


def matrix(world_size: int, quick: bool) -> list[dict[str, Any]]:
    """The cases of one world size; four ranks serve hpZ, shared packed sequences, matrices and experts."""
    from tests.support.exactness import can_share_matrices, everything, pairwise

    if quick:
        cases = pairwise()
    else:
        first: dict[str, dict[str, Any]] = {}
        for case in sorted(everything(), key=lambda one: hashlib.sha256(json.dumps(one).encode()).hexdigest()):
            first.setdefault(json.dumps([case[name] for name in MAIN]), case)
        cases = list(first.values())
    plain = [case for case in cases if case["offload"] == "none"]
    few = plain[:4] if quick else plain
    sizes = [ranks for ranks in (2, 4) if ranks <= world_size]
    shared = [case | {"sharing": ranks} for ranks in sizes for case in few]
    divided = [case | {"tensors": 2} for case in cases if world_size > 1 and can_share_matrices(case)]
    shared += divided[:4] if quick else divided
    # Of experts the rounding of one process in fp32, the oracle, is nearly the bound: tests hold them against float64.
    dense = [case for case in few if case["experts"] == "none"]
    shared += [case | {"gathering": ranks} for ranks in sizes for case in dense]
    sparse = [case for case in cases if case["experts"] != "none"]
    shared += [case | {"sharing_experts": ranks} for ranks in sizes for case in (sparse[:4] if quick else sparse)]
    if world_size == 4:
        return [*shared, *(case | {"hpz": 2} for case in plain if case["stage"] == 3)]
    return [*cases, *shared]


def run_batch(cases: list[dict[str, Any]], world_size: int, folder: Path) -> list[dict[str, Any]]:
    """Rows: the case, its differences from the oracle with their bounds, the failures. `folder` keeps the oracles."""
    from tests.support.engine_worker import launch
    from tests.support.exactness import differences, failures, job_of, with_sequence, with_shared_experts

    jobs = []
    for case in cases:
        job = job_of(case, folder, **({"zero_hpz_partition_size": case["hpz"]} if "hpz" in case else {}))
        method = "all_gather" if "gathering" in case else "ulysses"
        job = with_sequence(job, case.get("sharing") or case.get("gathering", 1), method)
        jobs.append(with_shared_experts(job, case.get("sharing_experts", 1)))
    outcome = launch(jobs, world_size, folder, timeout_seconds=60.0 * len(jobs))
    results = [job | one for job, one in zip(jobs, outcome, strict=True)]
    return [
        {"world_size": world_size, "case": case, "differences": differences(one), "failures": failures(one)}
        for case, one in zip(cases, results, strict=True)
    ]


def support_table(runs: list[Run]) -> str:
    """Markdown: for each value of each setting and each stage, the number of cases and whether all were exact."""
    rows = [row for _, some in runs for row in some]
    missing = runs[-1][0].get("missing", 0)
    origins = [
        f"{counted_noun(len(some), 'case')} on {about['date']}, commit {about['commit']}, {about['hardware']}"
        for about, some in runs
    ]
    lines = [
        "# What is supported",
        "",
        *([f"Not complete: {missing:,} cases of the full matrix did not run.", ""] if missing else []),
        f"Written by `make exactness`: {'; '.join(origins)}. DeepSpeed {VERSION}, gloo. A case trains 20 steps and is "
        "compared with plain torch in one process: fp32 gradients within 1e-5, norm and loss within 1e-6, weights "
        "within 1e-3 at the end; bf16 and fp16 within twice the error of one process of that precision against "
        "float64, weights with experts within 4 times. The number is how many cases ran; `-`: refused or not run.",
        "",
        "| | ZeRO 0 | 1 | 2 | 3 |",
        "|---|---|---|---|---|",
        _row("all", rows),
        *(
            _row(f"on {counted_noun(size, 'rank')}", [row for row in rows if row["world_size"] == size])
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


def missing_cases(runs: list[Run]) -> dict[int, tuple[int, int]]:
    """Number of ranks -> (cases that are in no run, all cases) of the full matrix, if any are missing."""
    keys = {key_of(row["world_size"], row["case"]) for _, rows in runs for row in rows}
    counts = {}
    for size in WORLD_SIZES:
        cases = matrix(size, quick=False)
        if missing := sum(key_of(size, case) not in keys for case in cases):
            counts[size] = (missing, len(cases))
    return counts


def publish_state(state: State, partial: bool = False, uncommitted: bool = False, add: bool = False) -> None:
    """Write RESULTS and TABLE. partial: also with missing cases. uncommitted: also with uncommitted sources. add: keep
    the results of other commits.

    Otherwise raises `UserError` and writes nothing.
    """
    others = [run for run in read_runs(RESULTS) if run[0]["commit"] != str(state.sources)] if add else []
    missing = missing_cases([*others, (state.about, state.rows)])
    reasons = []
    if not state.rows:
        reasons.append(f"{state.path} has no results; run make exactness first")
    elif missing and not partial:
        counts = {counted_noun(size, "rank"): pair for size, pair in missing.items()}
        words = ", ".join(f"{few:,} of {all_:,} cases on {ranks}" for ranks, (few, all_) in counts.items())
        reasons.append(f"{words} are missing; make exactness runs them, --partial publishes without them")
    if state.sources.changes and not uncommitted:
        reasons.append(
            "the sources have changes that are not committed; commit them and run again, or publish with --uncommitted"
        )
    if reasons:
        raise UserError(f"not published: {'; '.join(reasons)}")
    about = state.about | ({"missing": sum(few for few, _ in missing.values())} if missing else {})
    runs = [*others, (about, state.rows)]
    write_runs(RESULTS, runs)
    TABLE.write_text(support_table(runs))


def run_missing(state: State, world_sizes: list[int], quick: bool) -> None:
    """Run the missing cases, a few of each world size in turn; results are kept after each batch.

    Raises `UserError` if the sources change meanwhile; the current batch is not kept.
    """
    batches = []
    for size in world_sizes:
        cases = [case for case in matrix(size, quick) if not state.has(size, case)]
        batches += [(first, size, cases[first : first + BATCH]) for first in range(0, len(cases), BATCH)]
    total = sum(len(cases) for _, _, cases in batches)
    print(f"{len(state.rows):,} cases are in {state.path}, {total:,} to run")
    state.begin(hardware("cpu"))
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    with (
        Progress(*columns, console=Console(markup=False, emoji=False)) as progress,
        scratch_folder("exactness-") as folder,
    ):
        bar = progress.add_task("cases", total=total)
        for _, size, cases in sorted(batches, key=lambda batch: batch[0]):
            rows = run_batch(cases, size, folder)
            if (now := read_sources(ROOT)) != state.sources:
                raise UserError(f"the sources changed from {state.sources} to {now} during the run; run again")
            for row in rows:
                state.add(row)
                progress.advance(bar)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    worlds: Annotated[str, typer.Option(help="numbers of ranks")] = ",".join(map(str, WORLD_SIZES)),
    quick: Annotated[bool, typer.Option(help="the pairwise cases of CI")] = False,
) -> None:
    """Run the missing cases; publish when the full matrix is complete."""
    if context.invoked_subcommand:
        return
    try:
        if not all(size.isdecimal() and int(size) for size in worlds.split(",")):
            raise UserError(f"--worlds {worlds}: give numbers of ranks, as in --worlds 1,2,4")
        state = State(STATE, read_sources(ROOT))
        run_missing(state, [int(size) for size in worlds.split(",")], quick)
    except KeyboardInterrupt:
        print(f"stopped; {len(state.rows):,} cases are in {state.path}; the same command goes on")
        raise typer.Exit(130) from None
    except UserError as error:
        raise _refused(error) from None
    wrong = [row for row in state.rows if row["failures"]]
    for row in wrong:
        print(f"{row['world_size']} ranks, {row['case']}: {'; '.join(row['failures'])}")
    print(f"{len(state.rows):,} cases, {len(wrong)} wrong; {state.path}")
    if not quick:
        try:
            publish_state(state)
            print(f"published: {TABLE}")
        except UserError as error:
            print(error)
    raise typer.Exit(1 if wrong else 0)


@app.command()
def publish(
    partial: Annotated[bool, typer.Option(help="also if cases of the full matrix are missing")] = False,
    uncommitted: Annotated[bool, typer.Option(help="also if the sources were not committed")] = False,
    add: Annotated[bool, typer.Option(help="keep the published results of other commits")] = False,
) -> None:
    """Write benchmarks/exactness.jsonl and benchmarks/support.md from the results of the current sources."""
    try:
        publish_state(State(STATE, read_sources(ROOT)), partial, uncommitted, add)
    except UserError as error:
        raise _refused(error) from None
    print(f"published: {TABLE}")


@app.command()
def table() -> None:
    """Write benchmarks/support.md again from benchmarks/exactness.jsonl, after a change of its wording."""
    TABLE.write_text(support_table(read_runs(RESULTS)))


def _refused(error: UserError) -> typer.Exit:
    typer.echo(f"exactness: {error}", err=True)
    return typer.Exit(2)


if __name__ == "__main__":
    app()
