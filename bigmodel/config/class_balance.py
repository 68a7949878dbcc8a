"""Checks of the settings against imbalance: class weights, focal loss (`[classification]`), resampling (`[data]`)."""

from collections.abc import Mapping
from typing import Any

SMALLEST_WEIGHT = 2.0**-16  # the unit of a weight


def problem_of_balance(settings: Any) -> str:
    """Why they do not fit the classes or each other; empty if they do. settings: `Settings`, which imports this."""
    classification, data = settings.classification, settings.data
    weights = {} if classification.weights == "balanced" else classification.weights
    for name, values, least in (
        ("classification.weights", weights, SMALLEST_WEIGHT),
        ("data.class_mix", data.class_mix, 0),
    ):
        if problem := _problem_of_table(name, values, least, classification.classes):
            return problem
    if classification.weights == "balanced" and data.resamples_classes:
        return (
            f'classification.weights = "balanced" with {data.resampling}: both correct the same counts, so that rare '
            "classes would count twice; leave one of them out, or give the weights as a table"
        )
    if classification.focal_gamma and settings.training.label_smoothing:
        return (
            f"classification.focal_gamma = {classification.focal_gamma} with training.label_smoothing = "
            f"{settings.training.label_smoothing}: the focal loss is defined for one true class; leave one of them out"
        )
    return ""


def problem_without_classes(settings: Any) -> str:
    """Why settings of classes do not fit a run without classes; empty if they do."""
    if not settings.data.resamples_classes:
        return ""
    return (
        f"{settings.data.resampling} needs classes of documents: set classification.classes, or leave it out; for "
        "sources there are data.mix and data.mix_exponent"
    )


def _problem_of_table(setting: str, values: Mapping[str, float], least: float, classes: list[str]) -> str:
    for name, value in values.items():
        if name not in classes:
            return f"{setting}.{name} = {value}: no such class; classification.classes = {classes}"
        if value <= 0 or value < least:
            bound = f"at least {least:.2g} (1/65,536)" if least else "above 0"
            return f"{setting}.{name} = {value}: every value must be {bound}; give a larger one"
    return ""
