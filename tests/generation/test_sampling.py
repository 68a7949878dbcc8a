"""Chances are those of transformers' logits processors; draws repeat."""

from collections import Counter

import pytest
import torch

from bigmodel.config.settings import UserError
from bigmodel.generation.sampling import Sampling, chances, choose
from tools.torchvision_operators import define_missing_torchvision_operators

USED = [3, 5, 5, 11]
SETTINGS = [
    Sampling(1.0),
    Sampling(0.7, top_k=5),
    Sampling(1.3, top_p=0.6),
    Sampling(0.9, top_p=0.001),
    Sampling(1.0, min_p=0.2),
    Sampling(0.8, top_k=12, top_p=0.9, min_p=0.05, repetition_penalty=1.4),
    Sampling(0.8, top_k=1000, repetition_penalty=0.5),
]


@pytest.mark.parametrize("sampling", SETTINGS)
def test_the_chances_are_those_of_transformers(sampling: Sampling) -> None:
    define_missing_torchvision_operators()
    from transformers.generation import logits_process as theirs

    processors = [theirs.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    processors += [theirs.TemperatureLogitsWarper(sampling.temperature)] if sampling.temperature != 1 else []
    processors += [theirs.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    processors += [theirs.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    processors += [theirs.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    for seed in range(20):
        logits_V = torch.randn(40, generator=torch.Generator().manual_seed(seed)) * 2
        if sampling.top_p == 1:  # which of equal tokens top-p leaves is chance
            logits_V[7] = logits_V[9] = logits_V[1]
        expected = theirs.LogitsProcessorList(processors)(torch.tensor([USED]), logits_V[None].clone())[0].softmax(-1)
        ids, found = chances(logits_V, sampling, USED)
        assert ids.tolist() == expected.nonzero()[:, 0].tolist()
        assert torch.allclose(found, expected[ids], atol=1e-6)


def test_draws_follow_the_chances_and_repeat() -> None:
    logits_V, sampling = torch.tensor([0.5, 0.3, 0.2, 1e-9]).log(), Sampling(1.0)
    generator = torch.Generator().manual_seed(1)
    drawn = [choose(logits_V, sampling, [], generator) for _ in range(3000)]
    counts = Counter(drawn)
    assert [counts[token] / 3000 for token in range(4)] == pytest.approx([0.5, 0.3, 0.2, 0.0], abs=0.03)
    generator = torch.Generator().manual_seed(1)
    assert [choose(logits_V, sampling, [], generator) for _ in range(50)] == drawn[:50]


def test_a_repetition_penalty_holds_without_a_draw_too() -> None:
    logits_V = torch.tensor([2.0, 1.9, -1.0])
    generator = torch.Generator()
    assert choose(logits_V, Sampling(0), [0], generator) == 0
    assert choose(logits_V, Sampling(0, repetition_penalty=1.5), [0], generator) == 1


@pytest.mark.parametrize("values", [{"temperature": 1e-40}, {"temperature": 1e-320}, {"repetition_penalty": 1e-300}])
def test_a_value_near_zero_leaves_chances_that_are_numbers(values: dict[str, float]) -> None:
    logits_V = torch.tensor([-3.0, 7.0, 5.0, 0.0])
    sampling = Sampling(**{"temperature": 0.8} | values)
    ids, found = chances(logits_V, sampling, [1, 3])
    assert found.sum().item() == pytest.approx(1)
    assert ids[found.argmax()] == 1
    assert choose(logits_V, sampling, [1, 3], torch.Generator().manual_seed(0)) == 1


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2},
     {"repetition_penalty": 0}, {"seed": 1 << 64}],
)  # fmt: skip
def test_values_outside_their_range_are_refused(values: dict[str, float]) -> None:
    (name,) = values
    with pytest.raises(UserError, match=f"^{name} = .*: must be "):
        Sampling(**values)
