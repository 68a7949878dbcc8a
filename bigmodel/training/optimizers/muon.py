"""Muon (Jordan et al. 2024)."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bigmodel.config.settings import OptimizerSettings
from bigmodel.training.optimizers import adamw
from bigmodel.training.optimizers.shards import Shards


class Muon(torch.optim.AdamW):
    """Orthogonalised Nesterov momentum for hidden matrices, AdamW for all other parameters.

    m = mu * m + g; O = the nearest semi-orthogonal matrix to g + mu * m; w -= rate * (scale * O + decay * w). The scale
    0.2 * sqrt(max(rows, columns)) gives updates of AdamW's size, so that one rate serves both (Liu et al. 2025); the
    original one is sqrt(max(1, rows / columns)). A group with `parts` orthogonalises each of them. Experts are matrices
    of their own, and so is a router.
    Masters are flat and may hold parts of matrices; `shards`, set by the engine, assembles them.
    """

    shards: Shards
    param_groups: list[dict[str, Any]]

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerSettings, **adamw: Any) -> None:
        super().__init__(groups, **adamw)
        self.momentum = settings.momentum
        self._update = _SCALED[settings.matrix_scale]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        groups: list[dict[str, Any]] = self.param_groups
        self.param_groups = [group for group in groups if not group["matrices"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            for master in group["params"] if group["matrices"] else ():
                if master.grad is not None:
                    moment = self.state[master]["exp_avg"].mul_(self.momentum).add_(master.grad)
                    ahead = master.grad.add(moment, alpha=self.momentum)
                    update = self.shards.whole_matrices(master, ahead, partial(self._change, group["parts"]))
                    master.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _change(self, rows: tuple[int, ...], matrix: Tensor) -> Tensor:
        if matrix.dim() == 3:  # of each expert
            return torch.stack([self._change(rows, one) for one in matrix])
        return torch.cat([self._update(part) for part in matrix.split(rows)]) if rows else self._update(matrix)


def _as_adamw(matrix: Tensor) -> Tensor:
    return orthogonalize(matrix) * (0.2 * max(matrix.shape) ** 0.5)


def _original(matrix: Tensor) -> Tensor:
    rows, columns = matrix.shape
    return orthogonalize(matrix) * max(1.0, rows / columns) ** 0.5


_SCALED = {"match_rms_adamw": _as_adamw, "original": _original}


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """The polar factor of a matrix by Newton-Schulz iteration with the quintic of Jordan et al. 2024.

    The result's singular values are between 0.7 and 1.2. In bf16 on a GPU, where that is fast, otherwise in fp32.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    x = x / x.norm().clamp_min(1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


def build(groups: list[dict[str, Any]], settings: OptimizerSettings) -> Muon:
    return Muon(groups, settings, **adamw.arguments(settings))
