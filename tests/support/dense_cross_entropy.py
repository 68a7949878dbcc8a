"""Reference of the tests of linear cross-entropy: the formula with all logits, by torch's functions."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel.kernels.linear_cross_entropy import PLAIN, Options, linear_cross_entropy

IGNORED = -100
OPTIONS = {
    f"z_loss {z_loss:g}, smoothing {smoothing:g}, softcap {softcap:g}": Options(z_loss, smoothing, softcap)
    for z_loss in (0.0, 0.03)
    for smoothing in (0.0, 0.2)
    for softcap in (0.0, 2.5)
}


class Inputs(NamedTuple):
    hidden_TH: Tensor
    weight_VH: Tensor
    labels_T: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(self.hidden_TH.detach().to(dtype), self.weight_VH.detach().to(dtype), self.labels_T)

    def on(self, device: str) -> "Inputs":
        return Inputs(*(one.detach().to(device) for one in self))

    def leaves(self) -> "Inputs":
        """The same values as leaves that collect gradients."""
        return Inputs(*(one.detach().clone().requires_grad_() for one in self[:2]), self.labels_T)


class Results(NamedTuple):
    """Sums, and gradients of 3 * (loss_sum + z_loss * z_sum)."""

    loss_sum: Tensor
    z_sum: Tensor
    count: Tensor
    grad_hidden_TH: Tensor
    grad_weight_VH: Tensor


def make_inputs(
    dtype: torch.dtype = torch.float32, positions: int = 23, vocabulary: int = 31, width: int = 8
) -> Inputs:
    """Random inputs with logits of about 3; the first and the last label and two neighbours are ignored."""
    generator = torch.Generator().manual_seed(3)
    hidden_TH = torch.randn(positions, width, generator=generator).to(dtype)
    weight_VH = (torch.randn(vocabulary, width, generator=generator) * 3 * width**-0.5).to(dtype)
    labels_T = torch.randint(vocabulary, (positions,), generator=generator)
    labels_T[1], labels_T[2] = 0, vocabulary - 1
    labels_T[[0, 7, 8, -1]] = IGNORED
    return Inputs(hidden_TH, weight_VH, labels_T)


def dense_logits(inputs: Inputs, softcap: float) -> Tensor:
    logits_TV = inputs.hidden_TH @ inputs.weight_VH.T
    return softcap * torch.tanh(logits_TV / softcap) if softcap else logits_TV


def dense_results(inputs: Inputs, options: Options = PLAIN) -> Results:
    """The formula in the type of the inputs."""
    inputs = inputs.leaves()
    logits_TV = dense_logits(inputs, options.logit_softcap)
    loss_sum = F.cross_entropy(
        logits_TV, inputs.labels_T, ignore_index=IGNORED, reduction="sum", label_smoothing=options.label_smoothing
    )
    counted_T = inputs.labels_T != IGNORED
    z_sum = logits_TV.logsumexp(-1).square()[counted_T].sum()
    gradients = torch.autograd.grad(3 * (loss_sum + options.z_loss * z_sum), inputs[:2])
    return Results(loss_sum.detach(), z_sum.detach(), counted_T.sum(), *gradients)


def our_results(
    inputs: Inputs, options: Options = PLAIN, chunk_positions: int = 0, weights_T: Tensor | None = None
) -> Results:
    inputs = inputs.leaves()
    sums = linear_cross_entropy(*inputs, options, chunk_positions, weights_T)
    return Results(*(one.detach() for one in sums), *torch.autograd.grad(3 * sums.loss_sum, inputs[:2]))


def assert_as_exact_as_plain_torch(ours: Results, inputs: Inputs, options: Options = PLAIN) -> None:
    """Asserts sums exact to fp32, and gradient errors against float64 of at most 3 times those of plain torch."""
    dtype = inputs.hidden_TH.dtype
    truth, plain = dense_results(inputs.to(torch.float64), options), dense_results(inputs, options)
    assert ours.count.item() == truth.count.item() > 0
    for name in ("loss_sum", "z_sum"):
        our_sum, exact_sum = getattr(ours, name), getattr(truth, name).item()
        assert our_sum.dtype == torch.promote_types(dtype, torch.float32)
        assert abs(our_sum.item() - exact_sum) <= 1e-6 * exact_sum, f"{name} {our_sum.item()}, exactly {exact_sum}"
    for name in ("grad_hidden_TH", "grad_weight_VH"):
        our_rows, torch_rows, exact = (getattr(results, name) for results in (ours, plain, truth))
        assert our_rows.dtype == dtype
        assert exact.abs().max() > 0.1, f"{name}: nothing to compare"
        torch_error = (torch_rows.double() - exact).abs().max().item()
        our_error = (our_rows.double() - exact).abs().max().item()
        bound = 3 * torch_error + torch.finfo(dtype).eps
        assert our_error <= bound, f"{name}: error {our_error:.2e}, plain torch {torch_error:.2e}, bound {bound:.2e}"


def assert_losses_as_exact_as_plain_torch(losses_T: Tensor, inputs: Inputs, softcap: float) -> None:
    """Asserts single losses with at most twice plain torch's error against float64; ignored losses are 0."""
    exact_T, torch_T = (
        F.cross_entropy(dense_logits(one, softcap), inputs.labels_T, ignore_index=IGNORED, reduction="none").double()
        for one in (inputs.to(torch.float64), inputs)
    )
    our_error, torch_error = ((one.double() - exact_T).abs().max().item() for one in (losses_T, torch_T))
    assert our_error <= 2 * torch_error + 1e-7, f"error {our_error:.2e}, plain torch {torch_error:.2e}"
    assert (losses_T[inputs.labels_T == IGNORED] == 0).all()
    assert (losses_T[inputs.labels_T != IGNORED] > 0).all()


def make_weights(inputs: Inputs) -> Tensor:
    """Weights of 0, 0.25, 1 and others in turn."""
    weights_T = torch.tensor([0.0, 0.25, 1.0, 0.7, 1e-3]).repeat(len(inputs.labels_T))[: len(inputs.labels_T)]
    return weights_T.to(inputs.labels_T.device)


def weighted_dense_results(inputs: Inputs, weights_T: Tensor, options: Options) -> Results:
    """`dense_results` of each position alone, times its weight."""
    inputs = inputs.leaves()
    logits_TV, weights_T = dense_logits(inputs, options.logit_softcap), weights_T.to(inputs.hidden_TH.dtype)
    losses_T = F.cross_entropy(
        logits_TV, inputs.labels_T, ignore_index=IGNORED, reduction="none", label_smoothing=options.label_smoothing
    )
    counted_T = inputs.labels_T != IGNORED
    loss_sum = (losses_T * weights_T).sum()
    z_sum = (logits_TV.logsumexp(-1).square() * weights_T)[counted_T].sum()
    gradients = torch.autograd.grad(3 * (loss_sum + options.z_loss * z_sum), inputs[:2])
    return Results(loss_sum.detach(), z_sum.detach(), counted_T.sum(), *gradients)
