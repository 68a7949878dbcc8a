"""AdEMAMix (Pagliardini et al. 2024, "The AdEMAMix Optimizer: Better, Faster, Older"): AdamW with two moments.

The fast moment follows the gradient, the slow one averages over tens of thousands of updates. With g the gradient of
update t, counted from 1, and T = `ema_warmup_steps`:

    m1 = beta1 m1 + (1 - beta1) g;  m2 = beta3(t) m2 + (1 - beta3(t)) g;  v = beta2 v + (1 - beta2) g^2
    w -= rate * ((m1 / (1 - beta1^t) + alpha(t) m2) / (sqrt(v / (1 - beta2^t)) + epsilon) + decay w)

The slow moment has no bias correction; its warm-ups replace it. Costs: three fp32 numbers per parameter, one more than
AdamW.
"""

import math
from typing import Any

import torch

from bigmodel.config.settings import OptimizerSettings


class AdEMAMix(torch.optim.Optimizer):
    """Elementwise: shards are updated like whole parameters. The engine makes the states before the first update."""

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerSettings) -> None:
        super().__init__(groups, {"lr": settings.learning_rate})
        self._settings = settings

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for master in group["params"]:
                if master.grad is not None:
                    self._update(master, master.grad, group["lr"], group["weight_decay"])

    def _update(self, master: torch.Tensor, gradient: torch.Tensor, rate: float, decay: float) -> None:
        settings, state = self._settings, self.state[master]
        state["step"] += 1
        count = int(state["step"])
        fast, slow, squares = state["exp_avg"], state["exp_avg_slow"], state["exp_avg_sq"]
        fast.lerp_(gradient, 1 - settings.beta1)
        slow.lerp_(gradient, 1 - warm_beta3(count, settings))
        squares.mul_(settings.beta2).addcmul_(gradient, gradient, value=1 - settings.beta2)
        root = (squares / (1 - settings.beta2**count)).sqrt_().add_(settings.epsilon)
        direction = (fast / (1 - settings.beta1**count)).add_(slow, alpha=warm_alpha(count, settings)).div_(root)
        master.mul_(1 - rate * decay).add_(direction, alpha=-rate)


def warm_alpha(update: int, settings: OptimizerSettings) -> float:
    """alpha(t) = alpha min(t / T, 1)."""
    return settings.alpha * _progress(update, settings)


def warm_beta3(update: int, settings: OptimizerSettings) -> float:
    """beta3(t): 1 / log beta3(t) goes linearly from 1 / log beta1 to 1 / log beta3, so that the averaging time of m2
    grows evenly; beta3 from T on, never above."""
    progress = _progress(update, settings)
    if progress == 1:
        return settings.beta3
    inverse = (1 - progress) * _inverse_log(settings.beta1) + progress * _inverse_log(settings.beta3)
    return min(math.exp(1 / inverse), settings.beta3)


def _inverse_log(beta: float) -> float:
    return 1 / math.log(beta) if beta else 0.0


def _progress(update: int, settings: OptimizerSettings) -> float:
    return min(update / settings.ema_warmup_steps, 1.0) if settings.ema_warmup_steps else 1.0


def build(groups: list[dict[str, Any]], settings: OptimizerSettings) -> AdEMAMix:
    return AdEMAMix(groups, settings)
