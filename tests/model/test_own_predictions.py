"""Scheduled sampling is two passes: predictions of the first one, document by document, are inputs of the second."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bigmodel.config.settings import DataSettings, Settings
from bigmodel.data.load.batch import IGNORED, Batch
from bigmodel.data.load.own_inputs import with_own_inputs
from bigmodel.data.objectives.examples import Examples
from bigmodel.kernels.linear_choices import linear_choices
from bigmodel.model.transformer import Transformer
from bigmodel.training.zero.wrapping import wrap_blocks
from tests.model.test_encoder_decoder import ONE_SIDE, PAIRS, TEXTS, TWO_SIDES
from tests.support.example_batches import VOCABULARY, batch_of, model_of, plan_of, text

BOTH = {"kind": "encoder_decoder"}
MODELS = {  # settings of the model, the data's, documents
    "decoder": ({"tied_embeddings": True}, ONE_SIDE, TEXTS),
    "decoder, learned positions": ({"position_embedding": "learned", "max_positions": 64}, ONE_SIDE, TEXTS),
    "prefix": ({}, ONE_SIDE | {"objectives": [{"kind": "prefix"}]}, TEXTS),
    "cross": (BOTH, TWO_SIDES, PAIRS),
    "mixed": (BOTH | {"source_attention": "mixed", "logit_softcap": 0.5}, TWO_SIDES, PAIRS),
    "bias": (BOTH | {"position_embedding": "relative_bias"}, TWO_SIDES | {"target_ahead": 3}, PAIRS),
}


def sampled(documents: list, settings: dict, share: float = 0.6, drawn: bool = False) -> Batch:
    data = DataSettings(**settings)
    plan = plan_of(documents, Examples(data, 1, VOCABULARY))
    return with_own_inputs(batch_of(documents, data), plan, 1, share, data.target_ahead, drawn)


def far_model(**changes: object) -> Transformer:
    """In float64, with predictions far from ties."""
    model = model_of(**changes).double()
    with torch.no_grad():
        model.head.weight.mul_(5)
    return model


def gradients_of(model: Transformer, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.sum().backward()
    return [torch.zeros_like(one) if one.grad is None else one.grad.clone() for one in model.parameters()]


@pytest.mark.parametrize(("changes", "data", "documents"), MODELS.values(), ids=MODELS.keys())
def test_loss_and_gradient_are_those_of_inputs_predicted_before(changes: dict, data: dict, documents: list) -> None:
    batch, model = sampled(documents, data), far_model(**changes)
    plain = replace(batch, replaced=None, predicted_at=None)
    tokens, logits_TV = batch.tokens.numpy().copy(), model(plain, "logits").detach().numpy()
    tokens[batch.replaced] = logits_TV[batch.predicted_at].argmax(-1)
    assert (tokens != batch.tokens.numpy()).sum() > 10
    second = replace(plain, tokens=torch.from_numpy(tokens))
    expected = F.cross_entropy(model(second, "logits"), batch.labels, ignore_index=IGNORED, reduction="sum")
    found = model(batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    pairs = zip(gradients_of(model, found), gradients_of(model, expected), strict=True)
    assert all((one - two).abs().max() <= 1e-5 * two.abs().max() for one, two in pairs)  # logits are in fp32


def test_evaluation_has_the_true_inputs() -> None:
    batch, model = sampled(PAIRS, TWO_SIDES), far_model(**BOTH).eval()
    plain = replace(batch, replaced=None)
    with torch.no_grad():
        assert model(batch).item() == model(plain).item()
        assert model.train()(batch).item() != model(plain).item()


@pytest.mark.parametrize("changes", [BOTH, BOTH | {"source_attention": "mixed"}], ids=["cross", "mixed"])
def test_no_document_reaches_another_one_through_a_prediction(changes: dict) -> None:
    batch, model = sampled(PAIRS, TWO_SIDES, drawn=True), far_model(**changes, dropout=0.2)
    first = slice(*batch.cu_seqlens[:2].tolist())
    edited = batch.tokens.clone()
    edited[first] = edited[first].flip(0)
    with torch.no_grad():
        before, after = (model(one, "loss_per_position") for one in (batch, replace(batch, tokens=edited)))
    assert not torch.equal(before[first], after[first])
    assert torch.equal(before[first.stop :], after[first.stop :])


@pytest.mark.parametrize("drawn", [False, True], ids=["likeliest", "drawn"])
def test_activation_checkpointing_changes_no_bit_of_a_sampled_step(drawn: bool) -> None:
    found = []
    for kind in ("none", "full"):
        model = model_of(**BOTH, dropout=0.2, num_mtp_modules=1)
        wrap_blocks(model, Settings.model_validate({"training": {"activation_checkpointing": kind}}), stage=1)
        loss = model(sampled(PAIRS, TWO_SIDES, drawn=drawn))
        found.append([loss.detach(), *gradients_of(model, loss)])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_the_encoder_runs_once_and_the_decoder_twice_also_without_a_row_to_replace() -> None:
    model, calls = model_of(**BOTH), []
    for name, blocks in (("encoder", model.encoder.blocks), ("decoder", model.blocks)):
        blocks[0].register_forward_hook(lambda *_, name=name: calls.append((name, torch.is_grad_enabled())))
    for batch in (sampled(PAIRS, TWO_SIDES), sampled([[], []], TWO_SIDES)):
        calls.clear()
        model(batch).backward()
        assert calls == [("encoder", True), ("decoder", False), ("decoder", True)]


def test_a_draw_has_the_probability_of_its_token_and_does_not_depend_on_the_chunk() -> None:
    random = torch.Generator().manual_seed(0)
    hidden_RH, weight_VH = torch.randn(2, 8, generator=random), torch.randn(20, 8, generator=random)
    seeds_R = torch.randint(-(2**62), 2**62, (20_000,), generator=random)
    chosen_R = linear_choices(hidden_RH[:1].expand(len(seeds_R), 8), weight_VH, seeds_R, logit_softcap=2.0)
    logits_V = (weight_VH @ hidden_RH[0]).double().numpy()
    expected_V = np.exp(2 * np.tanh(logits_V / 2)) / np.exp(2 * np.tanh(logits_V / 2)).sum()
    counts_V = np.bincount(chosen_R, minlength=20)
    assert (((counts_V - 20_000 * expected_V) ** 2) / (20_000 * expected_V)).sum() < 43.8  # chi^2 of 19, p = 0.001
    again_R = linear_choices(hidden_RH[:1].expand(99, 8), weight_VH, seeds_R[:99], 2.0, chunk_positions=7)
    assert torch.equal(again_R, chosen_R[:99])
    assert linear_choices(hidden_RH, weight_VH).tolist() == (hidden_RH @ weight_VH.T).argmax(-1).tolist()


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("drawn", [False, True], ids=["likeliest", "drawn"])
def test_the_logits_are_never_whole(drawn: bool) -> None:
    hidden_RH, weight_VH, seeds_R = torch.randn(100, 8), torch.randn(50, 8), torch.arange(100) if drawn else None
    with Largest() as largest:
        linear_choices(hidden_RH, weight_VH, seeds_R, chunk_positions=10)
    assert largest.elements == 10 * 50


def test_a_start_token_is_never_replaced_and_texts_of_one_token_have_no_input_to_replace() -> None:
    batch = sampled([[text(0), text(1), text(9)], []], ONE_SIDE, share=1.0)
    assert batch.replaced.tolist() == [2, *range(4, 13)]
    assert batch.predicted_at.tolist() == [1, *range(3, 12)]
