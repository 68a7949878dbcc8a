"""Settings of scheduled sampling (training.scheduled_sampling): decoder inputs that are the model's own predictions."""

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from bigmodel.config.sections import Section, setting


class ScheduledSamplingSettings(Section):
    """Scheduled sampling (Bengio et al. 2015) in two passes (Mihaylova & Martins 2019): the first pass, without
    gradient, predicts; a share of the decoder inputs is replaced by its predictions; the second pass is trained."""

    schedule: Literal["constant", "linear", "exponential", "inverse_sigmoid"] = Field(
        "linear",
        description="share of replaced inputs at step i, counted from first_step: constant: share; linear: "
        "share * i / steps; exponential: 1 - k^i; inverse_sigmoid: 1 - k / (k + exp(i / k)); never above share",
    )
    share: float = Field(0.25, gt=0, le=1, description="largest share of replaced decoder inputs")
    first_step: int = Field(0, ge=0, description="steps before this one, counted from 0, have true inputs")
    steps: int = setting(1000, only_with={"schedule": "linear"}, ge=1, description="length of the rise from 0 to share")
    k: float = setting(
        0.0,
        only_with={"schedule": ("exponential", "inverse_sigmoid")},
        ge=0,
        description="exponential: between 0 and 1, as 0.999; inverse_sigmoid: at least 1, the steps of its slope",
    )
    choice: Literal["likeliest", "drawn"] = Field(
        "likeliest", description="the likeliest token, or one drawn by its probability"
    )

    @model_validator(mode="after")
    def _k_fits_the_schedule(self) -> "ScheduledSamplingSettings":
        fits = {"exponential": 0 < self.k < 1, "inverse_sigmoid": self.k >= 1}
        if not fits.get(self.schedule, True):
            needed = "between 0 and 1" if self.schedule == "exponential" else "at least 1"
            raise ValueError(
                f'training.scheduled_sampling.k = {self.k:g} with schedule = "{self.schedule}": must be {needed}'
            )
        return self

    def share_at(self, step: int) -> float:
        """The share of replaced inputs in a data step, counted from 0."""
        done = step - self.first_step
        if done < 0:
            return 0.0
        shares = {
            "constant": lambda: 1.0,
            "linear": lambda: self.share * done / self.steps,
            "exponential": lambda: 1.0 - self.k**done,
            "inverse_sigmoid": lambda: 1.0 / (1.0 + self.k * math.exp(-done / self.k)),
        }
        return min(self.share, shares[self.schedule]())


def problem_of_sampling(settings: Any) -> str:
    """Why other settings do not fit scheduled sampling; empty if they do. settings: `Settings`, which imports this."""
    if settings.training.scheduled_sampling is None:
        return ""
    data, said = settings.data, "training.scheduled_sampling"
    first, steps = settings.training.scheduled_sampling.first_step, settings.training.steps
    if first >= steps:
        return (
            f"{said}.first_step = {first} is not below training.steps = {steps}: no input would be replaced; lower it"
        )
    if settings.model.kind == "encoder":
        return f'{said} with model.kind = "encoder": an encoder has no decoder inputs; leave it out'
    if settings.model.is_recurrent:
        return f'{said} with model.kind = "{settings.model.kind}": only transformers have its first pass; leave it out'
    if settings.distillation.teacher is not None:
        return f"{said} with distillation.teacher: the teacher would read other inputs; leave one of them out"
    if settings.classification.classes:
        return f"{said} with classification.classes: a class is predicted, no next input; leave it out"
    if settings.training.sequence_parallel_ranks > 1:
        return (
            f"{said} with training.sequence_parallel_ranks = {settings.training.sequence_parallel_ranks}: predictions "
            "would have to move between ranks; set it to 1"
        )
    for name in ("masked_decoder_share", "dropped_decoder_share"):
        if value := getattr(data, name):
            return (
                f"{said} with data.{name} = {value:g}: the input after a prediction is then not the token that it "
                "predicts; leave one of them out"
            )
    if any(one.ahead > 1 for one in data.objectives):
        return (
            f"{said} with ahead above 1 in data.objectives: a prediction is then not the next input; set ahead = 1, or "
            "for the targets of an encoder-decoder data.target_ahead"
        )
    return ""
