"""Linear distillation: sums and gradients are those of torch's own functions, whatever the chunks and the options."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel.inspect.memory import LiveBytes
from bigmodel.kernels.linear_cross_entropy import IGNORED, Options, linear_cross_entropy
from bigmodel.kernels.linear_distillation import (
    Divergence,
    Taught,
    linear_distillation,
    linear_distillation_op,
    sums_and_gradients,
)
from tests.support.dense_cross_entropy import Inputs, make_inputs, make_weights

TEACHER_SOFTCAP = 4.0
EVERYTHING = Options(z_loss=0.03, label_smoothing=0.2, logit_softcap=2.5)
DIVERGENCES = [
    Divergence(*values) for values in itertools.product((0.3, 1.0), (2.0,), (0, 1, 5), ("forward", "reverse"))
]
GIGA = 10**9


def make_taught(inputs: Inputs, divergence: Divergence, tokens: int = 29, width: int = 12) -> Taught:
    """A teacher of another size, which lacks the last two rows of the student."""
    generator, dtype = torch.Generator().manual_seed(9), inputs.hidden_TH.dtype
    hidden_TE = torch.randn(len(inputs.labels_T), width, generator=generator).to(dtype)
    weight_NE = torch.randn(tokens, width, generator=generator).to(dtype)
    return Taught(hidden_TE, weight_NE, divergence, TEACHER_SOFTCAP)


def ours(
    inputs: Inputs,
    taught: Taught,
    options: Options = EVERYTHING,
    chunk_positions: int = 5,
    weights: Tensor | None = None,
) -> list[Tensor]:
    """Label loss, divergence, and both gradients of 3 times the loss."""
    leaves = inputs.leaves()
    sums, _ = linear_distillation(*leaves[:2], taught, leaves.labels_T, options, chunk_positions, weights)
    return [sums.labels.loss_sum, sums.divergence_sum, *torch.autograd.grad(3 * sums.labels.loss_sum, leaves[:2])]


def capped(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def logits_of(inputs: Inputs, taught: Taught, softcap: float) -> tuple[Tensor, Tensor]:
    return (
        capped(inputs.hidden_TH @ inputs.weight_VH.T, softcap),
        capped(taught.hidden_TE @ taught.weight_NE.T, taught.logit_softcap),
    )


def dense(inputs: Inputs, taught: Taught, options: Options, weights_T: Tensor | None = None) -> list[Tensor]:
    """The same with all logits, by torch.nn.functional; top_k by an explicit last event."""
    leaves, (share, temperature, top_k, direction) = inputs.leaves(), taught.divergence
    student_TV, teacher_TN = logits_of(leaves, taught, options.logit_softcap)
    weights_T = (leaves.labels_T != IGNORED) * (1.0 if weights_T is None else weights_T)
    label_T = F.cross_entropy(
        student_TV, leaves.labels_T, reduction="none", label_smoothing=options.label_smoothing, ignore_index=IGNORED
    )
    z_T = student_TV.logsumexp(-1).square()
    log_q = F.log_softmax(student_TV[:, : teacher_TN.shape[1]] / temperature, -1)
    log_p = F.log_softmax(teacher_TN / temperature, -1)
    if top_k:
        chosen = log_p.topk(top_k).indices
        log_q, log_p = (
            torch.cat([one.gather(1, chosen), (1 - one.exp().gather(1, chosen).sum(1, keepdim=True)).log()], 1)
            for one in (log_q, log_p)
        )
    target, given = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    divergence_T = F.kl_div(given, target, reduction="none", log_target=True).sum(1) * temperature**2
    label, z, divergence = ((one_T * weights_T).sum() for one_T in (label_T, z_T, divergence_T))
    loss = (1 - share) * label + (options.z_loss * z if share < 1 else 0) + share * divergence
    return [label, divergence, *torch.autograd.grad(3 * loss, leaves[:2])]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for one, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(one, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [Options(), EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_in_float64_sums_and_gradients_are_those_of_kl_div(divergence: Divergence, options: Options) -> None:
    inputs = make_inputs(torch.float64)
    taught, weights_T = make_taught(inputs, divergence), make_weights(inputs)
    for chunk_positions, weights in ((1, None), (5, weights_T), (0, weights_T)):
        exact = dense(inputs, taught, options, weights)
        assert_close(ours(inputs, taught, options, chunk_positions, weights), exact)


def test_top_k_is_the_divergence_of_k_events_and_one_more_in_numpy() -> None:
    inputs = make_inputs(torch.float64)
    taught = make_taught(inputs, Divergence(0.5, 3.0, top_k=4))
    student, teacher = (one.numpy() / 3.0 for one in logits_of(inputs, taught, 0.0))
    total = 0.0
    for row in np.flatnonzero(inputs.labels_T.numpy() != IGNORED):
        q, p = (np.exp(one) / np.exp(one).sum() for one in (student[row, :29], teacher[row]))
        best = np.argsort(-p)[:4]
        events = [(np.append(one[best], 1 - one[best].sum())) for one in (p, q)]
        total += 9.0 * np.sum(events[0] * np.log(events[0] / events[1]))
    assert float(ours(inputs, taught, Options())[1]) == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_more_of_the_teachers_tokens_are_a_larger_divergence_up_to_the_whole(direction: str) -> None:
    inputs = make_inputs(torch.float64)
    found = [
        float(ours(inputs, make_taught(inputs, Divergence(0.5, 1.0, k, direction)))[1]) for k in (1, 4, 28, 29, 99, 0)
    ]
    assert found[0] < found[1] < found[2]
    assert found[2:] == pytest.approx([found[-1]] * 4, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", [one for one in DIVERGENCES if one.share == 1.0], ids=str)
def test_a_student_equal_to_its_teacher_has_no_divergence_and_no_gradient_at_all(
    divergence: Divergence, dtype: torch.dtype
) -> None:
    inputs = make_inputs(dtype)
    taught = Taught(inputs.hidden_TH, inputs.weight_VH, divergence, logit_softcap=2.5)
    loss_sum, *zeros = ours(inputs, taught, Options(logit_softcap=2.5))
    assert loss_sum > 10
    assert all(bool((one == 0).all()) for one in zeros)


def test_the_label_loss_is_that_without_a_teacher_bitwise_and_ignored_positions_have_no_gradient() -> None:
    inputs = make_inputs()
    leaves, taught = inputs.leaves(), make_taught(inputs, Divergence())
    plain = linear_cross_entropy(*leaves, EVERYTHING, 5)
    sums, losses_T = linear_distillation(*leaves[:2], taught, leaves.labels_T, EVERYTHING, 5)
    assert torch.equal(sums.labels.loss_sum, plain.loss_sum)
    assert int(sums.labels.count) == int(plain.count) == 19
    assert float(losses_T.detach().double().sum()) == pytest.approx(plain.loss_sum.item(), rel=1e-6)
    (gradient_TH,) = torch.autograd.grad(sums.labels.loss_sum, leaves.hidden_TH)
    is_zero_T = (gradient_TH == 0).all(1)
    assert torch.equal(is_zero_T, leaves.labels_T == IGNORED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_as_exact_as_plain_torch_with_the_same_inputs(dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype, positions=70, vocabulary=301, width=24)
    taught = make_taught(inputs, Divergence(0.5, 2.0), tokens=301)
    wide = Taught(taught.hidden_TE.double(), taught.weight_NE.double(), taught.divergence, TEACHER_SOFTCAP)
    found, exact = ours(inputs, taught), dense(inputs.to(torch.float64), wide, EVERYTHING)
    assert_close([one.double() for one in found[:2]], exact[:2], 1e-5)
    step = torch.finfo(dtype).eps
    for one, gradient in zip(found[2:], exact[2:], strict=True):
        assert float((one.double() - gradient).norm() / gradient.norm()) < step


def test_the_operator_is_what_torch_asks_of_one() -> None:
    inputs = make_inputs().leaves()
    taught = make_taught(inputs, Divergence())
    arguments = (*inputs[:2], taught.hidden_TE, taught.weight_NE, inputs.labels_T, *EVERYTHING, 0.0, 0.5, 1.0, 0)
    torch.library.opcheck(
        linear_distillation_op, (*arguments, "forward", True, True, 5),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip
    sums, _ = linear_distillation(*inputs[:2], taught, inputs.labels_T)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        torch.autograd.grad(sums.labels.loss_sum, inputs.hidden_TH, create_graph=True)


def peak_bytes(naive: bool) -> int:
    """Of forward and backward at 8,192 positions of 128k tokens in bf16, beyond the inputs; nothing is computed."""
    with torch.device("meta"):
        hidden_TH, hidden_TE = (torch.empty(8_192, size, dtype=torch.bfloat16) for size in (2_048, 4_096))
        weight_VH, weight_NE = (torch.empty(131_072, size, dtype=torch.bfloat16) for size in (2_048, 4_096))
        labels_T = torch.empty(8_192, dtype=torch.int64)
    with LiveBytes() as bytes_:
        if naive:
            leaves = hidden_TH.requires_grad_(), weight_VH.requires_grad_()
            student, teacher = ((x @ w.T).float() for x, w in (leaves, (hidden_TE, weight_NE)))
            log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
            (F.cross_entropy(student, labels_T) + F.kl_div(log_q, log_p, reduction="sum", log_target=True)).backward()
        else:
            sums_and_gradients(
                hidden_TH, weight_VH, hidden_TE, weight_NE, labels_T, 0, 0, 0, 0, 0.5, 1.0, 0, "forward", True, True, 0
            )
    return bytes_.peak


@pytest.mark.skipif(torch.__version__ < "2.12", reason="the meta device of torch 2.11 takes no out_dtype")
def test_whole_logits_of_neither_model_are_in_memory() -> None:
    ours, naive, logits = peak_bytes(False), peak_bytes(True), 4 * 8_192 * 131_072
    print(f"{ours / GIGA:.2f} GB; {naive / GIGA:.2f} GB with whole logits; those of one model: {logits / GIGA:.2f} GB")
    assert ours < 0.6 * logits  # of it 1.07 GB are the gradient of the output matrix
    assert naive > 6 * logits


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_TE": torch.zeros(5, 12)}, r"it needs the 23 positions and at most the 31 tokens of the student"),
        ({"weight_NE": torch.zeros(32, 12)}, "at most the 31 tokens of the student"),
        ({"weight_NE": torch.zeros(29, 12, dtype=torch.float64)}, "both of one type"),
        ({"divergence": Divergence(share=0.0)}, "share needs to be above 0 and at most 1"),
        ({"divergence": Divergence(temperature=0.0)}, "temperature above 0"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, words: str) -> None:
    inputs = make_inputs()
    taught = make_taught(inputs, Divergence())
    with pytest.raises(ValueError, match=words):
        ours(inputs, Taught(**({name: getattr(taught, name) for name in vars(taught)} | change)))
