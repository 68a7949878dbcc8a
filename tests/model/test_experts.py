"""Mixture of experts: against dense layers, a loop in float64, and itself in other micro-batches."""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from bigmodel.config.expert_settings import ExpertSettings
from bigmodel.config.settings import DataSettings, ModelSettings
from bigmodel.data.load.batch import Batch, build_batch, make_dropout_seeds
from bigmodel.data.plan.shuffle import Chunk
from bigmodel.model.experts import MixtureOfExperts, Routing, balance, mixtures, within_capacity
from bigmodel.model.init import init_weights
from bigmodel.model.transformer import Transformer

VOCABULARY, SIZE = 97, 32
LENGTHS = [[9, 12], [20], [3, 3, 7], [1]]  # of documents, by packed sequence
DATA = DataSettings(max_document_length=SIZE, sequence_length=SIZE, max_documents=4)
EXPERTS: dict[str, Any] = {"count": 4, "per_token": 2, "width": 24}
MODEL: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48}


def model_of(**changes: Any) -> Transformer:
    experts = EXPERTS | changes.pop("experts", {})
    model = Transformer(ModelSettings(**MODEL | changes, experts=experts if experts["count"] else None), VOCABULARY)
    init_weights(model, 5)
    return model


def batch_of(packs: range) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, VOCABULARY, (16, SIZE + 1), generator=generator).numpy()
    rows = {pack: [sum(map(len, LENGTHS[:pack])) + number for number in range(len(LENGTHS[pack]))] for pack in packs}
    plan = [
        tuple(Chunk(0, 0, row, 0, length, 0) for row, length in zip(rows[pack], LENGTHS[pack], strict=True))
        for pack in packs
    ]
    return build_batch(plan, lambda chunk: tokens[chunk.row], DATA, make_dropout_seeds(1, 0, list(packs), SIZE))


def gradients(model: Transformer, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    """Loss sum and gradients over micro-batches, as the engine adds them up."""
    model.zero_grad(set_to_none=True)
    model.loads_LE = 0.0
    total = 0.0
    for batch in batches:
        loss = model(batch)
        loss.backward()
        total += loss.item()
    return total, {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def layer_of(dtype: torch.dtype = torch.float64, **experts: Any) -> MixtureOfExperts:
    model = model_of(experts=experts)
    return mixtures(model)[0].to(dtype)


def within_groups(ranked: list[float], groups: int, per_token: int) -> list[int]:
    """The experts of a token's groups."""
    size = len(ranked) // groups
    members = [range(first, first + size) for first in range(0, len(ranked), size)]
    best = sorted(members, key=lambda group: -sum(sorted(ranked[e] for e in group)[-2:]))[:per_token]
    return [e for group in best for e in group]


def by_hand(layer: MixtureOfExperts, x_TH: Tensor, padding_T: Tensor | None = None) -> Tensor:
    """Token by token, expert by expert."""
    rows = []
    for row, x_H in enumerate(x_TH):
        logits_E = layer.router.weight @ x_H
        scores_E = logits_E.softmax(0) if layer.settings.scores == "softmax" else logits_E.sigmoid()
        ranked_E = scores_E if layer.router.bias is None else scores_E + layer.router.bias
        inside = within_groups(ranked_E.tolist(), layer.settings.groups, layer.settings.groups_per_token)
        chosen = sorted(inside, key=lambda e: -ranked_E[e].item())[: layer.settings.per_token]
        total = sum(scores_E[e] for e in chosen) if layer.settings.normalize_weights else 1.0
        out_H = torch.zeros_like(x_H)
        for e in chosen if padding_T is None or not padding_T[row] else ():
            gate, up = (layer.experts.gate_up[e] @ x_H).chunk(2)
            share = scores_E[e] / total * layer.settings.route_scale
            out_H = out_H + share * (layer.experts.down[e] @ (torch.nn.functional.silu(gate) * up))
        rows.append(out_H if layer.shared is None else out_H + layer.shared(x_H[None])[0])
    return torch.stack(rows)


@pytest.mark.parametrize(
    "experts",
    [
        {},
        {"normalize_weights": False},
        {"per_token": 4},
        {"count": 8, "per_token": 3, "scores": "sigmoid", "route_scale": 2.5, "balance": "bias", "shared": 2},
        {"count": 12, "per_token": 3, "groups": 4, "groups_per_token": 2, "scores": "sigmoid", "balance": "bias"},
    ],
    ids=str,
)
def test_a_layer_is_the_sum_over_its_experts(experts: dict[str, Any]) -> None:
    layer, generator = layer_of(**experts), torch.Generator().manual_seed(2)
    if layer.router.bias is not None:
        layer.router.bias.copy_(torch.randn(layer.router.bias.shape, generator=generator) * 0.3)
    x_TH = torch.randn(40, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        plain = layer.choose(layer.router(x_TH).sigmoid())[0]
    found, wanted = layer(x_TH), by_hand(layer, x_TH)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    assert len(plain.unique()) > 2, "few experts are met"
    weight_TH = torch.randn(40, 32, generator=generator, dtype=torch.float64)
    inputs = [x_TH, *layer.parameters()]
    pairs = zip(*(torch.autograd.grad((out * weight_TH).sum(), inputs) for out in (found, wanted)), strict=True)
    for ours, by_torch in pairs:
        assert torch.allclose(ours, by_torch, rtol=0, atol=1e-10)


def test_one_expert_is_a_dense_layer() -> None:
    dense, one = model_of(experts={"count": 0}), model_of(experts={"count": 1, "per_token": 1, "width": 48})
    own = dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            if "router" not in name:
                plain = name.replace(".experts.gate_up", ".gate_up.weight").replace(".experts.down", ".down.weight")
                parameter.copy_(own[plain].view(parameter.shape))
    batch = batch_of(range(3))
    (dense_loss, dense_grads), (loss, grads) = (gradients(model, [batch]) for model in (dense, one))
    assert loss == pytest.approx(dense_loss, rel=1e-6)
    for name, gradient in grads.items():
        if "router" in name:
            assert float(gradient.abs().max()) < 1e-5, "the weight of the only expert is 1"
            continue
        plain = name.replace(".experts.gate_up", ".gate_up.weight").replace(".experts.down", ".down.weight")
        assert torch.allclose(gradient.view(dense_grads[plain].shape), dense_grads[plain], rtol=1e-4, atol=1e-5), name


def test_padding_passes_no_expert_and_has_no_part_in_loads_and_gradients() -> None:
    layer, padding_T = layer_of(), torch.tensor([False] * 5 + [True] * 3)
    batch = replace(batch_of(range(1)), padding=padding_T, labels=torch.tensor([3] * 5 + [-100] * 3))
    x_TH = torch.randn(8, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    routing = Routing(batch, records=True)
    out_TH = layer(x_TH, routing)
    assert torch.allclose(out_TH, by_hand(layer, x_TH, padding_T), rtol=0, atol=1e-12)
    assert out_TH[5:].abs().max() == 0
    recorded = routing.close()
    assert recorded.loads_LE.sum() == 5 * layer.settings.per_token
    (grad_TH,) = torch.autograd.grad(out_TH.sum() + recorded.term, x_TH)
    assert grad_TH[5:].abs().max() == 0
    assert grad_TH[:5].abs().min() > 0


def test_padding_of_a_batch_is_where_no_document_is() -> None:
    batch = batch_of(range(4))
    assert batch.padding is not None
    assert (~batch.padding).view(4, SIZE).sum(1).tolist() == [sum(lengths) for lengths in LENGTHS]
    assert torch.equal(batch.padding, batch.labels == -100), "plain text has a label at every token"


UNEVEN = {"balance_weight": 0.5, "router_z_weight": 0.01}


def tilted(**experts: Any) -> Transformer:
    """A model in float64 whose loads of the step before are uneven."""
    model = model_of(experts=experts).double()
    for number, layer in enumerate(mixtures(model)):
        if layer.router.load is not None:
            layer.router.load.copy_(torch.tensor([1.1, 0.5, 0.3, 0.1]).roll(number))
    return model


def test_two_ways_to_split_a_step_give_the_same_gradient_and_loads() -> None:
    model = tilted(**UNEVEN)
    whole, wanted = gradients(model, [batch_of(range(4))])
    loads = torch.as_tensor(model.loads_LE)
    assert loads.sum(1).tolist() == [2 * sum(map(sum, LENGTHS))] * 2
    for sizes in ([1, 3], [2, 2], [1, 1, 1, 1]):
        edges = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
        batches = [batch_of(range(*edge)) for edge in pairwise(edges)]
        total, found = gradients(model, batches)
        assert total == pytest.approx(whole, rel=1e-12)
        assert torch.equal(torch.as_tensor(model.loads_LE), loads)
        for name, gradient in found.items():
            assert torch.allclose(gradient, wanted[name], rtol=0, atol=1e-11), name


def test_balance_changes_the_gradient_of_routers_and_not_the_loss() -> None:
    batch = batch_of(range(4))
    plain, without = gradients(tilted(balance="none"), [batch])
    for experts in ({"balance_weight": 0.5}, {"balance": "none", "router_z_weight": 0.01}):
        loss, found = gradients(tilted(**experts), [batch])
        assert loss == plain
        for name, gradient in found.items():
            assert ("router" not in name) or not torch.allclose(gradient, without[name], rtol=1e-3), name


def test_only_the_loss_sum_has_the_gradient_of_the_balance_and_counts_loads() -> None:
    found = []
    for experts in ({"balance_weight": 0.5, "router_z_weight": 0.1}, {"balance": "none"}):
        model = tilted(**experts)
        model(batch_of(range(2)), "logits").sum().backward()
        assert model.loads_LE == 0.0
        found.append({name: one.grad for name, one in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_the_balance_loss_is_its_formula() -> None:
    layer, batch = mixtures(tilted(**UNEVEN))[0], batch_of(range(2))
    x_TH = torch.randn(2 * SIZE, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    routing = Routing(batch, records=True)
    layer(x_TH, routing)
    logits_TE = x_TH[~batch.padding] @ layer.router.weight.T
    mean_E = logits_TE.detach().softmax(-1).mean(0).tolist()
    loss = 4 * sum(f * p for f, p in zip([1.1, 0.5, 0.3, 0.1], mean_E, strict=True))
    z = float(logits_TE.detach().logsumexp(-1).square().mean())
    recorded = routing.close()
    assert recorded.term.item() / batch.num_labels == pytest.approx(0.5 * loss + 0.01 * z, rel=1e-6)
    assert float(recorded.z_sum) / batch.num_labels == pytest.approx(z)


def test_loads_and_biases_move_by_the_loads_of_the_step() -> None:
    model = model_of()
    balance(model, torch.tensor([[30, 10, 0, 0], [10, 10, 10, 10]]))
    first, second = (layer.router.load for layer in mixtures(model))
    assert first.tolist() == [1.5, 0.5, 0.0, 0.0], "shares of 20 tokens with 2 experts each"
    assert second.tolist() == [0.5] * 4
    model = model_of(experts={"balance": "bias", "bias_rate": 0.25})
    for _ in range(2):
        balance(model, torch.tensor([[30, 10, 0, 0], [9, 11, 10, 10]]))
    first, second = (layer.router.bias for layer in mixtures(model))
    assert first.tolist() == [-0.5, 0.0, 0.5, 0.5]
    assert second.tolist() == [0.5, -0.5, 0.0, 0.0]


def test_a_frozen_router_keeps_its_bias() -> None:
    """In one layer frozen, in the other not."""
    model = model_of(experts={"balance": "bias", "bias_rate": 0.25})
    mixtures(model)[0].router.weight.requires_grad = False
    balance(model, torch.tensor([[30, 10, 0, 0]] * 2))
    assert [layer.router.bias.tolist() for layer in mixtures(model)] == [[0.0] * 4, [-0.25, 0.0, 0.25, 0.25]]


def test_a_bias_changes_the_choice_and_not_the_weights() -> None:
    layer = layer_of(balance="bias", per_token=1, normalize_weights=False)
    scores_TE = torch.tensor([[0.6, 0.3, 0.1, 0.0]], dtype=torch.float64)
    assert [one.tolist() for one in layer.choose(scores_TE)] == [[[0]], [[0.6]]]
    layer.router.bias.copy_(torch.tensor([0.0, 0.5, 0.0, 0.0]))
    assert [one.tolist() for one in layer.choose(scores_TE)] == [[[1]], [[0.3]]]


def test_a_token_passes_experts_of_its_best_groups_only() -> None:
    """Two groups of two: the best expert is in the group with the smaller sum; so are biases below 0."""
    layer = layer_of(count=4, per_token=2, groups=2, balance="bias", normalize_weights=False)
    scores_TE = torch.tensor([[0.5, 0.0, 0.3, 0.25]], dtype=torch.float64)
    assert [one.tolist() for one in layer.choose(scores_TE)] == [[[2, 3]], [[0.3, 0.25]]]
    layer.router.bias.copy_(torch.tensor([-1.0, -1.0, -0.5, -0.5]))
    assert layer.choose(scores_TE)[0].tolist() == [[2, 3]]
    assert layer.choose(scores_TE[:0])[0].shape == (0, 2)


def test_scores_that_are_all_0_give_no_weight_and_no_nan() -> None:
    layer = layer_of(torch.float32, scores="sigmoid", balance_weight=0.5)
    with torch.no_grad():
        layer.router.weight.fill_(-100.0)
    x_TH, routing = torch.ones(5, 32, requires_grad=True), Routing(batch_of(range(1)), records=True)
    routing.padding_T, routing.weight_T = None, torch.ones(5)
    out_TH = layer(x_TH, routing)
    assert out_TH.abs().max() == 0
    term = routing.close().term
    assert term == 0
    for gradient in torch.autograd.grad(out_TH.sum() + term, [x_TH, *layer.parameters()]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_loads_and_biases_stay_in_fp32_in_every_precision(dtype: torch.dtype) -> None:
    for name in ("loss", "bias"):
        model = model_of(experts={"balance": name})
        balance(model, torch.tensor([[30, 10, 0, 1]] * 2))
        before = {key: value.clone() for key, value in model.named_buffers()}
        model.to(dtype)
        assert len(before) == 2
        for key, value in model.named_buffers():
            assert value.dtype == torch.float32
            assert torch.equal(value, before[key])


def test_the_router_computes_in_fp32() -> None:
    layer, x_TH = layer_of(torch.bfloat16), torch.randn(5, 32).bfloat16()
    assert torch.equal(layer.router(x_TH), x_TH.float() @ layer.router.weight.float().T)


def test_first_layers_can_be_dense_and_mtp_modules_have_experts() -> None:
    model = model_of(experts={"first_dense_layers": 1}, num_mtp_modules=1)
    assert [block.has_experts for block in (*model.blocks, *model.extra_blocks)] == [False, True, True]
    gradients(model, [batch_of(range(4))])
    assert torch.as_tensor(model.loads_LE).shape == (2, 4)


def kept_by_hand(experts_TK: list[list[int]], positions: list[int], settings: ExpertSettings) -> list[list[bool]]:
    """Token by token: an expert that has taken fewer tokens of the document than its capacity takes this one."""
    taken, kept = [0] * settings.count, []
    for position, experts in zip(positions, experts_TK, strict=True):
        taken = taken if position else [0] * settings.count
        share = Fraction(str(settings.capacity_factor)) * settings.per_token * (position + 1) / settings.count
        capacity = max(settings.min_capacity, math.ceil(share))
        kept.append([taken[expert] < capacity for expert in experts])
        for expert, keeps in zip(experts, kept[-1], strict=True):
            taken[expert] += keeps
    return kept


@pytest.mark.parametrize("capacity", [(0.5, 1), (1.0, 1), (1.25, 4), (1.1, 2)])
def test_an_expert_takes_the_first_tokens_of_a_document_up_to_its_capacity(capacity: tuple[float, int]) -> None:
    factor, least = capacity
    settings = ExpertSettings(count=8, per_token=2, capacity_factor=factor, min_capacity=least)
    generator, lengths = torch.Generator().manual_seed(3), [1, 40, 2, 90, 1, 7, 64]
    preferred = torch.tensor([9.0, 9.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    experts_TK = torch.multinomial(preferred.expand(sum(lengths), 8), 2, generator=generator)
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    chosen_ET = torch.zeros(8, sum(lengths), dtype=torch.long).scatter_(0, experts_TK.T, 1)
    kept_TE = within_capacity(chosen_ET, positions_T, settings).T
    by_hand = kept_by_hand(experts_TK.tolist(), positions_T.tolist(), settings)
    assert kept_TE.gather(1, experts_TK).tolist() == by_hand
    assert kept_TE.sum() == kept_TE.gather(1, experts_TK).sum(), "what is not chosen is not kept"
    assert 0 < sum(map(sum, by_hand)) < experts_TK.numel()


def test_dropped_choices_are_counted_and_give_nothing_in_training_alone() -> None:
    experts = {"capacity_factor": 0.5, "min_capacity": 1}
    layer, batch = layer_of(**experts), batch_of(range(4))
    x_TH = torch.randn(len(batch.tokens), 32, dtype=torch.float64)
    dropless = layer_of()
    whole, routing = dropless(x_TH, Routing(batch, records=False)), Routing(batch, records=True)
    assert torch.equal(layer.eval()(x_TH, Routing(batch, records=False)), whole)
    out = layer.train()(x_TH, routing)
    recorded = routing.close()
    experts_TK = layer.choose(layer.router(x_TH).softmax(-1))[0]
    kept_TK = torch.tensor(kept_by_hand(experts_TK.tolist(), batch.positions.tolist(), layer.settings))
    assert batch.padding is not None
    tokens_T = ~batch.padding
    assert recorded.dropped_L.tolist() == [int((~kept_TK[tokens_T]).sum())]
    assert recorded.loads_LE.sum() == 2 * batch.num_tokens, "loads are of what is chosen"
    none_T = tokens_T & ~kept_TK.any(1)
    assert none_T.any()
    assert not out[none_T].any()
    assert torch.equal(out[tokens_T & kept_TK.all(1)], whole[tokens_T & kept_TK.all(1)])


def test_a_large_capacity_drops_nothing_bit_for_bit() -> None:
    batches = [batch_of(range(4))]
    results = [gradients(model_of(experts=one), batches) for one in ({}, {"capacity_factor": 4.0})]
    assert results[0][0] == results[1][0]
    assert all(torch.equal(one, results[1][1][name]) for name, one in results[0][1].items())


@pytest.mark.parametrize(
    "capacity", [{"capacity_factor": value} for value in (1e18, 1e308)] + [{"min_capacity": 10**30}]
)
def test_a_capacity_beyond_64_bits_drops_nothing(capacity: dict[str, Any]) -> None:
    settings = ExpertSettings(**{"count": 8, "per_token": 2, "capacity_factor": 0.5} | capacity)
    positions_T = torch.cat([torch.arange(40), torch.arange(8), torch.zeros(3, dtype=torch.long)])
    chosen_ET = torch.zeros(8, len(positions_T), dtype=torch.long).index_fill(0, torch.tensor([0, 3]), 1)
    assert torch.equal(within_capacity(chosen_ET, positions_T, settings), chosen_ET > 0)


def test_drops_depend_on_earlier_tokens_of_the_same_document_alone() -> None:
    """Other micro-batches, later tokens and other documents change no output; an earlier token does."""
    model, batch = model_of(experts={"capacity_factor": 0.5, "min_capacity": 1}).double(), batch_of(range(4))
    with torch.no_grad():
        whole = model(batch, "logits")
        parts = torch.cat([model(batch_of(range(2)), "logits"), model(batch_of(range(2, 4)), "logits")])
        changed = replace(batch, tokens=batch.tokens.index_fill(0, torch.tensor([12]), 5))  # of the second document
        after = model(changed, "logits")
    assert torch.allclose(whole, parts, rtol=1e-12, atol=1e-12)
    moved = (whole - after).abs().amax(-1) > 1e-9
    assert moved[12:21].all()
    assert not moved[:12].any()
    assert not moved[21:].any()
