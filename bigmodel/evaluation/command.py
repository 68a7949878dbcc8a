"""`bigmodel evaluate`: the newest checkpoint of a run on its validation split, or on tasks of lm_eval.

In: a run directory, options. Out: lines of at most 80 columns, and with `output` all numbers as JSON. Started by a
launcher with several ranks, these share the work; each holds the whole model.
"""

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bigmodel import __version__
from bigmodel.config.settings import UserError
from bigmodel.data.store.shards import ShardStore
from bigmodel.distributed.world import ALONE, World, end_world, start_world
from bigmodel.evaluation import evaluation_text
from bigmodel.evaluation.classify import make_validation, show_evaluation
from bigmodel.evaluation.engine_texts import write_texts
from bigmodel.evaluation.shared_requests import SharedRequests
from bigmodel.evaluation.training_tasks import require_harness
from bigmodel.run_directory import write_atomically
from bigmodel.training.load_model import Trained, load_trained

GPU_POSITIONS = 8192  # of a micro-batch on a GPU, at least


@dataclass(frozen=True)
class TaskOptions:
    """named: names, folders and files of tasks. shots None: as the tasks say. limit: documents of each task; 0: all.
    ngram: words in a row that count as contamination; 0: not looked for."""

    named: Sequence[str] = ()
    shots: int | None = None
    limit: int = 0
    ngram: int = 0


def evaluate(
    run_directory: Path,
    options: TaskOptions,
    output: Path | None = None,
    best: bool = False,
    png: Path | None = None,
) -> None:
    """Print the result on rank 0. png: for the confusion matrix of a classification. Raises `UserError`."""
    for name, file in (("--output", output), ("--png", png)):
        if file:
            _check_place(name, file)
    world = start_world() if "RANK" in os.environ else ALONE
    trained = load_trained(run_directory, best)
    if png and (options.named or not trained.settings.classification.classes):
        raise UserError(f"--png {png}: only a classification has a confusion matrix; leave it out")
    if options.named:
        found = _on_tasks(trained, world, options)
    else:
        found = _on_validation(trained, world, png)
    if world.rank == 0 and output:
        told = {"run": str(run_directory), "step": trained.step, "bigmodel_version": __version__, **found}
        write_atomically(output, json.dumps(_in_json(told), indent=2, default=str, ensure_ascii=False) + "\n")
        print(f"{output}: written")
    end_world()


def _check_place(name: str, file: Path) -> None:
    if not file.parent.is_dir():
        raise UserError(f"{name} {file}: there is no folder {file.parent}; make it, or choose another")
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        why = "is a folder" if file.is_dir() else f"{file.parent} cannot be written to"
        raise UserError(f"{name} {file}: {why}; give the name of a file where you may write")


def _in_json(value: Any) -> Any:
    """JSON has no numbers that are infinite or none: null."""
    if isinstance(value, dict):
        return {key: _in_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _on_validation(trained: Trained, world: World, png: Path | None) -> dict[str, Any]:
    result = make_validation(trained.settings.data, packs_per_micro_batch=1).run(trained.forward, world)
    if world.rank == 0:
        print(evaluation_text.heading(trained.step, result))
    if world.rank == 0 and result.scores:
        show_evaluation(result.scores, png, f"{trained.settings.run.directory.name}, step {trained.step}")
    elif world.rank == 0:
        print(*evaluation_text.to_lines(result), sep="\n")
    return {"validation": evaluation_text.to_values(result)}


def _on_tasks(trained: Trained, world: World, options: TaskOptions) -> dict[str, Any]:
    require_harness(trained.settings.model, "--tasks", trained.settings.data.target_ahead)
    with _progress(shown=world.rank == 0) as progress:
        advance = _shown_by(progress)
        requests = SharedRequests(
            trained.forward,
            world,
            trained.settings,
            trained.tokenizer,
            packs_per_micro_batch=_packs(trained),
            generate=lambda prompts, seeds: write_texts(trained, prompts, seeds, advance),
            advance=advance,
        )
        scored = requests.run(lambda: _run(trained, requests, options))
        lines, values = _told(trained, *scored, options, progress) if scored else ([], {})
    for line in lines:
        print(line)
    return values


def _run(trained: Trained, requests: SharedRequests, options: TaskOptions) -> tuple[Any, dict[str, Any]]:
    """On rank 0: the tasks and their results."""
    from bigmodel.evaluation.tasks import Tasks

    tasks = Tasks(options.named, trained.settings, options.shots, options.limit)
    return tasks, tasks.run(trained.settings, trained.tokenizer, requests)


def _told(
    trained: Trained, tasks: Any, results: dict[str, Any], options: TaskOptions, progress: Progress
) -> tuple[list[str], dict[str, Any]]:
    """The printed lines and the values; looks for contamination, if asked to."""
    from bigmodel.evaluation import contamination
    from bigmodel.evaluation.tasks import to_lines

    lines = [f"step {trained.step}, lm_eval {results['lm_eval_version']}", *to_lines(results)]
    values = {name: value for name, value in results.items() if name != "samples"}
    if options.ngram:
        store = ShardStore.of_run(trained.settings.data, "train")
        found = contamination.find_contamination(
            tasks.loaded["tasks"], results, store, trained.tokenizer, options.ngram, progress
        )
        lines += ["", *contamination.to_lines(found, options.ngram)]
        values["contamination"] = {"ngram": options.ngram, "tasks": {name: asdict(one) for name, one in found.items()}}
    return lines, values


def _packs(trained: Trained) -> int:
    """Packed sequences of a micro-batch."""
    positions = GPU_POSITIONS if trained.device.type == "cuda" else 1
    return max(1, positions // trained.settings.data.sequence_length)


def _progress(shown: bool) -> Progress:
    """Bars on the standard error, with numbers and time left."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
    return Progress(*columns, console=console, disable=not shown)


def _shown_by(progress: Progress) -> Any:
    bars: dict[tuple[str, int], Any] = {}

    def advance(what: str, done: int, total: int) -> None:
        if (what, total) not in bars:
            bars[what, total] = progress.add_task(what, total=total)
        progress.update(bars[what, total], completed=done)

    return advance
