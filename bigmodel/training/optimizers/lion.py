"""Lion (Chen et al. 2023)."""

from typing import Any

import torch

from bigmodel.config.settings import OptimizerSettings


class Lion(torch.optim.Optimizer):
    """The sign of an interpolated momentum: one moment instead of two, half of AdamW's state.

    u = sign(beta1 * m + (1 - beta1) * g); w -= rate * (u + decay * w); m = beta2 * m + (1 - beta2) * g.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for master in group["params"]:
                moment, gradient = self.state[master]["exp_avg"], master.grad
                if gradient is not None:
                    direction = moment.lerp(gradient, 1 - beta1).sign_()
                    master.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                    moment.lerp_(gradient, 1 - beta2)


def build(groups: list[dict[str, Any]], settings: OptimizerSettings) -> Lion:
    return Lion(groups, settings.learning_rate, (settings.beta1, settings.beta2))
