"""Class weights and focal loss of the classification head, against NumPy and torch in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bigmodel.config.settings import Settings
from bigmodel.data.load.batch import Batch
from bigmodel.model.class_head import focal, labels_of
from bigmodel.model.init import init_weights
from bigmodel.model.transformer import Transformer
from tests.model.test_class_head import CLASSES, DATA, SIZE, labelled
from tests.support.example_batches import batch_of

WEIGHTS = torch.tensor([0.25, 3.0, 1.0])


def case(gamma: float, weighted: bool) -> tuple[Transformer, Batch]:
    classification = {"classes": CLASSES, "focal_gamma": gamma}
    settings = Settings.model_validate({"model": SIZE, "classification": classification, "data": DATA})
    batch = batch_of([[labelled(3, 0), labelled(9, 2), labelled(20, 1)], [labelled(7, 1)]], settings.data)
    if weighted:
        weights_T = torch.where(batch.labels >= 0, WEIGHTS[batch.labels.clamp_min(0)], 0.0)
        batch = replace(batch, weights=weights_T)
    model = Transformer(settings.model, 64)
    init_weights(model, 4)
    with torch.no_grad():
        model.head.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    return model.double(), batch


def reference(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, gamma: float) -> tuple[float, np.ndarray]:
    """Sum of w (1 - p)^gamma (-log p), and its gradient: w g (p - onehot), by the derivative in closed form."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    own = p[np.arange(len(labels)), labels]
    loss = weights * (1 - own) ** gamma * -np.log(own)
    by_log_p = weights * (gamma * (1 - own) ** (gamma - 1) * own * np.log(own) - (1 - own) ** gamma)
    gradient = by_log_p[:, None] * (np.eye(logits.shape[1])[labels] - p)
    return float(loss.sum()), gradient


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradient_are_those_of_the_formula(gamma: float, weighted: bool) -> None:
    model, batch = case(gamma, weighted)
    logits = model(batch, "logits").detach()
    labels_D = labels_of(batch.labels, batch.cu_seqlens)
    is_real = labels_D >= 0
    labels = labels_D[is_real]
    weights = WEIGHTS[labels].double() if weighted else torch.ones(len(labels))
    expected, of_logits = reference(logits[is_real].numpy(), labels.numpy(), weights.numpy(), gamma)
    loss = model(batch)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12)
    loss.backward()
    again, _ = case(gamma, weighted)
    (again(batch, "logits")[is_real] * torch.from_numpy(of_logits)).sum().backward()
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-13), name
    plain = F.cross_entropy(logits[is_real], labels, reduction="sum")
    assert float(model.head.plain_sum) == pytest.approx(float(plain) if gamma or weighted else 0.0, rel=1e-12)
    assert float(model(batch, "loss_per_position").detach().sum()) == pytest.approx(float(plain), rel=1e-12)


def test_gamma_0_and_weights_of_1_are_the_cross_entropy_to_the_last_bit() -> None:
    model, batch = case(0.0, weighted=False)
    losses = [model(batch), model(replace(batch, weights=(batch.labels >= 0).float()))]
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    assert torch.equal(*losses)
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_weights_are_those_of_torchs_cross_entropy() -> None:
    model, batch = case(0.0, weighted=True)
    labels_D = labels_of(batch.labels, batch.cu_seqlens)
    assert batch.weights is not None
    expected = F.cross_entropy(model(batch, "logits"), labels_D, WEIGHTS.double(), ignore_index=-100)
    assert float(model(batch).detach() / batch.weights.sum()) == pytest.approx(float(expected.detach()), rel=1e-12)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_a_certain_class_has_no_loss_and_a_finite_gradient(gamma: float) -> None:
    logits = torch.tensor([[0.0, 200.0], [0.0, -200.0], [0.0, 3.0]], requires_grad=True)
    losses = focal(F.cross_entropy(logits, torch.ones(3, dtype=torch.long), reduction="none"), gamma)
    losses.sum().backward()
    assert losses[0] == 0
    assert logits.grad is not None
    assert logits.grad[0].tolist() == [0.0, 0.0]
    assert logits.grad[1].tolist() == [1.0, -1.0]
    expected = np.array([[0.0, 3.0]]), np.array([1]), np.ones(1), gamma
    assert losses[2].item() == pytest.approx(reference(*expected)[0], rel=1e-5)
    assert logits.grad[2].numpy() == pytest.approx(reference(*expected)[1][0], rel=1e-5)
