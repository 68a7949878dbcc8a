"""Grouped matrix products and the permutation on a GPU: tiles of shipped sizes; run as the tests beside this one."""

import os

import pytest
import torch

from tests.support import grouped_products, permuted_rows
from tests.support.grouped_products import make_products
from tests.support.permuted_rows import make_sums

pytestmark = pytest.mark.skipif(
    os.environ.get("BIGMODEL_GPU_TESTS") != "1", reason="set BIGMODEL_GPU_TESTS=1 on a machine with a GPU"
)
TYPES = [torch.bfloat16, torch.float16, torch.float32]
COUNTS = {"full tiles": [256, 512, 128], "uneven": [0, 1, 700, 130, 0, 77, 300]}


@pytest.mark.parametrize("inputs", [512, 200], ids=["even", "odd"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_products_are_as_exact_as_plain_torch(dtype: torch.dtype, counts: list[int], inputs: int) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    products = make_products(dtype, counts, padding=300, inputs=inputs, outputs=384).on("cuda")
    products.x_MK[sum(counts) :] = torch.nan
    ours = grouped_products.our_results(products)
    products.x_MK[sum(counts) :] = 0
    grouped_products.assert_as_exact_as_plain_torch(ours, products)


def test_a_row_depends_on_itself_alone_bitwise() -> None:
    alone = make_products(torch.bfloat16, [200, 0], inputs=512, outputs=384).on("cuda")
    moved = make_products(torch.bfloat16, [333, 90], inputs=512, outputs=384).on("cuda")
    moved = moved._replace(weight_ENK=alone.weight_ENK)
    moved.x_MK[133:333], moved.dy_MN[133:333] = alone.x_MK, alone.dy_MN
    few, many = grouped_products.our_results(alone), grouped_products.our_results(moved)
    assert torch.equal(few.y_MN, many.y_MN[133:333])
    assert torch.equal(few.dx_MK, many.dx_MK[133:333])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_permuted_rows_are_as_exact_as_plain_torch(dtype: torch.dtype) -> None:
    sums = make_sums(dtype, tokens=500, choices=6, width=1_500)
    permuted_rows.assert_as_exact_as_plain_torch(permuted_rows.Sums(*(one.cuda() for one in sums)))
