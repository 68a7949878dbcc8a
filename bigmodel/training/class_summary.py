"""The summary at the end of a classification: the model beside the majority class, by class.

Writes summary.json, confusion.png, loss.png and time.png into the run directory.
"""

from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from bigmodel.config.settings import Settings
from bigmodel.data.store.shards import ShardStore
from bigmodel.evaluation.class_scores import ClassScores, constant, draw_confusion, in_words, show_scores
from bigmodel.evaluation.evaluate import Evaluation
from bigmodel.inspect.report import loss_curve, terminal_curve
from bigmodel.inspect.step_time import draw_times
from bigmodel.run_directory import write_json


def summarize_classes(settings: Settings, evaluation: Evaluation) -> None:
    """Write the files and print the scores."""
    scores, directory = evaluation.scores, settings.run.directory
    assert scores, "an evaluation of a classification has scores"
    majority = majority_class(settings, scores)
    summary: dict[str, Any] = {
        "steps": settings.training.steps,
        "nats_per_document": evaluation.nats_per_token,
        "validation_documents": scores.num_documents,
        **scores.numbers(),
        "confusion": scores.counts.tolist(),
    }
    if majority:
        summary |= {"majority_accuracy": majority.accuracy, "majority_macro_f1": majority.macro_f1}
    write_json(directory / "summary.json", summary)
    draw_confusion(scores, directory / "confusion.png", f"{directory.name}: {in_words(scores)}")
    loss_curve(directory)
    draw_times(directory)
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(terminal_curve(directory, console.width), markup=False)
    show_scores(scores, console)
    if majority:
        console.print(f"this model: {in_words(scores)}; the most frequent class always: {in_words(majority)}")
    for name, what in (
        ("confusion.png", "documents by class and predicted class"),
        ("loss.png", "loss curve"),
        ("time.png", "where the time went"),
        ("checkpoints", "weights and optimizer state"),
        ("metrics.jsonl", "every step"),
        ("summary.json", "these numbers"),
    ):
        console.print(Text.assemble(f"{directory / name}  ", (what, "dim")), soft_wrap=True)


def majority_class(settings: Settings, scores: ClassScores) -> ClassScores | None:
    """The scores of the most frequent class of the training documents; None where their classes are not counted."""
    labels = ShardStore.of_run(settings.data, "train").manifest.labels
    if not labels:
        return None
    counts = [sum(of_source["train"].get(name, 0) for of_source in labels.values()) for name in scores.classes]
    return constant(scores.classes, scores.support, int(np.argmax(counts)))
