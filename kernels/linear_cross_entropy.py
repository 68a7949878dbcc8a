"""Linear cross-entropy: the loss of hidden states under an output matrix, without ever holding all logits.

    logits[t, v] = hidden[t] . weight[v]
    loss[t]      = logsumexp(logits[t]) - logits[t, target[t]]        0 where target[t] is IGNORED

Shape suffixes: T positions, H hidden width, V vocabulary, C positions of one chunk.
Takes hidden (T, H), weight (V, H) of one floating type and targets (T,) int64. Gives the summed loss, or the loss
of each position, in fp32 (fp64 for fp64 inputs). Guarantees: gradients are computed chunk by chunk inside the
forward pass, where under ZeRO-3 the weight is whole; those of ignored positions are exactly zero. Costs: one
chunk of logits in memory, and a copy of both gradients between forward and backward.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

IGNORED = -100  # the target of a position without one
CHUNK_POSITIONS = 4096  # large enough for full-speed products; a chunk of logits at V = 128k takes 2 GB in fp32


def linear_cross_entropy_reference(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> Tensor:
    """The formula at once, with all logits: (T,) losses. For tests."""
    wide = torch.promote_types(hidden_TH.dtype, torch.float32)
    logits_TV = hidden_TH.to(wide) @ weight_VH.to(wide).T
    return torch.nn.functional.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED, reduction="none")


def linear_cross_entropy(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, chunk_positions: int = CHUNK_POSITIONS
) -> Tensor:
    """The sum of the losses, a scalar; differentiable once in hidden and weight."""
    # Inside the forward of a Function gradients look disabled, and needs_input_grad does not know of no_grad: ask here.
    return _LossSum.apply(hidden_TH, weight_VH, targets_T, chunk_positions, torch.is_grad_enabled())


@torch.no_grad()
def linear_cross_entropy_per_token(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, chunk_positions: int = CHUNK_POSITIONS
) -> Tensor:
    """(T,) losses, 0 at ignored positions; without gradients."""
    weight_VH = _multiplied(weight_VH)
    chunks = zip(hidden_TH.split(chunk_positions), targets_T.split(chunk_positions), strict=True)
    return torch.cat([_losses(_logits(hidden_CH, weight_VH), targets_C)[0] for hidden_CH, targets_C in chunks])


class _LossSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        targets_T: Tensor,
        chunk_positions: int,
        with_gradients: bool,
    ) -> Tensor:
        need_hidden, need_weight = (with_gradients and needed for needed in ctx.needs_input_grad[:2])
        matrix_VH = _multiplied(weight_VH)
        wide = torch.promote_types(hidden_TH.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden_TH.device)
        grad_hidden_TH = torch.empty_like(hidden_TH) if need_hidden else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=wide) if need_weight else None
        for start in range(0, len(hidden_TH), chunk_positions):
            chunk = slice(start, start + chunk_positions)
            hidden_CH = _multiplied(hidden_TH[chunk])
            logits_CV = _logits(hidden_CH, matrix_VH)
            losses_C, log_sum_C = _losses(logits_CV, targets_T[chunk])
            loss += losses_C.sum()
            if need_hidden or need_weight:
                slope_CV = _slope(logits_CV, log_sum_C, targets_T[chunk]).to(matrix_VH.dtype)
            if grad_hidden_TH is not None:
                grad_hidden_TH[chunk] = slope_CV @ matrix_VH
            if grad_weight_VH is not None:
                grad_weight_VH += slope_CV.T @ hidden_CH
        ctx.save_for_backward(grad_hidden_TH, None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        # The loss scale is rounded only together with what it scales: alone in bf16 it would be off by up to 0.4%.
        saved = ctx.saved_tensors
        hidden, weight = (None if one is None else (one.to(grad.dtype) * grad).to(one.dtype) for one in saved)
        return hidden, weight, None, None, None


def _multiplied(matrix: Tensor) -> Tensor:
    """The matrix in the type its products are taken in: fp32 for bf16 on a CPU, where bf16 products are 30 times
    slower (1.2 against 32 GFLOP/s on an AVX2 core) and their sums no more exact."""
    return matrix.float() if matrix.device.type == "cpu" and matrix.dtype is torch.bfloat16 else matrix


def _logits(hidden_CH: Tensor, weight_VH: Tensor) -> Tensor:
    """(C, V) in fp32 at least."""
    logits_CV = hidden_CH.to(weight_VH.dtype) @ weight_VH.T
    return logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))


def _losses(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) losses and (C,) logsumexp."""
    log_sum_C = logits_CV.logsumexp(-1)
    chosen_C = logits_CV.gather(-1, targets_C.clamp_min(0)[:, None])[:, 0]
    return torch.where(targets_C == IGNORED, 0.0, log_sum_C - chosen_C), log_sum_C


def _slope(logits_CV: Tensor, log_sum_C: Tensor, targets_C: Tensor) -> Tensor:
    """d loss / d logits = softmax - one at the target, in the place of the logits; 0 at ignored positions."""
    slope_CV = logits_CV.sub_(log_sum_C[:, None]).exp_()
    slope_CV.scatter_add_(-1, targets_C.clamp_min(0)[:, None], slope_CV.new_full((len(targets_C), 1), -1.0))
    return slope_CV.masked_fill_((targets_C == IGNORED)[:, None], 0.0)
