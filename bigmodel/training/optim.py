"""What an update is made of: parameter groups, AdamW and the learning rate of each step.

Takes a model and settings, gives a `torch.optim.AdamW` and pure functions of the step. The rule of weight decay:
matrices decay; embeddings and one-dimensional parameters (norms) do not. A head that is tied to the embedding
counts as embedding, an untied head as a matrix.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bigmodel.config import OptimizerSettings, Settings


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, with and without decay, for `torch.optim`. Every trained parameter is in exactly one."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.dim() >= 2 and id(parameter) not in embeddings else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """torch's AdamW in its fused form, one pass over memory per update on GPU and CPU alike."""
    return torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )


def cosine(step: int, settings: Settings) -> float:
    """peak * (r + (1 - r) * (1 + cos(pi * p)) / 2), r = final_ratio, p = (step + 1 - warmup) / (steps - warmup).

    Loshchilov & Hutter 2017. p is 0 at the last step of the warm-up and 1 at the last of all.
    """
    schedule = settings.schedule
    progress = (step + 1 - schedule.warmup_steps) / (settings.training.steps - schedule.warmup_steps)
    share = (1.0 + math.cos(math.pi * min(progress, 1.0))) / 2.0
    return settings.optimizer.learning_rate * (schedule.final_ratio + (1.0 - schedule.final_ratio) * share)


def wsd(step: int, settings: Settings) -> float:
    """Warm-up, stable, decay (Hu et al. 2024): the peak, then peak * (1 - (1 - r) * p) over the last decay_steps.

    p = (step + 1 - (steps - decay_steps)) / decay_steps is 1 at the last step of all.
    """
    schedule = settings.schedule
    into_decay = step + 1 - (settings.training.steps - schedule.decay_steps)
    if into_decay <= 0:
        return settings.optimizer.learning_rate
    progress = min(into_decay / schedule.decay_steps, 1.0) if schedule.decay_steps else 0.0
    return settings.optimizer.learning_rate * (1.0 - (1.0 - schedule.final_ratio) * progress)


SCHEDULES: dict[str, Callable[[int, Settings], float]] = {"cosine": cosine, "wsd": wsd}


def learning_rate(step: int, settings: Settings) -> float:
    """The learning rate of the update of step `step`, counted from 0.

    Linear warm-up first: peak * (step + 1) / warmup_steps, so that the first update already moves something.
    """
    warmup = settings.schedule.warmup_steps
    if step < warmup:
        return settings.optimizer.learning_rate * (step + 1) / warmup
    return SCHEDULES[settings.schedule.kind](step, settings)
