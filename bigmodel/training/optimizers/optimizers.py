"""What an update is made of: parameter groups and the optimizers that DeepSpeed runs on flat fp32 masters.

Takes a model and settings, gives a `torch.optim.Optimizer` whose states are known before the first update
(`state_keys`), so that they can be read and written by parameter name. The rule of weight decay: matrices decay;
embeddings and one-dimensional parameters (norms) do not; `optimizer.groups` says otherwise for the parameters that it
names. A head that is tied to the embedding counts as embedding, an untied head as a matrix.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from bigmodel.config.settings import OptimizerSettings, UserError
from bigmodel.training.zero.layouts import ParameterShard

WholeMatrices = Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]
ADAMW_STATE = ("exp_avg", "exp_avg_sq")
MOMENTUM_STATE = ("exp_avg",)
FACTORED_STATE, UNFACTORED_STATE = ("row_var", "col_var"), ("variance",)


def parameter_groups(model: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Groups of equal treatment for `torch.optim`. Every trained parameter is in exactly one.

    A group has `weight_decay`, `rate_factor` (times the schedule's rate) and `matrices`: whether the optimizer treats
    its parameters as matrices, as Muon does with hidden ones and Adafactor with all.
    Raises `UserError` where a pattern of `optimizer.groups` fits no parameter.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    met: set[str] = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)
        matrix = len(shape) >= 2 and id(parameter) not in embeddings
        decay, factor = settings.weight_decay if matrix else 0.0, 1.0
        as_matrix = settings.kind == "muon" and matrix and not name.startswith("head.")
        as_matrix |= settings.kind == "adafactor" and len(shape) == 2
        for given in [one for one in settings.groups if fnmatchcase(name, one.parameters)]:
            met.add(given.parameters)
            decay = decay if given.weight_decay is None else given.weight_decay
            factor = given.learning_rate_factor
        groups.setdefault((decay, factor, as_matrix), []).append(parameter)
    for given in settings.groups:
        if given.parameters not in met:
            names = [name for name, _ in model.named_parameters()]
            raise UserError(
                f'optimizer.groups: parameters = "{given.parameters}" fits no parameter; '
                f"names are for example {', '.join(names[:3])} and {names[-1]}"
            )
    return [
        {"params": parameters, "weight_decay": decay, "rate_factor": factor, "matrices": as_matrix}
        for (decay, factor, as_matrix), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def state_keys(settings: OptimizerSettings, group: dict[str, Any]) -> tuple[str, ...]:
    """Names of the states that the optimizer keeps for the parameters of a group: of the master's shape, but for
    `FACTORED_STATE`, which is one vector each of a parameter's rows and columns."""
    if settings.kind == "adafactor":
        return FACTORED_STATE if group["matrices"] else UNFACTORED_STATE
    return MOMENTUM_STATE if settings.kind == "lion" or group["matrices"] else ADAMW_STATE


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
        self.param_groups = [group for group in groups if not group["matrices"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            for master in group["params"] if group["matrices"] else ():
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


@dataclass(frozen=True)
class Part:
    """What of one parameter lies in a master on this rank, shard None: nothing; the parameter has a part on all."""

    shape: tuple[int, ...]
    shard: ParameterShard | None
    vectors: tuple[Tensor, ...]  # `FACTORED_STATE`, whole on every rank; empty where there is none

    def rows(self) -> slice:
        """The rows of the matrix in which the shard lies; the first and the last may be there in part."""
        assert self.shard is not None
        columns = self.shape[1]
        return slice(self.shard.start // columns, -(-(self.shard.start + self.shard.numel) // columns))

    def sums(self, master: Tensor, gradient: Tensor) -> Tensor:
        """Squares of the shard, added up: of the weights, and of the gradient by row and by column."""
        rows, columns = self.shape if self.vectors else (0, 0)
        sums = master.new_zeros(1 + rows + columns)
        if self.shard is not None:
            sums[0] = torch.linalg.vector_norm(self.shard.of(master)).square()
            if self.vectors:
                here, (first, after) = self.rows(), self._margins()
                squares = nn.functional.pad(self.shard.of(gradient).square(), (first, after)).view(-1, columns)
                sums[1 : 1 + rows][here] = squares.sum(1)
                sums[1 + rows :] = squares.sum(0)
        return sums

    def estimate(self, epsilon: float) -> Tensor:
        """Second moments of the shard's elements: row times column over the mean of all rows."""
        assert self.shard is not None
        (row_var, col_var), (first, _) = self.vectors, self._margins()
        of_rows = row_var[self.rows()] / row_var.mean().clamp(min=epsilon)
        return torch.outer(of_rows, col_var).flatten().narrow(0, first, self.shard.numel)

    def _margins(self) -> tuple[int, int]:
        """Elements that the shard lacks of its first row and of its last."""
        assert self.shard is not None
        columns = self.shape[1]
        return self.shard.start % columns, -(self.shard.start + self.shard.numel) % columns


class Adafactor(torch.optim.Optimizer):
    """The second moments of a matrix as rows times columns (Shazeer & Stern 2018), by the rules of torch's Adafactor.

    beta2 = 1 - t^beta2_decay; R, C = means of g^2 over each row and column, averaged by beta2; V = R C / mean(R), a
    vector's own V; u = g / max(sqrt(V), epsilon); w = (1 - rate * decay) * w - min(rate, 1/sqrt(t)) *
    max(least_scale, rms(w)) * u / max(1, rms(u) / clip). State: rows + columns floats a matrix, on every rank.
    Masters are flat and may hold parts of matrices: `parts` tells which, `sum_` adds up over the ranks that have the
    others; twice a call, which is for one group (ZeRO 1 and 2), or sub-group (3). The engine sets both. The gradient
    becomes the update in place.
    """

    parts: Callable[[Tensor], list[Part]]
    sum_: Callable[[Tensor], Tensor]

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerSettings) -> None:
        super().__init__(groups, {"lr": settings.learning_rate})
        self._epsilon, self._least_scale = settings.epsilon, settings.least_scale
        self._beta2_decay, self._clip = settings.beta2_decay, settings.update_clipping

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        masters = [(group, m) for group in self.param_groups for m in group["params"] if m.grad is not None]
        work = [(group, master, part) for group, master in masters for part in self.parts(master)]
        for _, master in masters:
            self.state[master]["step"] += 1
        sums = [part.sums(master, master.grad) for _, master, part in work]
        sums = list(self.sum_(torch.cat(sums)).split([len(one) for one in sums]))
        moves = [self._move(master, part, one[1:]) for (_, master, part), one in zip(work, sums, strict=True)]
        for (group, master, part), (weights, *_), moved in zip(work, sums, self.sum_(torch.stack(moves)), strict=True):
            if part.shard is not None:
                roots = [(squares / math.prod(part.shape)).sqrt() for squares in (weights, moved)]
                rate = min(group["lr"], float(self.state[master]["step"]) ** -0.5)
                size = -rate * roots[0].clamp(min=self._least_scale) / (roots[1] / self._clip).clamp(min=1)
                here = part.shard.of(master).mul_(1 - group["lr"] * group["weight_decay"])
                here.addcmul_(part.shard.of(master.grad), size)

    def _move(self, master: Tensor, part: Part, squares: Tensor) -> Tensor:
        """Average the second moments, turn the shard's gradient into its update; gives the sum of its squares.

        squares: of the gradient, by row and by column, over all ranks.
        """
        share = float(self.state[master]["step"]) ** self._beta2_decay
        if part.vectors:
            for vector, total, numel in zip(part.vectors, squares.split(part.shape), reversed(part.shape), strict=True):
                vector.lerp_(total / numel, share)
        if part.shard is None:
            return master.new_zeros(())
        gradient = part.shard.of(master.grad)
        if part.vectors:
            moments = part.estimate(self._epsilon)
        else:
            moments = part.shard.of(self.state[master]["variance"]).lerp_(gradient.square(), share).clone()
        gradient.mul_(moments.clamp_(min=self._epsilon**2).rsqrt_())
        return torch.linalg.vector_norm(gradient).square()


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer that `optimizer.kind` names; torch's AdamW in its fused form: one pass over memory."""
    groups, betas = parameter_groups(model, settings), (settings.beta1, settings.beta2)
    adamw: dict[str, Any] = {"lr": settings.learning_rate, "betas": betas, "eps": settings.epsilon, "fused": True}
    if settings.kind == "adafactor":
        return Adafactor(groups, settings)
    if settings.kind == "lion":
        return Lion(groups, settings.learning_rate, betas)
    if settings.kind == "muon":
        return Muon(groups, settings.momentum, **adamw)
    return torch.optim.AdamW(groups, **adamw)
