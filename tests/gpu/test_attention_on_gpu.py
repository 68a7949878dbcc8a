"""The attention kernels on a GPU: exact, repeatable, without waiting for the device, in CUDA graphs and compiled.

    BIGMODEL_GPU_TESTS=1 python -m pytest tests/gpu

Without that variable conftest.py hides the GPUs, and these tests are skipped.
"""

from functools import partial
from itertools import product

import pytest
import torch

from bigmodel.kernels.attention import KERNELS, attention, attention_and_largest, make_tile_metadata
from bigmodel.kernels.attention_kernels import AttentionCall
from bigmodel.kernels.attention_libraries import LIBRARIES, missing
from bigmodel.kernels.mask import AttentionMask, bidirectional, causal, cross, prefix_lm
from bigmodel.kernels.tiles import tile_tables_reference
from tests.kernels.test_mask import int32, offsets_of
from tests.support.dense_attention import (
    assert_as_exact_as_plain_torch,
    assert_largest_products_are_those_of_a_dense_matrix,
    make_inputs,
    out_and_gradients,
)

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: BIGMODEL_GPU_TESTS=1 python -m pytest tests/gpu"
)

LENGTHS = [0, 1, 700, 0, 129, 3, 128, 40, 0]
PREFIXES = [0, 1, 300, 4, 129, 0, 64, 999, 0]
ROWS = 1024
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rules() -> dict[str, tuple[AttentionMask, int, int]]:
    cu_seqlens = offsets_of(LENGTHS).to(DEVICE)
    sources = offsets_of([5, 0, 333, 9, 257, 1, 60, 40, 7]).to(DEVICE)
    return {
        "causal": (causal(cu_seqlens), ROWS, ROWS),
        "window": (causal(cu_seqlens, left=200), ROWS, ROWS),
        "window on both sides": (AttentionMask(cu_seqlens, cu_seqlens, left=150, right=33), ROWS, ROWS),
        "bidirectional": (bidirectional(cu_seqlens), ROWS, ROWS),
        "prefix-LM": (prefix_lm(cu_seqlens, int32(PREFIXES).to(DEVICE)), ROWS, ROWS),
        "cross": (cross(cu_seqlens, sources), ROWS, 720),
        "causal cross": (AttentionMask(cu_seqlens, sources, left=None, right=0), ROWS, 720),
    }


SCORES = {"plain": (None, None), "capped": (5.0, None), "biased": (None, 128), "capped and biased": (5.0, 40)}
SCORES |= {"dropout": (None, None, 0.3), "all": (5.0, 40, 0.2)}
TYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def _plain_torch_is_exact_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rule", rules())
def test_every_rule_is_as_exact_as_plain_torch(rule: str, dtype: torch.dtype) -> None:
    assert_as_exact_as_plain_torch(attention, make_inputs(*rules()[rule], (4, 2), 64, dtype))


# A variant is compiled four times, 2 seconds each: all types at one width, all widths in one type.
VARIANTS = [*product((64,), SCORES, TYPES), *product((24, 128, 160, 256), SCORES, TYPES[:1])]


@pytest.mark.parametrize(("channels", "score", "dtype"), VARIANTS, ids=str)
def test_every_head_width_and_score_is_as_exact_as_plain_torch(channels: int, score: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(*rules()["prefix-LM"], (2, 1), channels, dtype, *SCORES[score])
    assert_as_exact_as_plain_torch(attention, inputs)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("channels", [80, 128, 192, 256])
def test_rows_whose_first_tile_is_hidden_are_right_at_any_scale(channels: int, scale: float | None) -> None:
    """A hidden score times the scale has to be exact: a fused multiply-add does not round it, a product does."""
    inputs = make_inputs(*rules()["window"], (2, 1), channels, torch.bfloat16)
    for name, rows in out_and_gradients(partial(attention, scale=scale), inputs).items():
        assert rows.isfinite().all(), name
    if scale is None:
        assert_as_exact_as_plain_torch(attention, inputs)


@pytest.mark.parametrize("score", SCORES)
def test_ten_runs_agree_bitwise(score: str) -> None:
    inputs = make_inputs(*rules()["causal"], (4, 2), 128, torch.bfloat16, *SCORES[score])
    first = out_and_gradients(attention, inputs)
    for _ in range(9):
        for name, rows in out_and_gradients(attention, inputs).items():
            assert torch.equal(rows, first[name])


def test_a_document_of_nan_does_not_reach_another_one_bitwise() -> None:
    inputs = make_inputs(*rules()["prefix-LM"], (4, 2), 64, torch.bfloat16)
    before = out_and_gradients(attention, inputs)
    for rows in (inputs.q_THK, inputs.k_SGK, inputs.v_SGK, inputs.d_out_THK):
        rows[1:701] = torch.nan
    after = out_and_gradients(attention, inputs)
    for name, old in before.items():
        assert torch.equal(old[:1], after[name][:1])
        assert torch.equal(old[701:], after[name][701:])
        assert after[name][1:701].isnan().any()


def test_thousands_of_documents_of_one_token_give_their_values() -> None:
    rows = torch.randn(4099, 2, 64, device="cuda", dtype=torch.bfloat16)
    out = attention(rows, rows, rows, causal(offsets_of([1] * 4096).cuda()))
    assert torch.equal(out[:4096], rows[:4096])
    assert not out[4096:].any()


def test_nothing_waits_for_the_device() -> None:
    inputs = make_inputs(*rules()["prefix-LM"], (4, 2), 64, torch.bfloat16, 5.0, 40)
    out_and_gradients(attention, inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        out_and_gradients(attention, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_of_schedule_forward_and_backward_serves_other_documents() -> None:
    inputs = make_inputs(causal(offsets_of([100, 155, 0]).cuda()), 256, 256, (4, 2), 64, torch.bfloat16, 5.0, 40)
    cu_seqlens = inputs.mask.cu_seqlens_q
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            out_and_gradients(attention, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = out_and_gradients(attention, inputs)
    for name in ("q_THK", "k_SGK", "v_SGK", "d_out_THK"):
        getattr(inputs, name).nan_to_num_(0.0)  # the last row is in a document of some batches
    for lengths in ([256, 0, 0], [1, 130, 125], [0, 0, 7]):
        cu_seqlens.copy_(offsets_of(lengths))
        graph.replay()
        for name, rows in out_and_gradients(attention, inputs).items():
            assert torch.equal(replayed[name], rows), name


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_it_gives_the_same_and_other_documents_compile_nothing(mode: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, mode=mode)
    for lengths in ([100, 155, 0], [256, 0, 0], [1, 130, 125]):
        inputs = make_inputs(causal(offsets_of(lengths).cuda()), 256, 256, (4, 2), 64, torch.bfloat16, 5.0, 40)
        with torch._dynamo.config.patch(error_on_recompile=lengths != [100, 155, 0]):
            ours = {name: rows.clone() for name, rows in out_and_gradients(compiled, inputs).items()}
        for name, rows in out_and_gradients(attention, inputs).items():
            torch.testing.assert_close(ours[name], rows)


@pytest.mark.parametrize("rule", rules())
def test_the_schedule_is_that_of_plain_torch(rule: str) -> None:
    made = make_tile_metadata(*rules()[rule])
    exact = tile_tables_reference(*rules()[rule], made.block)
    assert torch.equal(made.query_tiles_NF, exact[0])
    assert torch.equal(made.key_tiles_NF, exact[1])


def test_the_schedule_of_thousands_of_documents_is_that_of_plain_torch() -> None:
    mask = causal(offsets_of([1] * 4096).cuda())
    made = make_tile_metadata(mask, 5000, 5000)
    assert torch.equal(made.query_tiles_NF, tile_tables_reference(mask, 5000, 5000, made.block)[0])


def test_a_schedule_shared_by_layers_serves_heads_of_any_width() -> None:
    mask = rules()["causal"][0]
    tile_metadata = make_tile_metadata(mask, ROWS, ROWS)
    for channels in (64, 256):
        rows = torch.randn(ROWS, 2, channels, device="cuda", dtype=torch.bfloat16)
        assert torch.equal(attention(rows, rows, rows, mask, tile_metadata), attention(rows, rows, rows, mask))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("channels", [64, 128])
def test_the_largest_products_are_those_of_a_dense_matrix(channels: int, score: str) -> None:
    inputs = make_inputs(*rules()["window"], (4, 2), channels, torch.bfloat16, *SCORES[score])
    assert_largest_products_are_those_of_a_dense_matrix(attention_and_largest, inputs)


@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
@pytest.mark.parametrize("rule", ["causal", "window", "window on both sides", "bidirectional"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_are_as_exact_as_plain_torch_and_repeat_bitwise(name: str, rule: str, dtype: torch.dtype) -> None:
    if reason := missing(name):
        pytest.skip(reason)
    inputs = make_inputs(*rules()[rule], (4, 2), 128, dtype)
    rows = inputs.q_THK, inputs.k_SGK, inputs.v_SGK, inputs.mask
    tile_metadata = make_tile_metadata(inputs.mask, ROWS, ROWS)
    call = AttentionCall(*rows, tile_metadata, 128**-0.5, None, None, None)
    assert KERNELS[name].refusal(call) is None, "our kernel would be tested in its place"
    assert_as_exact_as_plain_torch(partial(attention, kernel=name), inputs)
    first = out_and_gradients(partial(attention, kernel=name), inputs)
    for _ in range(3):
        for part, again in out_and_gradients(partial(attention, kernel=name), inputs).items():
            assert torch.equal(again, first[part]), f"{part} is not repeated"
