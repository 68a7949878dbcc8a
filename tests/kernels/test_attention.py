"""Attention: the reference here, the kernels under the interpreter and through the compiler in their own processes."""

from dataclasses import replace

import pytest
import torch
from torch import library

from bigmodel.kernels import attention as module
from bigmodel.kernels.attention import (
    HIDDEN,
    LOG2_E,
    attention,
    attention_and_largest,
    attention_reference,
    cpu_attention_op,
    largest_products,
    make_tile_metadata,
)
from bigmodel.kernels.attention_dropout import factors, make_dropout
from bigmodel.kernels.attention_kernels import AttentionCall, AttentionKernel, chosen
from bigmodel.kernels.mask import AttentionMask, bidirectional, causal, cross, prefix_lm
from bigmodel.kernels.relative_bias import t5_bias, t5_buckets
from bigmodel.kernels.tiles import TileMetadata
from tests.kernels.test_mask import int32, offsets_of
from tests.support.dense_attention import (
    assert_as_exact_as_plain_torch,
    assert_largest_products_are_those_of_a_dense_matrix,
    dense_attention,
    make_inputs,
    out_and_gradients,
)
from tests.support.interpreted import run_interpreted, run_python

MIXED = offsets_of([0, 1, 90, 0, 7, 0])

CASES = {
    "causal": (causal(MIXED), 109, 109, (4, 2), 16, torch.float32),
    "causal, more channels, no rows beyond": (causal(MIXED), 98, 98, (4, 1), 24, torch.float32),
    "causal, bf16": (causal(MIXED), 98, 98, (4, 1), 16, torch.bfloat16),
    "window": (causal(MIXED, left=5), 98, 98, (2, 2), 16, torch.float32),
    "window longer than all documents": (causal(MIXED, left=300), 98, 98, (2, 2), 16, torch.float32),
    "window on both sides": (AttentionMask(MIXED, MIXED, left=9, right=40), 98, 98, (2, 1), 16, torch.float32),
    "bidirectional": (bidirectional(MIXED), 100, 100, (2, 1), 16, torch.float32),
    "cross": (cross(offsets_of([40, 0, 3, 1]), offsets_of([5, 9, 0, 70])), 50, 90, (2, 1), 16, torch.float32),
    "causal cross: late queries see nothing": (
        AttentionMask(offsets_of([50]), offsets_of([20]), left=10, right=0), 50, 20, (1, 1), 16, torch.float32, 2.0, 30,
    ),
    "prefix-LM": (prefix_lm(MIXED, int32([0, 1, 40, 0, 3, 2])), 100, 100, (2, 1), 16, torch.float32),
    "prefix-LM in a window": (prefix_lm(MIXED, int32([0, 1, 99, 0, 3, 2]), left=20), 98, 98, (2, 1), 16, torch.float32),
    "the keys of a prefix-LM look at its queries": (
        prefix_lm(MIXED, int32([0, 1, 40, 0, 3, 2])).transposed, 98, 98, (2, 1), 16, torch.float32,
    ),
    "capped": (causal(MIXED), 98, 98, (2, 1), 16, torch.float32, 1.5),
    "biased and capped": (bidirectional(MIXED), 98, 98, (4, 2), 16, torch.float32, 1.5, 20),
    "dropout": (causal(MIXED), 100, 100, (2, 1), 16, torch.float32, None, None, 0.3),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_reference_is_as_exact_as_plain_torch(case) -> None:
    assert_as_exact_as_plain_torch(attention_reference, make_inputs(*case))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_largest_products_are_those_of_a_dense_matrix(case) -> None:
    inputs = make_inputs(*case)
    assert_largest_products_are_those_of_a_dense_matrix(attention_and_largest, inputs)
    alone = out_and_gradients(lambda *rows, **score: attention_and_largest(*rows, **score)[0], inputs)
    for name, rows in out_and_gradients(attention, inputs).items():
        assert torch.equal(rows, alone[name]), f"{name} has other bits"


def test_the_largest_products_of_a_long_document_come_from_all_its_queries() -> None:
    """Queries come in parts; query 700 of document 1 is the largest, and no pair of two documents counts."""
    q_THK, k_SGK = torch.zeros(1300, 2, 4), torch.zeros(1300, 1, 4)
    q_THK[900, 1], k_SGK[850, 0] = 1.0, 3.0  # scale 1/2: 6
    q_THK[901, 0], k_SGK[902, 0] = 10.0, 10.0  # hidden: it comes later
    q_THK[100, 0] = 5.0  # of document 0
    found_H = attention_and_largest(q_THK, k_SGK, k_SGK, causal(offsets_of([200, 1100])))[1]
    assert found_H.tolist() == [60.0, 6.0]


def test_the_largest_products_of_documents_do_not_depend_on_the_batch() -> None:
    lengths = [40, 7, 0, 3, 40]
    inputs = make_inputs(causal(offsets_of(lengths)), 90, 90, (4, 2), 16, torch.bfloat16)
    whole_H = attention_and_largest(inputs.q_THK, inputs.k_SGK, inputs.v_SGK, inputs.mask)[1]
    alone, end = [], 0
    for length in filter(None, lengths):
        mine = slice(end, end := end + length)
        rows = (rows[mine] for rows in (inputs.q_THK, inputs.k_SGK, inputs.v_SGK))
        alone.append(attention_and_largest(*rows, causal(offsets_of([length])))[1])
    assert torch.equal(torch.stack(alone).amax(0), whole_H)


@pytest.mark.parametrize("score", [(None, None), (1.5, None), (None, 20), (1.5, 20)], ids=str)
def test_in_float64_the_reference_is_the_formula(score: tuple[float | None, int | None]) -> None:
    inputs = make_inputs(causal(MIXED, left=30), 98, 98, (4, 2), 16, torch.float64, *score)
    ours, exact = out_and_gradients(attention_reference, inputs), out_and_gradients(dense_attention, inputs)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_dropout_keeps_its_share_of_pairs_in_every_head_and_each_head_draws_anew() -> None:
    seeds = torch.randint(-(2**63), 2**63 - 1, (500,), generator=torch.Generator().manual_seed(1))
    drops = make_dropout(0.25, seeds[:300], seeds[300:])
    all_rows = slice(None)
    first_H, later_H = (factors(one, all_rows, all_rows, 4, torch.float64) for one in (drops, drops.from_head(4)))
    kept = torch.cat([first_H, later_H]) > 0  # (8, 300, 200)
    deviation = (0.25 * 0.75 / kept[0].numel()) ** 0.5
    assert ((kept.double().mean((1, 2)) - 0.75).abs() < 4 * deviation).all()
    assert (kept.double().mean((0, 1)) - 0.75).abs().max() < 5 * (0.25 * 0.75 / 2400) ** 0.5
    centred = kept.double().flatten(1) - 0.75
    of_heads = torch.corrcoef(centred) - torch.eye(8)
    assert of_heads.abs().max() < 5 / kept[0].numel() ** 0.5
    of_rows = torch.corrcoef(kept[0].double()) - torch.eye(300)
    assert of_rows.abs().max() < 6 / 200**0.5
    assert torch.equal(factors(drops, slice(7, 90), slice(5, 80), 4, torch.float64), first_H[:, 7:90, 5:80])
    assert first_H.unique().tolist() == [0.0, 1 / 0.75]


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_dropout_without_sense_is_refused(rate: float) -> None:
    rows = torch.zeros(4, 1, 16)
    seeds = torch.arange(4)
    with pytest.raises(ValueError, match=f"dropout of {rate}; it needs at least 0 and less than 1"):
        attention(rows, rows, rows, causal(offsets_of([4])), dropout=make_dropout(rate, seeds, seeds))


def test_a_dropout_of_another_batch_is_refused() -> None:
    rows = torch.zeros(4, 1, 16)
    with pytest.raises(ValueError, match="words of 3 queries and 4 keys for 4 queries and 4 keys"):
        attention(
            rows, rows, rows, causal(offsets_of([4])), dropout=make_dropout(0.1, torch.arange(3), torch.arange(4))
        )


def test_on_cpu_bf16_is_computed_in_fp32_and_rounded_once() -> None:
    inputs = make_inputs(causal(MIXED), 98, 98, (4, 2), 16, torch.bfloat16, 2.0, 8)
    wide = out_and_gradients(attention_reference, inputs.in_documents(torch.float32))
    for name, ours in out_and_gradients(attention_reference, inputs).items():
        assert torch.equal(ours, wide[name].bfloat16())


def test_without_units_for_bf16_all_of_it_is_computed_in_fp32_and_rounded_once(monkeypatch) -> None:
    monkeypatch.setattr(module, "is_wide", lambda _rows: True)
    inputs = make_inputs(causal(MIXED), 98, 98, (4, 2), 16, torch.bfloat16)
    wide = out_and_gradients(attention_reference, inputs.in_documents(torch.float32))
    for name, ours in out_and_gradients(attention_reference, inputs).items():
        assert torch.equal(ours, wide[name].bfloat16())


@pytest.mark.parametrize("left", [None, 100])
def test_in_the_units_for_bf16_it_is_as_exact_as_plain_torch_and_the_backward_is_fp32(monkeypatch, left) -> None:
    monkeypatch.setattr(module, "is_wide", lambda _rows: False)
    mask = causal(offsets_of([300, 1, 40]), left)
    inputs = make_inputs(mask, 341, 341, (4, 2), 64, torch.bfloat16)
    assert_as_exact_as_plain_torch(attention_reference, inputs)
    rows, offsets = (inputs.q_THK, inputs.k_SGK, inputs.v_SGK), (mask.cu_seqlens_q, mask.cu_seqlens_k, None, None)
    found = out_and_gradients(attention_reference, inputs)
    out, lse = cpu_attention_op(*rows, *offsets, left, 0, 0.125)
    assert torch.equal(found["out"], out)
    widened = [x.detach().float() for x in (inputs.d_out_THK, out, lse, *rows)]
    wide = torch.ops.bigmodel.cpu_attention_backward(*widened, *offsets, left, 0, 0.125)
    for name, values in zip(("dq", "dk", "dv"), wide, strict=True):
        assert torch.equal(found[name], values.bfloat16())


@pytest.mark.parametrize("left", [None, 6])
def test_editing_a_document_leaves_the_others_bitwise_as_they_were(left: int | None) -> None:
    mask = causal(offsets_of([20, 37, 30, 41]), left=left)
    inputs = make_inputs(mask, 128, 128, (4, 2), 32, torch.float32)
    before = out_and_gradients(attention, inputs)
    for rows in (inputs.q_THK, inputs.k_SGK, inputs.v_SGK, inputs.d_out_THK):
        rows[20:57] = rows[20:57].flip(0) * 2
    after = out_and_gradients(attention, inputs)
    for name, old in before.items():
        new = after[name]
        assert torch.equal(old[:20], new[:20])
        assert torch.equal(old[57:], new[57:])
        assert not torch.equal(old[20:57], new[20:57])


@pytest.mark.parametrize("score", [(None, None), (1.5, 2)], ids=["plain", "capped and biased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("queries", "keys"),
    [([0, 0], [0, 0]), ([0, 4], [0, 0]), ([0, 0], [0, 4]), ([0, 0, 4], [0, 4, 4])],
    ids=["nothing", "queries", "keys", "documents of one side each"],
)
@pytest.mark.parametrize("beyond", [0, 3], ids=["", "rows beyond"])
def test_where_no_document_has_queries_and_keys_every_gradient_is_zero(queries, keys, dtype, score, beyond) -> None:
    mask = cross(int32(queries), int32(keys))
    inputs = make_inputs(mask, queries[-1] + beyond, keys[-1] + beyond, (4, 2), 16, dtype, *score)
    found = out_and_gradients(attention, inputs)
    assert found.keys() == {"out", "dq", "dk", "dv"} | ({"dbias"} if inputs.bias_HR is not None else set())
    assert found["out"].shape == inputs.q_THK.shape
    assert found["out"].dtype == dtype
    assert all((one == 0).all() for one in found.values())


def test_4096_documents_of_one_token_give_their_values() -> None:
    rows = torch.randn(4100, 1, 16, requires_grad=True)
    out = attention(rows, rows, rows, causal(offsets_of([1] * 4096)))
    assert torch.equal(out[:4096], rows[:4096])
    assert not out[4096:].any()


@pytest.mark.parametrize("kind", ["causal", "window", "bidirectional", "prefix"])
def test_a_document_has_the_same_bits_alone_and_among_others(kind: str) -> None:
    """Equal documents share a call, and places without a document cost nothing."""
    lengths, prefixes = [40, 7, 0, 7, 0, 3, 40, 1, 7, 1] + [0] * 300, [9, 2, 0, 0, 5, 1, 9, 0, 2, 1] + [0] * 300

    def mask_of(lengths: list[int], prefixes: list[int]) -> AttentionMask:
        offsets = offsets_of(lengths)
        if kind == "prefix":
            return prefix_lm(offsets, int32(prefixes))
        return {"causal": causal(offsets), "window": causal(offsets, 4), "bidirectional": bidirectional(offsets)}[kind]

    inputs = make_inputs(mask_of(lengths, prefixes), sum(lengths), sum(lengths), (4, 2), 16, torch.float32)
    together, end = out_and_gradients(attention, inputs), 0
    for length, prefix in zip(lengths, prefixes, strict=True):
        mine = slice(end, end := end + length)
        rows = {name: getattr(inputs, name)[mine] for name in ("q_THK", "k_SGK", "v_SGK", "d_out_THK")}
        alone = out_and_gradients(attention, replace(inputs, mask=mask_of([length], [prefix]), **rows))
        for name, values in alone.items():
            assert torch.equal(values, together[name][mine]), f"{name} of a document of {length}"


def test_torch_knows_all_about_the_operator_on_a_cpu() -> None:
    rows = [torch.randn(9, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
    offsets = offsets_of([3, 0, 4])
    library.opcheck(cpu_attention_op, (*rows, offsets, offsets, None, int32([2, 0, 1]), None, 0, 0.25))
    sides = [side.detach() for side in rows[:2]]
    library.opcheck(largest_products, (*sides, offsets, offsets, None, int32([2, 0, 1]), None, 0, 0.25))


def test_compiled_on_a_cpu_other_documents_compile_nothing_again() -> None:
    torch.compiler.reset()
    rows = torch.randn(12, 2, 16)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    def compiled(rows: torch.Tensor, mask: AttentionMask, tile_metadata: TileMetadata) -> torch.Tensor:
        return attention(rows, rows, rows, mask, tile_metadata)

    for lengths in ([12, 0, 0], [3, 5, 2], [4, 4, 4]):
        mask = causal(offsets_of(lengths))
        tile_metadata = make_tile_metadata(mask, 12, 12)
        with torch._dynamo.config.patch(error_on_recompile=lengths != [12, 0, 0]):
            assert torch.equal(compiled(rows, mask, tile_metadata), attention(rows, rows, rows, mask))


def test_a_schedule_made_before_gives_the_same() -> None:
    mask = causal(offsets_of([3, 5]))
    rows = torch.randn(8, 2, 16)
    tile_metadata = make_tile_metadata(mask, 8, 8)
    assert torch.equal(attention(rows, rows, rows, mask, tile_metadata), attention(rows, rows, rows, mask))


@pytest.mark.timeout(900)
def test_the_kernels_pass_their_tests_under_the_interpreter() -> None:
    assert run_interpreted("tests/support/interpreted_attention.py") == 42


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("architectures", "num_rows"),
    [(("90",), 38), pytest.param(("80", "100"), 92, marks=pytest.mark.long)],
    ids=["hopper", "ampere and blackwell"],
)
def test_the_kernels_compile_without_spilling_registers(architectures: tuple[str, ...], num_rows: int) -> None:
    printed = run_python(["-m", "tests.support.compile_kernels", *architectures], interpret=False)
    print(printed)
    rows = [line.split() for line in printed.splitlines() if "|" in line]
    assert len(rows) == num_rows
    assert {row[1] for row in rows} == {f"sm_{name}" for name in architectures}
    spilled = [row for row in rows if row[-2] != "0"]
    assert not spilled, f"kernel, architecture, type, channels, score | registers, stack, shared bytes: {spilled}"
    room = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448}
    too_large = [row for row in rows if int(row[-1]) > room[row[1]]]
    assert not too_large, f"more shared memory than there is: {too_large}"


def test_other_documents_and_lengths_of_a_batch_compile_no_kernel_again_and_a_window_compiles_one_more() -> None:
    printed = run_python(["-m", "tests.support.compile_kernels", "variants"], interpret=False)
    print(printed)
    assert printed.split() == [
        *("forward_kernel", "2", "delta_kernel", "1", "query_gradient_kernel", "2", "key_gradient_kernel", "2"),
        *("bias_gradient_kernel", "1", "plan_kernel", "1", "order_kernel", "1"),
    ]


def test_without_triton_the_reference_runs() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch
from bigmodel.kernels.attention import attention
from bigmodel.kernels.mask import causal
rows = torch.ones(4, 1, 16)
print(attention(rows, rows, rows, causal(torch.tensor([0, 4], dtype=torch.int32))).sum().item())
"""
    assert run_python(["-c", program], interpret=False).strip() == "64.0"


def test_t5_buckets_are_those_of_transformers() -> None:
    from tools.torchvision_operators import define_missing_torchvision_operators

    define_missing_torchvision_operators()
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-400, 401)
    for bidirectional_, num_buckets, max_distance in ((True, 32, 128), (False, 32, 128), (True, 8, 20), (False, 6, 64)):
        theirs = T5Attention._relative_position_bucket(distance, bidirectional_, num_buckets, max_distance)
        assert torch.equal(t5_buckets(distance, num_buckets, bidirectional_, max_distance), theirs)
        assert theirs.unique().numel() >= num_buckets - 1


def test_a_bias_by_distance_is_t5s_for_distances_near_and_far_and_sends_its_gradient_to_the_table() -> None:
    table_BH = torch.randn(32, 2, requires_grad=True)
    bias_HR = t5_bias(table_BH, bidirectional=True)
    assert bias_HR.shape == (2, 257)
    for distance, bucket in ((0, 0), (-3, 3), (3, 19), (-128, 15), (128, 31), (-20, 10)):
        assert torch.equal(bias_HR[:, 128 + distance], table_BH[bucket])
    bias_HR.sum().backward()
    assert table_BH.grad is not None
    assert table_BH.grad[:, 0].sum() == 257
    assert table_BH.grad[3, 0] == 1


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(3, 128), (2, 128), (32, 8)])
def test_buckets_that_cannot_be_divided_are_refused(num_buckets: int, max_distance: int) -> None:
    with pytest.raises(ValueError, match=f"t5_bias got {num_buckets} buckets"):
        t5_bias(torch.zeros(num_buckets, 1), bidirectional=True, max_distance=max_distance)


ROWS = torch.zeros(6, 4, 16)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ({"softcap": 0.0}, "got softcap 0.0; it needs a positive one, or None"),
        ({"bias_HR": torch.zeros(4, 6)}, r"bias of shape \(4, 6\); it needs \(4 heads, 2 \* reach \+ 1\)"),
        ({"bias_HR": torch.zeros(3, 7)}, r"bias of shape \(3, 7\); it needs \(4 heads"),
        (
            {"bias_HR": torch.zeros(4, 4099, requires_grad=True)},
            "a bias that reaches 2049 keys and requires a gradient",
        ),
    ],
)
def test_a_cap_or_bias_that_does_not_fit_is_refused(score, message) -> None:
    with pytest.raises(ValueError, match=message):
        attention(ROWS, ROWS, ROWS, causal(offsets_of([4])), **score)


@pytest.mark.parametrize(
    ("q", "k", "v", "scale", "message"),
    [
        (ROWS, ROWS[:, :3], ROWS[:, :3], None, "query heads must be a multiple of the key heads"),
        (ROWS, ROWS, ROWS[:5], None, r"it needs q \(T, H, K\) and k, v \(S, G, K\)"),
        (ROWS, ROWS.double(), ROWS, None, "cast them to one type"),
        (ROWS, ROWS, ROWS, 0.0, "got scale 0.0; it needs a positive one"),
        (ROWS[:5], ROWS, ROWS, None, "a tile_metadata made for 6 queries and 6 keys; make one for this batch"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(q, k, v, scale, message) -> None:
    mask = causal(offsets_of([4]))
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, mask, make_tile_metadata(mask, 6, 6), scale)


def test_an_unknown_kernel_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"attention got kernel 'hoper'; it needs one of .*triton"):
        attention(ROWS, ROWS, ROWS, causal(offsets_of([4])), kernel="hoper")


def test_a_call_that_a_kernel_does_not_cover_takes_the_one_that_covers_all() -> None:
    every = AttentionKernel(lambda _call: torch.ones(1), lambda _call: None)
    capped = AttentionKernel(lambda _call: torch.zeros(1), lambda call: None if call.softcap else "needs a cap")
    table = {"triton": every, "capped": capped}
    mask = causal(offsets_of([6]))
    for softcap, taken in ((None, every), (2.0, capped)):
        made = make_tile_metadata(mask, 6, 6)
        call = AttentionCall(ROWS, ROWS, ROWS, mask, made, 0.25, softcap, None, None)
        assert chosen(table, "capped", call) is taken


def test_a_schedule_of_another_rule_is_refused() -> None:
    cu_seqlens = offsets_of([6])
    with pytest.raises(ValueError, match="a tile_metadata made for another mask"):
        attention(ROWS, ROWS, ROWS, causal(cu_seqlens), make_tile_metadata(prefix_lm(cu_seqlens, int32([3])), 6, 6))


@pytest.mark.parametrize("block", [8, 48, 96])
def test_a_schedule_needs_tiles_that_kernels_can_take_in_parts(block: int) -> None:
    with pytest.raises(ValueError, match=f"block is {block}; tiles need a power of two of rows, at least 16"):
        make_tile_metadata(causal(offsets_of([6])), 6, 6, block=block)


def test_a_hidden_score_times_any_scale_is_exact() -> None:
    """Of two products that are subtracted from one another the compiler rounds only one."""
    hidden = torch.tensor(HIDDEN.value, dtype=torch.float32)
    scales = torch.rand(1000) * LOG2_E
    assert torch.equal((hidden * scales).double(), hidden.double() * scales.double())
