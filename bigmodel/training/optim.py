"""What an update is made of: parameter groups and the optimizers that DeepSpeed runs on flat fp32 masters.

Takes a model and settings, gives a `torch.optim.Optimizer` whose states are known before the first update
(`state_keys`), so that they can be read and written by parameter name. The rule of weight decay: matrices decay;
embeddings and one-dimensional parameters (norms) do not; `optimizer.groups` says otherwise for the parameters that it
names. A head that is tied to the embedding counts as embedding, an untied head as a matrix.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from bigmodel.config import OptimizerSettings, UserError

WholeMatrices = Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]
ADAMW_STATE = ("exp_avg", "exp_avg_sq")
MOMENTUM_STATE = ("exp_avg",)


def parameter_groups(model: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Groups of equal treatment for `torch.optim`. Every trained parameter is in exactly one.

    A group has `weight_decay`, `rate_factor` (times the schedule's rate) and `orthogonal` (whether Muon treats it).
    Raises `UserError` where a pattern of `optimizer.groups` fits no parameter.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    met: set[str] = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2 and id(parameter) not in embeddings
        decay, factor = settings.weight_decay if matrix else 0.0, 1.0
        orthogonal = settings.kind == "muon" and matrix and not name.startswith("head.")
        for given in [one for one in settings.groups if fnmatchcase(name, one.parameters)]:
            met.add(given.parameters)
            decay = decay if given.weight_decay is None else given.weight_decay
            factor = given.learning_rate_factor
        groups.setdefault((decay, factor, orthogonal), []).append(parameter)
    for given in settings.groups:
        if given.parameters not in met:
            names = [name for name, _ in model.named_parameters()]
            raise UserError(
                f'optimizer.groups: parameters = "{given.parameters}" fits no parameter; '
                f"names are for example {', '.join(names[:3])} and {names[-1]}"
            )
    return [
        {"params": parameters, "weight_decay": decay, "rate_factor": factor, "orthogonal": orthogonal}
        for (decay, factor, orthogonal), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def state_keys(settings: OptimizerSettings, group: dict[str, Any]) -> tuple[str, ...]:
    """Names of the states that the optimizer keeps for the parameters of a group, each of the master's shape."""
    return (
        ADAMW_STATE
        if settings.kind == "adamw" or not (group["orthogonal"] or settings.kind == "lion")
        else (MOMENTUM_STATE)
    )


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum (Chen et al. 2023): one moment instead of two, half of AdamW's memory.

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


class Muon(torch.optim.AdamW):
    """Orthogonalised Nesterov momentum for hidden matrices (Jordan et al. 2024), AdamW for all else.

    m = mu * m + g; O = the nearest semi-orthogonal matrix to g + mu * m; w -= rate * (0.2 * sqrt(max(rows, columns))
    * O + decay * w): that factor gives an update of AdamW's size, so that one rate serves both (Liu et al. 2025).
    Masters are flat and may hold parts of matrices: `whole_matrices` puts them together. The engine sets it.
    """

    whole_matrices: WholeMatrices
    param_groups: list[dict[str, Any]]

    def __init__(self, groups: list[dict[str, Any]], momentum: float, **adamw: Any) -> None:
        super().__init__(groups, **adamw)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        groups: list[dict[str, Any]] = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            for master in group["params"] if group["orthogonal"] else ():
                if master.grad is not None:
                    moment = self.state[master]["exp_avg"].mul_(self.momentum).add_(master.grad)
                    ahead = master.grad.add(moment, alpha=self.momentum)
                    update = self.whole_matrices(master, ahead, _orthogonal_update)
                    master.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def _orthogonal_update(matrix: Tensor) -> Tensor:
    return orthogonalize(matrix) * (0.2 * max(matrix.shape) ** 0.5)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """The polar factor of a matrix by Newton-Schulz iteration with the quintic of Jordan et al. 2024.

    Singular values end between 0.7 and 1.2. In bf16 on a GPU, where it is fast, in fp32 elsewhere.
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


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer that `optimizer.kind` names; torch's AdamW in its fused form: one pass over memory."""
    groups, betas = parameter_groups(model, settings), (settings.beta1, settings.beta2)
    adamw: dict[str, Any] = {"lr": settings.learning_rate, "betas": betas, "eps": settings.epsilon, "fused": True}
    if settings.kind == "lion":
        return Lion(groups, settings.learning_rate, betas)
    if settings.kind == "muon":
        return Muon(groups, settings.momentum, **adamw)
    return torch.optim.AdamW(groups, **adamw)
