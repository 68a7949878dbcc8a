"""The `scheduler` block of a DeepSpeed JSON, as settings.

In: the user's JSON and `Settings`. Out: settings whose rates are DeepSpeed's own, to the last bit
(bigmodel/training/deepspeed_rates.py). "auto" takes the run file's value. An absent parameter has DeepSpeed's default,
because the same JSON must give the same rates. DeepSpeed itself gets no scheduler: the loop sets the rate.
Written against DeepSpeed 0.19.8; a test compares the tables with the signatures of its classes.

    {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": "auto"}}, [schedule] warmup_steps = 50
    -> schedule.kind = "deepspeed_constant", warmup = "log", warmup_steps = 50, optimizer.learning_rate = 1e-3
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bigmodel.config.deepspeed_json import Source, value_at
from bigmodel.config.deepspeed_row import AUTO
from bigmodel.config.deepspeed_values import FLAG, Value, choice, number, rate, shown, unquoted, whole
from bigmodel.config.schedule_settings import with_default_warmup
from bigmodel.config.sections import without_effect
from bigmodel.config.settings import Settings

REQUIRED, FOLLOWS = object(), object()  # in place of a default: there is none; the run file's value
PEAK, TOTAL, BETA1 = "optimizer.learning_rate", "schedule.total_steps", "schedule.beta1_range"
BETA2_OF_CYCLE = 0.99  # OneCycle with cycle_momentum sets beta2 to this constant


@dataclass(frozen=True)
class Parameter:
    """A parameter of a DeepSpeed scheduler."""

    setting: str  # that it becomes; empty: it must have its default
    default: Any
    value: Value
    remedy: str = ""  # if it must have its default


@dataclass(frozen=True)
class Scheduler:
    """A scheduler of DeepSpeed, and the schedule with the same rates."""

    kind: str
    peak: str  # the parameter that replaces optimizer.params.lr; empty: none
    parameters: Mapping[str, Parameter]


RESUME = Parameter("", -1, whole(-1), remedy="a resumed run continues its schedule by itself")
WARMUP = {
    "warmup_num_steps": Parameter("schedule.warmup_steps", 1000, whole(1)),
    "warmup_type": Parameter("schedule.warmup", "log", choice("log", "linear")),
    "last_batch_iteration": RESUME,
}
TOTAL_STEPS = {"total_num_steps": Parameter(TOTAL, REQUIRED, whole(1))}
LOWEST = {"warmup_min_lr": Parameter("schedule.lowest_rate", 0.0, number())}

SCHEDULERS = {
    "WarmupLR": Scheduler(
        "deepspeed_constant",
        "warmup_max_lr",
        WARMUP | LOWEST | {"warmup_max_lr": Parameter(PEAK, FOLLOWS, rate())},
    ),
    "WarmupDecayLR": Scheduler(
        "deepspeed_linear",
        "warmup_max_lr",
        WARMUP | LOWEST | TOTAL_STEPS | {"warmup_max_lr": Parameter(PEAK, 1e-3, rate())},
    ),
    "WarmupCosineLR": Scheduler(
        "deepspeed_cosine",
        "",
        WARMUP
        | TOTAL_STEPS
        | {
            "warmup_min_ratio": Parameter("schedule.initial_ratio", 0.0, number(0, 1)),
            "cos_min_ratio": Parameter("schedule.final_ratio", 1e-4, number(0, 1)),
        },
    ),
    "OneCycle": Scheduler(
        "one_cycle",
        "cycle_max_lr",
        {
            "cycle_min_lr": Parameter("schedule.lowest_rate", REQUIRED, number()),
            "cycle_max_lr": Parameter(PEAK, REQUIRED, rate()),
            "decay_lr_rate": Parameter("schedule.decay_rate", 0.0, number()),
            "cycle_first_step_size": Parameter("schedule.rise_steps", 2000, whole(1)),
            "cycle_second_step_size": Parameter("schedule.fall_steps", None, whole()),
            "cycle_first_stair_count": Parameter("schedule.rise_stairs", 0, whole()),
            "cycle_second_stair_count": Parameter("schedule.fall_stairs", None, whole()),
            "decay_step_size": Parameter("schedule.decay_interval", 0, whole()),
            "cycle_momentum": Parameter(BETA1, True, FLAG),
            "cycle_min_mom": Parameter(BETA1, 0.8, number(0, 1)),
            "cycle_max_mom": Parameter(BETA1, 0.9, number(0, 1)),
            "decay_mom_rate": Parameter("", 0.0, number(), remedy="DeepSpeed's factor would take beta1 beyond 1"),
            "last_batch_iteration": RESUME,
        },
    ),
    "LRRangeTest": Scheduler(
        "range_test",
        "lr_range_test_min_lr",
        {
            "lr_range_test_min_lr": Parameter(PEAK, 1e-3, rate()),
            "lr_range_test_step_size": Parameter("schedule.rise_steps", 2000, whole(1)),
            "lr_range_test_step_rate": Parameter("schedule.growth", 1.0, number()),
            "lr_range_test_staircase": Parameter("schedule.staircase", False, FLAG),
            "last_batch_iteration": RESUME,
        },
    ),
}


def peak_of(config: dict[str, Any]) -> str:
    """The path of the scheduler's parameter that replaces the rate of the optimizer block; empty: none does."""
    kind = value_at(config, "scheduler.type")
    scheduler = SCHEDULERS.get(kind) if isinstance(kind, str) else None
    if scheduler is None or not scheduler.peak:
        return ""
    written = _parameters(config["scheduler"], scheduler).get(
        scheduler.peak, scheduler.parameters[scheduler.peak].default
    )
    return "" if written is FOLLOWS or written == AUTO else f"scheduler.params.{scheduler.peak}"


def settle_schedule(config: dict[str, Any], settings: Settings, source: Source) -> Settings:
    """Settings with the schedule of the JSON; without a scheduler block they stay as they are.

    Problems go to `source`: unknown names, wrong types and ranges, contradictions to the run file.
    """
    section = config.get("scheduler")
    if not section:
        return settings
    scheduler = _scheduler(section, source)
    if scheduler is None:
        return settings
    set_before = frozenset(settings.schedule.model_fields_set)
    settings = _with_kind(settings, section["type"], scheduler, source)
    written = _parameters(section, scheduler)
    source.refuse_unknown(written, scheduler.parameters, "scheduler.params.")
    _refuse_hidden_peak(config, scheduler, written, source)
    values = {name: _value(name, one, written, source) for name, one in scheduler.parameters.items()}
    for name, parameter in scheduler.parameters.items():
        if parameter.setting not in ("", BETA1) and values[name] not in (AUTO, FOLLOWS, REQUIRED):
            settings = _settle(settings, name, parameter, values[name], written, source)
    if scheduler.kind == "one_cycle":
        settings = _settle_momentum(settings, values, written, source)
    schedule = with_default_warmup(settings.schedule, settings.training.steps)
    settings = settings.model_copy(update={"schedule": schedule})
    for name, problem in without_effect(schedule).items():
        if name in set_before:
            source.problem(f"scheduler, with the settings of the run file: {problem}")
    return settings


def fill_schedule(config: dict[str, Any], settings: Settings) -> None:
    """Replace "auto" in the scheduler block by the settings' values."""
    section = config.get("scheduler")
    if not section:
        return
    scheduler = SCHEDULERS[section["type"]]
    written = _parameters(section, scheduler)
    for name, parameter in scheduler.parameters.items():
        if written.get(name) == AUTO:
            written[name] = _filled(name, parameter, settings)
    section["params"] = {name: value for name, value in written.items() if value is not None}


def _filled(name: str, parameter: Parameter, settings: Settings) -> Any:
    if parameter.setting == "":
        return parameter.default
    value = _setting(settings, parameter.setting)
    if parameter.setting == TOTAL:
        return value or settings.training.steps
    if parameter.setting == BETA1:
        return value is not None if name == "cycle_momentum" else value and value[name == "cycle_max_mom"]
    return value


def _scheduler(section: dict[str, Any], source: Source) -> Scheduler | None:
    kind, params = section.get("type"), section.get("params", {})
    if kind not in SCHEDULERS:
        if not source.tells_of("scheduler.type"):
            near = difflib.get_close_matches(str(kind), SCHEDULERS, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else "or describe the learning rate in [schedule] of the run file"
            source.problem(f"scheduler.type = {json.dumps(kind)} must be one of {', '.join(SCHEDULERS)}; {hint}")
        return None
    if params not in (None, AUTO) and not isinstance(params, dict):
        source.problem(f"scheduler.params = {json.dumps(params)} must be an object {{...}}")
        return None
    return SCHEDULERS[kind]


def _refuse_hidden_peak(config: dict[str, Any], scheduler: Scheduler, written: dict[str, Any], source: Source) -> None:
    """Refuse the rate of the optimizer block where DeepSpeed would replace it by a default."""
    rate = value_at(config, "optimizer.params.lr")
    if not scheduler.peak or scheduler.peak in written or rate is None:
        return
    default = scheduler.parameters[scheduler.peak].default
    if isinstance(default, float) and rate not in (AUTO, default):
        source.problem(
            f"scheduler.params.{scheduler.peak} is absent, which is {default} in DeepSpeed, and replaces "
            f'optimizer.params.lr = {json.dumps(rate)}; write a number, or "auto" to keep the optimizer\'s'
        )


def _parameters(section: dict[str, Any], scheduler: Scheduler) -> dict[str, Any]:
    """The written parameters, as a new dict."""
    params = section.get("params")
    if params == AUTO:
        return dict.fromkeys(scheduler.parameters, AUTO)
    return dict(params) if isinstance(params, dict) else {}


def _with_kind(settings: Settings, written: str, scheduler: Scheduler, source: Source) -> Settings:
    now = settings.schedule
    if "kind" in now.model_fields_set and now.kind != scheduler.kind:
        source.problem(
            f'scheduler.type = "{written}" is schedule.kind = "{scheduler.kind}", but the run file has schedule.kind = '
            f'"{now.kind}"; remove the scheduler from the JSON, or kind from the run file'
        )
    kind = now.model_copy(update={"kind": scheduler.kind})
    return settings.model_copy(update={"schedule": kind})


def _value(name: str, parameter: Parameter, written: dict[str, Any], source: Source) -> Any:
    """The checked value of a parameter; its default if it is absent or wrong."""
    path, value = f"scheduler.params.{name}", written.get(name, parameter.default)
    if name not in written:
        if value is REQUIRED:
            source.problem(f'{path} is missing; write a number, or "auto" to follow the run file')
        return value
    if value == AUTO:
        return AUTO
    if value is None and parameter.default is None:
        return None
    try:
        value = parameter.value.read(value)
    except ValueError:
        hint = "; a rate for some parameters is set by optimizer.groups" if isinstance(value, list) else unquoted(value)
        source.problem(f'{path} = {shown(value)} must be {parameter.value.words} (or "auto"){hint}')
        return parameter.default
    if not parameter.setting and value != parameter.default:
        source.problem(f"{path} = {json.dumps(value)}: {parameter.remedy}; remove it")
    return value


def _settle(
    settings: Settings, name: str, parameter: Parameter, value: Any, written: dict[str, Any], source: Source
) -> Settings:
    path, meant = f"scheduler.params.{name}", float(value) if isinstance(parameter.default, float) else value
    if parameter.setting == TOTAL:
        return _settle_total(settings, path, value, source)
    if name in written:
        return source.agree(settings, parameter.setting, meant, path, value)
    absent = f"{path} is absent, which is {json.dumps(value)} in DeepSpeed"
    return source.agree(settings, parameter.setting, meant, path, value, wording=absent)


def _settle_total(settings: Settings, path: str, value: int, source: Source) -> Settings:
    """The schedule's length: that of the run, unless schedule.total_steps is set."""
    if "total_steps" in settings.schedule.model_fields_set:
        return source.agree(settings, TOTAL, value, path, value)
    training = settings.training
    if "steps" in training.model_fields_set and training.steps != value:
        source.problem(
            f"{path} = {value}, but the run file has training.steps = {training.steps}; make them equal, write "
            f'"auto" in the JSON, or set kind = "{settings.schedule.kind}" and total_steps = {value} in [schedule] of '
            "the run file for a schedule of that length"
        )
        return settings
    return source.agree(settings, "training.steps", value, path, value)


def _settle_momentum(settings: Settings, values: dict[str, Any], written: dict[str, Any], source: Source) -> Settings:
    """beta1_range from OneCycle's momentum, and the beta2 that comes with it in DeepSpeed."""
    path, now = "scheduler.params.cycle_momentum", settings.schedule.beta1_range
    cycles = now is not None if values["cycle_momentum"] == AUTO else values["cycle_momentum"]
    if not cycles:
        return source.agree(settings, BETA1, None, path, False)
    ends = now or (0.8, 0.9)
    names = ("cycle_min_mom", "cycle_max_mom")
    lowest, highest = (
        end if values[name] == AUTO else float(values[name]) for name, end in zip(names, ends, strict=True)
    )
    if not lowest <= highest < 1:
        source.problem(
            f"scheduler.params: cycle_min_mom = {lowest:g} and cycle_max_mom = {highest:g} must rise and be below 1"
        )
        return settings
    momentum = f"scheduler.params: cycle_momentum cycles beta1 between {lowest:g} and {highest:g}"
    settings = source.agree(settings, BETA1, (lowest, highest), path, True, wording=momentum)
    fixed = f"{path} is true, which sets beta2 to {BETA2_OF_CYCLE} (false: neither beta changes)"
    return source.agree(settings, "optimizer.beta2", BETA2_OF_CYCLE, path, True, wording=fixed)


def _setting(settings: Settings, path: str) -> Any:
    section, name = path.split(".")
    return getattr(getattr(settings, section), name)
