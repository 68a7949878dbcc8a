"""The transformer: its pieces against their formulas, dropout by key, initial weights by name."""

import math

import pytest
import torch

from bigmodel.config.settings import ModelSettings
from bigmodel.model.init import init_weights
from bigmodel.model.layers import Linear, RMSNorm, dropout
from bigmodel.model.rotary import rotary_table, rotate
from bigmodel.model.transformer import Transformer
from tests.system.test_guarantee_leak import make_batch, make_model


def test_kv_heads_are_as_many_as_heads_where_nothing_is_said() -> None:
    assert ModelSettings(num_heads=6, hidden_size=48).num_kv_heads == 6
    assert ModelSettings(num_heads=6, hidden_size=48, num_kv_heads=2).num_kv_heads == 2
    assert ModelSettings().num_kv_heads == ModelSettings().num_heads


def test_rms_norm_is_its_formula() -> None:
    norm = RMSNorm(4, epsilon=0.0)
    norm.weight.data = torch.tensor([1.0, 2.0, 1.0, 1.0])
    assert norm(torch.tensor([[1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 0.0, 0.0]])).tolist() == [[1, 2, 1, 1], [2, 0, 0, 0]]


def test_rotation_turns_pairs_by_position_and_keeps_the_relative_product() -> None:
    turned = rotate(torch.tensor([[[1.0, 0.0]]]), rotary_table(torch.tensor([1]), ModelSettings(head_dim=2)))
    assert turned.flatten().tolist() == pytest.approx([math.cos(1), math.sin(1)])
    q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    settings = ModelSettings(head_dim=8, rope_theta=100.0)

    def product(a: int, b: int) -> float:
        first, second = (rotate(x, rotary_table(torch.tensor([p]), settings)) for x, p in ((q, a), (k, b)))
        return float((first * second).sum())

    assert product(3, 1) == pytest.approx(product(12, 10), abs=1e-5)
    assert product(3, 1) != pytest.approx(product(3, 2), abs=1e-3)


def test_bf16_products_on_a_cpu_are_rounded_once() -> None:
    layer, x = Linear(300, 7).bfloat16(), torch.randn(5, 300).bfloat16()
    assert torch.equal(layer(x), (x.float() @ layer.weight.float().T).bfloat16())


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(rate: float) -> None:
    keys = torch.randint(-(2**62), 2**62, (500,), generator=torch.Generator().manual_seed(0))
    dropped = dropout(torch.ones(500, 200), rate, keys, salt=1)
    assert float((dropped == 0).float().mean()) == pytest.approx(rate, abs=0.005)
    assert sorted(set(dropped.flatten().tolist())) == pytest.approx([0.0, 1 / (1 - rate)])
    columns, rows = (dropped == 0).float().mean(0), (dropped == 0).float().mean(1)
    assert max(float(columns.std()), float(rows.std())) < 2 * math.sqrt(rate * (1 - rate) / 200)


def test_dropout_depends_on_key_salt_and_channel_alone() -> None:
    keys, x = torch.arange(64) * 7919, torch.ones(64, 32)
    whole = dropout(x, 0.5, keys, salt=3)
    assert torch.equal(dropout(x[10:20], 0.5, keys[10:20], salt=3), whole[10:20])
    for other in (dropout(x, 0.5, keys, salt=4), dropout(x, 0.5, keys + 1, salt=3)):
        assert 0.4 < float((other == whole).float().mean()) < 0.6
    assert len({tuple(row) for row in whole.tolist()}) == 64


def test_dropout_is_on_in_training_and_off_in_evaluation() -> None:
    batch, model = make_batch(), make_model(dropout=0.5)
    assert float(model.eval()(batch)) != float(model.train()(batch)) == float(model(batch))
    assert float(model.eval()(batch)) == float(make_model(dropout=0.0)(batch))


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    small, large = make_model(num_layers=1), make_model(num_layers=2)
    assert torch.equal(small.blocks[0].feed_forward.gate_up.weight, large.blocks[0].feed_forward.gate_up.weight)
    again = make_model(num_layers=1)
    init_weights(again, seed=6)
    assert not torch.equal(small.embedding.weight, again.embedding.weight)
    assert not torch.equal(large.blocks[0].feed_forward.down.weight, large.blocks[1].feed_forward.down.weight)


def test_initial_weights_have_the_deviations_of_the_table() -> None:
    model = Transformer(
        ModelSettings(num_layers=8, hidden_size=256, num_heads=4, num_kv_heads=2, intermediate_size=512), 900
    )
    init_weights(model, seed=1)
    block = model.blocks[3]
    for weight, deviation in (
        (model.embedding.weight, 0.02),
        (model.head.weight, 0.02),
        (block.attention.query_key_value.weight, 256**-0.5),
        (block.attention.output.weight, (256 * 16) ** -0.5),
        (block.feed_forward.down.weight, (512 * 16) ** -0.5),
    ):
        assert float(weight.std()) == pytest.approx(deviation, rel=0.02)
    assert block.attention_norm.weight.tolist() == [1.0] * 256


def test_an_untrained_model_knows_nothing() -> None:
    batch = make_batch()
    assert float(make_model()(batch)) / batch.num_labels == pytest.approx(math.log(97), rel=0.02)


def test_a_tied_head_is_the_embedding_and_counted_once() -> None:
    tied, untied = make_model(tied_embeddings=True), make_model()
    assert tied.head.weight is tied.embedding.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 97 * 32


def test_losses_of_all_positions_add_up_to_the_sum() -> None:
    batch, model = make_batch(), make_model()
    each = model(batch, "loss_per_position")
    assert float(each.double().sum()) == pytest.approx(float(model(batch)), rel=1e-6)
    logits = model(batch, "logits").detach()
    expected = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
    assert torch.allclose(each, expected, atol=1e-5)
