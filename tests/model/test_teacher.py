"""A model with a teacher: the same loss, the gradient of both losses, documents apart, and no parameter more."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel.checks.leak import isolation, packed_equals_single
from bigmodel.config.settings import DataSettings
from bigmodel.data.load.batch import Batch
from bigmodel.data.objectives.examples import Pair
from bigmodel.kernels.linear_cross_entropy import IGNORED
from bigmodel.kernels.linear_distillation import Divergence
from bigmodel.model.teacher import Teacher
from bigmodel.model.transformer import Transformer
from tests.support.example_batches import batch_of, model_of, text

TOKENS = 380  # of 400 rows
SIDES = {"kind": "encoder_decoder"}


def batch_for(model: dict[str, Any], **more: object) -> Batch:
    sizes = {"max_document_length": 24, "sequence_length": 48, "max_documents": 6}
    if not model:
        return batch_of([[text(9), text(20), text(5)], [text(24)]], DataSettings(**sizes), **more)
    pairs = [[Pair(text(7), text(5)), Pair(text(4), text(11))], [Pair(text(9), text(3))]]
    return batch_of(pairs, DataSettings(**sizes, source_sequence_length=30), **more)


def taught(
    model: dict[str, Any], divergence: Divergence | None, dropout: float = 0.0, **student: Any
) -> tuple[Transformer, Teacher]:
    """A student, taught if there is a divergence, and its teacher, twice as wide."""
    one = model_of(**model, **student).double()
    size = {"hidden_size": 64, "num_layers": 1, "dropout": dropout, "logit_softcap": 9.0}
    teacher = Teacher(model_of(seed=6, **size, **model).double(), TOKENS, divergence or Divergence())
    with torch.no_grad():
        for parameter in teacher.model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)  # far from uniform
    one.teacher = teacher if divergence else None
    return one, teacher


def gradients(model: Transformer, batch: Batch) -> list[Tensor]:
    return list(torch.autograd.grad(model.train()(batch).sum(), list(model.parameters())))


@pytest.mark.parametrize("model", [{}, SIDES], ids=["decoder", "encoder_decoder"])
def test_the_gradient_is_that_of_labels_and_kl_div_in_float64(model: dict[str, Any]) -> None:
    batch = batch_for(model, has_weights=True)
    batch = replace(batch, weights=torch.rand(batch.labels.shape) * (batch.labels != IGNORED))
    student, teacher = taught(model, Divergence(0.25, 2.0))
    found = gradients(student, batch)
    teacher.take()
    loss = student(batch)
    student.teacher = None
    assert torch.equal(loss, student(batch))  # the value of the loss is that of the labels
    with torch.no_grad():
        target = F.log_softmax(teacher.model(batch, "logits")[:, :TOKENS] / 2.0, -1)
    # `logits` are fp32: the student's are computed here.
    states_TH = student.hidden(*embedded(student, batch))
    logits = states_TH @ student.head.weight.T
    label = F.cross_entropy(logits, batch.labels, reduction="none", ignore_index=IGNORED)
    given = F.log_softmax(logits[:, :TOKENS] / 2.0, -1)
    divergence = 4.0 * F.kl_div(given, target.double(), reduction="none", log_target=True).sum(1)
    expected = ((0.75 * label + 0.25 * divergence) * batch.weights).sum()
    for one, exact in zip(found, torch.autograd.grad(expected, list(student.parameters())), strict=True):
        torch.testing.assert_close(one, exact, rtol=1e-5, atol=1e-6)
    assert teacher.take() == pytest.approx((divergence * batch.weights).sum().item(), rel=1e-5)
    assert teacher.take() == 0.0


def embedded(model: Transformer, batch: Batch) -> tuple[Tensor, Batch, Tensor | None]:
    x_TH, x_SE = model.embed(batch)
    return x_TH, batch, x_SE


@pytest.mark.parametrize("divergence", [Divergence(0.5), Divergence(1.0, 2.0, 7, "reverse")], ids=str)
@pytest.mark.parametrize("model", [{}, SIDES], ids=["decoder", "encoder_decoder"])
def test_packed_equals_one_document_at_a_time_and_documents_do_not_meet(
    model: dict[str, Any], divergence: Divergence
) -> None:
    student, _ = taught(model, divergence, num_mtp_modules=1)
    batch = batch_for(model)
    findings = [*packed_equals_single(student, batch), *isolation(student, batch)]
    assert len(findings) == 6
    assert [finding for finding in findings if not finding.holds] == []


def test_a_student_equal_to_its_teacher_learns_nothing_more() -> None:
    student = model_of()
    student.teacher = Teacher(model_of(), 400, Divergence(1.0, 2.0))
    assert all(bool((one == 0).all()) for one in gradients(student, batch_for({})))
    assert student.teacher.take() == 0.0


def test_mtp_modules_learn_from_labels_alone_and_the_teacher_has_no_dropout() -> None:
    batch = batch_for({})
    found = []
    for divergence, dropout in ((None, 0.0), (Divergence(0.5), 0.0), (Divergence(0.5), 0.4)):
        student, _ = taught({}, divergence, dropout, num_mtp_modules=1)
        names = [name for name, _ in student.named_parameters()]
        found.append(dict(zip(names, gradients(student, batch), strict=True)))
    plain, with_teacher, with_dropout = found
    of_modules = {name for name in plain if name.startswith("extra_blocks.")}
    assert {name for name in plain if torch.equal(plain[name], with_teacher[name])} == of_modules
    assert all(torch.equal(with_teacher[name], with_dropout[name]) for name in plain)


def test_the_teacher_is_no_part_of_the_student_and_is_not_asked_in_evaluation() -> None:
    student, teacher = taught({}, Divergence())
    plain, _ = taught({}, None)
    assert list(student.state_dict()) == list(plain.state_dict())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    student.eval()
    assert torch.equal(student(batch_for({})), plain.eval()(batch_for({})))
    assert teacher.take() == 0.0
