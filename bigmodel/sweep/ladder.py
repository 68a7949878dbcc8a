"""A ladder: small runs that differ from a run file in size and length only. Imports no torch.

In: settings of the target, widths, tokens per parameter, learning rates. Out: rungs, each with the overrides that make
it. Rule of a rung of width w beside a target of width W and L layers:

    head_dim            that of the target, so that w must be a multiple of it
    num_heads           w / head_dim
    num_kv_heads        w / W times the target's, to the divisor of num_heads that is nearest by ratio
    intermediate_size   w / W times the target's, to a multiple of 8
    num_layers          w / W * L, rounded up at one half, at least 1; with fixed depth L
    steps               tokens per parameter * parameters / tokens of a step
    warm-up and decay   the share of the run that they have in the target

Batch, sequence length, optimizer and learning rate stay: with `model.mup_base_width` one rate fits all widths.
Parameters are all parameters, of experts those that a token passes; tokens are positions, padding included, as in
`bigmodel.planning.scaling`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from bigmodel.config.schedule_settings import COUNTED
from bigmodel.config.settings import ModelSettings, Settings, UserError
from bigmodel.planning.scaling import size_of

MOST_STEPS = 10**9  # of a rung: a small run takes far fewer


@dataclass(frozen=True)
class Rung:
    """A run of the ladder. `overrides`: for `--set`, without run.directory."""

    width: int
    num_layers: int
    rate: float
    parameters: int
    tokens: int
    steps: int
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"layers-{self.num_layers}-width-{self.width}-steps-{self.steps}-rate-{self.rate:g}"

    @property
    def compute(self) -> float:
        """6 N D, in FLOPs."""
        return 6.0 * self.parameters * self.tokens


def target_of(settings: Settings, vocabulary: int) -> Rung:
    """The run file itself. Raises `UserError` where a ladder is not defined."""
    training, model = settings.training, settings.model
    for name, value, wrong, remedy in (
        ("model.kind", model.kind, model.kind != "decoder", 'the law is of decoders; use kind = "decoder"'),
        ("model.from", str(model.start_folder), model.start_folder, "rungs begin with initial weights; leave it out"),
        ("lora.rank", settings.lora.rank, settings.lora.rank, "rungs train all weights; leave it out"),
        ("training.batch_ramp", training.batch_ramp, training.batch_ramp, "a rung has one batch size; leave it out"),
        (
            "schedule.kind",
            settings.schedule.kind,
            settings.schedule.kind not in COUNTED,
            f"warm-up and decay are shortened in proportion; use one of {', '.join(COUNTED)}",
        ),
        (
            "evaluation.at_end",
            False,
            not settings.evaluation.at_end,
            "the law is of the validation loss at the end; set it to true",
        ),
    ):
        if wrong:
            raise UserError(f"{name} = {json.dumps(value)}: {remedy}")
    parameters, tokens = size_of(settings, vocabulary)
    rate = settings.optimizer.learning_rate
    return Rung(model.hidden_size, model.num_layers, rate, parameters, tokens, training.steps, ())


def ladder(
    settings: Settings,
    vocabulary: int,
    widths: Sequence[int],
    ratios: Sequence[float] = (),
    rates: Sequence[float] = (),
    fixed_depth: bool = False,
) -> list[Rung]:
    """All rungs, the least compute first. ratios: tokens per parameter; empty: the target's. rates: learning rates;
    empty: the target's. fixed_depth: all have the target's layers. Raises `UserError`."""
    if not widths:
        raise UserError("--widths is empty: give hidden sizes below the target's, separated by commas")
    target = target_of(settings, vocabulary)
    rungs = [
        rung_of(settings, sized(settings.model, width, fixed_depth), vocabulary, ratio, rate)
        for width in widths
        for ratio in ratios or [target.tokens / target.parameters]
        for rate in rates or [target.rate]
    ]
    return sorted(rungs, key=lambda one: (one.compute, one.rate))


def rung_of(settings: Settings, model: ModelSettings, vocabulary: int, ratio: float, rate: float) -> Rung:
    smaller = settings.model_copy(update={"model": model})
    parameters, _ = size_of(smaller, vocabulary)
    per_step = settings.training.global_batch_size * settings.data.sequence_length
    wanted = ratio * parameters / per_step
    if wanted > MOST_STEPS:
        raise UserError(
            f"--tokens-per-parameter {ratio:g}: {wanted:.2g} steps of width {model.hidden_size}; a rung has at most "
            f"{MOST_STEPS:,}: give fewer tokens"
        )
    steps = max(1, round(wanted))
    of_model = {name: getattr(model, name) for name in SIZES}
    schedule, share = settings.schedule, steps / settings.training.steps
    lengths = {
        name: int(getattr(schedule, name) * share)
        for name in (f"warmup_{schedule.unit}", *([f"decay_{schedule.unit}"] if schedule.kind == "wsd" else []))
    }
    overrides = [
        *(f"model.{name}={value}" for name, value in of_model.items()),
        f"training.steps={steps}",
        f"optimizer.learning_rate={rate!r}",
        *(f"schedule.{name}={value}" for name, value in lengths.items()),
    ]
    return Rung(model.hidden_size, model.num_layers, rate, parameters, steps * per_step, steps, tuple(overrides))


SIZES = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")


def sized(model: ModelSettings, width: int, fixed_depth: bool = False) -> ModelSettings:
    """The model of that width by the rule above. Raises `UserError`."""
    head = model.resolved_head_dim
    if width % head or not 0 < width < model.hidden_size:
        raise UserError(
            f"--widths {width}: must be below model.hidden_size = {model.hidden_size} and a multiple of {head}, the "
            "channels of a head, which all widths share"
        )
    share, heads = width / model.hidden_size, width // head
    wanted = share * model.num_kv_heads
    divisors = [number for number in range(1, heads + 1) if heads % number == 0]
    return model.model_copy(
        update={
            "num_layers": model.num_layers if fixed_depth else max(1, int(share * model.num_layers + 0.5)),
            "hidden_size": width,
            "num_heads": heads,
            "num_kv_heads": min(divisors, key=lambda number: abs(math.log(number / wanted))),
            "head_dim": head,
            "intermediate_size": max(8, round(share * model.intermediate_size / 8) * 8),
        }
    )
