"""Sums of an evaluation, against literals and plain torch."""

import math
from dataclasses import replace

import pytest
import torch

from bigmodel.config.settings import DataSettings
from bigmodel.evaluation.evaluate import Evaluation
from bigmodel.evaluation.evaluation_text import to_lines, to_values
from bigmodel.evaluation.packed_requests import Continuation, make_batch
from bigmodel.evaluation.tally import Tally, add_up, tally
from bigmodel.kernels.linear_cross_entropy import linear_cross_entropy_per_token, linear_predictions

LOSS_GROUPS = [("causal", "news"), ("prefix", "letters"), ("causal", "letters")]


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_predictions_are_the_losses_and_the_likeliest_token_of_each_position(softcap: float) -> None:
    hidden, weight = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((300, 8), (40, 8)))
    labels = torch.randint(40, (300,), generator=torch.Generator().manual_seed(2))
    labels[::7] = -100
    losses, surprise, likeliest = linear_predictions(hidden, weight, labels, softcap, chunk_positions=128)
    assert losses.tolist() == linear_cross_entropy_per_token(hidden, weight, labels, softcap).double().tolist()
    logits = hidden.double() @ weight.double().T
    chances = (softcap * torch.tanh(logits / softcap) if softcap else logits).softmax(-1)
    assert likeliest.tolist() == logits.argmax(-1).tolist()
    asked = labels >= 0
    assert torch.allclose(torch.exp(-surprise[asked]), chances.amax(-1)[asked], atol=1e-5)


def one_of_two_right() -> Tally:
    """Two labels, 5 and 6 in the groups 0 and 2; likeliest are 5 (chance 0.9) and 4 (0.3); 6 has the chance 0.25."""
    data = DataSettings(max_document_length=4, sequence_length=4, max_documents=2)
    batch = make_batch([Continuation([1, 7, 8], [5, 6])], data)
    batch = replace(batch, loss_groups=torch.tensor([0, 0, 2, 0]), num_loss_groups=3)
    losses, surprise = [0, -math.log(0.9), -math.log(0.25), 0], [0, -math.log(0.9), -math.log(0.3), 0]
    bytes_by_token = torch.tensor([0, 0, 0, 0, 1, 2, 3]).numpy()
    return tally(batch, torch.tensor([losses, surprise, [0, 5, 4, 0]], dtype=torch.float64), bytes_by_token)


def test_weights_of_labels_count_in_the_loss_alone() -> None:
    data = DataSettings(max_document_length=4, sequence_length=4, max_documents=2)
    batch = make_batch([Continuation([1, 7, 8], [5, 6])], data)
    batch = replace(batch, weights=torch.tensor([0.0, 0.5, 2.0, 0.0]))
    predictions = torch.tensor([[0, 1, 3, 0], [0, 1, 1, 0], [0, 5, 4, 0]], dtype=torch.float64)
    nats, (part,), _ = add_up([tally(batch, predictions, None)], LOSS_GROUPS[:1])
    assert nats == part.nats == 6.5
    assert (part.weight, part.nats_per_token, part.num_labels, part.accuracy) == (2.5, 2.6, 2, 0.5)


def evaluation(times: int = 1) -> Evaluation:
    nats, parts, bins = add_up([one_of_two_right()] * times, LOSS_GROUPS)
    return Evaluation(nats, 2 * times, 5 * times, 1.0, parts=parts, bins=bins)


def test_a_tally_counts_loss_accuracy_bytes_and_calibration_by_objective_and_source() -> None:
    found = evaluation()
    assert [(one.objective, one.source) for one in found.parts] == [("causal", "news"), ("causal", "letters")]
    assert [(one.num_labels, one.num_right, one.text_bytes) for one in found.parts] == [(1, 1, 2), (1, 0, 3)]
    assert [one.nats for one in found.parts] == [-math.log(0.9), -math.log(0.25)]
    assert found.accuracy == 0.5
    assert {round(one.low * 15): one.num_labels for one in found.bins if one.num_labels} == {4: 1, 13: 1}
    assert found.calibration_error == pytest.approx((0.1 + 0.3) / 2)


def test_tallies_add_up() -> None:
    assert evaluation(3).nats == pytest.approx(3 * evaluation().nats)
    assert evaluation(3).accuracy == evaluation().accuracy
    assert evaluation(3).calibration_error == pytest.approx(evaluation().calibration_error)


def test_an_evaluation_fits_80_columns_and_its_values_hold_what_the_text_says() -> None:
    found = evaluation()
    long = tuple(
        replace(part, source="a" * 100, objective="fill_in_the_middle", num_labels=10**9) for part in found.parts
    )
    lines = [*to_lines(found), *to_lines(replace(found, parts=long))]
    assert max(map(len, lines)) <= 80
    assert any(line.split()[:2] == ["letters", "causal"] and line.endswith("0.0%") for line in lines)
    values = to_values(found)
    assert values["parts"][0]["perplexity"] == pytest.approx(1 / 0.9)
    assert values["parts"][1]["bits_per_byte"] == pytest.approx(2 / 3)
    assert len(values["calibration"]) == 15
