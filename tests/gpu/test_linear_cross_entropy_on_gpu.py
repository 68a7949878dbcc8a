"""Linear cross-entropy on a GPU: the kernel and the 16-bit products that no CPU runs.

`BIGMODEL_GPU_TESTS=1 python -m pytest tests/gpu` (or `python -m tools.gpu_suite`) fails where there is no GPU; without
the variable these tests are skipped.
"""

import os

import pytest
import torch

from bigmodel.kernels.linear_cross_entropy import (
    Options,
    linear_cross_entropy,
    linear_cross_entropy_per_token,
    softmax_step_reference,
    softmax_step_triton,
)
from tests.support.dense_cross_entropy import (
    IGNORED,
    OPTIONS,
    assert_as_exact_as_plain_torch,
    assert_losses_as_exact_as_plain_torch,
    make_inputs,
    our_results,
)

pytestmark = pytest.mark.skipif(
    os.environ.get("BIGMODEL_GPU_TESTS") != "1", reason="set BIGMODEL_GPU_TESTS=1 on a machine with a GPU"
)
EVERYTHING = Options(z_loss=0.03, label_smoothing=0.2, logit_softcap=2.5)
TYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def _a_gpu_is_here() -> None:
    assert torch.cuda.is_available(), "BIGMODEL_GPU_TESTS=1 and torch sees no GPU"


# One block that is not full, several blocks, a last block of one column.
@pytest.mark.parametrize("vocabulary", [301, 8_192, 12_289])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_error_is_bounded_by_that_of_plain_torch(dtype: torch.dtype, options: Options, vocabulary: int) -> None:
    inputs = make_inputs(dtype, positions=300, vocabulary=vocabulary, width=128).on("cuda")
    assert_as_exact_as_plain_torch(our_results(inputs, options, chunk_positions=128), inputs, options)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_losses_of_single_positions(dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype, positions=300, vocabulary=12_289, width=128).on("cuda")
    losses_T = linear_cross_entropy_per_token(*inputs, 2.5, 128)
    assert_losses_as_exact_as_plain_torch(losses_T, inputs, 2.5)


@pytest.mark.parametrize("gradient_type", TYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [12_289, 131_072])
def test_the_gradient_over_the_logits_is_that_of_the_reference(vocabulary: int, gradient_type: torch.dtype) -> None:
    """Many rows of many blocks: a thread that wrote before another one had read would show."""
    logits_CV = 3 * torch.randn(1_024, vocabulary, generator=torch.Generator("cuda").manual_seed(5), device="cuda")
    targets_C = torch.randint(vocabulary, (1_024,), device="cuda")
    targets_C[::100] = IGNORED
    exact = softmax_step_reference(logits_CV.clone(), targets_C, EVERYTHING, torch.float32)
    ours = softmax_step_triton(logits_CV, targets_C, EVERYTHING, gradient_type)
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], exact[1], rtol=1e-5, atol=1e-5)
    assert ours[2].dtype == gradient_type
    precision = torch.finfo(gradient_type).eps + 1e-5
    torch.testing.assert_close(ours[2].float(), exact[2], rtol=precision, atol=1e-6)
    assert (ours[2][::100] == 0).all()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_two_runs_agree_bitwise(dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype, positions=1_000, vocabulary=50_257, width=256).on("cuda")
    first = our_results(inputs, EVERYTHING, chunk_positions=256)
    for _ in range(3):
        again = our_results(inputs, EVERYTHING, chunk_positions=256)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_a_loss_scale_is_not_rounded_to_bf16_before_it_is_used() -> None:
    """1 / 1003 in bf16 is off by 0.2%; the gradient's norm must not be."""
    hidden, weight, labels = make_inputs(torch.bfloat16, 1_003, 211, 64).on("cuda").leaves()
    norms = []
    for scale in (1.0, 1 / 1003):
        gradients = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels).loss_sum * scale, (hidden, weight))
        norms.append([gradient.float().norm().item() / scale for gradient in gradients])
    for one, other in zip(*norms, strict=True):
        assert one == pytest.approx(other, rel=3e-4)


def test_memory_at_32k_positions_of_128k_tokens_is_below_3_gb() -> None:
    """What the meta device predicts (tests/kernels/test_linear_cross_entropy.py), measured with the allocator."""
    hidden = torch.randn(32_768, 4_096, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(131_072, 4_096, device="cuda", dtype=torch.bfloat16) / 64).requires_grad_()
    labels = torch.randint(131_072, (32_768,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = linear_cross_entropy(hidden, weight, labels, EVERYTHING).loss_sum
    forward = torch.cuda.max_memory_allocated() - before - 2 * hidden.numel()  # of the gradients it makes hidden's
    torch.cuda.reset_peak_memory_stats()
    loss.backward()
    backward = torch.cuda.max_memory_allocated() - before - 2 * (hidden.numel() + weight.numel())
    print(f"forward {forward / 1e9:.3f} GB, backward {backward / 1e9:.3f} GB above weights, inputs and their gradients")
    assert max(forward, backward) < 3e9


def test_nothing_waits_for_the_gpu() -> None:
    inputs = make_inputs(torch.bfloat16, positions=300, vocabulary=8_192, width=128).on("cuda").leaves()
    linear_cross_entropy(*inputs, EVERYTHING).loss_sum.backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(*inputs, EVERYTHING, chunk_positions=128).loss_sum.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
