"""Sinusoidal positions are their formula, begin anew in each document, and need no table."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from bigmodel.config.huggingface import fitting_type
from bigmodel.config.settings import DataSettings, UserError
from bigmodel.data.objectives.examples import Pair
from bigmodel.model.layers import sinusoids
from tests.support.example_batches import batch_of, model_of, text

ONE_SIDE: dict[str, Any] = {"max_document_length": 24, "sequence_length": 48}
MASKED = ONE_SIDE | {"objectives": [{"kind": "masked"}]}
TWO_SIDES = ONE_SIDE | {"source_sequence_length": 48}
KINDS = {
    "decoder": (ONE_SIDE, {}),
    "encoder": (MASKED, {"kind": "encoder"}),
    "encoder_decoder": (TWO_SIDES, {"kind": "encoder_decoder", "encoder_num_layers": 1}),
}


def formula(positions: list[int], channels: int) -> np.ndarray:
    """(positions, channels) fp64, one number at a time."""
    table = np.zeros((len(positions), channels))
    for row, position in enumerate(positions):
        for channel in range(channels):
            angle = position / 10_000 ** (2 * (channel // 2) / channels)
            table[row, channel] = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
    return table


@pytest.mark.parametrize("channels", [32, 7])
def test_sinusoids_are_the_formula_also_far_away(channels: int) -> None:
    places = [0, 1, 2, 31, 999, 100_003, 1_000_000]
    ours = sinusoids(torch.tensor(places), channels)
    assert ours.dtype == torch.float32
    assert np.abs(ours.numpy() - formula(places, channels)).max() < 1e-7


def test_the_input_is_the_scaled_token_plus_the_position_in_its_document() -> None:
    model = model_of(position_embedding="sinusoidal").double()
    batch = batch_of([[text(5), text(9), text(3)]], DataSettings(**ONE_SIDE))
    places = [*range(6), *range(10), *range(4)]  # inputs of the three documents, then padding
    assert batch.cu_seqlens[:4].tolist() == [0, 6, 16, 20]
    embedded = model.embedding.weight.detach().numpy()[batch.tokens[:20].numpy()] * math.sqrt(32)
    x_TH, _ = model.embed(batch)
    assert np.abs(x_TH[:20].detach().numpy() - (embedded + formula(places, 32))).max() < 1e-6
    assert 0.9 < float(model.embedding.weight.detach().std()) * math.sqrt(32) < 1.1
    assert "input." not in "".join(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_have_the_losses_that_they_have_alone(kind: str) -> None:
    data, settings = KINDS[kind]
    documents: list[Any] = [text(6), text(11), text(4)]
    if kind == "encoder_decoder":
        documents = [Pair(text(7), text(6)), Pair(text(3), text(11)), Pair(text(12), text(4))]
    model = model_of(position_embedding="sinusoidal", **settings).double().eval()
    with torch.no_grad():
        packed = model(batch_of([documents], DataSettings(**data)), "loss_per_position")
        turned = model(batch_of([documents[::-1]], DataSettings(**data)), "loss_per_position")
    assert float(packed.sum()) > 0
    if kind != "encoder":  # what is masked depends on the document's number
        assert sorted(packed[packed > 0].tolist()) == pytest.approx(sorted(turned[turned > 0].tolist()), rel=1e-12)
        alone = [model(batch_of([[one]], DataSettings(**data)), "loss_sum") for one in documents]
        assert float(packed.sum()) == pytest.approx(float(sum(alone)), rel=1e-12)


def test_no_class_of_transformers_has_them() -> None:
    with pytest.raises(UserError, match=r"model\.position_embedding = .sinusoidal"):
        fitting_type(model_of(position_embedding="sinusoidal").settings, "")
