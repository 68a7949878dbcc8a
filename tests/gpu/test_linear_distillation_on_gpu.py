"""Linear distillation on a GPU: the softmax kernel and 16-bit products inside it; run as the tests beside this one."""

import os
from dataclasses import replace

import pytest
import torch

from bigmodel.kernels.linear_distillation import Divergence
from tests.kernels.test_linear_distillation import EVERYTHING, dense, make_taught, ours
from tests.support.dense_cross_entropy import make_inputs, make_weights

pytestmark = pytest.mark.skipif(
    os.environ.get("BIGMODEL_GPU_TESTS") != "1", reason="set BIGMODEL_GPU_TESTS=1 on a machine with a GPU"
)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("top_k", [0, 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sums_and_gradients_are_those_of_kl_div(dtype: torch.dtype, top_k: int, direction: str) -> None:
    inputs = make_inputs(dtype, positions=300, vocabulary=8_193, width=64)
    weights_T, taught = make_weights(inputs), make_taught(inputs, Divergence(0.5, 2.0, top_k, direction), tokens=8_190)
    on_gpu = replace(taught, hidden_TE=taught.hidden_TE.cuda(), weight_NE=taught.weight_NE.cuda())
    wide = replace(taught, hidden_TE=taught.hidden_TE.double(), weight_NE=taught.weight_NE.double())
    found = ours(inputs.on("cuda"), on_gpu, EVERYTHING, 128, weights_T.cuda())
    exact = dense(inputs.to(torch.float64), wide, EVERYTHING, weights_T)
    for one, expected in zip(found[:2], exact[:2], strict=True):
        torch.testing.assert_close(one.double().cpu(), expected, rtol=1e-4, atol=1e-4)
    for one, expected in zip(found[2:], exact[2:], strict=True):
        assert float((one.double().cpu() - expected).norm() / expected.norm()) < max(torch.finfo(dtype).eps, 1e-4)
