"""Settings against imbalance that do not fit the classes or each other are refused with the reason."""

from typing import Any

import pytest

from bigmodel.config.settings import Settings

CLASSES = {"classes": ["a", "b"]}


def load(classification: dict[str, Any], data: dict[str, Any], **more: Any) -> Settings:
    return Settings.model_validate({"classification": classification, "data": data} | more)


@pytest.mark.parametrize(
    ("classification", "data", "message"),
    [
        (
            {},
            {"class_exponent": 0.5},
            "data.class_exponent = 0.5 needs classes of documents: set classification.classes",
        ),
        ({}, {"class_mix": {"a": 1.0}}, "data.class_mix = {'a': 1.0} needs classes of documents"),
        (
            {"weights": {"c": 2.0}},
            {},
            "classification.weights.c = 2.0: no such class; classification.classes = ['a', 'b']",
        ),
        (
            {"weights": {"a": 0.0}},
            {},
            "classification.weights.a = 0.0: every value must be at least 1.5e-05 (1/65,536)",
        ),
        ({"weights": {"a": -1.0}}, {}, "classification.weights.a = -1.0: every value must be at least"),
        ({}, {"class_mix": {"c": 2.0}}, "data.class_mix.c = 2.0: no such class; classification.classes = ['a', 'b']"),
        ({}, {"class_mix": {"a": 0.0}}, "data.class_mix.a = 0.0: every value must be above 0"),
        ({"weights": "equal"}, {}, "classification.weights = 'equal': must be \"balanced\" or a table of numbers"),
        ({"weights": {"a": float("inf")}}, {}, "classification.weights = {'a': inf}: must be \"balanced\" or a table"),
        ({"weights": "balanced"}, {"class_exponent": 0.0}, "both correct the same counts"),
        ({"weights": "balanced"}, {"class_mix": {"a": 1.0, "b": 1.0}}, "both correct the same counts"),
    ],
)
def test_what_does_not_fit_is_refused(classification: dict[str, Any], data: dict[str, Any], message: str) -> None:
    needs_none = "needs classes" in message
    with pytest.raises(ValueError, match="Value error") as caught:
        load(classification if needs_none else CLASSES | classification, data)
    assert message in str(caught.value)


def test_focal_loss_and_smoothed_labels_are_refused_together() -> None:
    with pytest.raises(ValueError, match=r"focal_gamma = 2.0 with training.label_smoothing = 0.1: the focal loss is"):
        load(CLASSES | {"focal_gamma": 2.0}, {}, training={"label_smoothing": 0.1})


def test_a_table_of_weights_goes_with_resampling() -> None:
    settings = load(CLASSES | {"weights": {"a": 5}, "focal_gamma": 2}, {"class_exponent": 0})
    assert settings.data.class_weights == {"a": 5.0}
    assert settings.classification.reweights
    assert not load(CLASSES, {}).classification.reweights
