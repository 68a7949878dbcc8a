"""Permutation: rows by expert, in order, and weighted sums back at the tokens, with all gradients."""

import pytest
import torch
from torch import Tensor, library

from bigmodel.kernels.permute import expert_rows, permute, permute_op, unpermute, unpermute_op
from tests.support.interpreted import run_interpreted
from tests.support.permuted_rows import Sums, assert_as_exact_as_plain_torch, formula, make_sums, our_results


def test_a_literal() -> None:
    place_Tk, offsets_E1 = expert_rows(torch.tensor([[1, 0], [1, 2]]), num_experts=2)
    assert place_Tk.tolist() == [[1, 0], [2, 3]]
    assert offsets_E1.tolist() == [0, 1, 3]
    assert offsets_E1.dtype == torch.int32
    y_MH = permute(torch.tensor([[5.0], [6.0]]), place_Tk)
    assert y_MH.tolist() == [[5.0], [5.0], [6.0], [6.0]]
    weights_Tk = torch.tensor([[10.0, 1.0], [0.5, 0.0]])
    assert unpermute(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), place_Tk, weights_Tk).tolist() == [[21.0], [1.5]]


def test_rows_are_sorted_by_expert_and_within_one_by_token() -> None:
    experts_Tk = torch.randint(0, 6, (50, 3), generator=torch.Generator().manual_seed(1))
    place_Tk, offsets_E1 = expert_rows(experts_Tk, num_experts=5)
    choices = [(int(expert), t, j) for t, row in enumerate(experts_Tk) for j, expert in enumerate(row)]
    assert [(t, j) for _, t, j in sorted(choices)] == [divmod(int(one), 3) for one in place_Tk.flatten().argsort()]
    assert offsets_E1.tolist() == [sum(one < expert for one, _, _ in choices) for expert in range(6)]


def test_without_tokens_there_are_no_rows() -> None:
    place_Tk, offsets_E1 = expert_rows(torch.zeros(0, 2, dtype=torch.int64), num_experts=3)
    assert offsets_E1.tolist() == [0, 0, 0, 0]
    y_MH = permute(torch.zeros(0, 4), place_Tk)
    assert unpermute(y_MH, place_Tk, torch.zeros(0, 2)).shape == (0, 4)


@pytest.mark.parametrize("choices", [1, 2, 5])
def test_in_float64_results_and_gradients_are_the_formula(choices: int) -> None:
    sums = make_sums(torch.float64, choices=choices)
    for ours, exact in zip(our_results(sums), formula(sums), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_are_rounded_once(dtype: torch.dtype) -> None:
    assert_as_exact_as_plain_torch(make_sums(dtype, tokens=60, choices=4))


def test_two_runs_agree_bitwise_and_a_token_depends_on_its_own_rows() -> None:
    sums = make_sums(torch.bfloat16)
    first, second = our_results(sums), our_results(sums)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    sums.x_TH[3] *= 2
    sums.weights_Tk[3] *= 3
    other = our_results(sums)
    rest = torch.arange(len(sums.x_TH)) != 3
    assert torch.equal(first.out_TH[rest], other.out_TH[rest])
    assert not torch.equal(first.out_TH[3], other.out_TH[3])


def test_torch_knows_all_about_the_operators() -> None:
    sums = make_sums(torch.float32, tokens=5)
    place_Tk, _ = expert_rows(sums.experts_Tk, 4)
    x_TH, weights_Tk = sums.x_TH.requires_grad_(), sums.weights_Tk.requires_grad_()
    y_MH = torch.randn(place_Tk.numel(), x_TH.shape[1], requires_grad=True)
    library.opcheck(permute_op, (x_TH, place_Tk))
    library.opcheck(unpermute_op, (y_MH, place_Tk, weights_Tk))
    library.opcheck(unpermute_op, (y_MH, place_Tk, None))


def test_it_compiles_once_for_all_choices() -> None:
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    def compiled(x_TH: Tensor, experts_Tk: Tensor, weights_Tk: Tensor) -> Tensor:
        place_Tk, _ = expert_rows(experts_Tk, 4)
        return unpermute(permute(x_TH, place_Tk), place_Tk, weights_Tk)

    sums = make_sums(torch.float32)
    for shift in range(3):
        changed: Sums = sums._replace(experts_Tk=(sums.experts_Tk + shift) % 5)
        with torch._dynamo.config.patch(error_on_recompile=shift > 0):
            found = compiled(changed.x_TH, changed.experts_Tk, changed.weights_Tk)
        torch.testing.assert_close(found, changed.x_TH * changed.weights_Tk.sum(1, keepdim=True))


def test_the_kernels_pass_their_tests_under_the_interpreter() -> None:
    assert run_interpreted("tests/support/interpreted_permute.py") == 6


PLACE, ROWS, WEIGHTS = torch.tensor([[1, 0], [2, 3]]), torch.zeros(4, 3), torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expert_rows(PLACE, 2**15), "got 32768 experts; it needs 1 to 32767"),
        (lambda: expert_rows(PLACE.flatten(), 4), r"got experts \(4,\) of torch\.int64; it needs \(T, k\)"),
        (lambda: expert_rows(PLACE.float(), 4), r"of torch\.float32; it needs \(T, k\) of an integer type"),
        (lambda: permute(ROWS, PLACE), r"got rows \(4, 3\), place \(2, 2\)"),
        (lambda: permute(ROWS[:2], PLACE.int()), r"of torch\.int32; it needs rows of H columns and the place"),
        (lambda: unpermute(ROWS[:3], PLACE, WEIGHTS), "it needs T k rows"),
        (lambda: unpermute(ROWS, PLACE, WEIGHTS[:1]), r"weights \(1, 2\) of torch\.float32; it needs T k rows"),
        (lambda: unpermute(ROWS, PLACE, WEIGHTS.double()), r"weights \(T, k\) of torch\.float32"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
