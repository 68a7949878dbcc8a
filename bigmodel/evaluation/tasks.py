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
from collections.abc import Iterator, Sequence
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.evaluator import evaluate

from bigmodel.config.settings import Settings, UserError
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.evaluation.harness_model import HarnessModel, check_generation, no_rolling
from bigmodel.evaluation.shared_requests import SharedRequests
from bigmodel.evaluation.task_files import load_tasks

FEWSHOT_SEED = 1234  # lm_eval's own
BOOTSTRAPS = 100_000  # lm_eval's own, for standard errors without a formula


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
            task.set_config(key="num_fewshot", value=(own or 0) if shots is None or own == 0 else shots)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)

    def run(
        self, settings: Settings, tokenizer: Tokenizer, requests: SharedRequests, with_errors: bool = True
    ) -> dict[str, Any]:
        """lm_eval's results, with a sample for each document. On rank 0, inside `requests.run`."""
        model = HarnessModel(settings, tokenizer, requests.score, requests.generate)
        with _quiet():
            found: Any = evaluate(
                lm=model, task_dict=self.loaded, limit=self._limit, bootstrap_iters=BOOTSTRAPS if with_errors else 0,
                log_samples=True,
            )  # fmt: skip
        return {**found, "lm_eval_version": lm_eval.__version__}


def scores(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Task or group -> metric -> value. A metric of a filter is "exact_match strict-match"."""
    return {
        name: {_metric(key): float(value) for key, value in found.items() if _is_score(key, value)}
        for name, found in results["results"].items()
    }


def to_lines(results: dict[str, Any]) -> Iterator[str]:
    """A table of at most 80 columns."""
    yield f"{'task':<28} {'version':>7} {'shots':>5}  {'metric':<16}{'value':>8} {'error':>7}"
    for name, found in results["results"].items():
        version, shots = results["versions"].get(name, ""), results["n-shot"].get(name, "")
        for key, value in found.items():
            if _is_score(key, value):
                metric, _, way = key.partition(",")
                error = found.get(f"{metric}_stderr,{way}")
                margin = f"{error:.4f}" if isinstance(error, float) else ""
                yield (
                    f"{_short(name, 28):<28} {version!s:>7} {shots!s:>5}  {_short(_metric(key), 15):<16}"
                    f"{value:>8.4f} {margin:>7}"
                )


def _metric(key: str) -> str:
    return key.removesuffix(",none").replace(",", " ")


def _is_score(key: str, value: Any) -> bool:
    return "," in key and "_stderr" not in key and isinstance(value, int | float)


def _short(text: str, columns: int) -> str:
    return text if len(text) <= columns else f"{text[: columns - 13]}...{text[-10:]}"


def _refuse_unsupported(name: str, task: Any, settings: Settings, draws: bool) -> None:
    kind = getattr(task, "OUTPUT_TYPE", None)
    if kind == "loglikelihood_rolling" and settings.model.kind == "encoder_decoder":
        raise no_rolling(name)
    if kind == "generate_until":
        wanted = check_generation(name, task.get_config("generation_kwargs") or {}, settings)
        if wanted["do_sample"] and not draws:
            raise UserError(
                f"task {name}: draws its texts at random (generation_kwargs.do_sample), which is not done during "
                "training; leave it out of evaluation.tasks and use bigmodel evaluate --tasks"
            )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task {name}: needs images or sound, which the model cannot read; leave it out")
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"task {name}: runs code that the model wrote, which is not done here; export the model "
            "(bigmodel export) and run lm_eval itself in a container"
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
