"""Settings of the learning rate's schedule ([schedule])."""

from typing import Literal

from pydantic import Field, model_validator

from bigmodel.config.sections import Section, setting

COUNTED = ("cosine", "wsd", "linear", "inverse_square_root", "constant")  # by `unit`: steps or tokens
DEEPSPEED_WARMUP = ("deepspeed_constant", "deepspeed_linear", "deepspeed_cosine")
WITH_LENGTH = ("deepspeed_linear", "deepspeed_cosine")


class ScheduleSettings(Section):
    """Learning rate: a linear warm-up, then `kind`; wsd: constant, then a linear decay. The last five kinds are
    schedulers of DeepSpeed, with the same rate in each step."""

    kind: Literal[
        "cosine",
        "wsd",
        "linear",
        "inverse_square_root",
        "constant",
        "deepspeed_constant",
        "deepspeed_linear",
        "deepspeed_cosine",
        "one_cycle",
        "range_test",
    ] = Field(
        "cosine",
        description="DeepSpeed's: deepspeed_constant is WarmupLR, deepspeed_linear WarmupDecayLR, deepspeed_cosine "
        "WarmupCosineLR, one_cycle OneCycle, range_test LRRangeTest",
    )
    unit: Literal["steps", "tokens"] = setting(
        "steps",
        only_with={"kind": COUNTED},
        description="tokens: counted as in training.global_batch_size, padding included",
    )
    warmup_steps: int = setting(
        100,
        only_with={"unit": "steps", "kind": (*COUNTED, *DEEPSPEED_WARMUP)},
        ge=0,
        description="absent, and 100 does not fit into training.steps: training.steps / 10; deepspeed_*: at least 2",
    )
    decay_steps: int = setting(
        0, only_with={"kind": "wsd", "unit": "steps"}, ge=0, description="length of the final decay"
    )
    warmup_tokens: int = setting(0, only_with={"unit": "tokens"}, ge=0, description="replaces warmup_steps")
    decay_tokens: int = setting(
        0, only_with={"kind": "wsd", "unit": "tokens"}, ge=0, description="replaces decay_steps"
    )
    initial_ratio: float = setting(
        0.0,
        only_with={"kind": (*COUNTED, "deepspeed_cosine")},
        ge=0,
        le=1,
        description="learning rate before the warm-up, divided by optimizer.learning_rate",
    )
    final_ratio: float = setting(
        0.1,
        only_with={"kind": ("cosine", "wsd", "linear", "inverse_square_root", "deepspeed_cosine")},
        ge=0,
        le=1,
        description="final (inverse_square_root: lowest) learning rate, divided by optimizer.learning_rate",
    )
    warmup: Literal["linear", "log"] = setting(
        "linear", only_with={"kind": DEEPSPEED_WARMUP}, description="shape of the warm-up"
    )
    total_steps: int = setting(
        0,
        only_with={"kind": WITH_LENGTH},
        ge=0,
        description="length of the whole schedule; 0: training.steps",
    )
    lowest_rate: float = setting(
        0.0,
        only_with={"kind": ("deepspeed_constant", "deepspeed_linear", "one_cycle")},
        ge=0,
        description="learning rate before the warm-up, or outside the cycle; deepspeed_linear: also the final one",
    )
    rise_steps: int = setting(
        2000,
        only_with={"kind": ("one_cycle", "range_test")},
        ge=1,
        description="one_cycle: from lowest_rate to optimizer.learning_rate; range_test: until the rate has grown by "
        "growth",
    )
    fall_steps: int | None = setting(
        None, only_with={"kind": "one_cycle"}, ge=0, description="back to lowest_rate; absent: rise_steps"
    )
    rise_stairs: int = setting(
        0, only_with={"kind": "one_cycle"}, ge=0, description="number of stairs in the rise; 0: a straight line"
    )
    fall_stairs: int | None = setting(
        None, only_with={"kind": "one_cycle"}, ge=0, description="the same in the fall; absent: rise_stairs"
    )
    decay_rate: float = setting(
        0.0,
        only_with={"kind": "one_cycle"},
        ge=0,
        description="n steps after the cycle, the rate is lowest_rate / (1 + decay_rate * n / decay_interval)",
    )
    decay_interval: int = setting(
        0, only_with={"kind": "one_cycle"}, ge=0, description="steps, see decay_rate; 0: no decay"
    )
    beta1_range: tuple[float, float] | None = setting(
        None,
        only_with={"kind": "one_cycle"},
        description="[lowest, highest] beta1: it falls while the rate rises, and rises while the rate falls; absent: "
        "optimizer.beta1 throughout",
    )
    growth: float = setting(
        1.0,
        only_with={"kind": "range_test"},
        ge=0,
        description="the rate grows by optimizer.learning_rate * growth every rise_steps",
    )
    staircase: bool = setting(
        False, only_with={"kind": "range_test"}, description="grow once every rise_steps, not in each step"
    )

    @model_validator(mode="after")
    def _beta1_range_makes_sense(self) -> "ScheduleSettings":
        if self.beta1_range and not 0 <= self.beta1_range[0] <= self.beta1_range[1] < 1:
            raise ValueError(
                f"schedule.beta1_range = {list(self.beta1_range)}: must be [lowest, highest] with 0 <= lowest <= "
                "highest < 1"
            )
        return self


def with_default_warmup(schedule: ScheduleSettings, steps: int) -> ScheduleSettings:
    """The schedule of a run of `steps`: a default warm-up that does not fit is shortened to a tenth of the run."""
    fits = schedule.warmup_steps + schedule.decay_steps <= steps
    if fits or schedule.unit != "steps" or "warmup_steps" in schedule.model_fields_set:
        return schedule
    if schedule.kind not in (*COUNTED, *DEEPSPEED_WARMUP):
        return schedule
    shorter = schedule.model_copy(update={"warmup_steps": min(schedule.warmup_steps, steps // 10)})
    shorter.model_fields_set.discard("warmup_steps")
    return shorter
