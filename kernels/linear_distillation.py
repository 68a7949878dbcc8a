"""Linear distillation: the label loss and the divergence from a teacher, without the whole logits of either in memory.

Formula, for position t, temperature U, N tokens that both models know, and the softcapped logits s of the student and r
of the teacher (Hinton et al. 2015):

    log q[t]      = log_softmax(s[t, :N] / U)             the student
    log p[t]      = log_softmax(r[t, :N] / U)             the teacher
    divergence[t] = U^2 * sum_v p[t, v] * (log p[t, v] - log q[t, v])      forward: KL(p || q)
                    U^2 * sum_v q[t, v] * (log q[t, v] - log p[t, v])      reverse: KL(q || p)

With top_k = k < N the k tokens that the teacher finds likeliest keep their p, and all others are one event: p of the
others is shared out among them as the student's q is. So the divergence is that of k + 1 events; it is at most the full
one, and equal to it at k = N - 1.

Divergence and label loss are 0 where the label is IGNORED, and multiplied by the position's weight w[t]. With the share
a of the divergence, the backward differentiates

    sum_t (1 - a) * loss[t] + z_loss * z[t] + a * divergence[t]

    d divergence[t] / d s[t, v] = w[t] * U * (q - p)                                     forward
                                  w[t] * U * q * (log q - log p - divergence / U^2)      reverse

with loss and z of `linear_cross_entropy`, to which the value of loss_sum is equal.

In: hidden (T, H) and weight (V, H) of the student, hidden (T, E) and weight (N, E) of the teacher, N <= V, each pair of
one floating type; labels and weights as there. Out: sums in fp32 (fp64 for fp64 inputs). Guarantees: those of
`linear_cross_entropy`; a student equal to its teacher has the divergence 0 and the gradient 0, exactly. Costs: one more
product than it; the logits of both models together take at most CHUNK_BYTES, a few arrays of BLOCK_BYTES come on top.

Example: U = 1, N = 2, p = [1/2, 1/2], q = [1/4, 3/4]: forward log(2) / 2 + log(2/3) / 2 = 0.144.

Shape suffixes: as in linear_cross_entropy.py; E the teacher's hidden size, N tokens, R positions of one block.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, library

from bigmodel.kernels.linear_cross_entropy import (
    IGNORED,
    PLAIN,
    LossSums,
    Options,
    add_product,
    check_inputs,
    check_targets,
    chunk_slices,
    multiplied,
    part_of,
    product,
    scaled,
    softmax_step,
)

BLOCK_BYTES = 2**26  # of the arrays in a step of the divergence: 128 positions at N = 128k


class Divergence(NamedTuple):
    """Constants of a run: share of the divergence beside the label loss, temperature, 0 or k, direction."""

    share: float = 0.5
    temperature: float = 1.0
    top_k: int = 0
    direction: Literal["forward", "reverse"] = "forward"


@dataclass(frozen=True, eq=False)
class Taught:
    """The teacher's side of a batch: its hidden states, output matrix and softcap, and how it is compared."""

    hidden_TE: Tensor
    weight_NE: Tensor
    divergence: Divergence
    logit_softcap: float = 0.0


class DistillationSums(NamedTuple):
    """`LossSums` of the labels, and the sum of the divergences, which has no gradient of its own: the backward of
    `labels.loss_sum` is that of both."""

    labels: LossSums
    divergence_sum: Tensor


# The step of the divergence, in plain torch on every device.


def divergence_step(
    logits_CN: Tensor, teacher_CN: Tensor, options: Divergence, softcaps: tuple[float, float]
) -> Tensor:
    """(C,) divergences. Overwrites the teacher's raw logits with the gradients by the student's raw logits."""
    rows = max(1, BLOCK_BYTES // (teacher_CN.element_size() * teacher_CN.shape[1]))
    blocks = zip(logits_CN.split(rows), teacher_CN.split(rows), strict=True)
    return torch.cat([_block_step(logits_RN, teacher_RN, options, softcaps) for logits_RN, teacher_RN in blocks])


def _block_step(logits_RN: Tensor, teacher_RN: Tensor, options: Divergence, softcaps: tuple[float, float]) -> Tensor:
    temperature = options.temperature
    capped_RN = _capped(logits_RN, softcaps[0])
    log_q_RN = torch.log_softmax(capped_RN / temperature, -1)
    log_p_RN = torch.log_softmax(_capped(teacher_RN, softcaps[1]) / temperature, -1)
    if 0 < options.top_k < teacher_RN.shape[1]:
        log_p_RN = _with_students_tail(log_p_RN, log_q_RN, options.top_k)
    lead_RN = log_p_RN - log_q_RN
    q_RN = log_q_RN.exp_()
    if options.direction == "forward":
        p_RN = log_p_RN.exp_()
        divergence_R = (p_RN * lead_RN).sum(-1)
        torch.sub(q_RN, p_RN, out=teacher_RN)
    else:
        divergence_R = -(q_RN * lead_RN).sum(-1)
        torch.mul(q_RN, lead_RN.add_(divergence_R[:, None]).neg_(), out=teacher_RN)
    teacher_RN *= temperature
    if softcaps[0]:
        teacher_RN *= 1 - (capped_RN / softcaps[0]).square()
    return divergence_R * temperature**2


def _capped(logits_RN: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits_RN / softcap) if softcap else logits_RN


def _with_students_tail(log_p_RN: Tensor, log_q_RN: Tensor, top_k: int) -> Tensor:
    """The teacher's log-probabilities, those beyond its top k spread as the student's are."""
    kept_Rk, chosen_Rk = log_p_RN.topk(top_k, dim=-1)
    tails_R1 = (
        log_RN.scatter(-1, chosen_Rk, float("-inf")).logsumexp(-1, keepdim=True) for log_RN in (log_p_RN, log_q_RN)
    )
    tail_p_R1, tail_q_R1 = tails_R1
    return (log_q_RN + (tail_p_R1 - tail_q_R1)).scatter_(-1, chosen_Rk, kept_Rk)


# Chunks, and autograd.


def sums_and_gradients(
    hidden_TH: Tensor, weight_VH: Tensor, hidden_TE: Tensor, weight_NE: Tensor, targets_T: Tensor,
    z_loss: float, label_smoothing: float, logit_softcap: float, teacher_softcap: float,
    share: float, temperature: float, top_k: int, direction: str,
    need_hidden: bool, need_weight: bool, chunk_positions: int, weights_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss sum, z sum, count, divergence sum, the gradients of hidden and weight (empty where not needed), and the loss
    of each position."""
    check_targets(targets_T, len(weight_VH))
    # The z-loss keeps its whole weight beside labels that have 1 - share of it.
    options = Options(z_loss / (1 - share) if share < 1 else 0.0, label_smoothing, logit_softcap)
    divergence = Divergence(share, temperature, top_k, direction)  # type: ignore[arg-type]
    wide = torch.promote_types(weight_VH.dtype, torch.float32)
    matrix_VH, matrix_NE, tokens = multiplied(weight_VH), multiplied(weight_NE), len(weight_NE)
    needed = need_hidden or need_weight
    losses_T, z_T, divergence_T = (hidden_TH.new_empty(len(hidden_TH), dtype=wide) for _ in range(3))
    grad_hidden_TH = torch.empty_like(hidden_TH) if need_hidden else hidden_TH.new_empty(0)
    grad_weight_VH = torch.zeros_like(weight_VH, dtype=wide) if need_weight else weight_VH.new_empty(0, dtype=wide)
    for chunk in chunk_slices(len(hidden_TH), len(weight_VH) + tokens, wide, chunk_positions):
        hidden_CH, weights_C, targets_C = multiplied(hidden_TH[chunk]), part_of(weights_T, chunk), targets_T[chunk]
        logits_CV = product(hidden_CH, matrix_VH.T)
        teacher_CN = product(multiplied(hidden_TE[chunk]), matrix_NE.T).to(wide)
        factor_C = (targets_C != IGNORED).to(wide) * (1.0 if weights_C is None else weights_C)
        softcaps = (logit_softcap, teacher_softcap)
        divergence_T[chunk] = divergence_step(logits_CV[:, :tokens], teacher_CN, divergence, softcaps) * factor_C
        losses_T[chunk], z_T[chunk], slope_CV = softmax_step(
            logits_CV, targets_C, options, wide if needed else None, weights_C
        )
        if needed:
            slope_CV *= 1 - share
            slope_CV[:, :tokens].addcmul_(teacher_CN, (share * factor_C)[:, None])
            slope_CV = slope_CV.to(matrix_VH.dtype)
        del teacher_CN
        if need_hidden:
            grad_hidden_TH[chunk] = product(slope_CV, matrix_VH)
        if need_weight:
            add_product(grad_weight_VH, slope_CV.T, hidden_CH)
        del logits_CV, slope_CV  # otherwise two chunks of logits would be in memory at once
    loss_sum, z_sum, divergence_sum = (
        rows_T.sum(dtype=torch.float64).to(wide) for rows_T in (losses_T, z_T, divergence_T)
    )
    count = (targets_T != IGNORED).sum()
    return loss_sum, z_sum, count, divergence_sum, grad_hidden_TH, grad_weight_VH, losses_T


linear_distillation_op = library.custom_op("bigmodel::linear_distillation", mutates_args=())(sums_and_gradients)


@linear_distillation_op.register_fake
def _(
    hidden_TH: Tensor, weight_VH: Tensor, _hidden_TE: Tensor, _weight_NE: Tensor, targets_T: Tensor,
    _z: float, _smoothing: float, _softcap: float, _teacher_softcap: float,
    _share: float, _temperature: float, _top_k: int, _direction: str,
    need_hidden: bool, need_weight: bool, _positions: int, _weights_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(weight_VH.dtype, torch.float32)
    loss_sum, z_sum, divergence_sum = (hidden_TH.new_empty((), dtype=wide) for _ in range(3))
    grad_hidden_TH = torch.empty_like(hidden_TH) if need_hidden else hidden_TH.new_empty(0)
    grad_weight_VH = torch.empty_like(weight_VH, dtype=wide) if need_weight else weight_VH.new_empty(0, dtype=wide)
    count, losses_T = targets_T.new_empty((), dtype=torch.int64), hidden_TH.new_empty(len(hidden_TH), dtype=wide)
    return loss_sum, z_sum, count, divergence_sum, grad_hidden_TH, grad_weight_VH, losses_T


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[4:6])
    ctx.type, ctx.needed, ctx.others = inputs[0].dtype, inputs[13:15], len(inputs) - 2


def _differentiate(ctx: Any, grad: Tensor | None, *_others: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * (2 + ctx.others)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError("linear distillation is differentiable once; its gradient has no gradient")
    gradients = zip(ctx.saved_tensors, ctx.needed, strict=True)
    return *(scaled(one, grad, ctx.type) if needed else None for one, needed in gradients), *(None,) * ctx.others


linear_distillation_op.register_autograd(_differentiate, setup_context=_remember)


# The public function.


def linear_distillation(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    taught: Taught,
    targets_T: Tensor,
    options: Options = PLAIN,
    chunk_positions: int = 0,
    weights_T: Tensor | None = None,
) -> tuple[DistillationSums, Tensor]:
    """The sums, and the weighted label loss of each position, which has no gradient; differentiable once in hidden and
    weight, not in what is taught. `chunk_positions` 0: as many as fit.

    Raises ValueError for wrong shapes, types, labels or options.
    """
    check_inputs(hidden_TH, weight_VH, targets_T, options, weights_T)
    _check(hidden_TH, weight_VH, taught)
    needed = (torch.is_grad_enabled() and one.requires_grad for one in (hidden_TH, weight_VH))
    found = linear_distillation_op(
        hidden_TH, weight_VH, taught.hidden_TE.detach(), taught.weight_NE.detach(), targets_T,
        *options, taught.logit_softcap, *taught.divergence, *needed, chunk_positions, weights_T,
    )  # fmt: skip
    loss_sum, z_sum, count, divergence_sum, _, _, losses_T = found
    return DistillationSums(LossSums(loss_sum, z_sum, count), divergence_sum), losses_T


def _check(hidden_TH: Tensor, weight_VH: Tensor, taught: Taught) -> None:
    hidden_TE, weight_NE, divergence = taught.hidden_TE, taught.weight_NE, taught.divergence
    if (
        hidden_TE.shape[:1] != hidden_TH.shape[:1]
        or hidden_TE.shape[1:] != weight_NE.shape[1:]
        or not 0 < len(weight_NE) <= len(weight_VH)
        or hidden_TE.dtype != weight_NE.dtype
    ):
        raise ValueError(
            f"linear distillation got hidden {tuple(hidden_TE.shape)} {hidden_TE.dtype}, weight "
            f"{tuple(weight_NE.shape)} {weight_NE.dtype} of the teacher; it needs the {len(hidden_TH)} positions and "
            f"at most the {len(weight_VH)} tokens of the student, both of one type"
        )
    share, temperature, top_k, direction = divergence
    if not (0 < share <= 1 and temperature > 0 and top_k >= 0 and direction in ("forward", "reverse")):
        raise ValueError(
            f"linear distillation got {divergence}; share needs to be above 0 and at most 1, temperature above 0, "
            "top_k at least 0"
        )
