"""The forward for Hopper under Triton's interpreter, which runs its formula, mask and descriptors; the interpreter
knows no specialization of warps. Run by test_attention_hopper.py."""

from functools import partial

import pytest
import torch

from bigmodel.kernels import attention as kernels
from bigmodel.kernels.mask import AttentionMask, causal, cross, mixed, prefix_lm
from tests.kernels.test_mask import int32, offsets_of
from tests.support.dense_attention import assert_as_exact_as_plain_torch, make_inputs, out_and_gradients
from tests.support.interpreted_attention import _new_tensors_hold_nan as _new_tensors_hold_nan
from tests.support.interpreted_attention import attend

FP32, FP16 = torch.float32, torch.float16
attend_on_hopper = partial(attend, kernel="hopper")


@pytest.fixture(autouse=True)
def _the_present_forward_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.INTERPRETED  # else the reference would run
    monkeypatch.setattr(kernels, "forward_kernel", None)


CASES = {
    "causal, grouped heads, rows beyond": (causal(offsets_of([0, 1, 66, 0, 7, 0])), 85, 85, (2, 1), 64, FP32),
    "window on both sides, fp16": (
        AttentionMask(offsets_of([70, 3]), offsets_of([70, 3]), left=9, right=40), 80, 80, (2, 2), 64, FP16,
    ),
    "prefixes, 128 channels, fp16": (prefix_lm(offsets_of([1, 45]), int32([0, 37])), 46, 46, (1, 1), 128, FP16),
    "cross, empty on either side": (
        cross(offsets_of([40, 0, 3, 1]), offsets_of([5, 9, 0, 70])), 50, 90, (2, 1), 64, FP32,
    ),
    "mixed, fp16": (mixed(offsets_of([9, 0, 40]), offsets_of([20, 3, 35])), 49, 107, (2, 1), 64, FP16),
    "late queries see nothing": (
        AttentionMask(offsets_of([50]), offsets_of([20]), left=10, right=0), 50, 20, (2, 1), 64, FP32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_forward_for_hopper_is_as_exact_as_plain_torch(case) -> None:
    assert_as_exact_as_plain_torch(attend_on_hopper, make_inputs(*case))


def test_a_document_of_nan_does_not_reach_another_one_bitwise() -> None:
    inputs = make_inputs(prefix_lm(offsets_of([20, 23, 5]), int32([3, 5, 9])), 48, 48, (2, 1), 64, FP32)
    with torch.no_grad():
        rows = inputs.q_THK, inputs.k_SGK, inputs.v_SGK
        before = attend_on_hopper(*rows, inputs.mask)
        for one in rows:
            one[20:43] = torch.nan
        after = attend_on_hopper(*rows, inputs.mask)
    assert before[:48].isfinite().all()
    assert torch.equal(before[:20], after[:20])
    assert torch.equal(before[43:], after[43:])
    assert after[20:43].isnan().all()


def test_a_program_may_take_a_part_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(causal(offsets_of([37, 3])), 40, 40, (1, 1), 64, FP32)
    monkeypatch.setitem(kernels.attention_hopper.SHAPES, 64, (16, 16, 4, 2))
    assert_as_exact_as_plain_torch(attend_on_hopper, inputs)


def test_rows_that_the_memory_accelerator_cannot_address_are_copied() -> None:
    inputs = make_inputs(causal(offsets_of([33])), 33, 33, (2, 1), 64, FP32)
    exact = out_and_gradients(attend_on_hopper, inputs)
    # Strided channels, rows 65 numbers apart, a first row at an odd number.
    inputs.q_THK = inputs.q_THK.transpose(0, 2).contiguous().transpose(0, 2)
    inputs.k_SGK = torch.nn.functional.pad(inputs.k_SGK, (0, 1))[:, :, :64]
    inputs.v_SGK = torch.nn.functional.pad(inputs.v_SGK, (1, 3))[:, :, 1:65]
    for name, rows in out_and_gradients(attend_on_hopper, inputs).items():
        assert torch.equal(rows, exact[name]), name


def test_compiled_it_is_one_operator_and_other_documents_compile_nothing() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    def compiled(rows: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
        return attend(rows, rows, rows, mask, block=16, kernel="hopper")

    rows = torch.randn(16, 2, 64)
    for lengths in ([16, 0, 0], [3, 5, 2]):
        mask = causal(offsets_of(lengths))
        with torch._dynamo.config.patch(error_on_recompile=lengths != [16, 0, 0]):
            assert torch.equal(compiled(rows, mask), attend(rows, rows, rows, mask, block=16, kernel="hopper"))
