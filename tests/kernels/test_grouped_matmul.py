"""Grouped matrix product: each row times the matrix of its expert, and both gradients."""

import pytest
import torch
from torch import Tensor, library

from bigmodel.kernels.grouped_matmul import grouped_matmul, grouped_matmul_op
from tests.support.grouped_products import (
    Products,
    assert_as_exact_as_plain_torch,
    dense_results,
    make_products,
    our_results,
)
from tests.support.interpreted import run_interpreted, run_python

COUNTS = {
    "uneven": [5, 1, 17, 3],
    "some without rows": [0, 9, 0, 0, 4, 0],
    "one expert": [11],
    "all rows in the last": [0, 0, 8],
}


@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_in_float64_result_and_gradients_are_the_formula(counts: list[int], padding: int) -> None:
    products = make_products(torch.float64, counts, padding)
    for ours, exact in zip(our_results(products), dense_results(products), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_error_is_bounded_by_that_of_plain_torch(dtype: torch.dtype) -> None:
    products = make_products(dtype, [50, 0, 3, 70], padding=5, inputs=96, outputs=64)
    assert_as_exact_as_plain_torch(our_results(products), products)


def test_a_literal() -> None:
    x_MK = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    weight_ENK = torch.tensor([[[1.0, 10.0]], [[2.0, 20.0]]])
    y_MN = grouped_matmul(x_MK, weight_ENK, torch.tensor([0, 2, 3], dtype=torch.int32))
    assert y_MN.tolist() == [[21.0], [43.0], [130.0], [0.0]]


def test_padding_is_not_read_and_gives_zeros() -> None:
    products = make_products(torch.float32, [4, 0, 7], padding=3)
    clean = our_results(products)
    products.x_MK[11:] = torch.nan
    products.dy_MN[11:] = torch.inf
    found = our_results(products)
    assert all(torch.equal(one, other) for one, other in zip(found, clean, strict=True))
    assert (found.y_MN[11:] == 0).all()
    assert (found.dx_MK[11:] == 0).all()
    assert (found.d_weight_ENK[1] == 0).all()


@pytest.mark.parametrize(("inputs", "outputs"), [(40, 24), (512, 320)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_depends_on_itself_alone_bitwise(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    """20 rows of one expert, all of them, the first few of them, and after 113 others of it and 9 of another one."""
    alone = make_products(dtype, [20, 0], inputs=inputs, outputs=outputs)
    moved = make_products(dtype, [133, 9], padding=4, inputs=inputs, outputs=outputs)
    moved = moved._replace(weight_ENK=alone.weight_ENK)
    moved.x_MK[113:133], moved.dy_MN[113:133] = alone.x_MK, alone.dy_MN
    few, many = our_results(alone), our_results(moved)
    assert torch.equal(few.y_MN, many.y_MN[113:133])
    assert torch.equal(few.dx_MK, many.dx_MK[113:133])
    for count in (1, 2, 7):
        first = Products(alone.x_MK[:count], alone.weight_ENK, alone.offsets_E1.clamp_max(count), alone.dy_MN[:count])
        assert torch.equal(our_results(first).y_MN, few.y_MN[:count])
        assert torch.equal(our_results(first).dx_MK, few.dx_MK[:count])


def test_only_padding_is_zero_and_so_are_its_gradients() -> None:
    products = make_products(torch.float32, [0, 0], padding=5)
    assert [float(one.abs().sum()) for one in our_results(products)] == [0.0, 0.0, 0.0]
    assert our_results(make_products(torch.float32, [0, 0])).y_MN.shape == (0, 24)


def test_one_expert_is_a_linear_layer_bitwise() -> None:
    products = make_products(torch.float32, [64], inputs=48, outputs=32)
    found = our_results(products)
    x_MK, weight_NK = products.x_MK.clone().requires_grad_(), products.weight_ENK[0].clone().requires_grad_()
    y_MN = torch.nn.functional.linear(x_MK, weight_NK)
    gradients = torch.autograd.grad(y_MN, (x_MK, weight_NK), products.dy_MN)
    assert torch.equal(found.y_MN, y_MN)
    assert torch.equal(found.dx_MK, gradients[0])
    assert torch.equal(found.d_weight_ENK[0], gradients[1])


def test_only_the_wanted_gradient_is_given() -> None:
    products = make_products(torch.float32, [4, 3])
    both = our_results(products)
    for wanted, name in ((0, "dx_MK"), (1, "d_weight_ENK")):
        inputs = [one.clone() for one in products[:2]]
        inputs[wanted].requires_grad_()
        y_MN = grouped_matmul(*inputs, products.offsets_E1)
        (gradient,) = torch.autograd.grad(y_MN, inputs[wanted], products.dy_MN)
        assert torch.equal(gradient, getattr(both, name))


def test_strides_do_not_matter() -> None:
    products = make_products(torch.float32, [4, 3], padding=1)
    turned = products._replace(
        x_MK=products.x_MK.T.contiguous().T, weight_ENK=products.weight_ENK.transpose(1, 2).contiguous().transpose(1, 2)
    )
    assert not turned.weight_ENK.is_contiguous()
    assert all(torch.equal(one, other) for one, other in zip(our_results(turned), our_results(products), strict=True))
    y_MN = grouped_matmul(*(one.requires_grad_() for one in products[:2]), products.offsets_E1)
    y_MN.sum().backward()  # a gradient whose strides are all 0
    assert products.x_MK.grad is not None
    torch.testing.assert_close(products.x_MK.grad[0], products.weight_ENK.detach()[0].sum(0))


def test_torch_knows_all_about_the_operator() -> None:
    products = make_products(torch.float32, [4, 0, 3], padding=2)
    for needed in ((True, True), (False, True), (True, False), (False, False)):
        inputs = [one.clone().requires_grad_(is_needed) for one, is_needed in zip(products[:2], needed, strict=True)]
        library.opcheck(grouped_matmul_op, (*inputs, products.offsets_E1))


def test_other_counts_compile_nothing_again() -> None:
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    def compiled(x_MK: Tensor, weight_ENK: Tensor, offsets_E1: Tensor) -> Tensor:
        return grouped_matmul(x_MK, weight_ENK, offsets_E1)

    for counts in ([4, 3, 5], [0, 12, 0], [1, 1, 9]):
        products = make_products(torch.float32, counts, padding=12 - sum(counts))
        leaves = [one.clone().requires_grad_() for one in products[:2]]
        with torch._dynamo.config.patch(error_on_recompile=counts != [4, 3, 5]):
            y_MN = compiled(*leaves, products.offsets_E1)
        gradients = torch.autograd.grad(y_MN, leaves, products.dy_MN)
        assert all(
            torch.equal(one, other) for one, other in zip((y_MN, *gradients), our_results(products), strict=True)
        )


# The kernels.


def test_the_kernels_pass_their_tests_under_the_interpreter() -> None:
    assert run_interpreted("tests/support/interpreted_grouped_matmul.py") == 9


@pytest.mark.parametrize(
    "architectures",
    [("90",), pytest.param(("80", "100"), marks=pytest.mark.long)],
    ids=["hopper", "ampere and blackwell"],
)
def test_the_kernels_compile_without_spilling_registers(architectures: tuple[str, ...]) -> None:
    printed = run_python(["-m", "tests.support.compile_grouped_matmul", *architectures], interpret=False)
    print(printed)
    rows = [line.split() for line in printed.splitlines()]
    assert {row[1] for row in rows} == {f"sm_{name}" for name in architectures}
    assert len(rows) == 7 * len(architectures)
    spilled = [row for row in rows if row[-3] != "0"]
    assert not spilled, f"kernel, architecture, type, sizes | registers, stack, shared, stages: {spilled}"
    room = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448}
    assert not [row for row in rows if int(row[-2]) > room[row[1]]]
    assert not [row for row in rows if int(row[-1]) < 4], "tiles do not come through asynchronous copies"


def test_without_triton_the_references_run() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch
from bigmodel.kernels.grouped_matmul import grouped_matmul
from bigmodel.kernels.permute import expert_rows, permute, unpermute
place_Tk, offsets_E1 = expert_rows(torch.tensor([[0], [1], [0]]), 1)
rows_MN = grouped_matmul(permute(torch.ones(3, 2), place_Tk), torch.ones(1, 4, 2), offsets_E1)
print(unpermute(rows_MN, place_Tk, torch.ones(3, 1)).sum().item())
"""
    assert run_python(["-c", program], interpret=False).strip() == "16.0"


# What is refused.

ROWS, MATRICES, OFFSETS = torch.zeros(4, 3), torch.zeros(2, 5, 3), torch.tensor([0, 1, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("x", "weight", "offsets", "message"),
    [
        (ROWS[:, :2], MATRICES, OFFSETS, r"needs x \(M, K\) and weight \(E, N, K\) with the same K"),
        (ROWS, MATRICES[0], OFFSETS, r"needs x \(M, K\) and weight \(E, N, K\)"),
        (ROWS, MATRICES, OFFSETS[:2], r"it needs E \+ 1 offsets of torch\.int32"),
        (ROWS, MATRICES, OFFSETS.long(), r"of torch\.int64; it needs E \+ 1 offsets"),
        (ROWS.double(), MATRICES, OFFSETS, r"x torch\.float64, weight torch\.float32; cast them to one floating type"),
        (ROWS, MATRICES, OFFSETS + 1, r"got the offsets \[1, 2, 5\] for 4 rows; they need to start at 0"),
        (ROWS[:3], MATRICES, OFFSETS, r"for 3 rows; they need to start at 0, never decrease, and end at most"),
        (ROWS, MATRICES, OFFSETS.flip(0) * 0 + torch.tensor([0, 3, 1]).int(), "never decrease"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x: Tensor, weight: Tensor, offsets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grouped_matmul(x, weight, offsets)
