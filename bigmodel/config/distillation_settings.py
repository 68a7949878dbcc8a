"""Settings of knowledge distillation ([distillation]): a teacher whose predictions the run is trained on, too."""

import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from bigmodel.config.sections import SET, Section, setting

WITH_TEACHER: dict[str, Any] = {"only_with": {"teacher": SET}}


class DistillationSettings(Section):
    """Knowledge distillation (Hinton et al. 2015): the loss is (1 - weight) * label loss + weight * divergence, the
    divergence of the student's predictions from the teacher's, times temperature^2."""

    section = "distillation"

    teacher: Path | None = Field(
        None,
        description="directory of another run, whose newest checkpoint is read, or Hugging Face folder; its tokenizer "
        "is that of the data; absent: no distillation",
    )
    weight: float = setting(
        0.5, **WITH_TEACHER, gt=0, le=1, description="share of the divergence; the labels have the rest; 1: no labels"
    )
    temperature: float = setting(
        1.0, **WITH_TEACHER, gt=0, description="divisor of the logits of both models in the divergence"
    )
    top_k: int = setting(
        0,
        **WITH_TEACHER,
        ge=0,
        description="tokens that the teacher finds likeliest, compared one by one; all others count as one event; "
        "0: all tokens one by one",
    )
    direction: Literal["forward", "reverse"] = setting(
        "forward",
        **WITH_TEACHER,
        description="forward: KL(teacher || student), covers all that the teacher finds likely; reverse: "
        "KL(student || teacher), avoids what it finds unlikely",
    )
    precision: Literal["", "bf16", "fp16", "fp32"] = setting(
        "", **WITH_TEACHER, description="of the teacher's weights; empty: training.precision"
    )


def problem_of_distillation(settings: Any) -> str:
    """Why other settings do not fit a distillation; empty if they do. settings: `Settings`, which imports this."""
    asked, start = settings.distillation, settings.model.start_folder
    if asked.teacher is None:
        return ""
    said = f"distillation.teacher = {json.dumps(str(asked.teacher))}"
    if settings.classification.classes:
        return (
            f"{said} with classification.classes: a teacher's predictions are over tokens, not over classes; leave one "
            "of them out"
        )
    if settings.training.sequence_parallel_ranks > 1:
        return (
            f"{said} with training.sequence_parallel_ranks = {settings.training.sequence_parallel_ranks}: the teacher "
            "reads whole packed sequences; set it to 1"
        )
    if _same(asked.teacher, settings.run.directory):
        return f"{said} is run.directory: a run cannot be its own teacher; name another run"
    if asked.weight < 1:
        return ""
    for name in ("z_loss", "label_smoothing"):
        if value := getattr(settings.training, name):
            return f"training.{name} = {value:g} with distillation.weight = 1: the loss has no labels; leave it out"
    if settings.lora.rank and not settings.lora.start_folder and start and _same(asked.teacher, start):
        return (
            f"{said} is model.from, with new adapters (lora.rank = {settings.lora.rank}) and distillation.weight = 1: "
            "the student begins equal to the teacher and has nothing to learn; lower the weight or name another teacher"
        )
    return ""


def _same(one: Path, other: Path) -> bool:
    return os.path.abspath(one) == os.path.abspath(other)
