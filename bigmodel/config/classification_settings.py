"""Settings of classification: one of several classes for each document ([classification])."""

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from bigmodel.config.class_balance import problem_of_balance
from bigmodel.config.sections import SET, Section, setting

NO_TEXT = (
    "a model with classification.classes predicts no tokens, so it generates no text; `bigmodel evaluate RUN` scores it"
)
WITH_CLASSES = {"classes": SET}


class ClassificationSettings(Section):
    """A classification head in place of the output matrix. Documents and labels: `label_column` of a source."""

    classes: list[str] = Field(
        [], description="names of the classes, as in the label column; empty: the model predicts tokens"
    )
    pooling: Literal["", "first", "last", "mean"] = setting(
        "",
        only_with=WITH_CLASSES,
        description="the state of a document that the head reads: of its first token, of its last one, or the mean; "
        'empty: "last" in a decoder, "first" in an encoder; a decoder\'s first token sees no other',
    )
    head: Literal["", "linear", "bert", "modernbert"] = setting(
        "",
        only_with=WITH_CLASSES,
        description="linear: one matrix without bias (Llama, Qwen and others); bert: dense layer and tanh before it, "
        "both with bias; modernbert: dense layer, gelu and norm before it; empty: that of the Hugging Face class of "
        "the model's type",
    )
    weights: Literal["balanced"] | dict[str, float] = setting(
        {},
        only_with=WITH_CLASSES,
        description='weights of the classes in the loss, { spam = 5.0 }, those left out 1; "balanced": documents / '
        "(classes * documents of the class), of the training split; empty: all 1",
    )
    focal_gamma: float = setting(
        0.0,
        only_with=WITH_CLASSES,
        ge=0,
        description="focal loss: each loss is multiplied by (1 - probability of the class) ** focal_gamma; 0: off",
    )

    @field_validator("weights", mode="before")
    @classmethod
    def _weights_are_a_table(cls, weights: Any) -> Any:
        values = weights.values() if isinstance(weights, dict) else [weights == "balanced" or math.nan]
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise ValueError(
                f'classification.weights = {weights!r}: must be "balanced" or a table of numbers, {{ spam = 5.0 }}'
            )
        return weights

    @model_validator(mode="after")
    def _classes_differ(self) -> "ClassificationSettings":
        if len(self.classes) == 1:
            raise ValueError(
                f"classification.classes = {self.classes}: one class alone needs no model; name at least two"
            )
        for name in self.classes:
            if not name.strip():
                raise ValueError(f"classification.classes: {name!r} is an empty name; every class needs one")
            if self.classes.count(name) > 1:
                raise ValueError(f"classification.classes names {name!r} twice; name every class once")
        return self

    @property
    def reweights(self) -> bool:
        """Whether the training loss differs from the mean cross-entropy of the documents."""
        return bool(self.weights) or self.focal_gamma > 0

    def resolved(self, kind: str, norm_placement: str) -> "ClassificationSettings":
        """With the pooling and head of a model's kind where they are empty."""
        pooling = self.pooling or ("first" if kind == "encoder" else "last")
        head = self.head or ("linear" if kind != "encoder" else "bert" if norm_placement == "post" else "modernbert")
        return self.model_copy(update={"pooling": pooling, "head": head})


def problem_of_classification(settings: Any) -> str:
    """Why other settings do not fit a classification; empty if they do. settings: `Settings`, which imports this."""
    pooling, kind = settings.classification.pooling, settings.model.kind
    if pooling == "first" and kind != "encoder" and not settings.model.has_source:
        return (
            f'classification.pooling = "first" with model.kind = "{kind}": the first token sees no other; leave it out'
        )
    if pooling in ("first", "mean") and settings.model.has_source:
        return (
            f'classification.pooling = "{pooling}" with model.kind = "{kind}": the decoder has one token, '
            "which reads the document through the encoder; leave it out"
        )
    named = {
        "data.objectives": bool(settings.data.objectives),
        "data.target_ahead": settings.data.target_ahead > 1,
        "data.fixed_target_tokens": settings.data.fixed_target_tokens > 0,
        "data.masked_decoder_share": settings.data.masked_decoder_share > 0,
        "data.dropped_decoder_share": settings.data.dropped_decoder_share > 0,
        "model.num_mtp_modules": settings.model.num_mtp_modules > 0,
        "evaluation.tasks": bool(settings.evaluation.tasks),
        "training.z_loss": settings.training.z_loss > 0,
        "training.sequence_parallel_ranks": settings.training.sequence_parallel_ranks > 1,
    }
    if wrong := [name for name, is_set in named.items() if is_set]:
        return (
            f"classification.classes = {settings.classification.classes}: {', '.join(wrong)} cannot be combined with "
            "classes, one label for each document; leave it out"
        )
    return problem_of_balance(settings)
