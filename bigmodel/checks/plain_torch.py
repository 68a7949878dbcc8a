"""Plain torch in one process: what the engine is compared with, and how far two results are apart.

In: a model, micro-batches. Out: losses, gradients and weights of a training without DeepSpeed, ranks, buckets and
partitions. Costs: 24 bytes a parameter with AdamW, 48 in float64, and what the caller copies.
"""

import copy
import math
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigmodel.config.settings import OptimizerSettings, Settings
from bigmodel.model.experts import balance, mixtures
from bigmodel.model.transformer import Transformer
from bigmodel.training.learning_rate import betas, learning_rate
from bigmodel.training.optimizers.groups import build_optimizer, parameter_groups, states_of
from bigmodel.training.optimizers.penalty import with_penalty
from bigmodel.training.optimizers.shards import Shards

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}
FP16_SCALE = 2.0**10  # of the loss; in float64 there is none
NEGLIGIBLE = 1e-3  # share of the whole gradient's length, below which a parameter's error is measured against it


class PlainTraining:
    """A training of `model`, which it changes.

    In bf16 and fp16, gradients of micro-batches are summed in fp32, and masters are fp32. wide: all in float64, from
    the initial weights of the precision. exact: parameters whose masters are not rounded to the precision at the start.
    """

    def __init__(self, model: Transformer, settings: Settings, wide: bool = False, exact: Collection[str] = ()) -> None:
        low = LOW.get(settings.training.precision)
        self._settings, self._model, self._masters = settings, model, copy.deepcopy(model)
        if low:
            model.to(low)
            rounded = {name: value for name, value in model.state_dict().items() if name not in exact}
            self._masters.load_state_dict(rounded, strict=False)
        if wide:
            model.double(), self._masters.double()
            model.load_state_dict(self._masters.state_dict())
        self._scale = FP16_SCALE if low is torch.float16 and not wide else 1.0
        self._optimizer = plain_optimizer(self._masters, settings.optimizer)
        trained = [(name, one) for name, one in self._masters.named_parameters() if one.requires_grad]
        self._pairs = [(name, master, model.get_parameter(name)) for name, master in trained]
        self._averages = {name: one.detach().clone() for name, one in trained} if settings.training.ema_decay else {}

    def accumulate(self, batches: Iterable[Any], weight: float) -> float:
        """Forward and backward of a step's micro-batches; gives its mean loss. weight: of the labels of the step."""
        nats = 0.0
        self._model.loads_LE = 0.0
        for _, master, _ in self._pairs:
            master.grad = None
        for batch in batches:
            loss = self._model(batch).sum()
            (loss * (self._scale / weight)).backward()
            nats += loss.item()
            for _, master, parameter in self._pairs:
                if parameter.grad is not None:
                    gradient = parameter.grad.to(master.dtype) / self._scale
                    master.grad = gradient.clone() if master.grad is None else master.grad + gradient
                    parameter.grad = None
        return nats / weight

    def gradients(self) -> dict[str, Tensor]:
        """Copies, before clipping."""
        return {
            name: torch.zeros_like(master) if master.grad is None else master.grad.clone()
            for name, master, _ in self._pairs
        }

    def update(self, step: int) -> float:
        """Clip and apply an update at the rate of data step `step`; gives the gradient norm before clipping."""
        limit = self._settings.optimizer.gradient_clipping or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self._masters.parameters(), limit)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(step, self._settings) * group["rate_factor"]
            group["betas"] = betas(step, self._settings) or group.get("betas")
        self._optimizer.step()
        if mixtures(self._masters):
            balance(self._masters, self._model.loads_LE)
        self._model.load_state_dict(self._masters.state_dict())
        for name, average in self._averages.items():
            average.lerp_(self._masters.get_parameter(name).detach(), 1.0 - self._settings.training.ema_decay)
        return norm.item()

    def weights(self) -> dict[str, Tensor]:
        """Copies of the masters."""
        return {name: master.detach().clone() for name, master, _ in self._pairs}

    def averages(self) -> dict[str, Tensor]:
        """Of the weights; empty without `training.ema_decay`."""
        return self._averages

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's state, flat, by key and parameter."""
        state = ((name, self._optimizer.state[master]) for name, master, _ in self._pairs)
        return {f"{key}.{name}": value.flatten() for name, one in state for key, value in one.items() if key != "step"}


def plain_optimizer(model: Transformer, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """torch's optimizer if torch has it, else ours, which tests/training/optimizers compares with the papers."""
    if settings.kind == "adafactor":
        groups, epsilons = parameter_groups(model, settings), (settings.epsilon, settings.least_scale)
        theirs = torch.optim.Adafactor(groups, 0.0, settings.beta2_decay, epsilons, settings.update_clipping)
        return with_penalty(theirs)
    return alone(build_optimizer(model, settings), settings)


def alone(optimizer: torch.optim.Optimizer, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Makes the states as the engine does, with every parameter as its own master."""
    optimizer.shards = Shards(lambda master, flat, change: change(flat), lambda master: [], lambda sums: sums)
    for group in optimizer.param_groups:
        for master in group["params"]:
            for key, shape in states_of(settings, group):
                zeros = torch.zeros(()) if shape == "number" else torch.zeros_like(master)
                optimizer.state[master][key] = zeros
    return optimizer


class Lengths(NamedTuple):
    """L2 norms of a parameter's difference from what is wanted, and of what is wanted."""

    name: str
    difference: float
    wanted: float


def lengths(name: str, found: Tensor, wanted: Tensor) -> Lengths:
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return Lengths(name, float((found - wanted).norm()), float(wanted.norm()))


def together(parts: Collection[Lengths]) -> float:
    """The relative difference of all parameters as one vector."""
    difference, wanted = (math.hypot(*sizes) for sizes in list(zip(*parts, strict=True))[1:])
    return ratio_of(difference, wanted)


def worst(parts: Collection[Lengths]) -> tuple[float, str]:
    """The relative difference and the name of the parameter that is farthest off."""
    least = NEGLIGIBLE * math.hypot(*(part.wanted for part in parts))
    return max((ratio_of(part.difference, max(part.wanted, least)), part.name) for part in parts)


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """|found - wanted| / |wanted| over all tensors together."""
    return together([lengths(name, tensor, wanted[name]) for name, tensor in found.items()])


def ratio_of(difference: float, wanted: float) -> float:
    """0 if both are 0; infinite if it is not finite."""
    if difference == 0:
        return 0.0
    ratio = difference / wanted if wanted else math.inf
    return ratio if math.isfinite(ratio) else math.inf
