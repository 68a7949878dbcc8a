"""Linear cross-entropy: the loss and both gradients are those of the formula, whatever the chunks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear_cross_entropy import IGNORED, linear_cross_entropy, linear_cross_entropy_per_token

POSITIONS, WIDTH, VOCABULARY = 23, 8, 31


def example(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden_TH = torch.randn(POSITIONS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight_VH = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets_T = torch.randint(VOCABULARY, (POSITIONS,), generator=generator)
    targets_T[[0, 7, 8, 22]] = IGNORED
    return hidden_TH, weight_VH, targets_T


def exactly(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> list[Tensor]:
    """[loss of each position, gradients of their sum times 3 in hidden and in weight], in float64."""
    wide = [rows.detach().double().requires_grad_() for rows in (hidden_TH, weight_VH)]
    losses_T = F.cross_entropy(wide[0] @ wide[1].T, targets_T, ignore_index=-100, reduction="none")
    return [losses_T.detach(), *torch.autograd.grad(3 * losses_T.sum(), wide)]


@pytest.mark.parametrize("chunk_positions", [1, 5, 23, 4096])
@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2**-7)]
)
def test_loss_and_gradients_are_exact(dtype: torch.dtype, relative: float, chunk_positions: int) -> None:
    hidden_TH, weight_VH, targets_T = example(dtype)
    losses_T, exact_hidden, exact_weight = exactly(hidden_TH, weight_VH, targets_T)
    loss = linear_cross_entropy(hidden_TH, weight_VH, targets_T, chunk_positions)
    (3 * loss).backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.item() == pytest.approx(losses_T.sum().item(), rel=min(relative, 1e-5))
    for gradient, exact in ((hidden_TH.grad, exact_hidden), (weight_VH.grad, exact_weight)):
        assert gradient.dtype == dtype
        assert (gradient.double() - exact).norm() <= relative * exact.norm()


@pytest.mark.parametrize("chunk_positions", [4, 4096])
def test_losses_of_single_positions(chunk_positions: int) -> None:
    hidden_TH, weight_VH, targets_T = example(torch.float32)
    losses_T = linear_cross_entropy_per_token(hidden_TH, weight_VH, targets_T, chunk_positions)
    torch.testing.assert_close(losses_T.double(), exactly(hidden_TH, weight_VH, targets_T)[0], rtol=1e-5, atol=1e-5)
    assert losses_T.dtype == torch.float32
    assert not losses_T.requires_grad
    assert losses_T[targets_T == IGNORED].tolist() == [0.0] * 4


def test_ignored_positions_have_no_gradient_and_no_influence() -> None:
    hidden_TH, weight_VH, targets_T = example(torch.float32)
    linear_cross_entropy(hidden_TH, weight_VH, targets_T).backward()
    assert (hidden_TH.grad[targets_T == IGNORED] == 0).all()
    assert (hidden_TH.grad[targets_T != IGNORED] != 0).any(-1).all()

    edited = hidden_TH.detach().masked_fill((targets_T == IGNORED)[:, None], 50.0).requires_grad_()
    other_weight = weight_VH.detach().clone().requires_grad_()
    linear_cross_entropy(edited, other_weight, targets_T).backward()
    assert torch.equal(other_weight.grad, weight_VH.grad)


def test_the_weight_may_be_the_embedding_too() -> None:
    _, weight_VH, targets_T = example(torch.float64)
    tokens_T = targets_T.clamp_min(0).roll(1)
    linear_cross_entropy(torch.tanh(weight_VH[tokens_T]), weight_VH, targets_T).backward()
    tied = weight_VH.detach().clone().requires_grad_()
    F.cross_entropy(torch.tanh(tied[tokens_T]) @ tied.T, targets_T, ignore_index=-100, reduction="sum").backward()
    torch.testing.assert_close(weight_VH.grad, tied.grad, rtol=1e-12, atol=1e-12)


def test_only_the_wanted_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_TH, weight_VH, targets_T = example(torch.float32)
    linear_cross_entropy(hidden_TH, weight_VH.detach(), targets_T).backward()
    assert hidden_TH.grad is not None
    assert weight_VH.grad is None

    def refuse(*_inputs: Tensor) -> Tensor:
        raise AssertionError("a gradient was computed where none was asked for")

    monkeypatch.setattr("kernels.linear_cross_entropy._slope", refuse)
    with torch.no_grad():
        assert linear_cross_entropy(hidden_TH, weight_VH, targets_T) > 0
    with pytest.raises(AssertionError, match="a gradient was computed"):
        linear_cross_entropy(hidden_TH, weight_VH, targets_T)


def test_a_loss_scale_is_not_rounded_to_bf16_before_it_is_used() -> None:
    """1 / 1003 in bf16 is off by 0.2%; the gradient's norm must not be."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1003, 64).bfloat16(), torch.randn(211, 64).bfloat16().requires_grad_()
    targets = torch.randint(0, 211, (1003,))
    norms = {}
    for scale in (1.0, 1 / 1003, 3 / 1003):
        weight.grad = None
        (linear_cross_entropy(hidden, weight, targets) * scale).backward()
        norms[scale] = weight.grad.float().norm().item() / scale
    assert max(norms.values()) / min(norms.values()) - 1 < 3e-4
