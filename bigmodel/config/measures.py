"""Measures of an evaluation that can choose the best checkpoint and end a run. Imports no torch.

To add one: a row, and the attribute in the evaluation's result (`bigmodel.evaluation.evaluate`).
"""

from typing import NamedTuple


class Measure(NamedTuple):
    """attribute: of an evaluation's result, or of a part of it: "scores.accuracy"; None there: not known. of_classes:
    only of a classification."""

    attribute: str
    is_better_high: bool = False
    of_classes: bool = False


MEASURES: dict[str, Measure] = {
    "loss": Measure("nats_per_token"),
    "bits_per_byte": Measure("bits_per_byte"),
    "accuracy": Measure("accuracy", is_better_high=True),
    "macro_f1": Measure("macro_f1", is_better_high=True, of_classes=True),
    "balanced_accuracy": Measure("scores.balanced_accuracy", is_better_high=True, of_classes=True),
}
