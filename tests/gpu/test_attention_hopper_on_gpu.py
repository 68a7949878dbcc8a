"""The forward for Hopper on a GPU. In a process of its own: a wrong address ends the work of a whole process.

BIGMODEL_GPU_TESTS=1 python -m pytest tests/gpu/test_attention_hopper_on_gpu.py
"""

from functools import partial

import pytest
import torch

from bigmodel.kernels import attention as kernels
from bigmodel.kernels.attention import attention, make_tile_metadata
from bigmodel.kernels.mask import causal
from tests.gpu.test_attention_on_gpu import _plain_torch_is_exact_too as _plain_torch_is_exact_too
from tests.gpu.test_attention_on_gpu import rules
from tests.kernels.test_mask import offsets_of
from tests.support.dense_attention import assert_as_exact_as_plain_torch, make_inputs, out_and_gradients

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU: BIGMODEL_GPU_TESTS=1 python -m pytest tests/gpu",
)
attend = partial(attention, kernel="hopper")


@pytest.fixture(autouse=True)
def _the_present_forward_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "forward_kernel", None)


@pytest.mark.parametrize(("channels", "dtype"), [(128, torch.bfloat16), (64, torch.bfloat16), (128, torch.float16)])
@pytest.mark.parametrize("rule", rules())
def test_every_rule_is_as_exact_as_plain_torch(rule: str, channels: int, dtype: torch.dtype) -> None:
    assert_as_exact_as_plain_torch(attend, make_inputs(*rules()[rule], (4, 2), channels, dtype))


@pytest.mark.parametrize("channels", [64, 128])
def test_a_document_of_nan_does_not_reach_another_one_bitwise(channels: int) -> None:
    inputs = make_inputs(*rules()["prefix-LM"], (4, 2), channels, torch.bfloat16)
    before = out_and_gradients(attend, inputs)
    for rows in (inputs.q_THK, inputs.k_SGK, inputs.v_SGK, inputs.d_out_THK):
        rows[1:701] = torch.nan
    after = out_and_gradients(attend, inputs)
    for name, old in before.items():
        assert torch.equal(old[:1], after[name][:1])
        assert torch.equal(old[701:], after[name][701:])


def test_fifty_runs_agree_bitwise() -> None:
    """Warps that pass one another give other sums now and then."""
    inputs = make_inputs(*rules()["causal"], (32, 16), 128, torch.bfloat16)
    made = make_tile_metadata(*rules()["causal"])
    run = partial(attend, inputs.q_THK, inputs.k_SGK, inputs.v_SGK, made.mask, made)
    first = run()
    for _ in range(49):
        assert torch.equal(run()[:1000], first[:1000])


def test_a_graph_serves_other_documents() -> None:
    inputs = make_inputs(causal(offsets_of([100, 155, 0]).cuda()), 256, 256, (4, 2), 128, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            out_and_gradients(attend, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = out_and_gradients(attend, inputs)
    for name in ("q_THK", "k_SGK", "v_SGK", "d_out_THK"):
        getattr(inputs, name).nan_to_num_(0.0)  # the last row is in a document of some batches
    for lengths in ([256, 0, 0], [1, 130, 125]):
        inputs.mask.cu_seqlens_q.copy_(offsets_of(lengths))
        graph.replay()
        for name, rows in out_and_gradients(attend, inputs).items():
            assert torch.equal(replayed[name], rows), name
