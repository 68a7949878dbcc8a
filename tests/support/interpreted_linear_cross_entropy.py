"""The softmax kernel of linear cross-entropy, under Triton's interpreter. Run by test_linear_cross_entropy.py."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, library

from bigmodel.kernels import linear_cross_entropy as module
from bigmodel.kernels.linear_cross_entropy import (
    PLAIN,
    Options,
    linear_cross_entropy_op,
    linear_cross_entropy_per_token,
    softmax_step_reference,
    softmax_step_triton,
)
from bigmodel.kernels.triton_import import INTERPRETED
from tests.support.dense_cross_entropy import (
    IGNORED,
    OPTIONS,
    assert_as_exact_as_plain_torch,
    assert_losses_as_exact_as_plain_torch,
    make_inputs,
    make_weights,
    our_results,
    weighted_dense_results,
)


@pytest.fixture(autouse=True)
def _kernels_alone_on_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of 64 columns; no reference; torch.empty gives NaN, so unwritten values are detected."""
    assert INTERPRETED
    monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.delattr(module, "softmax_step_reference")
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# One partial block; full blocks only; a last block of one column.
@pytest.mark.parametrize("vocabulary", [50, 128, 193])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_in_fp32_the_kernel_is_as_exact_as_plain_torch(options: Options, vocabulary: int) -> None:
    inputs = make_inputs(positions=12, vocabulary=vocabulary)
    assert_as_exact_as_plain_torch(our_results(inputs, options, chunk_positions=5), inputs, options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits_the_kernel_is_as_exact_as_plain_torch(dtype: torch.dtype) -> None:
    options = Options(0.03, 0.2, 2.5)
    inputs = make_inputs(dtype, positions=12, vocabulary=193)
    assert_as_exact_as_plain_torch(our_results(inputs, options, chunk_positions=5), inputs, options)


@pytest.mark.parametrize("softcap", [0.0, 2.5])
def test_losses_of_single_positions(softcap: float) -> None:
    inputs = make_inputs(positions=12, vocabulary=193)
    assert_losses_as_exact_as_plain_torch(linear_cross_entropy_per_token(*inputs, softcap, 5), inputs, softcap)


@pytest.mark.parametrize("options", [PLAIN, Options(0.03, 0.2, 2.5)])
def test_the_kernel_multiplies_by_the_weights(options: Options) -> None:
    inputs = make_inputs(positions=12, vocabulary=193)
    weights_T = make_weights(inputs)
    exact = weighted_dense_results(inputs.to(torch.float64), weights_T, options)
    for ours, expected in zip(our_results(inputs, options, 5, weights_T), exact, strict=True):
        torch.testing.assert_close(ours.double(), expected.double(), rtol=3e-6, atol=3e-6)


def surrounded_logits(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Random fp32 logits as a slice of a larger matrix of NaN, and that matrix."""
    whole = torch.full((rows + 2, columns + 10), torch.nan)
    whole[1:-1, :columns] = 3 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))
    return whole[1:-1, :columns], whole


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_16_bit_gradient_lies_in_the_first_half_of_the_logits(options: Options) -> None:
    logits_CV, whole = surrounded_logits(6, 193)
    targets_C = torch.tensor([0, 192, IGNORED, 64, 100, 63])
    exact = softmax_step_reference(logits_CV.double(), targets_C, options, torch.float64)
    losses_C, z_C, slope_CV = softmax_step_triton(logits_CV, targets_C, options, torch.float16)
    assert slope_CV.dtype == torch.float16
    assert slope_CV.data_ptr() == logits_CV.data_ptr()
    assert slope_CV.shape == (6, 193)
    assert ((slope_CV.double() - exact[2]).abs() <= 2**-10 * exact[2].abs() + 2**-20).all()
    torch.testing.assert_close(losses_C.double(), exact[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(z_C.double(), exact[1], rtol=1e-6, atol=1e-6)
    assert whole[[0, -1]].isnan().all()
    assert whole[1:-1, 193:].isnan().all()


def test_an_ignored_row_of_nan_gives_zeros() -> None:
    logits_CV, _whole = surrounded_logits(3, 100)
    logits_CV[1] = torch.nan
    step = softmax_step_triton(logits_CV, torch.tensor([5, IGNORED, 7]), Options(0.03, 0.2, 2.5), torch.float32)
    for rows in step:
        assert (rows[1] == 0).all()
        assert not rows.isnan().any()


def test_a_row_with_a_nan_is_nan_and_leaves_the_others_alone() -> None:
    logits_CV, _whole = surrounded_logits(3, 100)
    clean = [rows.clone() for rows in softmax_step_triton(logits_CV.clone(), torch.tensor([5, 6, 7]), PLAIN, None)]
    logits_CV[1, 70] = torch.nan
    losses_C, z_C, _ = softmax_step_triton(logits_CV, torch.tensor([5, 6, 7]), PLAIN, torch.float32)
    assert losses_C.isnan().tolist() == z_C.isnan().tolist() == [False, True, False]
    assert torch.equal(losses_C[[0, 2]], clean[0][[0, 2]])


def test_huge_logits_do_not_overflow() -> None:
    logits_CV = torch.tensor([[1e30, 0.0, -1e30] + [0.0] * 70])
    losses_C, _z, slope_CV = softmax_step_triton(logits_CV.clone(), torch.tensor([1]), PLAIN, torch.float32)
    assert losses_C.item() == pytest.approx(1e30)
    assert slope_CV[0, :3].tolist() == [1.0, -1.0, 0.0]
    capped = softmax_step_triton(logits_CV, torch.tensor([1]), Options(logit_softcap=30.0), torch.float32)
    assert capped[0].item() == pytest.approx(30.0)
    assert capped[2].isfinite().all()


def test_two_runs_agree_bitwise() -> None:
    inputs = make_inputs(positions=12, vocabulary=193)
    first, second = (our_results(inputs, Options(0.03, 0.2, 2.5), chunk_positions=5) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_torch_knows_all_about_the_operator() -> None:
    inputs = make_inputs(positions=12, vocabulary=70).leaves()
    for weights_T in (None, make_weights(inputs)):
        library.opcheck(linear_cross_entropy_op, (*inputs, 0.03, 0.2, 2.5, True, True, 4, weights_T))
