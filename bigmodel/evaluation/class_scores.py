"""Scores of a classification: accuracy, precision, recall and F1, all from one table of counts.

In: (C, C) counts of documents, a row for each class, a column for each predicted class. A score whose divisor is zero
is 0: the precision of a class that was never predicted. Averages are over all classes, as scikit-learn's with `labels`
of all classes and `zero_division=0`. Example, two classes and the counts [[3, 1], [2, 4]]:

    accuracy 0.7; class 0: precision 3/5, recall 3/4, F1 2/3; class 1: precision 4/5, recall 4/6, F1 8/11;
    balanced accuracy (3/4 + 4/6) / 2
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bigmodel.pictures import save_picture


@dataclass(frozen=True, eq=False)
class ClassScores:
    """`counts` (C, C): documents of class i predicted as class j."""

    classes: tuple[str, ...]
    counts: np.ndarray

    @property
    def num_documents(self) -> int:
        return int(self.counts.sum())

    @property
    def support(self) -> np.ndarray:
        """(C,) documents of each class."""
        return self.counts.sum(1)

    @property
    def accuracy(self) -> float:
        """Also the micro average of precision, recall and F1, because each document has one class."""
        return float(np.trace(self.counts) / max(1, self.num_documents))

    @property
    def precision(self) -> np.ndarray:
        return _share(np.diag(self.counts), self.counts.sum(0))

    @property
    def recall(self) -> np.ndarray:
        return _share(np.diag(self.counts), self.support)

    @property
    def f1(self) -> np.ndarray:
        return _share(2 * np.diag(self.counts), self.counts.sum(0) + self.support)

    @property
    def balanced_accuracy(self) -> float:
        """The mean recall of the classes that have documents."""
        return float(self.recall[self.support > 0].mean()) if self.num_documents else 0.0

    @property
    def macro(self) -> tuple[float, ...]:
        """Precision, recall and F1, each the mean over the classes."""
        return tuple(float(one.mean()) for one in (self.precision, self.recall, self.f1))

    @property
    def weighted(self) -> tuple[float, ...]:
        """The same, each class by its documents."""
        shares = self.support / max(1, self.num_documents)
        return tuple(float((one * shares).sum()) for one in (self.precision, self.recall, self.f1))

    @property
    def macro_f1(self) -> float:
        return self.macro[2]

    @property
    def weighted_f1(self) -> float:
        return float((self.f1 * self.support).sum() / max(1, self.num_documents))

    def numbers(self) -> dict[str, Any]:
        """For metrics and summary.json."""
        columns = zip(self.classes, self.precision, self.recall, self.f1, self.support, strict=True)
        (macro_precision, macro_recall, _), (weighted_precision, weighted_recall, _) = self.macro, self.weighted
        return {
            "accuracy": self.accuracy,
            "balanced_accuracy": self.balanced_accuracy,
            "macro_precision": macro_precision,
            "macro_recall": macro_recall,
            "macro_f1": self.macro_f1,
            "micro_f1": self.accuracy,
            "weighted_precision": weighted_precision,
            "weighted_recall": weighted_recall,
            "weighted_f1": self.weighted_f1,
            "by_class": {
                name: {"precision": float(one), "recall": float(two), "f1": float(three), "documents": int(four)}
                for name, one, two, three, four in columns
            },
        }


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), 0.0)


def constant(classes: tuple[str, ...], support: np.ndarray, predicted: int) -> ClassScores:
    """The baseline that predicts one class for every document."""
    counts = np.zeros((len(classes), len(classes)), np.int64)
    counts[:, predicted] = support
    return ClassScores(classes, counts)


def show_scores(scores: ClassScores, console: Console) -> None:
    """Print the scores of each class, their averages, and the counts."""
    table = Table("class", title="validation, by class", title_justify="left")
    for name in ("documents", "precision", "recall", "F1"):
        table.add_column(name, justify="right")
    for row in zip(scores.classes, scores.support, scores.precision, scores.recall, scores.f1, strict=True):
        table.add_row(Text(row[0]), f"{row[1]:,}", *(f"{value:.3f}" for value in row[2:]))
    table.add_section()
    for name, values in (("macro average", scores.macro), ("weighted average", scores.weighted)):
        table.add_row(name, f"{scores.num_documents:,}", *(f"{value:.3f}" for value in values))
    table.add_row("accuracy (micro average)", "", "", "", f"{scores.accuracy:.3f}")
    table.add_row("balanced accuracy", "", "", f"{scores.balanced_accuracy:.3f}", "")
    console.print(table)
    console.print(_confusion(scores, console.width))


def _confusion(scores: ClassScores, width: int) -> Table | str:
    """The counts as a table without lines, whose columns have the numbers of the rows."""
    numbers = [str(number) for number in range(1, len(scores.classes) + 1)]
    cells = [[str(count) if count else "." for count in counts] for counts in scores.counts.tolist()]
    names = max(map(len, scores.classes)) + len(numbers[-1]) + 1
    if names + sum(1 + max(map(len, column)) for column in zip(numbers, *cells, strict=True)) > width:
        return f"confusion matrix: {len(numbers)} classes are too wide for this terminal; --png draws them"
    table = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False, title_justify="left")
    table.title = "confusion matrix: class by row, prediction by column"
    table.add_column("")
    for number in numbers:
        table.add_column(number, justify="right")
    for number, name, row in zip(numbers, scores.classes, cells, strict=True):
        table.add_row(Text(f"{number:>{len(numbers[-1])}} {name}"), *row)
    return table


def draw_confusion(scores: ClassScores, path: Path, title: str) -> None:
    """Write the confusion matrix: a shade is a share of the documents of a class, a number their count."""
    from matplotlib.figure import Figure

    count = len(scores.classes)
    side = min(24.0, 2.6 + 0.55 * count)
    figure = Figure(figsize=(side + 1.0, side), dpi=150, layout="constrained")
    axes = figure.subplots()
    shares = scores.counts / np.maximum(scores.support, 1)[:, None]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(count), scores.classes, rotation=60, ha="right", fontsize=8, parse_math=False)
    axes.set_yticks(range(count), scores.classes, fontsize=8, parse_math=False)
    axes.set_xlabel("predicted class", fontsize=9)
    axes.set_ylabel("class", fontsize=9)
    axes.set_title(title, loc="left", fontsize=10, parse_math=False)
    for row, column in np.argwhere(scores.counts).tolist() if count <= 40 else ():
        shade = "white" if shares[row, column] > 0.55 else "black"
        axes.text(column, row, f"{scores.counts[row, column]:,}", ha="center", va="center", fontsize=7, color=shade)
    save_picture(figure, path)


def in_words(scores: ClassScores) -> str:
    return f"accuracy {scores.accuracy:.3f}, macro F1 {scores.macro_f1:.3f}"


def labels_found(classes: Sequence[str], labels: np.ndarray, predicted: np.ndarray) -> ClassScores:
    """The counts of these documents: (n,) numbers of classes, (n,) predicted ones."""
    size = len(classes)
    counts = np.bincount(labels * size + predicted, minlength=size * size).reshape(size, size)
    return ClassScores(tuple(classes), counts.astype(np.int64))
