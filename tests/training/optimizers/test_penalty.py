"""The L1 penalty against scikit-learn's elastic net and against its formula in NumPy, with every optimizer."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import ElasticNet

from bigmodel.config.settings import OptimizerSettings
from bigmodel.training.optimizers.groups import build_optimizer, parameter_groups
from bigmodel.training.optimizers.table import OPTIMIZERS
from tests.training.optimizers.test_optimizers import model, optimizer_alone


@pytest.mark.parametrize("ratio", [1.0, 0.5], ids=["lasso", "elastic net"])
def test_a_least_squares_fit_reaches_the_solution_of_scikit_learn(ratio: float) -> None:
    """AdamW with beta1 = beta2 = 0 and a huge epsilon is gradient descent with the rate learning_rate / epsilon, and
    the penalties count epsilon times."""
    draw, alpha, epsilon = np.random.default_rng(1), 0.3, 1e6
    x, truth = draw.normal(size=(80, 12)), np.where(np.arange(12) < 4, draw.normal(size=12) * 2, 0)
    y = x @ truth + draw.normal(size=80)
    expected = ElasticNet(alpha=alpha, l1_ratio=ratio, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x, y).coef_
    linear = torch.nn.Linear(12, 1, bias=False, dtype=torch.float64)
    settings = OptimizerSettings(
        learning_rate=0.2 * epsilon,
        beta1=0.0,
        beta2=0.0,
        epsilon=epsilon,
        l1_penalty=alpha * ratio / epsilon,
        weight_decay=alpha * (1 - ratio) / epsilon,
    )
    optimizer = build_optimizer(linear, settings)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    for _ in range(800):
        optimizer.zero_grad()
        ((linear(inputs)[:, 0] - labels).square().mean() / 2).backward()
        optimizer.step()
    found = linear.weight.detach()[0].numpy()
    assert 0 < np.count_nonzero(found) < 12
    assert np.array_equal(found == 0, expected == 0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def updated(settings: OptimizerSettings) -> dict[str, np.ndarray]:
    net = model(tied=False)
    optimizer = optimizer_alone(net, settings)
    for number, parameter in enumerate(net.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_with_every_optimizer_matrices_move_towards_zero_after_the_update_and_stop_there(kind: str) -> None:
    given = {"kind": kind, "learning_rate": 0.01, "weight_decay": 0.2}
    plain, penalised = (updated(OptimizerSettings(**given, l1_penalty=size)) for size in (0.0, 1.5))
    for name, before in plain.items():
        size = 0.015 if before.ndim == 2 and name != "embedding.weight" else 0.0
        expected = np.sign(before) * np.maximum(np.abs(before) - size, 0)
        np.testing.assert_allclose(penalised[name], expected, rtol=1e-5, atol=1e-8)
        assert (np.count_nonzero(expected) < np.count_nonzero(before)) == (size > 0)


def test_groups_override_the_penalty_and_its_rule() -> None:
    groups = [{"parameters": "embedding.*", "l1_penalty": 0.5}, {"parameters": "head.*", "l1_penalty": 0}]
    net = model(tied=False)
    found = parameter_groups(net, OptimizerSettings(l1_penalty=0.1, groups=groups))
    penalty = {id(parameter): group["l1_penalty"] for group in found for parameter in group["params"]}
    by_name = {name: penalty[id(parameter)] for name, parameter in net.named_parameters()}
    assert by_name["embedding.weight"] == 0.5
    assert by_name["head.weight"] == by_name["norm.weight"] == 0.0
    assert by_name["blocks.0.feed_forward.down.weight"] == 0.1


def test_without_a_penalty_the_optimizer_is_as_it_was() -> None:
    assert type(build_optimizer(model(tied=False), OptimizerSettings())) is torch.optim.AdamW
