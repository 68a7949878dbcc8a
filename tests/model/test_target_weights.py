"""Weights of labels in the model: in the loss, in loss groups and in the extra heads."""

from dataclasses import replace

import torch

from bigmodel.config.settings import ModelSettings
from bigmodel.model.init import init_weights
from bigmodel.model.transformer import Transformer
from tests.system.test_guarantee_leak import make_batch

SETTINGS = ModelSettings(
    num_layers=1, hidden_size=32, num_heads=4, num_kv_heads=2, intermediate_size=40, num_mtp_modules=2
)


def gradients(batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model = Transformer(SETTINGS, 97, z_loss=0.01).train()
    init_weights(model, seed=5)
    loss = model(batch)
    loss.sum().backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


def test_a_weight_of_zero_is_no_label_also_for_the_tokens_further_ahead() -> None:
    batch = make_batch()
    left_out = torch.arange(len(batch.labels)) % 3 == 1
    weights = (batch.labels != -100).float() * ~left_out
    weighted = gradients(replace(batch, weights=weights))
    ignored = gradients(replace(batch, labels=batch.labels.masked_fill(left_out, -100)))
    assert torch.equal(weighted[0], ignored[0])
    assert all(torch.equal(one, other) for one, other in zip(weighted[1], ignored[1], strict=True))
    assert not torch.equal(weighted[0], gradients(batch)[0])


def test_half_of_every_weight_is_half_of_the_loss_and_of_the_gradient() -> None:
    batch = make_batch()
    plain, half = gradients(batch), gradients(replace(batch, weights=torch.full(batch.labels.shape, 0.5)))
    torch.testing.assert_close(2 * half[0], plain[0])
    for one, other in zip(half[1], plain[1], strict=True):
        torch.testing.assert_close(2 * one, other)


def test_the_sums_of_loss_groups_are_weighted() -> None:
    batch = make_batch()
    groups = torch.arange(len(batch.labels)) % 2
    batch = replace(batch, loss_groups=groups, num_loss_groups=2, weights=(groups == 0).float())
    sums, _ = gradients(batch)
    assert sums[0] > 0
    assert sums[1] == 0
