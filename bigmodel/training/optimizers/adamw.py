"""AdamW (Loshchilov & Hutter 2019): torch's fused version, one pass over memory."""

from typing import Any

import torch

from bigmodel.config.settings import OptimizerSettings


def build(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, **arguments(settings))


def arguments(settings: OptimizerSettings) -> dict[str, Any]:
    """The arguments of torch's AdamW, except the groups."""
    betas = (settings.beta1, settings.beta2)
    return {"lr": settings.learning_rate, "betas": betas, "eps": settings.epsilon, "fused": True}
