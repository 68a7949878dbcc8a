"""The attention kernels, under Triton's interpreter. Run by test_attention.py."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.attention import _attention, attention, make_schedule
from kernels.visibility import Visibility, bidirectional, causal, cross
from tests.dense_attention import Inputs, assert_as_exact_as_plain_torch, make_inputs, out_and_gradients
from tests.test_visibility import offsets_of

BLOCK = 32


@pytest.fixture(autouse=True)
def _new_tensors_hold_nan() -> Iterator[None]:
    """In deterministic mode torch.empty gives NaN: a row that a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def attend(q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, visibility: Visibility) -> Tensor:
    return attention(q_THK, k_SGK, v_SGK, visibility, make_schedule(visibility, len(q_THK), len(k_SGK), block=BLOCK))


EMPTY_SHORT_AND_LONG = offsets_of([0, 1, 90, 0, 7, 0])

CASES = {
    "causal, 4 query heads on 2": (causal(EMPTY_SHORT_AND_LONG), 109, 109, (4, 2), 16, torch.float32),
    "causal, 4 query heads on 1, fp16": (causal(EMPTY_SHORT_AND_LONG), 98, 98, (4, 1), 16, torch.float16),
    "window with full tiles": (causal(offsets_of([5, 100]), left=66), 110, 110, (1, 1), 16, torch.float32),
    "window on both sides, 24 channels": (
        Visibility(offsets_of([70, 3]), offsets_of([70, 3]), left=9, right=40), 80, 80, (2, 2), 24, torch.float32,
    ),
    "bidirectional, fp16": (bidirectional(offsets_of([2, 64, 33])), 100, 100, (2, 1), 16, torch.float16),
    "cross, empty on either side": (
        cross(offsets_of([40, 0, 3, 1]), offsets_of([5, 9, 0, 70])), 50, 90, (2, 1), 16, torch.float32,
    ),
    "causal cross: late queries see nothing": (
        Visibility(offsets_of([50]), offsets_of([20]), left=10, right=0), 50, 20, (1, 1), 16, torch.float32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_kernels_are_as_exact_as_plain_torch(case) -> None:
    assert_as_exact_as_plain_torch(attend, make_inputs(*case))


def test_a_document_of_nan_does_not_reach_another_one_bitwise() -> None:
    visibility = causal(offsets_of([20, 37, 30]))
    inputs = make_inputs(visibility, 87, 87, (2, 1), 16, torch.float32)
    before = out_and_gradients(attend, inputs)
    for rows in (inputs.q_THK, inputs.k_SGK, inputs.v_SGK, inputs.d_out_THK):
        rows[20:57] = torch.nan
    after = out_and_gradients(attend, inputs)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:20], new[:20])
        assert torch.equal(old[57:], new[57:])
        assert new[20:57].isnan().any()


def test_two_runs_agree_bitwise() -> None:
    inputs = make_inputs(causal(offsets_of([50, 14])), 64, 64, (2, 1), 16, torch.float32)
    for first, second in zip(out_and_gradients(attend, inputs), out_and_gradients(attend, inputs), strict=True):
        assert torch.equal(first, second)


def test_a_sum_may_be_differentiated() -> None:
    # The gradient of a sum has stride 0 everywhere.
    inputs = make_inputs(causal(offsets_of([33])), 33, 33, (2, 1), 16, torch.float32)
    inputs = Inputs(inputs.visibility, inputs.q_THK, inputs.k_SGK, inputs.v_SGK, torch.ones(()).expand(33, 2, 16))
    assert_as_exact_as_plain_torch(attend, inputs)


def test_torch_knows_all_about_the_operators() -> None:
    visibility = causal(offsets_of([5, 11]))
    q_THK, k_SGK, v_SGK = (torch.randn(16, heads, 16, requires_grad=True) for heads in (2, 1, 1))
    schedule = make_schedule(visibility, 16, 16, block=16)
    tables = schedule.query_tiles_NF, schedule.key_tiles_NF
    torch.library.opcheck(_attention, (q_THK, k_SGK, v_SGK, *tables, *visibility.window, 0.25, 16))


def test_bf16_is_refused_where_the_interpreter_is_wrong() -> None:
    rows = torch.zeros(4, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"kernels got torch\.bfloat16; they need one of"):
        attend(rows, rows, rows, causal(offsets_of([4])))


def test_wide_heads_are_refused() -> None:
    rows = torch.zeros(4, 1, 136)
    with pytest.raises(ValueError, match="got 136 channels a head; use at most 128"):
        attend(rows, rows, rows, causal(offsets_of([4])))
