"""Settings of pruning ([pruning])."""

from typing import Any, Literal

from pydantic import Field

from bigmodel.config.sections import Section, setting

KINDS = ("magnitude", "2:4")


class PruningSettings(Section):
    """Weights become exactly 0 during training and stay 0. Their share rises as in Zhu & Gupta 2017: from begin_step to
    end_step by a cubic curve, steep at first, in one jump every every_steps steps."""

    section = "pruning"

    kind: Literal["none", "magnitude", "2:4"] = Field(
        "none",
        description="magnitude: the smallest weights of each matrix; 2:4: of 4 consecutive weights of an output the "
        "2 smallest, the layout of NVIDIA's sparse tensor cores",
    )
    sparsity: float = setting(
        0.5,
        only_with={"kind": "magnitude"},
        why="2:4 is half of the weights",
        gt=0,
        lt=1,
        description="share of a matrix that is 0 from end_step on",
    )
    initial_sparsity: float = setting(
        0.0,
        only_with={"kind": KINDS},
        ge=0,
        lt=1,
        description="share from begin_step on; for a start from pruned weights: their share",
    )
    begin_step: int = setting(0, only_with={"kind": KINDS}, ge=0, description="0: before the first step")
    end_step: int | None = setting(
        None,
        only_with={"kind": KINDS},
        ge=0,
        description="equal to begin_step: all at once; absent: half of training.steps",
    )
    every_steps: int = setting(100, only_with={"kind": KINDS}, ge=1, description="steps between two jumps")
    targets: list[str] = setting(
        [],
        only_with={"kind": KINDS},
        description='patterns of the matrices: "blocks.*.feed_forward.*", "head"; empty: all that are trained, '
        "without embeddings and head",
    )

    @property
    def final_sparsity(self) -> float:
        return 0.5 if self.kind == "2:4" else self.sparsity

    @property
    def last_step(self) -> int:
        """`end_step`, once `with_end_of_pruning` has filled it."""
        assert self.end_step is not None, "the settings of a run have it"
        return self.end_step


def with_end_of_pruning(pruning: PruningSettings, steps: int) -> PruningSettings:
    """`end_step` filled in. steps: of the run."""
    if pruning.kind == "none" or pruning.end_step is not None:
        return pruning
    return pruning.model_copy(update={"end_step": max(pruning.begin_step, steps // 2)})


def problem_of_pruning(settings: Any) -> str:
    """Why pruning does not go with other settings; empty: it does. settings: `Settings`, which imports this."""
    pruning = settings.pruning
    if pruning.kind == "none":
        return ""
    if settings.lora.rank:
        return (
            f'pruning.kind = "{pruning.kind}" with lora.rank = {settings.lora.rank}: merged adapters would fill the '
            "zeros; leave [lora] out, or train the adapters first and prune in a run with model.from = their run"
        )
    if pruning.begin_step > settings.training.steps:
        return (
            f"pruning.begin_step = {pruning.begin_step} exceeds training.steps = {settings.training.steps}: nothing "
            "would be pruned; lower it or train longer"
        )
    if pruning.last_step < pruning.begin_step:
        return f"pruning.end_step = {pruning.end_step} is before begin_step = {pruning.begin_step}; raise it"
    if pruning.last_step > settings.training.steps:
        return (
            f"pruning.end_step = {pruning.end_step} exceeds training.steps = {settings.training.steps}: the sparsity "
            "would not be reached; lower it or train longer"
        )
    if pruning.initial_sparsity > pruning.final_sparsity:
        return (
            f"pruning.initial_sparsity = {pruning.initial_sparsity} exceeds the {pruning.final_sparsity} of the end; "
            "weights do not come back: lower it"
        )
    return ""
