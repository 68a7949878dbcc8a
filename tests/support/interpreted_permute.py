"""The kernels of the permutation, under Triton's interpreter. Run by test_permute.py."""

from collections.abc import Iterator

import pytest
import torch

from bigmodel.kernels import permute as module
from bigmodel.kernels.triton_import import INTERPRETED
from tests.support.permuted_rows import assert_as_exact_as_plain_torch, make_sums, our_results


@pytest.fixture(autouse=True)
def _kernels_alone_on_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of 16 columns; no reference; torch.empty gives NaN, so unwritten values are detected."""
    assert INTERPRETED
    monkeypatch.setattr(module, "BLOCK", 16)
    for name in ("permute", "unpermute", "unpermute_gradients"):
        monkeypatch.delattr(module, f"{name}_reference")
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# One partial block, full blocks, a last block of one column.
@pytest.mark.parametrize("width", [10, 32, 33])
def test_the_kernels_are_as_exact_as_plain_torch(width: int) -> None:
    assert_as_exact_as_plain_torch(make_sums(torch.float32, tokens=7, width=width))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits_results_are_rounded_once(dtype: torch.dtype) -> None:
    assert_as_exact_as_plain_torch(make_sums(dtype, tokens=7, width=33))


def test_two_runs_agree_bitwise() -> None:
    sums = make_sums(torch.float32, tokens=7)
    assert all(torch.equal(one, other) for one, other in zip(our_results(sums), our_results(sums), strict=True))
