"""The kernels of grouped matrix products, under Triton's interpreter. Run by test_grouped_matmul.py."""

from collections.abc import Iterator

import pytest
import torch

from bigmodel.kernels import grouped_matmul as module
from bigmodel.kernels.triton_import import INTERPRETED
from tests.support.grouped_products import Products, assert_as_exact_as_plain_torch, make_products, our_results

TILE = (16, 32, 16, 4, 1)


@pytest.fixture(autouse=True)
def _kernels_alone_on_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of 16 rows and 32 columns; no reference; torch.empty gives NaN, so unwritten values are detected."""
    assert INTERPRETED
    for name in ("TILE_SHAPES", "TILE_SHAPES_OF_FP32"):
        monkeypatch.setattr(module, name, {"product": TILE, "weight_gradient": TILE})
    monkeypatch.setattr(module, "TOGETHER", 3)
    monkeypatch.delattr(module, "grouped_matmul_reference")
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


CASES = {
    "full tiles only": make_products(torch.float32, [16, 32], inputs=32, outputs=64),
    "partial tiles, experts without rows": make_products(torch.float32, [0, 17, 0, 3, 40, 0], 0, 24, 40),
    "padding of several tiles": make_products(torch.float32, [5, 0, 1], 60, 40, 33),
    "fp16": make_products(torch.float16, [20, 1, 30], 5, 50, 24),
}


@pytest.mark.parametrize("products", CASES.values(), ids=CASES.keys())
def test_the_kernels_are_as_exact_as_plain_torch(products: Products) -> None:
    assert_as_exact_as_plain_torch(our_results(products), products)


def test_padding_is_not_read_and_gives_zeros() -> None:
    products = make_products(torch.float32, [20, 0, 7], padding=20)
    clean = our_results(products)
    products.x_MK[27:] = torch.nan
    products.dy_MN[27:] = torch.inf
    found = our_results(products)
    assert all(torch.equal(one, other) for one, other in zip(found, clean, strict=True))
    assert (found.y_MN[27:] == 0).all()
    assert (found.dx_MK[27:] == 0).all()
    assert (found.d_weight_ENK[1] == 0).all()


def test_only_padding_is_zero() -> None:
    assert [float(one.abs().sum()) for one in our_results(make_products(torch.float32, [0, 0], 20))] == [0.0] * 3
    assert our_results(make_products(torch.float32, [0, 0])).y_MN.shape == (0, 24)


def test_a_row_depends_on_itself_alone_bitwise() -> None:
    """The same rows of one expert, alone and after 13 others of it and 9 of another one."""
    alone = make_products(torch.float32, [20, 0], padding=0)
    moved = make_products(torch.float32, [33, 9], padding=4)._replace(weight_ENK=alone.weight_ENK)
    moved.x_MK[13:33], moved.dy_MN[13:33] = alone.x_MK, alone.dy_MN
    few, many = our_results(alone), our_results(moved)
    assert torch.equal(few.y_MN, many.y_MN[13:33])
    assert torch.equal(few.dx_MK, many.dx_MK[13:33])


def test_a_row_of_nan_stays_in_its_expert() -> None:
    products = make_products(torch.float32, [5, 20, 6])
    clean = our_results(products)
    products.x_MK[7] = products.dy_MN[7] = torch.nan
    found = our_results(products)
    assert found.y_MN.isnan().any(1).nonzero().tolist() == [[7]]
    assert torch.equal(found.d_weight_ENK[[0, 2]], clean.d_weight_ENK[[0, 2]])
    assert found.d_weight_ENK[1].isnan().all()


def test_two_runs_agree_bitwise() -> None:
    products = make_products(torch.float32, [20, 3], 5)
    assert all(torch.equal(one, other) for one, other in zip(our_results(products), our_results(products), strict=True))
