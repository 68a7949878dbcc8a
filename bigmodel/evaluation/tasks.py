"""Tasks of EleutherAI's lm_eval, on our model directly.

In: names of its tasks, folders or files of task files (YAML, with datasets beside them), a model. Out: lm_eval's own
results: each metric with its standard error, the versions of tasks and package. lm_eval builds the prompts and computes
the metrics; the model answers through `bigmodel.evaluation.harness_model`. Guarantees: no random state of the caller is
changed. Costs: lm_eval's import takes 3 s, its list of 14,000 named tasks, read only if one is asked for, 20 s.

A named task downloads its dataset from the Hugging Face Hub on first use. A local task needs no network:

    tasks/capitals.yaml    task: capitals
                           dataset_path: json
                           dataset_kwargs: {data_files: {test: capitals.jsonl}}
                           test_split: test
                           output_type: multiple_choice
                           doc_to_text: "The capital of {{country}} is"
                           doc_to_choice: "{{cities}}"
                           doc_to_target: "{{answer}}"
    tasks/capitals.jsonl   {"country": "France", "cities": ["Lyon", "Paris"], "answer": 1}
"""

import contextlib
import io
import logging
import random
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

from bigmodel.config.settings import Settings, UserError
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.evaluation.harness_model import HarnessModel, check_generation, no_rolling
from bigmodel.evaluation.shared_requests import SharedRequests
from bigmodel.evaluation.task_files import load_tasks

FEWSHOT_SEED = 1234  # lm_eval's own
BOOTSTRAPS = 100_000  # lm_eval's own, for standard errors without a formula

NO_VERSION = "Yaml"  # lm_eval's version of a task without one
METRICS = {  # what lm_eval computes for a document
    "loglikelihood": ("perplexity", "acc"),
    "loglikelihood_rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "multiple_choice": (
        "acc", "acc_norm", "acc_bytes", "acc_mutual_info", "f1", "mcc", "exact_match", "brier_score", "likelihood",
    ),
}  # fmt: skip


class Tasks:
    """Tasks loaded once, for one or several runs."""

    def __init__(
        self, named: Sequence[str], settings: Settings, shots: int | None = None, limit: int = 0, draws: bool = True
    ) -> None:
        """named: see `load_tasks`. shots: examples in each prompt; None: as the task says. limit: documents of each
        task; 0: all. draws: whether texts may be drawn at random.

        Raises `UserError` for tasks that cannot be loaded or that a model of these settings cannot answer, with the
        file or name.
        """
        with _quiet():
            self.loaded: Any = load_tasks(named)
        self._limit = limit or None
        for name, task in self.loaded["tasks"].items():
            _refuse_unsupported(name, task, settings, draws)
            own = task.get_config("num_fewshot")
            if own is not None and own < 0:
                raise UserError(f"task {name}: num_fewshot = {own}: must be at least 0")
            task.set_config(key="num_fewshot", value=(own or 0) if shots is None or own == 0 else shots)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)

    def run(
        self, settings: Settings, tokenizer: Tokenizer, requests: SharedRequests, with_errors: bool = True
    ) -> dict[str, Any]:
        """lm_eval's results, with a sample for each document. On rank 0, inside `requests.run`."""
        model = HarnessModel(settings, tokenizer, requests.score, requests.generate)
        with _quiet(), self._explained():
            found: Any = evaluate(
                lm=model, task_dict=self.loaded, limit=self._limit, bootstrap_iters=BOOTSTRAPS if with_errors else 0,
                log_samples=True,
            )  # fmt: skip
        lacking = {
            name: _number_without_answer(task, found["samples"][name]) for name, task in self.loaded["tasks"].items()
        }
        return {
            **found,
            "lm_eval_version": lm_eval.__version__,
            "without_answer": {name: number for name, number in lacking.items() if number},
        }

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """What lm_eval raises for a document, an answer or a metric of a task, as a `UserError`."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
            if any(frame.f_globals.get("__name__") == HarnessModel.__module__ for frame in frames):
                raise  # of our model
            at_work = [value for frame in frames for value in frame.f_locals.values()]
            names = [name for name, task in self.loaded["tasks"].items() if any(one is task for one in at_work)]
            is_null = any(frame.f_locals.get("gold", "") is None for frame in frames)
            reason = "the right answer of a document is null" if is_null else f"{type(error).__name__}: {error}"
            raise UserError(
                f"task {', '.join(names[:1]) or 'unknown'}: lm_eval cannot make its prompts or scores: {reason}; "
                "correct the task's file, its functions or its dataset"
            ) from error


def _number_without_answer(task: Any, samples: Sequence[dict[str, Any]]) -> int:
    """Documents whose right answer is null, or none of the choices; lm_eval counts any answer to them as wrong."""
    kind = getattr(task, "OUTPUT_TYPE", None)
    if type(task) is not ConfigurableTask or kind == "loglikelihood_rolling" or task.get_config("process_results"):
        return 0
    return len({one["doc_id"] for one in samples if _lacks_answer(task, kind, one["doc"], one["target"])})


def _lacks_answer(task: Any, kind: str | None, document: dict[str, Any], target: Any) -> bool:
    if kind != "multiple_choice":  # in a template, null becomes the text None
        return target is None or (target == "None" and None in document.values())
    choices, right = task.doc_to_choice(document), task.doc_to_text(document) if task.multiple_input else target
    answers = right if isinstance(right, list) else [right]
    return not any(
        one in choices if isinstance(one, str) else isinstance(one, int) and 0 <= one < len(choices) for one in answers
    )


def scores(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Task or group -> metric -> value. A metric of a filter is "exact_match strict-match"."""
    return {
        name: {_metric(key): float(value) for key, value in found.items() if _is_score(key, value)}
        for name, found in results["results"].items()
    }


def to_lines(results: dict[str, Any]) -> Iterator[str]:
    """A table of at most 80 columns."""
    yield f"{'task':<25} {'version':>7} {'shots':>5}  {'metric':<20}{'value':>10} {'error':>8}"
    for name, found in results["results"].items():
        version, shots = results["versions"].get(name, ""), results["n-shot"].get(name, "")
        for key, value in found.items():
            if _is_score(key, value):
                metric, _, way = key.partition(",")
                error = found.get(f"{metric}_stderr,{way}")
                margin = _number(error) if isinstance(error, float) else ""
                told = "" if version == NO_VERSION else _short(str(version), 7)
                yield (
                    f"{_short(name, 25):<25} {told:>7} {shots!s:>5}  {_short(_metric(key), 19):<20}"
                    f"{_number(value):>10} {margin:>8}"
                )
    for name, number in results["without_answer"].items():
        yield f"{_short(name, 25)}: {number:,} documents without a right answer count as wrong"


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"


def _metric(key: str) -> str:
    return key.removesuffix(",none").replace(",", " ")


def _is_score(key: str, value: Any) -> bool:
    return "," in key and "_stderr" not in key and isinstance(value, int | float)


def _short(text: str, columns: int) -> str:
    half = (columns - 3) // 2
    return text if len(text) <= columns else f"{text[: columns - 3 - half]}...{text[-half:]}"


def _refuse_unsupported(name: str, task: Any, settings: Settings, draws: bool) -> None:
    kind = getattr(task, "OUTPUT_TYPE", None)
    if kind == "loglikelihood_rolling" and settings.model.has_source:
        raise no_rolling(name)
    if kind == "generate_until":
        wanted = check_generation(name, task.get_config("generation_kwargs") or {}, settings)
        if wanted["do_sample"] and not draws:
            raise UserError(
                f"task {name}: draws its texts at random (generation_kwargs.do_sample), which is not done during "
                "training; leave it out of evaluation.tasks and use bigmodel evaluate --tasks"
            )
    _refuse_no_metric(name, kind, task)
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task {name}: needs images or sound, which the model cannot read; leave it out")
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"task {name}: runs code that the model wrote, which is not done here; export the model "
            "(bigmodel export) and run lm_eval itself in a container"
        )


def _refuse_no_metric(name: str, kind: str | None, task: Any) -> None:
    """lm_eval passes over a metric that an output type does not give, and fails late at one that it does not know."""
    if type(task) is not ConfigurableTask or task.get_config("process_results") is not None:
        return
    functions = getattr(task, "_metric_fn_list", {})
    asked, given = list(functions), METRICS.get(kind or "")
    if given is None and (unknown := [metric for metric in asked if functions[metric] is None]):
        raise UserError(f"task {name}: metric {unknown[0]!r} is none of lm_eval's; correct metric_list")
    if given and asked and not set(asked) & set(given):
        raise UserError(
            f"task {name}: metric_list names {', '.join(asked)}, and output_type = {kind} gives only "
            f"{', '.join(given)}; name one of these, or write a function process_results"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, lm_eval and its parts neither print nor change this process's random states."""
    python, numpy, torch_cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_cpu)
