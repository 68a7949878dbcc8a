"""The balance of experts over a step: sums over micro-batches, the record, skipped steps."""

import json

import pytest
import torch

from bigmodel.metrics.run_accounting import of_experts
from bigmodel.training.expert_balance import ExpertBalance, describe
from tests.model.test_experts import batch_of, gradients, model_of


def state_of(model: torch.nn.Module) -> dict[str, list[float]]:
    return {name: buffer.tolist() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("kind", ["loss", "bias"])
def test_a_step_moves_the_state_and_a_skipped_one_does_not(kind: str) -> None:
    model = model_of(experts={"balance": kind})
    balance, before = ExpertBalance(model), state_of(model)
    batches = [batch_of(range(2)), batch_of(range(2, 4))]
    gradients(model, batches)
    sums = balance.take()
    assert sum(sums[1:]) == 2 * 2 * 55, "2 layers, 2 experts of each of 55 tokens"
    skipped = balance.move(sums, 55.0, skip=True)
    assert state_of(model) == before
    assert balance.move(sums, 55.0, skip=False) == skipped
    assert state_of(model) != before
    balance.begin()
    gradients(model, batches[:1])
    assert sum(balance.take()[1:]) == 2 * 2 * 41


def test_dropped_choices_are_told_by_layer_and_as_a_share() -> None:
    model = model_of(experts={"capacity_factor": 1.0})
    told = ExpertBalance(model)
    told.begin()
    model.loads_LE, model.dropped_L = torch.tensor([[6, 4, 0, 0], [5, 5, 0, 0]]), torch.tensor([3, 1])
    moved = told.move(told.take(), 5.0, skip=False)
    assert moved is not None
    assert (moved.dropped, moved.dropped_share, moved.largest) == ((3, 1), 0.2, (2.4, 2.0))
    line = json.loads(json.dumps({"expert_loads": moved._asdict()}))
    assert of_experts(line)["expert_dropped_ratio"] == 0.2


def test_a_model_without_experts_has_no_sums() -> None:
    model = model_of(experts={"count": 0})
    balance = ExpertBalance(model)
    balance.begin()
    gradients(model, [batch_of(range(1))])
    assert balance.take() == []
    assert balance.move([], 21.0, skip=False) is None


def test_loads_are_described_by_their_largest_and_their_entropy() -> None:
    loads = describe([[3.0, 1.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 9.0, 0.0, 0.0]], 6.0)
    assert loads == ((3.0, 1.0, 4.0), (0.4056, 1.0, 0.0), 2.0, 0, None, None)


def test_a_router_that_prefers_an_expert_is_told_with_its_layer_of_the_model() -> None:
    """The alert BigmodelExpertsCollapsed asks for an evenness below 0.7."""
    model = model_of(num_layers=4, experts={"first_dense_layers": 1})
    balance = ExpertBalance(model)
    found = []
    for _ in range(2):
        balance.begin()
        gradients(model, [batch_of(range(4))])
        record = balance.move(balance.take(), 55.0, skip=True)
        assert record
        found.append(of_experts({"expert_loads": record._asdict()}))
        model.blocks[2].feed_forward.router.register_forward_hook(
            lambda module, inputs, logits_TE: logits_TE + torch.tensor([0.0, 100.0, 100.0, 0.0])
        )
    sound, collapsed = found
    assert sound["expert_load_entropy_ratio"] > 0.7
    assert collapsed["expert_load_entropy_ratio"] == 0.5
    assert (collapsed["expert_load_ratio"], collapsed["expert_load_layer"]) == (2.0, 2)


def test_the_load_of_each_expert_is_recorded_at_measured_steps_by_the_model_s_layers() -> None:
    model = model_of(experts={"first_dense_layers": 1})
    balance = ExpertBalance(model, every_steps=10)
    assert balance.by_expert(10) is None, "nothing was counted"
    balance.move([6.0, 0.0, 30.0, 10.0, 1.0, 0.0], 1.0, skip=False)
    assert balance.by_expert(20) == {"1": [293, 98, 10, 0]}
    assert balance.by_expert(21) is None
    never = ExpertBalance(model)
    never.move([6.0, 0.0, 30.0, 10.0, 1.0, 0.0], 1.0, skip=True)
    assert never.by_expert(20) is None


def test_the_loads_of_a_large_model_are_a_kilobyte_of_a_step_s_line() -> None:
    loads_LE = [[1 + (7 * layer + 13 * expert) % 97 for expert in range(256)] for layer in range(61)]
    assert len(json.dumps(describe(loads_LE, 6.0)._asdict())) < 1100
