"""Scores of a classification: those of scikit-learn on the same predictions, also of classes that never occur."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from bigmodel.evaluation.class_scores import constant, draw_confusion, labels_found, show_scores

metrics = pytest.importorskip("sklearn.metrics")
NAMES = ("a", "b", "[bold]c", "never")


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_scikit_learns(seed: int) -> None:
    draw = np.random.default_rng(seed)
    labels = draw.choice(3, 200, p=[0.7, 0.2, 0.1])
    predicted = np.where(draw.random(200) < 0.6, labels, draw.integers(0, 2 + seed % 2, 200))
    scores = labels_found(NAMES, labels, predicted)
    told = {"labels": range(4), "zero_division": 0}
    precision, recall, f1, support = metrics.precision_recall_fscore_support(labels, predicted, **told)
    for ours, theirs in ((scores.precision, precision), (scores.recall, recall), (scores.f1, f1)):
        assert np.allclose(ours, theirs, atol=1e-15)
    assert scores.support.tolist() == support.tolist()
    assert (scores.counts == metrics.confusion_matrix(labels, predicted, labels=range(4))).all()
    found = scores.numbers()
    for name in ("macro", "weighted"):
        theirs = metrics.precision_recall_fscore_support(labels, predicted, average=name, **told)[:3]
        assert [found[f"{name}_{what}"] for what in ("precision", "recall", "f1")] == pytest.approx(theirs)
    assert found["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(labels, predicted))
    assert [one["documents"] for one in found["by_class"].values()] == support.tolist()
    for name in ("macro", "micro", "weighted"):
        assert found[f"{name}_f1"] == pytest.approx(metrics.f1_score(labels, predicted, average=name, **told))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert json.loads(json.dumps(found)) == found


def test_one_class_for_all_documents_scores_its_share() -> None:
    scores = constant(("a", "b"), np.array([3, 1]), 0)
    assert (scores.accuracy, scores.recall.tolist(), scores.precision.tolist()) == (0.75, [1.0, 0.0], [0.75, 0.0])


def test_the_table_and_the_picture_show_names_as_they_are(tmp_path: Path) -> None:
    scores = labels_found(NAMES, np.array([0, 1, 2, 2]), np.array([0, 2, 2, 1]))
    console = Console(record=True, width=100, markup=False)
    show_scores(scores, console)
    printed = console.export_text()
    assert "[bold]c" in printed
    assert "accuracy (micro average)" in printed
    assert "balanced accuracy" in printed
    draw_confusion(scores, tmp_path / "c.png", "run: $x^2$")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
