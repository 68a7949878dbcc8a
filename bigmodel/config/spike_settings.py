"""Settings of the spike policy (training.spikes): what follows a loss or gradient norm far above the usual."""

from typing import Literal

from pydantic import Field, model_validator

from bigmodel.config.sections import Section, setting

LEAST_WINDOW = 8


class SpikeSettings(Section):
    """A spike is a loss or gradient norm more than `sigmas` robust standard deviations above the median of the steps
    before it. The gradient norm is that before clipping."""

    policy: Literal["note", "skip", "rewind"] = Field(
        "note",
        description="note: an event; skip: the step is not applied; rewind: the run goes back to a checkpoint before "
        "the spike and leaves out the steps that led to it (exit code 4: the same command, or the launcher, goes on)",
    )
    sigmas: float = Field(
        10.0,
        gt=0,
        description="robust standard deviations (1.4826 times the median deviation); norms of a sound run reach 8",
    )
    window: int = Field(
        128, ge=LEAST_WINDOW, description="number of steps that make the usual; judged from a quarter of it on"
    )
    left_out_steps: int = setting(
        10,
        only_with={"policy": "rewind"},
        ge=1,
        description="steps without an update after a rewind: this many up to the spike, itself included",
    )
    max_rewinds: int = setting(
        3, only_with={"policy": "rewind"}, ge=1, description="rewinds to the same checkpoint; then the run fails"
    )

    @model_validator(mode="after")
    def _one_spike_is_no_rule(self) -> "SpikeSettings":
        if self.policy == "rewind" and self.left_out_steps >= self.window:
            raise ValueError(
                f"training.spikes.left_out_steps = {self.left_out_steps} must be below window = {self.window}"
            )
        return self
