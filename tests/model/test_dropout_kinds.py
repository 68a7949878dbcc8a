"""Dropout of embeddings and attention weights, stochastic depth: their shares, and what they depend on."""

import pytest
import torch

from bigmodel.config.settings import DataSettings, ModelSettings
from bigmodel.kernels.attention import make_tile_metadata
from bigmodel.kernels.mask import causal
from bigmodel.model.init import init_weights
from bigmodel.model.layers import drop_documents
from bigmodel.model.transformer import Attention, AttentionInputs, Transformer, dropout_of_weights
from tests.kernels.test_mask import offsets_of
from tests.support.dense_attention import dense_attention
from tests.support.example_batches import batch_of, model_of, text

KINDS = {
    "embeddings": {"embedding_dropout": 0.3},
    "attention": {"attention_dropout": 0.3},
    "depth": {"stochastic_depth": 0.6},
    "all": {"dropout": 0.1, "attention_dropout": 0.2, "embedding_dropout": 0.1, "stochastic_depth": 0.5},
}
SIDES = {
    "decoder": ({}, {}),
    "encoder-decoder, cross": ({"kind": "encoder_decoder"}, {"source_sequence_length": 64}),
    "encoder-decoder, mixed": (
        {"kind": "encoder_decoder", "source_attention": "mixed"}, {"source_sequence_length": 64},
    ),
}  # fmt: skip


def documents(data: DataSettings, packs: list[list[int]]):
    return batch_of([[text(length) for length in pack] for pack in packs], data, by_document=True)


def data_of(**more: int) -> DataSettings:
    kind = {"kind": "prefix"} if more else {"kind": "causal"}
    return DataSettings(max_document_length=32, sequence_length=64, max_documents=4, objectives=[kind], **more)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize(("model", "sides"), SIDES.values(), ids=SIDES.keys())
def test_a_document_drops_the_same_in_any_packed_sequence(kind: dict, model: dict, sides: dict) -> None:
    """In float64: other documents change only the order of the gradients' sums."""
    data, found = data_of(**sides), []
    for packs in ([[20], [9], [17], [30]], [[20, 9], [17, 30]]):
        net = model_of(**model, **kind).double().train()
        net(documents(data, packs)).sum().backward()
        found.append([parameter.grad for parameter in net.parameters()])
    for alone, together in zip(*found, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    net.zero_grad()
    net.eval()(documents(data, packs)).sum().backward()
    plain = [parameter.grad for parameter in net.parameters()]
    assert any((one - other).norm() > 0.01 * other.norm() for one, other in zip(found[0], plain, strict=True))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_evaluation_is_that_of_a_model_without_dropout(kind: dict) -> None:
    batch = documents(data_of(), [[20, 9]])
    assert torch.equal(model_of(**kind).eval()(batch), model_of().eval()(batch))


def test_attention_drops_the_weights_that_the_formula_drops() -> None:
    """The layer's number chooses the draws."""
    settings = ModelSettings(
        num_layers=3, hidden_size=32, num_heads=4, num_kv_heads=2, attention_dropout=0.4, position_embedding="learned",
        max_positions=64,
    )  # fmt: skip
    layer = Attention(settings, layer=2).double().train()
    mask, seeds = causal(offsets_of([7, 12])), torch.arange(19) * 0x51ED2701
    stack = torch.nn.Module().train()
    stack.settings = settings
    drops = dropout_of_weights(stack, seeds, seeds)
    inputs = AttentionInputs(mask, make_tile_metadata(mask, 19, 19), dropout=drops)
    x_TH = torch.randn(19, 32, dtype=torch.float64)
    q, k, v = layer.project(x_TH, inputs)
    expected = layer.output(dense_attention(q, k, v, mask, dropout=drops.from_head(8)).flatten(1))
    torch.testing.assert_close(layer(x_TH, inputs), expected)
    plain = layer.output(dense_attention(q, k, v, mask).flatten(1))
    torch.testing.assert_close(layer.eval()(x_TH, inputs), plain)


def test_embeddings_lose_their_share_and_keep_their_mean() -> None:
    model = model_of(embedding_dropout=0.25, embedding_scale=3.0).train()
    batch = documents(data_of(), [[30, 28]])
    dropped, whole = model.embed(batch)[0], model.eval().embed(batch)[0]
    is_lost = dropped == 0
    assert float(is_lost.float().mean()) == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(dropped[~is_lost], whole[~is_lost] / 0.75)


def test_the_share_of_stochastic_depth_grows_with_depth() -> None:
    model = model_of(num_layers=4, stochastic_depth=0.6, num_mtp_modules=1)
    assert [block.death_rate for block in model.blocks] == pytest.approx([0.15, 0.3, 0.45, 0.6])
    assert [block.death_rate for block in model.extra_blocks] == [0.6]


def test_stochastic_depth_drops_or_keeps_whole_documents_and_draws_anew_in_each_sublayer() -> None:
    words = torch.randint(0, 2**31, (4000,), generator=torch.Generator().manual_seed(2)) << 32
    seeds = (words[:, None] + torch.arange(3)).flatten()  # 4000 documents of 3 positions
    kept = torch.stack([drop_documents(torch.ones(12000, 2), 0.3, seeds, salt) for salt in range(4)])
    of_documents = kept.view(4, 4000, 6)
    assert (of_documents == of_documents[..., :1]).all()
    assert sorted(set(kept.flatten().tolist())) == pytest.approx([0.0, 1 / 0.7])
    share = (of_documents[..., 0] == 0).double().mean(1)
    assert ((share - 0.3).abs() < 4 * (0.3 * 0.7 / 4000) ** 0.5).all()
    correlation = torch.corrcoef((of_documents[..., 0] == 0).double()) - torch.eye(4)
    assert correlation.abs().max() < 4 / 4000**0.5


def test_a_document_of_which_all_sublayers_are_skipped_passes_through_unchanged() -> None:
    settings = ModelSettings(num_layers=2, hidden_size=32, num_heads=4, stochastic_depth=0.9)
    model = Transformer(settings, 60)
    init_weights(model, 1)
    batch = documents(data_of(), [[7, 5, 8, 9]] * 30)
    x_TH, _ = model.train().embed(batch)
    views, _ = model.attention_inputs(None, batch)
    out_TH = model.blocks[1](x_TH, views[model.blocks[1].kind], batch.dropout_seeds)
    starts = batch.cu_seqlens.unique()[:-1].long()
    unchanged = (out_TH == x_TH).all(1)[starts].double().mean()
    assert float(unchanged) == pytest.approx(0.81, abs=0.15)
