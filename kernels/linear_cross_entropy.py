"""Linear cross-entropy: the loss of hidden states under an output matrix, without the whole logits in memory.

Formula, for position t with label y, softcap c, smoothing e (0 = off for both) and a vocabulary of V tokens:

    raw[t, v]   = hidden[t] . weight[v]
    logit[t, v] = c * tanh(raw[t, v] / c)                         raw[t, v] where c = 0
    lse[t]      = log(sum_v exp(logit[t, v]))
    loss[t]     = lse[t] - (1 - e) * logit[t, y] - e / V * sum_v logit[t, v]
    z[t]        = lse[t]^2

loss and z are 0 where the label is IGNORED, and multiplied by the position's weight w[t] where weights are given. The
backward differentiates sum_t loss[t] + z_loss * z[t]:

    d raw[t, v] = w[t] * (softmax_v * (1 + 2 * z_loss * lse[t]) - (1 - e) * [v = y] - e / V)
                  * (1 - (logit[t, v] / c)^2)

In: hidden (T, H), weight (V, H) of one floating type with any strides, labels (T,) int64, and the weights (T,) fp32 of
the positions or None, which is the same as 1 everywhere, bitwise. Out: the sums, or the loss of each position, in fp32
(fp64 for fp64 inputs); sums are taken in fp64, over positions in order. A chunk here is a run of positions. Guarantees:
gradients are computed chunk by chunk inside the forward, where under ZeRO-3 the weight is whole, and only if needed;
16-bit products are accumulated in fp32, also across chunks; two runs agree bitwise; gradients of ignored positions are
exactly zero; nothing waits for a GPU. Costs: 3 matrix products (2 V H operations a position each) with gradients, 1
without; memory for one chunk of logits, at most CHUNK_BYTES, and until the backward the gradient of hidden and an fp32
gradient of the weight.

Example: V = 4, all logits 0, labels [2, IGNORED]: losses [log 4, 0], loss_sum = log 4 = 1.386, count = 1.

Shape suffixes: T positions, H hidden_size, V vocabulary, C positions of one chunk. In kernels: B columns of a block.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from bigmodel.kernels.cpu import bf16_products, is_wide
from bigmodel.kernels.triton_import import HAS_TRITON, INTERPRETED, tl, triton

IGNORED = -100  # the label of a position without one
CHUNK_BYTES = 2**29  # of logits: 1,024 positions at V = 128k, 4,096 at V = 32k; enough rows for products at full speed
CACHE_BYTES = 2**20  # of logits on a CPU: half of a core's second-level cache
HALF_TYPES = (torch.bfloat16, torch.float16)


class Options(NamedTuple):
    """Constants of a run; 0: off."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    logit_softcap: float = 0.0


PLAIN = Options()


# Part 2: the reference of the softmax step; runs on CPU.


def softmax_step_reference(
    logits_CV: Tensor,
    targets_C: Tensor,
    options: Options,
    gradient_type: torch.dtype | None,
    weights_C: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(C,) losses, (C,) z, and (C, V) gradients of the raw logits. Overwrites the logits.

    gradient_type None: no gradients; the third tensor has no meaning.
    """
    z_loss, smoothing, softcap = options
    target_C1 = targets_C.clamp_min(0)[:, None]
    capped_CV = softcap * torch.tanh(logits_CV / softcap) if softcap else logits_CV
    top_C = capped_CV.amax(-1)
    chosen_C = capped_CV.gather(-1, target_C1)[:, 0] - top_C
    mean_C = capped_CV.mean(-1) - top_C if smoothing else 0.0
    slope_CV = capped_CV - top_C[:, None] if softcap else logits_CV.sub_(top_C[:, None])
    total_C = slope_CV.exp_().sum(-1)
    lse_C = top_C + total_C.log()
    ignored_C = targets_C == IGNORED
    losses_C = (total_C.log() - (1 - smoothing) * chosen_C - smoothing * mean_C).masked_fill(ignored_C, 0.0)
    z_C = lse_C.square().masked_fill(ignored_C, 0.0)
    if weights_C is not None:
        losses_C, z_C = losses_C * weights_C, z_C * weights_C
    if gradient_type is None:
        return losses_C, z_C, slope_CV

    slope_CV *= ((1 + 2 * z_loss * lse_C) / total_C)[:, None]
    slope_CV.scatter_add_(-1, target_C1, slope_CV.new_full((len(targets_C), 1), smoothing - 1))
    if smoothing:
        slope_CV -= smoothing / logits_CV.shape[1]
    if softcap:
        slope_CV *= 1 - (capped_CV / softcap).square()
    if weights_C is not None:
        slope_CV *= weights_C[:, None]
    return losses_C, z_C, slope_CV.masked_fill_(ignored_C[:, None], 0.0).to(gradient_type)


# Part 3: the Triton kernel of the softmax step.

BLOCK = 4096  # columns read at a time
NUM_WARPS = 8


@triton.jit
def tanh(x):
    """tanh to a few units in the last place of fp32; near 0 by its series, because 1 - 2 / (exp(2x) + 1) cancels."""
    square = x * x
    tail = square * (-17.0 / 315 + square * (62.0 / 2835))
    near = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + tail)))
    return tl.where(tl.abs(x) < 0.25, near, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def load_logits(row, column, num_columns, SOFTCAP: tl.constexpr):
    """(B,) soft-capped logits, -inf beyond the last column."""
    inside = column < num_columns
    logit_B = tl.load(row + column, mask=inside, other=0.0)
    if SOFTCAP > 0:
        logit_B = SOFTCAP * tanh(logit_B / SOFTCAP)
    return tl.where(inside, logit_B, float("-inf"))


@triton.jit
def softmax_kernel(logits, gradients, labels, weights, losses, zs, row_stride, gradient_stride, num_columns,
                   Z_LOSS: tl.constexpr, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, IGNORED: tl.constexpr,
                   WITH_WEIGHTS: tl.constexpr, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program: loss, z and the gradient of one row, which overwrites the logits. An ignored row is not read.

    A 16-bit gradient takes the first half of its row's memory. Its block n overwrites logits of blocks up to n. So
    blocks run in order, and no thread writes block n before all threads have read it.
    """
    place = tl.program_id(0).to(tl.int64)
    logits += place * row_stride
    gradients += place * gradient_stride
    label = tl.load(labels + place)
    if label == IGNORED:
        tl.store(losses + place, 0.0)
        tl.store(zs + place, 0.0)
        if WITH_GRADIENT:
            for start in range(0, num_columns, BLOCK):
                column = start + tl.arange(0, BLOCK)
                nothing_B = tl.zeros([BLOCK], gradients.dtype.element_ty)
                tl.store(gradients + column, nothing_B, mask=column < num_columns)
        return

    top = float("-inf")
    total = 0.0
    logit_sum = 0.0
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        logit_B = load_logits(logits, column, num_columns, SOFTCAP)
        new_top = tl.maximum(top, tl.max(logit_B, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(logit_B - new_top), 0)
        top = new_top
        if SMOOTHING > 0:
            logit_sum += tl.sum(tl.where(column < num_columns, logit_B, 0.0), 0)
    log_total = tl.log(total)
    lse = top + log_total
    target_logit = tl.load(logits + label)
    if SOFTCAP > 0:
        target_logit = SOFTCAP * tanh(target_logit / SOFTCAP)
    loss = log_total - (1.0 - SMOOTHING) * (target_logit - top)  # relative to top: a large lse would be rounded
    if SMOOTHING > 0:
        loss -= SMOOTHING * (logit_sum / num_columns - top)
    z = lse * lse
    if WITH_WEIGHTS:
        weight = tl.load(weights + place)
        loss *= weight
        z *= weight
    tl.store(losses + place, loss)
    tl.store(zs + place, z)

    if WITH_GRADIENT:
        scale = (1.0 + 2.0 * Z_LOSS * lse) / total
        for start in range(0, num_columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            logit_B = load_logits(logits, column, num_columns, SOFTCAP)
            slope_B = tl.exp(logit_B - top) * scale - tl.where(column == label, 1.0 - SMOOTHING, 0.0)
            if SMOOTHING > 0:
                slope_B -= SMOOTHING / num_columns
            if SOFTCAP > 0:
                slope_B *= 1.0 - (logit_B / SOFTCAP) * (logit_B / SOFTCAP)
            if WITH_WEIGHTS:
                slope_B *= weight
            tl.debug_barrier()  # all threads of the program have read their part of this block
            tl.store(gradients + column, slope_B.to(gradients.dtype.element_ty), mask=column < num_columns)


def softmax_step_triton(
    logits_CV: Tensor,
    targets_C: Tensor,
    options: Options,
    gradient_type: torch.dtype | None,
    weights_C: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`softmax_step_reference` for fp32 logits; the gradients overwrite the logits."""
    rows, columns = logits_CV.shape
    losses_C, z_C = logits_CV.new_empty(rows), logits_CV.new_empty(rows)
    half = gradient_type in HALF_TYPES
    gradient_CV = logits_CV.view(gradient_type)[:, :columns] if half else logits_CV
    softmax_kernel[(rows,)](
        logits_CV, gradient_CV, targets_C, losses_C if weights_C is None else weights_C, losses_C, z_C,
        logits_CV.stride(0), gradient_CV.stride(0), columns,
        Z_LOSS=options.z_loss, SMOOTHING=options.label_smoothing, SOFTCAP=options.logit_softcap, IGNORED=IGNORED,
        WITH_WEIGHTS=weights_C is not None, WITH_GRADIENT=gradient_type is not None, **launch_options(columns),
    )  # fmt: skip
    return losses_C, z_C, gradient_CV


def launch_options(columns: int) -> dict[str, int]:
    """BLOCK and num_warps for a vocabulary of this size."""
    return {"BLOCK": min(BLOCK, max(16, 1 << (columns - 1).bit_length())), "num_warps": NUM_WARPS}


# Part 4: chunks, and autograd.


def chunk_slices(num_tokens: int, vocabulary: int, wide: torch.dtype, chunk_positions: int) -> Iterator[slice]:
    """The chunks of a batch; chunk_positions 0: a multiple of 128 positions whose logits fit into CHUNK_BYTES."""
    fitting = CHUNK_BYTES // (wide.itemsize * vocabulary) // 128 * 128
    positions = chunk_positions or max(128, fitting)
    return (slice(start, start + positions) for start in range(0, num_tokens, positions))


def softmax_step(
    logits_CV: Tensor,
    targets_C: Tensor,
    options: Options,
    gradient_type: torch.dtype | None,
    weights_C: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    on_gpu = HAS_TRITON and (logits_CV.device.type == "cuda" or INTERPRETED)
    step = softmax_step_triton if on_gpu and logits_CV.dtype == torch.float32 else softmax_step_in_cache
    return step(logits_CV, targets_C, options, gradient_type, weights_C)


def softmax_step_in_cache(
    logits_CV: Tensor,
    targets_C: Tensor,
    options: Options,
    gradient_type: torch.dtype | None,
    weights_C: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`softmax_step_reference`, on a CPU by rows that stay in a core's cache through its passes; same bits."""
    rows = max(1, CACHE_BYTES // (logits_CV.element_size() * logits_CV.shape[1]))
    if logits_CV.device.type != "cpu" or rows >= len(logits_CV):
        return softmax_step_reference(logits_CV, targets_C, options, gradient_type, weights_C)
    losses_C, z_C = logits_CV.new_empty(len(logits_CV)), logits_CV.new_empty(len(logits_CV))
    in_place = gradient_type in (None, logits_CV.dtype)
    slope_CV = logits_CV if in_place else torch.empty_like(logits_CV, dtype=gradient_type)
    for start in range(0, len(logits_CV), rows):
        part = slice(start, start + rows)
        losses_C[part], z_C[part], found_CV = softmax_step_reference(
            logits_CV[part], targets_C[part], options, gradient_type, part_of(weights_C, part)
        )
        if found_CV.data_ptr() != slope_CV[part].data_ptr():
            slope_CV[part] = found_CV
    return losses_C, z_C, slope_CV


def multiplied(matrix: Tensor) -> Tensor:
    """The matrix in the type of its products: fp32 for 16-bit types on a CPU without units for them."""
    return matrix.float() if is_wide(matrix) else matrix


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, in fp32 at least: 16-bit products are accumulated in fp32 and not rounded."""
    if right.dtype in HALF_TYPES and right.device.type == "cpu":
        with bf16_products():
            return torch.mm(left.float(), right.float())
    return torch.mm(left, right, out_dtype=torch.float32) if left.dtype in HALF_TYPES else torch.mm(left, right)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in the type of the total (fp32 for 16-bit products: torch 2.10 or later, PR 167931)."""
    if right.dtype in HALF_TYPES and right.device.type == "cpu":
        with bf16_products():
            total.addmm_(left.float(), right.float())
    elif left.dtype in HALF_TYPES:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left, right)


def sums_and_gradients(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor,
    z_loss: float, label_smoothing: float, logit_softcap: float,
    need_hidden: bool, need_weight: bool, chunk_positions: int, weights_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss sum, z sum, count, the gradients of hidden and (in fp32 at least) of the weight, empty where not needed, and
    the loss of each position."""
    check_targets(targets_T, len(weight_VH))
    options = Options(z_loss, label_smoothing, logit_softcap)
    wide = torch.promote_types(weight_VH.dtype, torch.float32)
    matrix_VH = multiplied(weight_VH)
    # On a CPU fp32: `product` rounds, and would widen bf16 again.
    slope_type = wide if matrix_VH.device.type == "cpu" else matrix_VH.dtype
    gradient_type = slope_type if need_hidden or need_weight else None
    losses_T, z_T = (torch.empty(len(hidden_TH), dtype=wide, device=hidden_TH.device) for _ in range(2))
    grad_hidden_TH = torch.empty_like(hidden_TH) if need_hidden else hidden_TH.new_empty(0)
    grad_weight_VH = torch.zeros_like(weight_VH, dtype=wide) if need_weight else weight_VH.new_empty(0, dtype=wide)
    for chunk in chunk_slices(len(hidden_TH), len(weight_VH), wide, chunk_positions):
        hidden_CH = multiplied(hidden_TH[chunk])
        logits_CV = product(hidden_CH, matrix_VH.T)
        losses_T[chunk], z_T[chunk], slope_CV = softmax_step(
            logits_CV, targets_T[chunk], options, gradient_type, part_of(weights_T, chunk)
        )
        if need_hidden:
            grad_hidden_TH[chunk] = product(slope_CV, matrix_VH)
        if need_weight:
            add_product(grad_weight_VH, slope_CV.T, hidden_CH)
        del logits_CV, slope_CV  # otherwise two chunks of logits would be in memory at once
    loss_sum, z_sum = (rows_T.sum(dtype=torch.float64).to(wide) for rows_T in (losses_T, z_T))
    return loss_sum, z_sum, (targets_T != IGNORED).sum(), grad_hidden_TH, grad_weight_VH, losses_T


def part_of(weights_T: Tensor | None, chunk: slice) -> Tensor | None:
    return None if weights_T is None else weights_T[chunk]


def check_targets(targets_T: Tensor, vocabulary: int) -> None:
    good_T = (targets_T == IGNORED) | ((targets_T >= 0) & (targets_T < vocabulary))
    need = f"labels need to be {IGNORED} (ignored) or 0 to {vocabulary - 1}, the rows of the weight"
    if targets_T.device.type != "cpu":
        torch._assert_async(good_T.all(), need)
    elif not good_T.all():
        raise ValueError(f"linear cross-entropy got the label {int(targets_T[~good_T][0])}; {need}")


linear_cross_entropy_op = library.custom_op("bigmodel::linear_cross_entropy", mutates_args=())(sums_and_gradients)


@linear_cross_entropy_op.register_fake
def _(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, _z: float, _smoothing: float, _softcap: float,
    need_hidden: bool, need_weight: bool, _positions: int, _weights_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(weight_VH.dtype, torch.float32)
    loss_sum, z_sum = (hidden_TH.new_empty((), dtype=wide) for _ in range(2))
    grad_hidden_TH = torch.empty_like(hidden_TH) if need_hidden else hidden_TH.new_empty(0)
    grad_weight_VH = torch.empty_like(weight_VH, dtype=wide) if need_weight else weight_VH.new_empty(0, dtype=wide)
    count, losses_T = targets_T.new_empty((), dtype=torch.int64), hidden_TH.new_empty(len(hidden_TH), dtype=wide)
    return loss_sum, z_sum, count, grad_hidden_TH, grad_weight_VH, losses_T


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:5])
    ctx.type, ctx.needed = inputs[0].dtype, inputs[6:8]


def _differentiate(ctx: Any, grad: Tensor | None, *_others: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError("linear cross-entropy is differentiable once; its gradient has no gradient")
    gradients = zip(ctx.saved_tensors, ctx.needed, strict=True)
    return *(scaled(one, grad, ctx.type) if needed else None for one, needed in gradients), *(None,) * 8


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor in fp32 at least, rounded once to `dtype`, without an fp32 copy.

    A zero-dimensional factor would first be rounded to the gradient's type: an error of up to 0.4% in bf16.
    """
    return torch.mul(gradient, factor.view(1, 1), out=torch.empty_like(gradient, dtype=dtype))


linear_cross_entropy_op.register_autograd(_differentiate, setup_context=_remember)


# Part 5: the public functions.


class LossSums(NamedTuple):
    """Sums over the positions with a label, each with its weight, and the number of these positions.

    The backward of `loss_sum` gives the gradient of loss_sum + z_loss * z_sum, so that reported losses are comparable
    across values of z_loss. z_sum and count have no gradient.
    """

    loss_sum: Tensor
    z_sum: Tensor
    count: Tensor


def linear_cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    options: Options = PLAIN,
    chunk_positions: int = 0,
    weights_T: Tensor | None = None,
) -> LossSums:
    """The sums of losses and z, and the count of labels; differentiable once in hidden and weight.

    `chunk_positions` 0: as many as fit into CHUNK_BYTES of logits. Raises ValueError for wrong shapes, types, labels
    or options; on a GPU an assertion on the device checks the labels.
    """
    return linear_cross_entropy_and_losses(hidden_TH, weight_VH, targets_T, options, chunk_positions, weights_T)[0]


def linear_cross_entropy_and_losses(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    options: Options = PLAIN,
    chunk_positions: int = 0,
    weights_T: Tensor | None = None,
) -> tuple[LossSums, Tensor]:
    """`linear_cross_entropy`, and the weighted loss of each position, at no extra cost; that has no gradient."""
    check_inputs(hidden_TH, weight_VH, targets_T, options, weights_T)
    # Inside an operator is_grad_enabled() is False, so it is read here.
    needed = (torch.is_grad_enabled() and one.requires_grad for one in (hidden_TH, weight_VH))
    found = linear_cross_entropy_op(hidden_TH, weight_VH, targets_T, *options, *needed, chunk_positions, weights_T)
    loss_sum, z_sum, count, _, _, losses_T = found
    return LossSums(loss_sum, z_sum, count), losses_T


@torch.no_grad()
def linear_cross_entropy_per_token(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    logit_softcap: float = 0.0,
    chunk_positions: int = 0,
    weights_T: Tensor | None = None,
) -> Tensor:
    """(T,) weighted losses, 0 at ignored positions, for evaluation: no gradients, z-loss or smoothing."""
    options = Options(logit_softcap=logit_softcap)
    check_inputs(hidden_TH, weight_VH, targets_T, options, weights_T)
    check_targets(targets_T, len(weight_VH))
    matrix_VH = multiplied(weight_VH)
    losses_T = torch.empty(
        len(hidden_TH), dtype=torch.promote_types(weight_VH.dtype, torch.float32), device=hidden_TH.device
    )
    for chunk in chunk_slices(len(hidden_TH), len(weight_VH), losses_T.dtype, chunk_positions):
        logits_CV = product(multiplied(hidden_TH[chunk]), matrix_VH.T)
        losses_T[chunk] = softmax_step(logits_CV, targets_T[chunk], options, None, part_of(weights_T, chunk))[0]
        del logits_CV
    return losses_T


@torch.no_grad()
def linear_predictions(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, logit_softcap: float = 0.0, chunk_positions: int = 0
) -> Tensor:
    """(3, T) fp64 for evaluation: the losses of `linear_cross_entropy_per_token` without weights, and of every
    position's likeliest token the negated log-probability and the id. Without a label the first two are 0.
    """
    options = Options(logit_softcap=logit_softcap)
    check_inputs(hidden_TH, weight_VH, targets_T, options, None)
    check_targets(targets_T, len(weight_VH))
    matrix_VH = multiplied(weight_VH)
    wide = torch.promote_types(weight_VH.dtype, torch.float32)
    found_3T = hidden_TH.new_empty((3, len(hidden_TH)), dtype=torch.float64)  # ids up to 2**53 are exact
    for chunk in chunk_slices(len(hidden_TH), len(weight_VH), wide, chunk_positions):
        logits_CV, targets_C = product(multiplied(hidden_TH[chunk]), matrix_VH.T), targets_T[chunk]
        top_C, likeliest_C = logits_CV.max(-1)
        asked_C = logits_CV.gather(-1, targets_C.clamp_min(0)[:, None])[:, 0]
        if logit_softcap:
            top_C, asked_C = (logit_softcap * torch.tanh(one_C / logit_softcap) for one_C in (top_C, asked_C))
        losses_C = softmax_step(logits_CV, targets_C, options, None, None)[0]
        lead_C = (top_C - asked_C).masked_fill(targets_C == IGNORED, 0.0)
        found_3T[:, chunk] = torch.stack([losses_C.double(), losses_C.double() - lead_C, likeliest_C.double()])
        del logits_CV
    return found_3T


def check_inputs(
    hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, options: Options, weights_T: Tensor | None
) -> None:
    shapes = f"hidden {tuple(hidden_TH.shape)}, weight {tuple(weight_VH.shape)}, labels {tuple(targets_T.shape)}"
    if hidden_TH.dim() != 2 or weight_VH.dim() != 2 or hidden_TH.shape[1] != weight_VH.shape[1]:
        raise ValueError(f"linear cross-entropy got {shapes}; it needs hidden (T, H) and weight (V, H) with the same H")
    if targets_T.shape != hidden_TH.shape[:1] or targets_T.dtype != torch.int64:
        raise ValueError(f"linear cross-entropy got {shapes} of {targets_T.dtype}; it needs T labels of torch.int64")
    if weights_T is not None and (weights_T.shape != targets_T.shape or weights_T.dtype != torch.float32):
        raise ValueError(
            f"linear cross-entropy got weights {tuple(weights_T.shape)} of {weights_T.dtype}; it needs T weights of "
            "torch.float32"
        )
    if hidden_TH.dtype != weight_VH.dtype:
        raise ValueError(
            f"linear cross-entropy got hidden {hidden_TH.dtype}, weight {weight_VH.dtype}; cast them to one type"
        )
    if options.z_loss < 0 or options.logit_softcap < 0 or not 0 <= options.label_smoothing < 1:
        raise ValueError(
            f"linear cross-entropy got {options}; z_loss and logit_softcap need to be at least 0, "
            "label_smoothing at least 0 and below 1"
        )
