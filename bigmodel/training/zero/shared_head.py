"""The output head and its loss over a vocabulary that ranks share, with no rank's logits whole.

In: the states of this rank's positions, (P, H), labels of all positions, and this rank's rows of the output matrix,
(W, H). Out: in training the loss sum of this rank's positions, with the gradient of all; in evaluation what `Head`
gives, of all positions. Formulas as in bigmodel/kernels/linear_cross_entropy.py. Of each position each rank finds the
largest logit, the sum of exponentials, the label's logit if it is one of its own, and the sum of logits; these four
numbers are exchanged, and every rank has the loss, bitwise the same. Costs: 3 products of W H operations a position,
one exchange of 4 fp32 numbers a position, memory for one chunk of logits.

Letters: T positions, P of a rank, C of a chunk, H hidden_size, V vocabulary, W rows of a rank, N ranks.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigmodel.kernels.linear_cross_entropy import (
    IGNORED,
    Options,
    add_product,
    check_targets,
    chunk_slices,
    multiplied,
    part_of,
    product,
    scaled,
)
from bigmodel.model.loss_groups import by_group
from bigmodel.training.zero.sharing_ranks import Gather, SharingRanks


def shared_head(
    head: Any,
    ranks: SharingRanks,
    x_PH: Tensor,
    labels_T: Tensor,
    output: str,
    groups_T: Tensor | None = None,
    num_loss_groups: int = 1,
    weights_T: Tensor | None = None,
) -> Tensor:
    """`Head.forward`; in training its sums are of this rank's positions."""
    x_TH, options = Gather.apply(x_PH, ranks), head.options
    if output == "logits":
        return _logits(x_TH, head.weight, ranks, options.logit_softcap)
    if output == "predictions":
        return _predictions(x_TH, head.weight, labels_T, ranks, options.logit_softcap)
    if output == "loss_per_position":
        return _losses(
            x_TH, head.weight, labels_T, ranks, Options(logit_softcap=options.logit_softcap), weights_T
        ).losses_T
    assert output == "loss_sum", f"tensor-parallel ranks do not give {output}"
    needed = [torch.is_grad_enabled() and one.requires_grad for one in (x_TH, head.weight)]
    loss_sum, z_sum, losses_T = Loss.apply(
        x_TH, head.weight, labels_T, weights_T, options, ranks, head.training, needed
    )
    head.z_sum = z_sum
    if groups_T is None:
        return loss_sum
    if head.training:
        losses_T, groups_T = ranks.own(losses_T), ranks.own(groups_T)
    return by_group(loss_sum, losses_T, groups_T, num_loss_groups)


class Losses(NamedTuple):
    """Of each position, weighted; and the gradients, where asked for."""

    losses_T: Tensor
    z_T: Tensor
    grad_hidden_TH: Tensor | None
    grad_weight_WH: Tensor | None


class Loss(torch.autograd.Function):
    """Loss sum and z sum of this rank's positions, or of all, and the loss of each position. The gradient is that of
    all positions' loss_sum + z_loss * z_sum: of the hidden states this rank's term of it."""

    @staticmethod
    def forward(
        context: Any,
        x_TH: Tensor,
        weight_WH: Tensor,
        labels_T: Tensor,
        weights_T: Tensor | None,
        options: Options,
        ranks: SharingRanks,
        of_own: bool,
        needed: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = _losses(x_TH, weight_WH, labels_T, ranks, options, weights_T, *needed)
        rows = [ranks.own(one) if of_own else one for one in (found.losses_T, found.z_T)]
        loss_sum, z_sum = (one.sum(dtype=torch.float64).to(one.dtype) for one in rows)
        context.gradients, context.type = (found.grad_hidden_TH, found.grad_weight_WH), x_TH.dtype
        context.mark_non_differentiable(z_sum, found.losses_T)
        context.set_materialize_grads(False)
        return loss_sum, z_sum, found.losses_T

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        of_loss, found = gradients[0], context.gradients
        if of_loss is None:
            return (None,) * 8
        del context.gradients
        return *(None if one is None else scaled(one, of_loss, context.type) for one in found), *(None,) * 6


def _losses(
    x_TH: Tensor,
    weight_WH: Tensor,
    labels_T: Tensor,
    ranks: SharingRanks,
    options: Options,
    weights_T: Tensor | None = None,
    need_hidden: bool = False,
    need_weight: bool = False,
) -> Losses:
    check_targets(labels_T, len(weight_WH) * ranks.size)
    wide = torch.promote_types(weight_WH.dtype, torch.float32)
    matrix_WH = multiplied(weight_WH)
    slope_type = wide if matrix_WH.device.type == "cpu" else matrix_WH.dtype
    losses_T, z_T = (torch.empty(len(x_TH), dtype=wide, device=x_TH.device) for _ in range(2))
    grad_hidden_TH = torch.empty_like(x_TH) if need_hidden else None
    grad_weight_WH = torch.zeros_like(weight_WH, dtype=wide) if need_weight else None
    for chunk in chunk_slices(len(x_TH), len(weight_WH), wide, 0):
        hidden_CH = multiplied(x_TH[chunk])
        step = SoftmaxStep(product(hidden_CH, matrix_WH.T), labels_T[chunk], ranks, options)
        losses_T[chunk], z_T[chunk] = step.losses(part_of(weights_T, chunk))
        if need_hidden or need_weight:
            slope_CW = step.slope(part_of(weights_T, chunk)).to(slope_type)
            if grad_hidden_TH is not None:
                grad_hidden_TH[chunk] = product(slope_CW, matrix_WH)
            if grad_weight_WH is not None:
                add_product(grad_weight_WH, slope_CW.T, hidden_CH)
            del slope_CW
        del step  # otherwise two chunks of logits would be in memory at once
    return Losses(losses_T, z_T, grad_hidden_TH, grad_weight_WH)


class SoftmaxStep:
    """Softmax and losses of a chunk, (C, W) raw logits on each rank. Overwrites the logits without a softcap."""

    def __init__(self, logits_CW: Tensor, labels_C: Tensor, ranks: SharingRanks, options: Options) -> None:
        self._options, self._num_columns = options, logits_CW.shape[1] * ranks.size
        self._ignored_C = labels_C == IGNORED
        column_C = labels_C - ranks.rank * logits_CW.shape[1]
        self._is_here_C = (column_C >= 0) & (column_C < logits_CW.shape[1])
        self._column_C1 = column_C.where(self._is_here_C, 0)[:, None]
        softcap = options.logit_softcap
        self._capped_CW = softcap * torch.tanh(logits_CW / softcap) if softcap else logits_CW
        chosen_C = self._capped_CW.gather(-1, self._column_C1)[:, 0].where(self._is_here_C, 0.0)
        own_top_C = self._capped_CW.amax(-1)
        sum_C = self._capped_CW.sum(-1) if options.label_smoothing else torch.zeros_like(own_top_C)
        less_CW = self._capped_CW - own_top_C[:, None] if softcap else logits_CW.sub_(own_top_C[:, None])
        self._exponentials_CW = less_CW.exp_()
        told_N4C = ranks.each(torch.stack([own_top_C, self._exponentials_CW.sum(-1), chosen_C, sum_C]))
        self.top_C = told_N4C[:, 0].amax(0)
        self._total_C = (told_N4C[:, 1] * (told_N4C[:, 0] - self.top_C).exp()).sum(0)
        self.lead_C = self.top_C - told_N4C[:, 2].sum(0)  # of the largest logit over the label's
        self._mean_C = told_N4C[:, 3].sum(0) / self._num_columns - self.top_C if options.label_smoothing else None
        self._from_own_top_C = (own_top_C - self.top_C).exp()
        self._lse_C = self.top_C + self._total_C.log()

    def losses(self, weights_C: Tensor | None) -> tuple[Tensor, Tensor]:
        """(C,) losses and z, weighted."""
        smoothing = self._options.label_smoothing
        losses_C = self._total_C.log() + (1 - smoothing) * self.lead_C
        if self._mean_C is not None:
            losses_C = losses_C - smoothing * self._mean_C
        found = (one_C.masked_fill(self._ignored_C, 0.0) for one_C in (losses_C, self._lse_C.square()))
        losses_C, z_C = (one_C if weights_C is None else one_C * weights_C for one_C in found)
        return losses_C, z_C

    def slope(self, weights_C: Tensor | None) -> Tensor:
        """(C, W) gradients of this rank's raw logits. Overwrites the exponentials."""
        z_loss, smoothing, softcap = self._options
        slope_CW = self._exponentials_CW
        slope_CW *= (self._from_own_top_C * (1 + 2 * z_loss * self._lse_C) / self._total_C)[:, None]
        of_label_C = self._is_here_C.to(slope_CW.dtype) * (smoothing - 1)
        slope_CW.scatter_add_(-1, self._column_C1, of_label_C[:, None])
        if smoothing:
            slope_CW -= smoothing / self._num_columns
        if softcap:
            slope_CW *= 1 - (self._capped_CW / softcap).square()
        if weights_C is not None:
            slope_CW *= weights_C[:, None]
        return slope_CW.masked_fill_(self._ignored_C[:, None], 0.0)


def _predictions(x_TH: Tensor, weight_WH: Tensor, labels_T: Tensor, ranks: SharingRanks, softcap: float) -> Tensor:
    """As `linear_predictions`: (3, T) fp64."""
    check_targets(labels_T, len(weight_WH) * ranks.size)
    matrix_WH, wide = multiplied(weight_WH), torch.promote_types(weight_WH.dtype, torch.float32)
    found_3T = x_TH.new_empty((3, len(x_TH)), dtype=torch.float64)  # ids up to 2**53 are exact
    for chunk in chunk_slices(len(x_TH), len(weight_WH), wide, 0):
        logits_CW = product(multiplied(x_TH[chunk]), matrix_WH.T)
        top_C, likeliest_C = logits_CW.max(-1)
        told_N2C = ranks.each(torch.stack([top_C.double(), likeliest_C.double() + ranks.rank * len(weight_WH)]))
        step = SoftmaxStep(logits_CW, labels_T[chunk], ranks, Options(logit_softcap=softcap))
        losses_C = step.losses(None)[0].double()
        lead_C = step.lead_C.masked_fill(labels_T[chunk] == IGNORED, 0.0)
        best_C, token_C = told_N2C[0]
        for next_C, next_token_C in told_N2C[1:]:
            token_C = next_token_C.where(next_C > best_C, token_C)
            best_C = torch.maximum(best_C, next_C)
        found_3T[:, chunk] = torch.stack([losses_C, losses_C - lead_C, token_C])
        del logits_CW, step
    return found_3T


def _logits(x_TH: Tensor, weight_WH: Tensor, ranks: SharingRanks, softcap: float) -> Tensor:
    logits_TW = x_TH.float() @ weight_WH.float().T
    logits_TV = ranks.each(logits_TW).permute(1, 0, 2).flatten(1)
    return softcap * torch.tanh(logits_TV / softcap) if softcap else logits_TV
