"""The attention kernels, under Triton's interpreter. Run by test_attention.py."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as some
from torch import Tensor, library
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from bigmodel.kernels import attention as kernels
from bigmodel.kernels.attention import attention, attention_and_largest, attention_op, make_tile_metadata
from bigmodel.kernels.attention_dropout import make_dropout
from bigmodel.kernels.mask import AttentionMask, bidirectional, causal, cross, last_first, mixed, prefix_lm
from tests.kernels.test_mask import int32, offsets_of, random_masks
from tests.support.dense_attention import (
    Inputs,
    assert_as_exact_as_plain_torch,
    assert_largest_products_are_those_of_a_dense_matrix,
    make_inputs,
    out_and_gradients,
)

BLOCK = 32
FP32, FP16 = torch.float32, torch.float16


@pytest.fixture(autouse=True, scope="module")
def _new_tensors_hold_nan() -> Iterator[None]:
    """Deterministic mode fills torch.empty with NaN, so rows that a kernel does not write are detected."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def attend(q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, mask: AttentionMask, block: int = BLOCK, **score) -> Tensor:
    tile_metadata = make_tile_metadata(mask, len(q_THK), len(k_SGK), block=block)
    return attention(q_THK, k_SGK, v_SGK, mask, tile_metadata, **score)


SHORT_AND_LONG = offsets_of([0, 1, 66, 0, 7, 0])

LATE_QUERIES_SEE_NOTHING = (
    AttentionMask(offsets_of([50]), offsets_of([20]), left=10, right=0), 50, 20, (2, 1), 16, FP32,
)  # fmt: skip

CASES = {
    "causal, 2 query heads on 1, rows beyond": (causal(SHORT_AND_LONG), 85, 85, (2, 1), 16, FP32),
    "window with full tiles, 24 channels": (causal(offsets_of([5, 100]), left=66), 105, 105, (1, 1), 24, FP32),
    "window on both sides, fp16": (
        AttentionMask(offsets_of([70, 3]), offsets_of([70, 3]), left=9, right=40), 80, 80, (2, 2), 16, FP16,
    ),
    "prefixes shorter and longer than a tile": (
        prefix_lm(SHORT_AND_LONG, int32([0, 1, 37, 0, 9, 0]), left=50), 74, 74, (1, 1), 16, FP32,
    ),
    "cross, empty on either side, capped": (
        cross(offsets_of([40, 0, 3, 1]), offsets_of([5, 9, 0, 70])), 50, 90, (2, 1), 16, FP32, 1.5,
    ),
    "mixed: own past and source": (
        mixed(offsets_of([9, 0, 40]), offsets_of([20, 3, 35])), 49, 107, (2, 1), 16, FP32,
    ),
    "a run of positions, last first": (
        last_first(causal(SHORT_AND_LONG, left=40), range(20, 60), 1), 40, 59, (2, 1), 16, FP32,
    ),
    "causal cross: late queries see nothing": (*LATE_QUERIES_SEE_NOTHING, None, 40),
    "bidirectional, a bias": (bidirectional(offsets_of([2, 69])), 71, 71, (1, 1), 16, FP32, None, 40),
    "causal, a bias of one number, capped, fp16": (causal(offsets_of([40])), 40, 40, (2, 1), 16, FP16, 2.0, 0),
    "causal, dropout": (causal(SHORT_AND_LONG), 85, 85, (2, 1), 16, FP32, None, None, 0.3),
    "mixed, dropout, a bias, capped, fp16": (
        mixed(offsets_of([9, 0, 30]), offsets_of([20, 3, 15])), 39, 77, (2, 1), 16, FP16, 1.5, 20, 0.5,
    ),
    "a head of 136 channels": (causal(offsets_of([9, 20])), 30, 30, (1, 1), 136, FP32),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_kernels_are_as_exact_as_plain_torch(case) -> None:
    assert_as_exact_as_plain_torch(attend, make_inputs(*case))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_largest_products_are_those_of_a_dense_matrix(case) -> None:
    inputs = make_inputs(*case)
    tile_metadata = make_tile_metadata(inputs.mask, len(inputs.q_THK), len(inputs.k_SGK), block=BLOCK)
    assert_largest_products_are_those_of_a_dense_matrix(
        partial(attention_and_largest, tile_metadata=tile_metadata), inputs
    )


def test_measured_attention_has_the_bits_of_the_plain_one() -> None:
    inputs = make_inputs(*CASES["causal, 2 query heads on 1, rows beyond"])
    tile_metadata = make_tile_metadata(inputs.mask, len(inputs.q_THK), len(inputs.k_SGK), block=BLOCK)
    measured = out_and_gradients(lambda *rows: attention_and_largest(*rows, tile_metadata)[0], inputs)
    for name, rows in out_and_gradients(attend, inputs).items():
        assert torch.equal(rows, measured[name]), f"{name} has other bits"


# hypothesis's shrinking and explaining trace every line of the interpreter: minutes.
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    random_masks(longest=24, most=3),
    some.sampled_from([(1, 1), (2, 1), (2, 2)]),
    some.sampled_from([FP32, FP16]),
    some.sampled_from([None, 0.5, 20.0]),
    some.sampled_from([None, 3, 17]),
)
def test_any_batch_is_as_exact_as_plain_torch(case, heads, dtype, softcap, reach) -> None:
    if case[1] and case[2]:
        inputs = make_inputs(*case, heads, 16, dtype, softcap, reach)
        assert_as_exact_as_plain_torch(partial(attend, block=16), inputs)


def test_a_kernel_may_take_the_tiles_of_a_schedule_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(prefix_lm(offsets_of([37, 3]), int32([4, 1])), 40, 40, (2, 1), 16, FP32, None, 11)
    whole = kernels.launch_options

    def halves(*arguments):
        options = whole(*arguments)
        return options | {"ROWS": options["ROWS"] // 2, "PARTS": options["PARTS"] * 2, "COLUMNS": 16}

    monkeypatch.setattr(kernels, "launch_options", halves)
    assert_as_exact_as_plain_torch(attend, inputs)


def test_scores_far_beyond_the_cap_are_as_exact_as_plain_torch() -> None:
    inputs = make_inputs(causal(offsets_of([20])), 20, 20, (1, 1), 16, FP32, softcap=0.01)
    inputs.q_THK.mul_(50.0)
    assert_as_exact_as_plain_torch(attend, inputs)


def test_a_document_of_nan_does_not_reach_another_one_bitwise() -> None:
    mask = prefix_lm(offsets_of([20, 23, 5]), int32([3, 5, 9]))
    inputs = make_inputs(mask, 48, 48, (2, 1), 16, FP32, softcap=3.0)
    before = out_and_gradients(attend, inputs)
    for rows in (inputs.q_THK, inputs.k_SGK, inputs.v_SGK, inputs.d_out_THK):
        rows[20:43] = torch.nan
    after = out_and_gradients(attend, inputs)
    for name, old in before.items():
        assert torch.equal(old[:20], after[name][:20])
        assert torch.equal(old[43:], after[name][43:])
        assert after[name][20:43].isnan().any()


def test_two_runs_agree_bitwise() -> None:
    inputs = make_inputs(causal(offsets_of([40])), 40, 40, (2, 1), 16, FP32, reach=20)
    first, second = out_and_gradients(attend, inputs), out_and_gradients(attend, inputs)
    assert len(first) == 5
    assert all(torch.equal(rows, second[name]) for name, rows in first.items())


def test_few_programs_sum_the_bias_gradient_of_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(causal(offsets_of([40, 9, 20])), 70, 70, (1, 1), 16, FP32, reach=12)
    monkeypatch.setattr(kernels, "BIAS_GRADIENT_PROGRAMS", 2)
    assert_as_exact_as_plain_torch(partial(attend, block=16), inputs)


def test_any_strides_will_do() -> None:
    inputs = make_inputs(causal(offsets_of([33])), 33, 33, (2, 1), 16, FP32)
    # The gradient of a sum has stride 0 everywhere; q has strided channels; k has its heads outermost.
    q_THK = inputs.q_THK.transpose(1, 2).contiguous().transpose(1, 2)
    k_SGK = inputs.k_SGK.transpose(0, 1).contiguous().transpose(0, 1)
    d_out_THK = torch.ones(()).expand(33, 2, 16)
    assert_as_exact_as_plain_torch(attend, Inputs(inputs.mask, q_THK, k_SGK, inputs.v_SGK, d_out_THK))


def small_inputs(lengths: list[int], prefixes: list[int]) -> Inputs:
    mask = prefix_lm(offsets_of(lengths), int32(prefixes), left=9)
    return make_inputs(mask, 16, 16, (1, 1), 16, FP32, softcap=3.0, reach=4)


def test_torch_knows_all_about_the_operators() -> None:
    inputs = small_inputs([5, 9], [1, 2])
    drops = make_dropout(0.25, torch.arange(16), torch.arange(16))
    words = drops.query_words_T, drops.key_words_S
    tile_metadata = make_tile_metadata(inputs.mask, 16, 16, block=16)
    tables = tile_metadata.query_tiles_NF, tile_metadata.key_tiles_NF
    leaves = [rows.detach().requires_grad_() for rows in (inputs.q_THK, inputs.k_SGK, inputs.v_SGK, inputs.bias_HR)]
    leaves = [rows.detach().nan_to_num(0.0).requires_grad_() for rows in leaves]
    library.opcheck(attention_op, (*leaves, *words, *tables, *inputs.mask.window, 0.25, 3.0, 16, 0.25, 3))


def assert_compiled_it_gives_the_same(attend_compiled, counter: CompileCounterWithBackend) -> None:
    for lengths, prefixes in ([5, 9, 0], [2, 0, 0]), ([16, 0, 0], [0, 0, 0]):
        inputs = small_inputs(lengths, prefixes)
        ours = out_and_gradients(attend_compiled, inputs)
        for name, rows in out_and_gradients(partial(attend, block=16), inputs).items():
            torch.testing.assert_close(ours[name], rows)
    assert counter.frame_count == 1, "other documents were compiled again"


def test_schedule_and_attention_compile_without_graph_breaks_once() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(partial(attend, block=16), fullgraph=True, backend=counter)
    assert_compiled_it_gives_the_same(compiled, counter)


def test_inductor_compiles_attention_once() -> None:
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(attention, fullgraph=True, backend=counter)

    def attend_compiled(q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, mask: AttentionMask, **score) -> Tensor:
        return compiled(q_THK, k_SGK, v_SGK, mask, make_tile_metadata(mask, 16, 16, block=16), **score)

    assert_compiled_it_gives_the_same(attend_compiled, counter)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_in_the_backward_gradients_are_the_same_bitwise(use_reentrant: bool) -> None:
    inputs = small_inputs([5, 11], [1, 2])

    def recomputed(q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, mask: AttentionMask, **score) -> Tensor:
        bias_HR = score.pop("bias_HR")
        run = lambda q, k, v, bias: attend(q, k, v, mask, bias_HR=bias, **score)  # noqa: E731
        return checkpoint(run, q_THK, k_SGK, v_SGK, bias_HR, use_reentrant=use_reentrant)

    plain = out_and_gradients(attend, inputs)
    for name, rows in out_and_gradients(recomputed, inputs).items():
        assert torch.equal(rows, plain[name])


def test_a_bias_that_is_not_learned_costs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = small_inputs([5, 11], [1, 2])
    monkeypatch.setattr(kernels, "bias_gradient_kernel", None)
    leaves = [rows.detach().requires_grad_() for rows in (inputs.q_THK, inputs.k_SGK, inputs.v_SGK)]
    out_THK = attend(*leaves, inputs.mask, bias_HR=inputs.bias_HR)
    assert all(rows.isfinite().all() for rows in torch.autograd.grad(out_THK, leaves, inputs.d_out_THK))


def test_bf16_is_refused_where_the_interpreter_is_wrong() -> None:
    rows = torch.zeros(4, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"kernels got torch\.bfloat16; they need one of"):
        attend(rows, rows, rows, causal(offsets_of([4])))


def test_wide_heads_are_refused() -> None:
    rows = torch.zeros(4, 1, 264)
    with pytest.raises(ValueError, match="got 264 channels a head; use at most 256"):
        attend(rows, rows, rows, causal(offsets_of([4])))
