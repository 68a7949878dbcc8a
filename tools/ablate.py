"""Ablations: variants of a run beside each other, over several seeds.

    python -m tools.ablate configs/tiny.toml --vary model.dropout=0.1,0.2 --vary optimizer.kind=muon --seeds 1,2,3 \\
        --out runs/ablation
    python -m tools.ablate configs/tiny.toml --variants benchmarks/ablations/decoder.toml --out runs/ablation

Every value is a variant of its own, with --grid every combination. A file of variants (`tools.ablation_variants`) names
them and has several settings for each. All settings are checked first. Then the runs follow each other, or with --slurm
they are the tasks of a job array. Out: OUT/table.md, results.json, curves.png (`tools.ablation_results`), and the
folders of the runs (`tools.ablation_work`). The same command goes on after a kill; what is finished is not repeated.

Exit codes: 0 all runs are finished, 1 some failed, 2 something to correct, 3 stopped.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bigmodel.config.settings import UserError
from bigmodel.run_directory import EXIT_FAILED, EXIT_STOPPED, EXIT_USER, write_atomically
from bigmodel.sizes import counted_noun
from tools.ablation_results import draw, show_table, write_table
from tools.ablation_variants import Job, from_file, from_texts, require_sound
from tools.ablation_work import Failed, Stopped, finished, locked, stoppable, work

Texts = list[str]


def ablate(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="run file of the baseline")],
    out: Annotated[Path, typer.Option(help="folder of the ablation")],
    vary: Annotated[Texts, typer.Option(metavar="SETTING=VALUE,VALUE", help="values to try; repeatable")] = [],  # noqa: B006
    variants: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="named variants, instead of --vary")
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="every combination of the values")] = False,
    seeds: Annotated[str, typer.Option(help="seeds of the runs, separated by commas")] = "1,2,3",
    override: Annotated[
        Texts, typer.Option("--set", metavar="KEY=VALUE", help="for the baseline and all variants")
    ] = [],  # noqa: B006
    only: Annotated[Texts, typer.Option(metavar="NAME", help="run only this variant; repeatable")] = [],  # noqa: B006
    ranks: Annotated[int, typer.Option(min=1, help="ranks of each run")] = 1,
    slurm: Annotated[bool, typer.Option("--slurm", help="submit the runs as a SLURM job array")] = False,
    sbatch: Annotated[Texts, typer.Option(metavar="OPTION", help="option for sbatch, as --partition=gpu")] = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check and list the runs, start nothing")] = False,
    task: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Run variants of a run file over several seeds, and compare them."""
    if sbatch and not slurm:
        raise UserError("--sbatch has no effect without --slurm; leave it out or give both")
    for option in sbatch:
        if not option.startswith("-") or option.startswith(("-a", "--array")):
            raise UserError(f"--sbatch {option}: must be an option as --partition=gpu; --array is set here")
    jobs = require_sound(list_jobs(run_file, out, vary, variants, grid, seeds, override), ranks)
    chosen = [job for job in jobs if not only or job.variant.name in only]
    if unknown := [name for name in only if name not in {job.variant.name for job in jobs}]:
        known = ", ".join(dict.fromkeys(job.variant.name for job in jobs))
        raise UserError(f"--only {unknown[0]}: no such variant; known: {known}")
    words = [str(run_file), "--out", str(out), *_options("--vary", vary), *_options("--set", override)]
    words += [*_options("--variants", [str(variants)] if variants else []), *(["--grid"] if grid else [])]
    words += ["--seeds", seeds, "--ranks", str(ranks)]
    work_list = WorkList(jobs, ranks, shlex.join(["python", "-m", "tools.ablate", *words]))
    if slurm:
        titles = [job.title for job in chosen if not finished(job)]
        submit(out, sbatch_script(out, titles, sbatch, words), len(titles), dry_run)
    elif dry_run:
        for job in chosen:
            print(f"{job.title}: {'finished' if finished(job) else job.in_words()}")
    elif task:
        raise typer.Exit(work_list.run([of_title(jobs, task)], draws=False))
    else:
        raise typer.Exit(work_list.run(chosen, draws=True))


def _options(name: str, values: Sequence[str]) -> Texts:
    return [word for value in values for word in (name, value)]


def list_jobs(
    run_file: Path, out: Path, vary: Texts, variants: Path | None, grid: bool, seeds: str, override: Texts
) -> list[Job]:
    """All jobs, the first seed of every variant first. Raises `UserError`."""
    if bool(vary) == bool(variants):
        raise UserError("give --vary SETTING=VALUE,VALUE or --variants FILE.toml, one of them")
    if grid and not vary:
        raise UserError("--grid has no effect without --vary; leave it out")
    common: Texts = []
    if variants:
        found, common = from_file(run_file, variants)
    else:
        found = from_texts(run_file, vary, grid)
    out = out.absolute()
    return [Job(one, seed, out, (*common, *override)) for seed in numbers_of(seeds) for one in found]


def of_title(jobs: Sequence[Job], title: str) -> Job:
    """Raises `UserError` if the variants have changed since the job array was submitted."""
    for job in jobs:
        if job.title == title:
            return job
    raise UserError(f"--task {title}: no such run any more; submit the job array again")


def numbers_of(seeds: str) -> list[int]:
    numbers = [int(one) if one.strip().isdecimal() else -1 for one in seeds.split(",")]
    if min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise UserError(f"--seeds {seeds}: must be different whole numbers separated by commas, for example 1,2,3")
    return numbers


# ---- one after another


@dataclass
class WorkList:
    """Works jobs off; shows progress; writes the table after each and the pictures at the end."""

    jobs: list[Job]
    ranks: int
    command: str
    console: Console = field(
        default_factory=lambda: Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    )
    failed: dict[Job, str] = field(default_factory=dict)

    def run(self, chosen: Sequence[Job], draws: bool) -> int:
        """Exit code. Jobs that another process works on come last: they are waited for. draws: without it pictures are
        drawn only when all is finished."""
        out = self.jobs[0].out
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        live = self.console.is_terminal
        with stoppable(), Progress(*columns, console=self.console, disable=not live) as progress:
            total = progress.add_task("runs", total=len(chosen), completed=sum(map(finished, chosen)))
            try:
                busy = []
                for job in chosen:
                    if not self._one(job, progress, wait=False):
                        busy.append(job)
                    progress.update(total, completed=sum(map(finished, chosen)))
                for job in busy:
                    self.console.print(f"{job.title}: another process works on it; waiting")
                    self._one(job, progress, wait=True)
                    progress.update(total, completed=sum(map(finished, chosen)))
            except Stopped:
                progress.stop()
                self.console.print("stopped; checkpoints are kept, the same command goes on")
                return EXIT_STOPPED
        write_table(self.jobs, out, self.command)
        show_table(self.jobs, Console(highlight=False, markup=False, emoji=False))
        pictures = draw(self.jobs, out) if draws or all(map(finished, self.jobs)) else []
        self.console.print(f"{out}: table.md, results.json{''.join(f', {path.name}' for path in pictures)}")
        for job, reason in self.failed.items():
            self.console.print(f"failed: {job.title}: {reason}")
        return EXIT_FAILED if self.failed else 0

    def _one(self, job: Job, progress: Progress, wait: bool) -> bool:
        """Finish a job and those that it needs; False: another process works on it."""
        if finished(job):
            return True
        for other in self.jobs:
            if other.seed == job.seed and other.variant.name in job.variant.needs and other not in self.failed:
                self._one(other, progress, wait=True)
        lacking = [other for other in self.failed if other.seed == job.seed and other.variant.name in job.variant.needs]
        if lacking:
            self.failed[job] = f"needs {lacking[0].title}, which failed"
            return True
        with locked(job, wait) as held:
            if held is None:
                return False
            if not finished(job):
                self._work(job, progress, held)
        return True

    def _work(self, job: Job, progress: Progress, held: IO[Any]) -> None:
        began = time.monotonic()
        steps = None if job.variant.commands else job.settings().training.steps
        bar = progress.add_task(job.title, total=steps)
        if not self.console.is_terminal:
            self.console.print(f"{job.title}: begins")
        try:
            work(
                job,
                self.ranks,
                held,
                lambda step, said: progress.update(bar, completed=step, description=f"{job.title}: {said}"),
            )
            self.console.print(f"{job.title}: finished in {time.monotonic() - began:.0f} s")
        except (Failed, UserError) as error:
            self.failed[job] = str(error)
            self.console.print(f"{job.title}: failed: {error}")
        finally:
            progress.remove_task(bar)
        write_table(self.jobs, job.out, self.command)


# ---- SLURM


def sbatch_script(out: Path, titles: Sequence[str], options: Sequence[str], words: Sequence[str]) -> str:
    """A job array with a task per run, which it names, so that it stays the same when variants are added. Before its
    time is over a task gets SIGTERM, saves, and ends with 3; a requeued one goes on."""
    given = {
        "job-name": f'"ablate-{out.name}"',
        "array": f"0-{len(titles) - 1}",
        "output": f'"{out.absolute()}/slurm/%A_%a.out"',
        "open-mode": "append",
        "signal": "B:TERM@120",
    }
    lines = ["#!/bin/bash", *(f"#SBATCH --{name}={value}" for name, value in given.items()), "#SBATCH --requeue"]
    lines += [f"#SBATCH {option}" for option in options]
    lines += ["", f"cd {shlex.quote(os.getcwd())} || exit 1"]
    lines += ["runs=(", *(f"  {shlex.quote(title)}" for title in titles), ")"]
    command = shlex.join([sys.executable, "-m", "tools.ablate", *words])
    lines += [f'exec {command} --task "${{runs[$SLURM_ARRAY_TASK_ID]}}"']
    return "\n".join(lines) + "\n"


def submit(out: Path, script: str, count: int, dry_run: bool) -> None:
    """Submit the job array, or print it. Raises `UserError` if SLURM refuses it."""
    if dry_run or not count:
        print(script if count else "every run is finished; the same command without --slurm draws the table")
        return
    if shutil.which("sbatch") is None:
        raise UserError("--slurm: sbatch is not on this machine; use a login node of the cluster")
    (out / "slurm").mkdir(parents=True, exist_ok=True)
    file = out / "slurm" / "array.sbatch"
    write_atomically(file, script)
    answer = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise UserError(f"--slurm: sbatch refused {file}: {answer.stderr.strip()}")
    number = answer.stdout.strip().partition(";")[0]
    print(f"job {number}: {counted_noun(count, 'task')}; output in {file.parent}, the table in {out}/table.md")


def main() -> None:
    try:
        typer.run(ablate)
    except UserError as error:
        print(f"ablate: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER) from None


if __name__ == "__main__":
    main()
