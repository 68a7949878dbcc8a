"""Encoder-decoder and all objectives: packed equals one document at a time, and no document reaches another one."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from bigmodel.checks.leak import isolation, packed_equals_single
from bigmodel.config.settings import DataSettings, Settings
from bigmodel.data.load.batch import IGNORED, Batch, exchange_sources
from bigmodel.data.objectives.examples import Pair
from bigmodel.kernels.attention import make_tile_metadata
from bigmodel.kernels.mask import AttentionMask, bidirectional, causal, cross, prefix_lm
from bigmodel.model.rotary import rotary_table
from bigmodel.model.transformer import Attention, AttentionInputs
from bigmodel.training.zero.wrapping import wrap_blocks
from tests.support.example_batches import batch_of, model_of, text

ONE_SIDE = {"max_document_length": 64, "sequence_length": 64, "max_documents": 5}
TWO_SIDES = ONE_SIDE | {"source_sequence_length": 64}
PAIRS = [[Pair(text(9), text(20)), Pair(text(1), text(1)), Pair(text(30), text(5))], [Pair(text(12), text(40))]]
TEXTS = [[text(19), text(1), text(14)], [text(30)]]
SOURCES = {  # on two sides: (documents, objectives)
    "pairs": (PAIRS, []),
    "span_corruption": (TEXTS, [{"kind": "span_corruption"}]),
    "ul2": (TEXTS, [{"kind": "ul2"}]),
    "prefix": (TEXTS, [{"kind": "prefix"}]),
    "causal_without_source": (TEXTS, [{"kind": "causal"}]),
    "mixture": (TEXTS, [{"kind": "causal"}, {"kind": "span_corruption"}, {"kind": "prefix"}]),
    "ahead": (TEXTS, [{"kind": "causal", "ahead": 3}]),
    "ul2_of_tiny_texts": ([[text(0), text(1), text(2), text(3)], [text(2), text(3), text(1)]], [{"kind": "ul2"}]),
    "pairs_beside_text": ([[*PAIRS[0][:2], text(14)], [text(9), PAIRS[1][0]]], [{"kind": "prefix"}]),
}
DROPOUT = {"dropout": 0.2, "attention_dropout": 0.3, "embedding_dropout": 0.1, "stochastic_depth": 0.3}
ENCODER_DECODERS = {
    "cross": {},
    "mixed": {"source_attention": "mixed"},
    "relative_bias": {"position_embedding": "relative_bias", "attention_scale": 1.0, "activation": "gelu"},
    "other_widths": {
        "encoder_num_layers": 1,
        "encoder_hidden_size": 24,
        "encoder_num_heads": 2,
        "encoder_num_kv_heads": 1,
        "encoder_intermediate_size": 30,
        "separate_embeddings": True,
        "qk_norm": True,
    },
    "mixed_other_widths": {
        "source_attention": "mixed",
        "encoder_num_layers": 3,
        "encoder_hidden_size": 24,
        "encoder_num_heads": 3,
        "encoder_num_kv_heads": 3,
        "separate_embeddings": True,
    },
    "tied_mtp_dropout": {"tied_embeddings": True, "num_mtp_modules": 2, **DROPOUT},
    "mixed_mtp_dropout": {"source_attention": "mixed", "num_mtp_modules": 2, **DROPOUT},
}
DECODERS = {
    "causal": [{"kind": "causal"}],
    "ahead": [{"kind": "causal", "ahead": 3}],
    "prefix": [{"kind": "prefix"}],
    "fill_in_the_middle": [{"kind": "fill_in_the_middle"}],
    "span_corruption": [{"kind": "span_corruption"}],
    "ul2": [{"kind": "ul2"}],
}


def holds(model: torch.nn.Module, batch: Batch) -> None:
    findings = [*isolation(model, batch), *packed_equals_single(model.double(), batch)]
    assert [f"{finding.claim}: {finding.evidence}" for finding in findings if not finding.holds] == []
    assert len(findings) == 6


@pytest.mark.parametrize("changes", ENCODER_DECODERS.values(), ids=ENCODER_DECODERS.keys())
def test_pairs_are_apart_and_packed_equals_one_at_a_time(changes: dict) -> None:
    holds(model_of(kind="encoder_decoder", **changes), batch_of(PAIRS, DataSettings(**TWO_SIDES)))


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("changes", ENCODER_DECODERS.values(), ids=ENCODER_DECODERS.keys())
def test_activation_checkpointing_of_both_sides_changes_no_bit(changes: dict, kind: str) -> None:
    """Encoder, decoder and extra heads, each block once more in the backward pass."""
    found = []
    for checkpointing in ("none", kind):
        model, calls = model_of(kind="encoder_decoder", **changes), []
        blocks = [*model.encoder.blocks, *model.blocks, *model.extra_blocks]
        for number, block in enumerate(blocks):
            block.attention_norm.register_forward_hook(lambda *_, number=number, calls=calls: calls.append(number))
        wrap_blocks(model, Settings.model_validate({"training": {"activation_checkpointing": checkpointing}}), stage=1)
        loss = model(batch_of(PAIRS, DataSettings(**TWO_SIDES)))
        loss.backward()
        assert sorted(calls) == sorted([*range(len(blocks))] * (1 if checkpointing == "none" else 2))
        found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("source_attention", ["cross", "mixed"])
@pytest.mark.parametrize(("documents", "objectives"), SOURCES.values(), ids=SOURCES.keys())
def test_every_objective_of_an_encoder_decoder(documents: list, objectives: list, source_attention: str) -> None:
    data = DataSettings(**TWO_SIDES, objectives=objectives)
    batch = batch_of(documents, data)
    has_source = any(one["kind"] != "causal" for one in objectives) or not objectives
    assert (batch.source.num_tokens > 0) == has_source
    holds(model_of(kind="encoder_decoder", source_attention=source_attention, num_mtp_modules=1), batch)


@pytest.mark.parametrize(
    "inputs",
    [
        {"fixed_target_tokens": 16},
        {"target_ahead": 3},
        {"masked_decoder_share": 0.3},
        {"dropped_decoder_share": 0.4},
        {"fixed_target_tokens": 16, "masked_decoder_share": 0.3, "dropped_decoder_share": 0.4},
    ],
    ids=["fixed", "ahead", "masked", "sparse", "all_three"],
)
@pytest.mark.parametrize("source_attention", ["cross", "mixed"])
def test_every_kind_of_decoder_input(inputs: dict, source_attention: str) -> None:
    data = DataSettings(**TWO_SIDES, **inputs)
    holds(model_of(kind="encoder_decoder", source_attention=source_attention), batch_of(PAIRS, data))


@pytest.mark.parametrize(
    "extra", [{}, {"num_mtp_modules": 2}, {"position_embedding": "relative_bias"}], ids=["", "heads", "bias"]
)
@pytest.mark.parametrize("objectives", DECODERS.values(), ids=DECODERS.keys())
def test_every_objective_of_a_decoder(objectives: list, extra: dict) -> None:
    holds(model_of(**extra), batch_of(TEXTS, DataSettings(**ONE_SIDE, objectives=objectives)))


def test_pairs_of_a_decoder() -> None:
    holds(model_of(), batch_of([PAIRS[0][:2], [PAIRS[0][2]]], DataSettings(**ONE_SIDE)))


@pytest.mark.parametrize("positions", ["rotary", "relative_bias"])
def test_masked_tokens_of_an_encoder(positions: str) -> None:
    data = DataSettings(**ONE_SIDE, objectives=[{"kind": "masked"}])
    holds(model_of(kind="encoder", positions=positions), batch_of(TEXTS, data))


SMALL = TWO_SIDES | {"source_sequence_length": 16, "sequence_length": 24, "max_document_length": 24}
CAUSAL = {"kind": "causal"}  # on two sides a text without a source
EDGES = {  # packs, objectives; and in each pack the positions that are left on both sides
    "cut_pairs_fill_both_sides": ([[Pair(text(30), text(40))]], [], [(0, 0)]),
    "padded_targets": ([[Pair(text(9), text(4)), Pair(text(5), text(7))]], [], [(11, 0)]),
    "padded_sources": ([[Pair(text(5), text(4)), Pair(text(3), text(18))]], [], [(0, 6)]),
    "padded_on_both_sides": ([[Pair(text(5), text(4)), Pair(text(3), text(7))]], [], [(11, 6)]),
    "empty_texts": ([[Pair(text(0), text(3)), Pair(text(3), text(0)), Pair(text(0), text(0))]], [], [(18, 10)]),
    "no_source_at_all_beside_pairs": ([[text(5), Pair(text(3), text(4)), text(3)]], [CAUSAL], [(9, 12)]),
    "one_token_targets": ([[Pair(text(4), text(0))] * 3], [], [(21, 1)]),
    "one_document_a_pack": ([[Pair(text(4), text(9))], [Pair(text(7), text(3))]], [], [(14, 11), (20, 8)]),
    "an_empty_pack": ([[Pair(text(4), text(9)), Pair(text(7), text(3))], []], [], [(10, 3), (24, 16)]),
}


@pytest.mark.parametrize("source_attention", ["cross", "mixed"])
@pytest.mark.parametrize(("packs", "objectives", "left"), EDGES.values(), ids=EDGES.keys())
def test_edges_of_pairs_and_of_both_budgets(packs: list, objectives: list, left: list, source_attention: str) -> None:
    batch = batch_of(packs, DataSettings(**SMALL, objectives=objectives))
    ends = [batch.cu_seqlens.tolist(), batch.source.cu_seqlens.tolist()]
    found, document = [], 0
    for number, pack in enumerate(packs):
        document += len(pack)
        found.append(tuple(size * (number + 1) - edges[document] for size, edges in zip((24, 16), ends, strict=True)))
        document += any(found[-1])  # padding is a document of its own
    assert found == left
    if sum(map(len, packs)) > 1:
        holds(model_of(kind="encoder_decoder", source_attention=source_attention, num_mtp_modules=2), batch)
    else:
        findings = packed_equals_single(model_of(kind="encoder_decoder", num_mtp_modules=2).double(), batch)
        assert all(finding.holds for finding in findings)


@pytest.mark.parametrize("objectives", [[CAUSAL], [{"kind": "ul2"}], [{"kind": "fill_in_the_middle"}]])
def test_edges_of_texts_of_a_decoder(objectives: list) -> None:
    """Texts of 0 to 3 tokens, a full pack and an empty one."""
    data = DataSettings(**(ONE_SIDE | {"max_documents": 8}), objectives=objectives)
    packs = [[text(length) for length in (0, 1, 2, 3, 0, 1, 2)], [], [text(40)]]
    holds(model_of(num_mtp_modules=2), batch_of(packs, data))


def test_the_checks_see_a_leak_between_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(PAIRS, DataSettings(**TWO_SIDES))

    def over_everything(rule):
        return lambda *cu_seqlens: rule(*(one if one is None else one[[0, -1]] for one in cu_seqlens))

    for name, rule in (("cross", cross), ("bidirectional", bidirectional), ("causal", causal)):
        with monkeypatch.context() as patch:
            patch.setattr(f"bigmodel.model.attention_masks.{name}", over_everything(rule))
            model = model_of(kind="encoder_decoder")
            broken = [finding.claim for finding in isolation(model, batch) if not finding.holds]
            assert len(broken) == 3, f"{name} over all documents was not seen"
            assert not any(finding.holds for finding in packed_equals_single(model.double(), batch))


def test_the_checks_see_a_target_that_sees_the_source_after_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the first document does not reach the second one, but the second one reaches the first."""
    batch = batch_of(PAIRS, DataSettings(**TWO_SIDES))

    def too_far(targets: torch.Tensor, sources: torch.Tensor) -> AttentionMask:
        sources = sources.clone()
        if len(sources) > 2:  # one document alone is as it was
            sources[1] += 1
        return cross(targets, sources)

    monkeypatch.setattr("bigmodel.model.attention_masks.cross", too_far)
    model = model_of(kind="encoder_decoder")
    assert [finding.holds for finding in isolation(model, batch)] == [True, False, False, False]
    assert not any(finding.holds for finding in packed_equals_single(model.double(), batch))


def test_the_checks_see_labels_of_an_extra_head_that_come_from_the_next_document(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = batch_of(PAIRS, DataSettings(**TWO_SIDES))
    monkeypatch.setattr("bigmodel.model.transformer.ahead", lambda labels_T, _offsets, steps: labels_T.roll(-steps))
    outputs, gradients = packed_equals_single(model_of(kind="encoder_decoder", num_mtp_modules=1).double(), batch)
    assert outputs.holds
    assert not gradients.holds


def test_later_sources_do_not_move_a_prefix_that_stays() -> None:
    """A target position sees the whole of its source, also what comes after its own number."""
    data = DataSettings(**TWO_SIDES)
    batch = batch_of([[Pair(text(9), text(20))]], data)
    edited = batch.source.tokens.clone()
    edited[8] = 7
    changed = replace(batch, source=replace(batch.source, tokens=edited))
    for source_attention in ("cross", "mixed"):
        model = model_of(kind="encoder_decoder", source_attention=source_attention).eval()
        difference = (model(batch, "logits") - model(changed, "logits")).abs().amax(1)
        assert difference[:21].min() > 0
        assert difference[21:].max() == 0


def test_mixed_attention_is_that_of_a_prefix_lm_whose_prefix_is_the_source() -> None:
    """With the source's keys and values made by the decoder's own weights: one text, positions from its begin on."""
    batch = batch_of(PAIRS, DataSettings(**TWO_SIDES))
    model = model_of(kind="encoder_decoder", source_attention="mixed", qk_norm=True).double()
    attention = model.blocks[0].attention
    attention.source_key_value.weight.data.copy_(attention.query_key_value.weight[32:])  # behind the queries
    random = torch.Generator().manual_seed(3)
    x_TH, x_SE = (torch.randn(len(side.tokens), 32, generator=random).double() for side in (batch, batch.source))
    found_TH = attention(x_TH, model.attention_inputs(x_SE, batch)[0]["full"], x_SE)

    edges = zip(pairwise(batch.source.cu_seqlens.tolist()), pairwise(batch.cu_seqlens.tolist()), strict=True)
    texts = [torch.cat([x_SE[slice(*source)], x_TH[slice(*target)]]) for source, target in edges]
    places = torch.cat([torch.arange(len(text)) for text in texts])
    rule = prefix_lm(batch.cu_seqlens + batch.source.cu_seqlens, batch.source.cu_seqlens.diff())
    inputs = AttentionInputs(
        rule, make_tile_metadata(rule, len(places), len(places)), rotary_table(places, model.settings)
    )
    expected_NH = Attention.forward(attention, torch.cat(texts), inputs)
    is_target = places >= torch.repeat_interleave(batch.source.cu_seqlens.diff(), torch.tensor(list(map(len, texts))))
    asked_T = batch.labels != IGNORED  # padding has positions of its own
    assert torch.allclose(found_TH[asked_T], expected_NH[is_target][asked_T], rtol=1e-9, atol=1e-9)


def test_targets_do_not_see_their_own_future() -> None:
    batch = batch_of([[Pair(text(9), text(20))]], DataSettings(**TWO_SIDES))
    edited = batch.tokens.clone()
    edited[10] = 7
    for source_attention in ("cross", "mixed"):
        model = model_of(kind="encoder_decoder", source_attention=source_attention).eval()
        difference = (model(batch, "logits") - model(replace(batch, tokens=edited), "logits")).abs().amax(1)
        assert difference[:10].max() == 0
        assert difference[10:21].min() > 0


def test_mtp_modules_shape_the_gradient_and_not_the_loss() -> None:
    batch = batch_of(TEXTS, DataSettings(**ONE_SIDE))
    plain, extra = model_of(), model_of(num_mtp_modules=2)
    assert float(plain(batch)) == float(extra(batch))
    for model in (plain, extra):
        model(batch).backward()
    assert not torch.equal(plain.blocks[0].attention.output.weight.grad, extra.blocks[0].attention.output.weight.grad)
    assert all(bool(p.grad.any()) for p in extra.extra_blocks.parameters())


def test_mtp_modules_are_the_formula() -> None:
    """The gradient is that of loss + weight * mean over heads of the loss of the token further on."""
    from bigmodel.model.transformer import ahead

    batch = batch_of(TEXTS, DataSettings(**ONE_SIDE))
    model = model_of(num_mtp_modules=2, mtp_loss_weight=0.5).double()
    model(batch).backward()
    found = model.embedding.weight.grad.clone()
    model.zero_grad()
    trunk_TH, views, _ = model.trunk(*model.embed(batch), batch)
    loss = model.head(model.norm(trunk_TH), batch.labels, "loss_sum")
    for steps, block in enumerate(model.extra_blocks, 1):
        later = ahead(batch.labels, batch.cu_seqlens, steps)
        loss = loss + 0.5 / 2 * model.head(
            model.norm(block(trunk_TH, views[block.kind], batch.dropout_seeds)), later, "loss_sum"
        )
    loss.backward()
    assert torch.allclose(found, model.embedding.weight.grad, rtol=1e-12)


def test_labels_further_on_stay_inside_their_document() -> None:
    from bigmodel.model.transformer import ahead

    targets = torch.tensor([11, 12, 13, 21, 22, IGNORED])
    cu_seqlens = torch.tensor([0, 3, 5, 6], dtype=torch.int32)
    assert ahead(targets, cu_seqlens, 1).tolist() == [12, 13, IGNORED, 22, IGNORED, IGNORED]
    assert ahead(targets, cu_seqlens, 2).tolist() == [13, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED]


def test_parts_add_up_to_the_loss_and_keep_its_gradient() -> None:
    data = DataSettings(**TWO_SIDES, objectives=[{"kind": "prefix"}, {"kind": "span_corruption"}])
    whole = batch_of(TEXTS, data)
    parted = batch_of(TEXTS, data, loss_group_of=lambda piece: piece.objective, num_loss_groups=3)
    model = model_of(kind="encoder_decoder", num_mtp_modules=1)
    loss, parts = model(whole), model(parted)
    assert parts.shape == (3,)
    assert float(parts.sum()) == pytest.approx(float(loss), rel=1e-6)
    of_first = model(parted, "loss_per_position")[parted.loss_groups == 0].sum()
    assert float(parts[0]) == pytest.approx(float(of_first), rel=1e-6)
    assert float(parts[2]) == 0 < float(parts[1])
    gradients = []
    for value in (loss, parts.sum()):
        model.zero_grad()
        value.backward()
        gradients.append(model.embedding.weight.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-6)


def test_exchanged_sources_are_those_of_the_next_document() -> None:
    batch = batch_of(PAIRS, DataSettings(**TWO_SIDES))
    changed = exchange_sources(batch)
    assert batch.source.cu_seqlens.tolist()[:7] == [0, 10, 12, 43, 64, 77, 128]
    assert changed.source.cu_seqlens.tolist()[:7] == [0, 2, 33, 46, 67, 77, 128]
    assert changed.source.tokens[:2].tolist() == batch.source.tokens[10:12].tolist()
    assert changed.source.tokens[67:77].tolist() == batch.source.tokens[:10].tolist()
    assert changed.source.positions[2:33].tolist() == list(range(31))


def test_examples_ask_the_model_about_the_sources_that_it_was_trained_on() -> None:
    """A prefix has no end token, and a document under causal no source at all."""
    from bigmodel.generation.samples import examples

    class Words:
        bos, eos, vocabulary = 1, 2, 60

        def decode(self, ids: list[int]) -> str:
            return " ".join(map(str, ids))

    batch = batch_of(TEXTS[:1], DataSettings(**TWO_SIDES, objectives=[{"kind": "prefix"}, {"kind": "causal"}]))
    model, asked, inputs = model_of(kind="encoder_decoder").eval(), [], []

    def forward(one: Batch, output: str) -> torch.Tensor:
        inputs.append(one.tokens.tolist())
        asked.append(one.source.tokens.tolist())
        return model(one, output)

    printed = examples(forward, Words(), batch, 2, "cpu")
    inputs.clear()
    examples(forward, Words(), batch, 1, "cpu", target_ahead=3)
    assert [len(one) for one in inputs[:4]] == [1, 2, 3, 4]
    assert inputs[2] == [1, 1, 1]
    assert inputs[3][3] != 1
    assert inputs[4][:4] == inputs[3]
    first, end = batch.source.cu_seqlens[:2].tolist()
    assert (first, end) == (0, 10)
    assert batch.source.tokens[:10].tolist() in asked
    assert [] in asked
    assert len({tuple(source) for source in asked}) == 2
    assert printed.count("[model]") == 2
