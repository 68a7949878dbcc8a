"""Attention: the reference here, the kernels under the interpreter and through the compiler in their own processes."""

import pytest
import torch

from kernels.attention import attention, attention_reference, make_schedule
from kernels.visibility import Visibility, bidirectional, causal, cross
from tests.dense_attention import assert_as_exact_as_plain_torch, dense_attention, make_inputs, out_and_gradients
from tests.interpreted import run_interpreted, run_python
from tests.test_visibility import offsets_of

MIXED = offsets_of([0, 1, 90, 0, 7, 0])

CASES = {
    "causal": (causal(MIXED), 109, 109, (4, 2), 16, torch.float32),
    "causal, more channels, no rows beyond": (causal(MIXED), 98, 98, (4, 1), 24, torch.float32),
    "causal, bf16": (causal(MIXED), 98, 98, (4, 1), 16, torch.bfloat16),
    "window": (causal(MIXED, left=5), 98, 98, (2, 2), 16, torch.float32),
    "window longer than all documents": (causal(MIXED, left=300), 98, 98, (2, 2), 16, torch.float32),
    "window on both sides": (Visibility(MIXED, MIXED, left=9, right=40), 98, 98, (2, 1), 16, torch.float32),
    "bidirectional": (bidirectional(MIXED), 100, 100, (2, 1), 16, torch.float32),
    "cross": (cross(offsets_of([40, 0, 3, 1]), offsets_of([5, 9, 0, 70])), 50, 90, (2, 1), 16, torch.float32),
    "causal cross: late queries see nothing": (
        Visibility(offsets_of([50]), offsets_of([20]), left=10, right=0), 50, 20, (1, 1), 16, torch.float32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_reference_is_as_exact_as_plain_torch(case) -> None:
    assert_as_exact_as_plain_torch(attention_reference, make_inputs(*case))


def test_in_float64_the_reference_is_the_formula() -> None:
    inputs = make_inputs(causal(MIXED, left=30), 98, 98, (4, 2), 16, torch.float64)
    for ours, exact in zip(
        out_and_gradients(attention_reference, inputs), out_and_gradients(dense_attention, inputs), strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_on_cpu_bf16_is_computed_in_fp32_and_rounded_once() -> None:
    inputs = make_inputs(causal(MIXED), 98, 98, (4, 2), 16, torch.bfloat16)
    wide = out_and_gradients(attention_reference, inputs.in_documents(torch.float32))
    for ours, exact in zip(out_and_gradients(attention_reference, inputs), wide, strict=True):
        assert torch.equal(ours, exact.bfloat16())


@pytest.mark.parametrize("left", [None, 6])
def test_editing_a_document_leaves_the_others_bitwise_as_they_were(left: int | None) -> None:
    visibility = causal(offsets_of([20, 37, 30, 41]), left=left)
    inputs = make_inputs(visibility, 128, 128, (4, 2), 32, torch.float32)
    before = out_and_gradients(attention, inputs)
    for rows in (inputs.q_THK, inputs.k_SGK, inputs.v_SGK, inputs.d_out_THK):
        rows[20:57] = rows[20:57].flip(0) * 2
    after = out_and_gradients(attention, inputs)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:20], new[:20])
        assert torch.equal(old[57:], new[57:])
        assert not torch.equal(old[20:57], new[20:57])


def test_a_schedule_made_before_gives_the_same() -> None:
    visibility = causal(offsets_of([3, 5]))
    rows = torch.randn(8, 2, 16)
    schedule = make_schedule(visibility, 8, 8)
    assert schedule.lengths == ((3, 3), (5, 5))
    assert torch.equal(attention(rows, rows, rows, visibility, schedule), attention(rows, rows, rows, visibility))


def test_the_kernels_pass_their_tests_under_the_interpreter() -> None:
    assert run_interpreted("tests/interpreted_attention.py") == 13


def test_the_kernels_compile_for_hopper_and_ampere_without_spilling_registers() -> None:
    printed = run_python(["-m", "tests.compile_kernels"], interpret=False)
    print(printed)
    rows = [line.split() for line in printed.splitlines()]
    assert len(rows) == 24
    spilled = [row for row in rows if row[-2] != "0"]
    assert not spilled, f"kernel, architecture, type, channels | registers, stack, shared bytes: {spilled}"
    room = {"sm_90": 232_448, "sm_80": 166_912}
    assert all(int(row[-1]) <= room[row[1]] for row in rows)


def test_without_triton_the_reference_runs() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch
from kernels.attention import attention
from kernels.visibility import causal
rows = torch.ones(4, 1, 16)
print(attention(rows, rows, rows, causal(torch.tensor([0, 4], dtype=torch.int32))).sum().item())
"""
    assert run_python(["-c", program], interpret=False).strip() == "64.0"


ROWS = torch.zeros(6, 4, 16)


@pytest.mark.parametrize(
    ("q", "k", "v", "scale", "message"),
    [
        (ROWS, ROWS[:, :3], ROWS[:, :3], None, "query heads must be a multiple of the key heads"),
        (ROWS, ROWS, ROWS[:5], None, r"it needs q \(T, H, K\) and k, v \(S, G, K\)"),
        (ROWS, ROWS.double(), ROWS, None, "cast them to one type"),
        (ROWS, ROWS, ROWS, 0.0, "got scale 0.0; it needs a positive one"),
        (ROWS[:5], ROWS, ROWS, None, "a schedule made for 6 queries and 6 keys; make one for this batch"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(q, k, v, scale, message) -> None:
    visibility = causal(offsets_of([4]))
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, visibility, make_schedule(visibility, 6, 6), scale)
