"""Linear cross-entropy: sums and both gradients are those of the formula, whatever the chunks and the options."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

from bigmodel.config.settings import ModelSettings, load_settings
from bigmodel.distributed.world import ALONE
from bigmodel.inspect.memory import LiveBytes
from bigmodel.kernels import linear_cross_entropy as module
from bigmodel.kernels.linear_cross_entropy import (
    Options,
    chunk_slices,
    linear_cross_entropy,
    linear_cross_entropy_op,
    linear_cross_entropy_per_token,
    scaled,
    sums_and_gradients,
)
from bigmodel.model.init import init_weights
from bigmodel.model.transformer import Transformer
from bigmodel.training import loop, start
from tests.support.dense_cross_entropy import (
    IGNORED,
    OPTIONS,
    assert_as_exact_as_plain_torch,
    assert_losses_as_exact_as_plain_torch,
    dense_results,
    make_inputs,
    our_results,
)
from tests.support.interpreted import run_interpreted, run_python
from tests.support.tiny_run import write_run
from tests.system.test_guarantee_leak import make_batch

EVERYTHING = Options(z_loss=0.03, label_smoothing=0.2, logit_softcap=2.5)


@pytest.mark.parametrize("chunk_positions", [1, 5, 23, 0])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_in_float64_sums_and_gradients_are_the_formula(options: Options, chunk_positions: int) -> None:
    inputs = make_inputs(torch.float64)
    for ours, exact in zip(our_results(inputs, options, chunk_positions), dense_results(inputs, options), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_bounded_by_that_of_plain_torch(dtype: torch.dtype, options: Options) -> None:
    inputs = make_inputs(dtype, positions=70, vocabulary=301, width=24)
    assert_as_exact_as_plain_torch(our_results(inputs, options, chunk_positions=32), inputs, options)


@pytest.mark.parametrize("softcap", [0.0, 2.5])
@pytest.mark.parametrize("chunk_positions", [4, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_single_positions(dtype: torch.dtype, chunk_positions: int, softcap: float) -> None:
    inputs = make_inputs(dtype)
    losses_T = linear_cross_entropy_per_token(*inputs.leaves(), softcap, chunk_positions)
    assert losses_T.dtype == torch.float32
    assert not losses_T.requires_grad
    assert_losses_as_exact_as_plain_torch(losses_T, inputs, softcap)


def test_a_z_loss_changes_the_gradient_and_not_the_loss() -> None:
    inputs = make_inputs()
    without, with_z = our_results(inputs), our_results(inputs, Options(z_loss=0.03))
    assert without.loss_sum.item() == with_z.loss_sum.item()
    assert without.z_sum.item() == with_z.z_sum.item() > 100
    assert (without.grad_hidden_TH - with_z.grad_hidden_TH).abs().max() > 0.1
    sums = linear_cross_entropy(*inputs.leaves(), Options(z_loss=0.03))
    assert [one.requires_grad for one in sums] == [True, False, False]


def test_ignored_positions_have_no_gradient_and_no_influence() -> None:
    inputs = make_inputs()
    ignored_T = inputs.labels_T == IGNORED
    before = our_results(inputs, EVERYTHING)
    assert (before.grad_hidden_TH[ignored_T] == 0).all()
    assert (before.grad_hidden_TH[~ignored_T] != 0).any(-1).all()

    inputs.hidden_TH[ignored_T] = 50.0
    after = our_results(inputs, EVERYTHING)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_editing_a_position_leaves_the_gradients_of_others_bitwise_as_they_were() -> None:
    inputs = make_inputs()
    before = our_results(inputs, EVERYTHING, chunk_positions=8)
    inputs.hidden_TH[10:13] *= 2
    after = our_results(inputs, EVERYTHING, chunk_positions=8)
    assert torch.equal(before.grad_hidden_TH[:10], after.grad_hidden_TH[:10])
    assert torch.equal(before.grad_hidden_TH[13:], after.grad_hidden_TH[13:])
    assert not torch.equal(before.grad_hidden_TH[10:13], after.grad_hidden_TH[10:13])


def test_a_batch_without_any_target_is_zero() -> None:
    inputs = make_inputs()
    inputs.labels_T[:] = IGNORED
    assert [float(one.abs().sum()) for one in our_results(inputs, EVERYTHING)] == [0.0] * 5


def test_the_weight_may_be_the_embedding_too() -> None:
    inputs = make_inputs(torch.float64).leaves()
    tokens_T = inputs.labels_T.clamp_min(0).roll(1)
    linear_cross_entropy(torch.tanh(inputs.weight_VH[tokens_T]), *inputs[1:]).loss_sum.backward()
    tied = inputs.weight_VH.detach().clone().requires_grad_()
    F.cross_entropy(torch.tanh(tied[tokens_T]) @ tied.T, inputs.labels_T, ignore_index=-100, reduction="sum").backward()
    torch.testing.assert_close(inputs.weight_VH.grad, tied.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [Options(), Options(0.01, 0.1, 3.0)], ids=["plain", "all"])
@pytest.mark.parametrize("gradient_type", [None, torch.float32, torch.bfloat16], ids=str)
def test_the_rows_of_a_cache_have_the_same_bits_as_all_at_once(monkeypatch, options, gradient_type) -> None:
    monkeypatch.setattr(module, "CACHE_BYTES", 4 * 50 * 3)  # three rows of seven
    logits_CV, weights_C = torch.randn(7, 50), torch.rand(7)
    labels_C = torch.tensor([3, IGNORED, 49, 0, IGNORED, 7, 8])
    whole = module.softmax_step_reference(logits_CV.clone(), labels_C, options, gradient_type, weights_C)
    parts = module.softmax_step_in_cache(logits_CV.clone(), labels_C, options, gradient_type, weights_C)
    for one, other in zip(whole[: 2 if gradient_type is None else 3], parts, strict=False):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype


def test_only_the_wanted_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_TH, weight_VH, labels_T = make_inputs().leaves()
    linear_cross_entropy(hidden_TH, weight_VH.detach(), labels_T).loss_sum.backward()
    assert hidden_TH.grad is not None

    asked = []
    real = module.softmax_step_reference
    monkeypatch.setattr(module, "softmax_step_reference", lambda *inputs: asked.append(inputs[3]) or real(*inputs))
    with torch.no_grad():
        linear_cross_entropy(hidden_TH, weight_VH, labels_T)
    linear_cross_entropy(hidden_TH, weight_VH, labels_T)
    assert asked == [None, torch.float32]

    products = []
    monkeypatch.setattr(module, "add_product", lambda *_inputs: products.append("weight"))
    linear_cross_entropy(hidden_TH, weight_VH.detach(), labels_T)
    assert products == []
    linear_cross_entropy(hidden_TH, weight_VH, labels_T)
    assert products == ["weight"]


def test_a_loss_scale_is_not_rounded_to_bf16_before_it_is_used() -> None:
    """1 / 1003 in bf16 is off by 0.2%; the gradient's norm must not be."""
    hidden, weight, labels = make_inputs(torch.bfloat16, positions=1003, vocabulary=211, width=64).leaves()
    norms = {}
    for scale in (1.0, 1 / 1003, 3 / 1003):
        loss_sum = linear_cross_entropy(hidden, weight, labels).loss_sum
        gradients = torch.autograd.grad(loss_sum * scale, (hidden, weight))
        norms[scale] = [gradient.float().norm().item() / scale for gradient in gradients]
    for of_all_scales in zip(*norms.values(), strict=True):
        assert max(of_all_scales) / min(of_all_scales) - 1 < 3e-4


def test_the_gradient_of_a_bf16_weight_is_rounded_once() -> None:
    """Of 40 chunks added up in bf16 the last would hardly count: an error of 1.4. Processors with bf16 units, as GPUs,
    round the slopes: 0.03."""
    inputs = make_inputs(torch.bfloat16, positions=640)
    chunked, whole = our_results(inputs, chunk_positions=16), our_results(inputs)
    exact = dense_results(inputs.to(torch.float64)).grad_weight_VH
    for ours in (chunked, whole):
        assert ((ours.grad_weight_VH.double() - exact).abs() <= 2**-8 * exact.abs() + 0.1).all()


def test_torch_knows_all_about_the_operator() -> None:
    inputs = make_inputs().leaves()
    for needed in ((True, True), (False, True), (True, False), (False, False)):
        library.opcheck(linear_cross_entropy_op, (*inputs, *EVERYTHING, *needed, 8))


def test_it_compiles_without_a_break() -> None:
    inputs = make_inputs(torch.bfloat16)
    eager = our_results(inputs, EVERYTHING)
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor) -> tuple[Tensor, ...]:
        return linear_cross_entropy(hidden_TH, weight_VH, labels_T, EVERYTHING)

    leaves = inputs.leaves()
    sums = compiled(*leaves)
    (3 * sums[0]).backward()
    ours = (*(one.detach() for one in sums), leaves.hidden_TH.grad, leaves.weight_VH.grad)
    assert all(torch.equal(one, other) for one, other in zip(ours, eager, strict=True))


def test_it_may_be_recomputed_in_the_backward() -> None:
    from torch.utils.checkpoint import checkpoint

    inputs = make_inputs()
    leaves = inputs.leaves()
    loss = checkpoint(lambda *each: linear_cross_entropy(*each, EVERYTHING).loss_sum, *leaves, use_reentrant=False)
    gradients = torch.autograd.grad(3 * loss, leaves[:2])
    eager = our_results(inputs, EVERYTHING)
    assert all(torch.equal(one, other) for one, other in zip(gradients, eager[3:], strict=True))


# Memory.

BILLION = 10**9


class NeverLaunched:
    """Stands in for the kernel where tensors have no memory."""

    def __getitem__(self, _grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_inputs, **_options: None


def peak_bytes(monkeypatch: pytest.MonkeyPatch, chunk_positions: int) -> tuple[int, int]:
    """The peaks of forward and backward at T = 32k, V = 128k, H = 4k in bf16 as on a GPU, without the inputs.

    On the meta device: every tensor that the code makes is made, without its memory. What the matrix library and the
    kernel use inside is not seen (a workspace of some 10 MB; nothing).
    """
    monkeypatch.setattr(module, "softmax_kernel", NeverLaunched())
    monkeypatch.setattr(module, "INTERPRETED", True)  # the step of the kernel, not of the reference
    hidden_TH = torch.empty(32_768, 4_096, dtype=torch.bfloat16, device="meta")
    weight_VH = torch.empty(131_072, 4_096, dtype=torch.bfloat16, device="meta")
    labels_T = torch.empty(32_768, dtype=torch.int64, device="meta")
    with LiveBytes() as forward:
        saved = sums_and_gradients(hidden_TH, weight_VH, labels_T, *EVERYTHING, True, True, chunk_positions)
    del saved
    assert forward.live == 0
    gradients = torch.empty_like(hidden_TH), torch.empty_like(weight_VH, dtype=torch.float32)
    with LiveBytes() as backward:
        made = [scaled(one, torch.ones((), device="meta"), torch.bfloat16) for one in gradients]
    assert [one.shape for one in made] == [hidden_TH.shape, weight_VH.shape]
    return forward.peak, backward.peak + sum(one.untyped_storage().nbytes() for one in gradients)


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="the meta device of torch 2.11 takes no out_dtype; a real one does"
)
def test_32k_positions_of_128k_tokens_take_less_than_3_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = peak_bytes(monkeypatch, chunk_positions=0)
    grad_hidden, grad_weight = 2 * 32_768 * 4_096, 2 * 131_072 * 4_096
    wide_grad_weight, logits = 2 * grad_weight, 4 * 1_024 * 131_072
    print(f"forward {forward / BILLION:.3f} GB, backward {backward / BILLION:.3f} GB, gradients included")
    assert wide_grad_weight + logits < forward - grad_hidden < 2.8 * BILLION
    assert wide_grad_weight < backward - grad_hidden - grad_weight < 2.5 * BILLION
    assert peak_bytes(monkeypatch, chunk_positions=32_768)[0] > 19 * BILLION  # what all logits take is seen


@pytest.mark.parametrize(
    ("vocabulary", "positions"), [(131_072, 1_024), (32_000, 4_096), (50_257, 2_560), (10**7, 128)]
)
def test_chunks_follow_from_the_vocabulary(vocabulary: int, positions: int) -> None:
    chunks = list(chunk_slices(2 * positions + 1, vocabulary, torch.float32, 0))
    assert [(chunk.start, chunk.stop) for chunk in chunks] == [
        (0, positions), (positions, 2 * positions), (2 * positions, 3 * positions),
    ]  # fmt: skip


# The kernel.


def test_the_kernel_passes_its_tests_under_the_interpreter() -> None:
    assert run_interpreted("tests/support/interpreted_linear_cross_entropy.py") == 43


def test_the_kernel_compiles_for_ampere_to_blackwell_without_spilling_registers() -> None:
    printed = run_python(["-m", "tests.support.compile_linear_cross_entropy"], interpret=False)
    print(printed)
    rows = [line.split() for line in printed.splitlines()]
    assert {row[0] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    assert len(rows) == 24
    spilled = [row for row in rows if row[-2] != "0"]
    assert not spilled, f"architecture, gradient, vocabulary, options, order | registers, stack, shared: {spilled}"
    assert [row[4] for row in rows if row[1] == "bf16"] == ["ordered"] * 12  # over the logits only what was read


def test_without_triton_the_reference_runs() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch
from bigmodel.kernels.linear_cross_entropy import linear_cross_entropy
rows = torch.zeros(4, 2)
print(linear_cross_entropy(rows, torch.zeros(8, 2), torch.zeros(4, dtype=torch.int64)).loss_sum.item())
"""
    assert float(run_python(["-c", program], interpret=False)) == pytest.approx(8.31777, abs=1e-5)  # 4 log 8


# The model.


@pytest.mark.parametrize("tied", [False, True])
def test_the_options_reach_the_gradient_of_the_model_and_not_its_evaluation(tied: bool) -> None:
    settings = ModelSettings(
        num_layers=1,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=40,
        tied_embeddings=tied,
        logit_softcap=2.5,
    )
    model = Transformer(settings, 97, z_loss=0.03, label_smoothing=0.2).double()
    init_weights(model, seed=5)
    batch = make_batch()
    states_TH = model.hidden(model.embedding(batch.tokens), batch)
    exact = dense_results(make_inputs(torch.float64)._replace(
        hidden_TH=states_TH, weight_VH=model.head.weight, labels_T=batch.labels
    ), EVERYTHING)  # fmt: skip

    states_TH.retain_grad()
    loss_sum = model.head(states_TH, batch.labels, "loss_sum")
    (3 * loss_sum).backward()
    torch.testing.assert_close(loss_sum.detach(), exact.loss_sum, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(states_TH.grad, exact.grad_hidden_TH, rtol=1e-12, atol=1e-12)
    if not tied:
        torch.testing.assert_close(model.head.weight.grad, exact.grad_weight_VH, rtol=1e-12, atol=1e-12)

    losses_T = model(batch, "loss_per_position")
    plain = Transformer(settings, 97).double()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(losses_T, plain(batch, "loss_per_position"))
    assert losses_T.sum().item() == pytest.approx(plain(batch).item(), rel=1e-12)
    logits_TV = model(batch, "logits")
    assert 0.01 < logits_TV.abs().max() < 2.5
    expected_T = F.cross_entropy(logits_TV, batch.labels, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(losses_T.float(), expected_T, rtol=1e-5, atol=1e-5)


def test_the_options_of_a_run_file_reach_the_model(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Made(Exception):
        """Ends the run where the model would be made."""

    def make(*arguments: Any) -> None:
        raise Made(Transformer(*arguments).head.options)

    monkeypatch.setattr(start, "build_model", make)
    monkeypatch.setattr(loop, "start_world", lambda _: ALONE)
    monkeypatch.setattr(loop, "StopFlag", object)
    overrides = ["training.z_loss=1e-4", "training.label_smoothing=0.1", "model.logit_softcap=30"]
    with pytest.raises(Made) as made:
        loop.train(load_settings(write_run(tmp_path, shards), overrides))
    assert made.value.args == (Options(z_loss=1e-4, label_smoothing=0.1, logit_softcap=30.0),)


# What is refused.

ROWS, MATRIX, TARGETS = torch.zeros(4, 3), torch.zeros(7, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("hidden", "weight", "labels", "options", "message"),
    [
        (ROWS, MATRIX[:, :2], TARGETS, Options(), r"needs hidden \(T, H\) and weight \(V, H\) with the same H"),
        (ROWS, MATRIX, TARGETS[:3], Options(), r"needs T labels of torch\.int64"),
        (ROWS, MATRIX, TARGETS.int(), Options(), r"of torch\.int32; it needs T labels of torch\.int64"),
        (ROWS, MATRIX.double(), TARGETS, Options(), r"weight torch\.float64; cast them to one type"),
        (ROWS, MATRIX, TARGETS + 7, Options(), r"got the label 7; labels need to be -100 \(ignored\) or 0 to 6"),
        (ROWS, MATRIX, TARGETS - 1, Options(), r"got the label -1; labels need to be -100 \(ignored\) or 0 to 6"),
        (ROWS, MATRIX, TARGETS, Options(label_smoothing=1.0), "label_smoothing at least 0 and below 1"),
        (ROWS, MATRIX, TARGETS, Options(z_loss=-1.0), "z_loss and logit_softcap need to be at least 0"),
        (ROWS, MATRIX, TARGETS, Options(logit_softcap=-1.0), "z_loss and logit_softcap need to be at least 0"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit_are_refused(hidden, weight, labels, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, labels, options)


def test_a_second_derivative_is_refused() -> None:
    hidden_TH = torch.randn(3, 4, requires_grad=True)
    loss = linear_cross_entropy(hidden_TH, torch.randn(5, 4), torch.tensor([0, 1, 2])).loss_sum
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(loss, hidden_TH, create_graph=True)
