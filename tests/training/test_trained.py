"""What is trained, with which factor of the rate, and from which weights."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bigmodel.config.settings import DataSettings, Settings, UserError, settings_from_table
from bigmodel.data.load.batch import Batch
from bigmodel.data.objectives.examples import Pair
from bigmodel.distributed.world import ALONE
from bigmodel.model.lora import add_adapters
from bigmodel.model.transformer import Transformer
from bigmodel.training.checkpoint import saver
from bigmodel.training.optimizers.groups import layer_factors, parameter_groups
from bigmodel.training.start import new_model
from bigmodel.training.trained import choose_trained, passes
from tests.exchange.test_adapter import States
from tests.support.engine_worker import batch_of
from tests.support.example_batches import batch_of as paired
from tests.support.example_batches import model_of, text

SIZES = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 40}
SIDES = {"kind": "encoder_decoder", "encoder_num_layers": 3}
WHOLE = {"zero_optimization": {"stage": 0}}


def trained(freeze: list[str], lora: dict[str, Any] | None = None, **model: Any) -> set[str]:
    settings = Settings.model_validate({"training": {"freeze": freeze}, "lora": lora or {}})
    one = model_of(**model)
    add_adapters(one, settings.lora)
    choose_trained(one, settings)
    return {name for name, parameter in one.named_parameters() if parameter.requires_grad}


def test_a_pattern_freezes_all_parameters_below_it() -> None:
    names = {name for name, _ in model_of().named_parameters()}
    below = {name for name in names if name.startswith(("embedding.", "blocks.0."))}
    assert trained(["embedding", "blocks.0.*"]) == names - below
    assert trained(["blocks.[0-1]", "*norm.weight"]) == {"embedding.weight", "head.weight"}
    assert trained([]) == names


def test_a_pattern_without_a_parameter_is_an_error_with_near_names() -> None:
    with pytest.raises(UserError, match=r'training.freeze: "embeding" matches no parameter; near names: embedding'):
        trained(["embeding"])
    with pytest.raises(UserError, match="no parameter is left to train"):
        trained(["*"])


def test_with_adapters_only_they_are_trained_and_may_be_frozen_too() -> None:
    one = trained([], {"rank": 2, "targets": ["q_proj", "blocks.1.feed_forward.down"]})
    assert {name.rpartition(".lora.")[0] + " " + name.rpartition(".lora.")[2] for name in one} == {
        f"blocks.{layer}.{matrix}.{side}.weight"
        for layer, matrix in ((0, "attention.query_key_value q_proj"), (1, "attention.query_key_value q_proj"))
        for side in "ab"
    } | {f"blocks.1.feed_forward.down down_proj.{side}.weight" for side in "ab"}
    assert all(name.endswith(".b.weight") for name in trained(["*.a.weight"], {"rank": 2}))


@pytest.mark.parametrize(("target", "words"), [("q_prj", "did you mean q_proj"), ("lm_head", "use all-linear, q_proj")])
def test_a_target_without_a_matrix_is_an_error(target: str, words: str) -> None:
    with pytest.raises(UserError, match=f'lora.targets: "{target}" is no matrix of this model; {words}'):
        trained([], {"rank": 2, "targets": ["v_proj", target]})


def test_the_rate_falls_from_layer_to_layer() -> None:
    names = [name for name, _ in model_of(num_mtp_modules=1).named_parameters()]
    factors = layer_factors(names, 0.5)
    assert {name: factors[name] for name in factors if name.startswith(("embedding", "head", "norm"))} == {
        "embedding.weight": 0.125, "norm.weight": 1.0, "head.weight": 1.0,
    }  # fmt: skip
    assert {factors[name] for name in names if name.startswith("blocks.0.")} == {0.25}
    assert {factors[name] for name in names if name.startswith("blocks.1.")} == {0.5}
    assert {factors[name] for name in names if name.startswith("extra_blocks.")} == {1.0}


def test_each_side_counts_its_own_layers() -> None:
    bias = {"position_embedding": "relative_bias"}
    factors = layer_factors([name for name, _ in model_of(**SIDES, **bias).named_parameters()], 0.5)
    assert factors["embedding.weight"] == 0.5**4
    assert factors["encoder.blocks.2.feed_forward.down.weight"] == factors["blocks.1.feed_forward.down.weight"] == 0.5
    assert factors["encoder.relative_bias.weight"] == factors["encoder.blocks.0.attention.output.weight"] == 0.5**3
    assert factors["relative_bias.weight"] == factors["blocks.0.attention.output.weight"] == 0.25
    assert factors["encoder.norm.weight"] == factors["norm.weight"] == 1.0


def test_the_layer_s_factor_multiplies_that_of_a_group() -> None:
    settings = Settings.model_validate(
        {"optimizer": {"layer_decay": 0.5, "groups": [{"parameters": "blocks.0.*", "learning_rate_factor": 3.0}]}}
    )
    one = model_of()
    factor_of = {
        id(p): group["rate_factor"] for group in parameter_groups(one, settings.optimizer) for p in group["params"]
    }
    assert factor_of[id(one.blocks[0].feed_forward.down.weight)] == 0.75
    assert factor_of[id(one.blocks[1].feed_forward.down.weight)] == 0.5


def test_a_frozen_weight_is_passed_twice_and_a_trained_one_three_times() -> None:
    one = model_of()
    assert passes(one) == 3
    matrices = {name: p.numel() for name, p in one.named_parameters() if p.dim() == 2 and name != "embedding.weight"}
    one.head.weight.requires_grad = False
    assert passes(one) == pytest.approx(3 - matrices["head.weight"] / sum(matrices.values()))
    for parameter in one.parameters():
        parameter.requires_grad = False
    assert passes(one) == 2


def test_of_frozen_experts_a_token_passes_its_own_only() -> None:
    """One of 4 experts, frozen, is a quarter of their weights; those of the other 3 have no part in it."""
    one = model_of(experts={"count": 4, "per_token": 1, "width": 40, "normalize_weights": False})
    names = {name: p for name, p in one.named_parameters() if p.dim() >= 2 and name != "embedding.weight"}
    sizes = {name: p.numel() / (4 if p.dim() == 3 else 1) for name, p in names.items()}
    for name, parameter in names.items():
        parameter.requires_grad = ".experts." not in name
    frozen = sum(size for name, size in sizes.items() if ".experts." in name)
    assert frozen == 2 * 3 * 32 * 40, "2 layers, gate, up and down of one expert"
    assert passes(one) == pytest.approx(3 - frozen / sum(sizes.values()))


@torch.no_grad()
def lost(one: Transformer, batch: Batch) -> float:
    return float(one(batch))


def test_dropout_of_adapters_is_keyed_by_the_batch_not_by_calls() -> None:
    """Each part of a matrix drops other channels."""
    settings = Settings.model_validate({"lora": {"rank": 2, "dropout": 0.5}})
    one = model_of()
    add_adapters(one, settings.lora)
    with torch.no_grad():
        for number, parameter in enumerate(p for name, p in one.named_parameters() if ".lora." in name):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    batch = batch_of(0, range(2))
    first, other, again = (lost(one, batch_of(step, range(2))) for step in (0, 1, 0))
    assert first == again != other
    assert lost(one.eval(), batch) != first
    seen: list[torch.Tensor] = []
    adapters = one.train().blocks[0].attention.query_key_value.lora
    for adapter in adapters.values():
        adapter.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0] == 0))
    lost(one, batch)
    assert len(seen) == 3
    assert 0.4 < float(seen[0].float().mean()) < 0.6
    assert not torch.equal(seen[0], seen[1])


def test_adapters_of_both_sides_drop_by_the_seeds_of_their_input() -> None:
    """The keys and values of cross-attention read the source, which has other lengths and seeds than the target."""
    settings = Settings.model_validate({"lora": {"rank": 2, "dropout": 0.5, "targets": ["k_proj"]}})
    one = model_of(**SIDES)
    add_adapters(one, settings.lora)
    seen: dict[str, torch.Tensor] = {}

    def note(name: str) -> Any:
        return lambda module, inputs, output: seen.__setitem__(name, inputs[0] == 0)

    for name, module in one.named_modules():
        if name.endswith(".lora.k_proj"):
            module.register_forward_hook(note(name))
    data = DataSettings(max_document_length=48, sequence_length=48, max_documents=4, source_sequence_length=64)
    lost(one, paired([[Pair(text(30), text(20))]], data))
    rows = {name: len(dropped) for name, dropped in seen.items()}
    assert (
        rows["blocks.0.cross_attention.key_value.lora.k_proj"]
        == rows["encoder.blocks.0.attention.query_key_value.lora.k_proj"]
        == 64
    )
    assert rows["blocks.0.attention.query_key_value.lora.k_proj"] == 48
    dropped = [seen[name].float().mean() for name in rows]
    assert 0.4 < float(min(dropped)) < float(max(dropped)) < 0.6


# Starts.


def run_of(folder: Path, lora: dict[str, Any] | None = None) -> tuple[Path, Transformer]:
    """A run directory with one checkpoint, and its model."""
    settings = Settings.model_validate(
        {"model": SIZES, "lora": lora or {}, "data": {"directory": str(folder / "data")}}
    )
    one = new_model(settings, WHOLE, 67, begins=True)
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            if ".b." in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    saver.save(folder / "run/checkpoints", States(one), {"step": 1}, settings, ALONE)
    (folder / "run/settings.json").write_text(json.dumps(settings.model_dump(mode="json", exclude_none=True)))
    return folder / "run", one.eval()


def test_a_run_starts_from_another_one_with_its_adapters_merged(tmp_path: Path) -> None:
    run, before = run_of(tmp_path, {"rank": 3, "targets": ["k_proj", "gate_proj"]})
    table = {"model": {"from": str(run)}, "lora": {"rank": 2}}
    settings = settings_from_table(table, Path("run.toml"))
    assert (settings.model.num_layers, settings.model.num_kv_heads, settings.model.min_vocabulary) == (2, 2, 67)
    after = new_model(settings, WHOLE, 67, begins=True).eval()
    batch = batch_of(0, range(2))
    with torch.no_grad():
        one, two = before(batch, "logits"), after(batch, "logits")
    assert float((one - two).abs().max() / one.abs().max()) < 1e-5
    with contextlib.suppress(UserError):
        settings_from_table({"model": {"from": str(run), "num_layers": 3}}, Path("run.toml"))
        raise AssertionError("another number of layers was accepted")


def test_a_run_without_a_checkpoint_is_no_start(tmp_path: Path) -> None:
    run, _ = run_of(tmp_path)
    (run / "checkpoints/step-00000001").rename(run / "checkpoints/other")
    with pytest.raises(UserError, match="this run has no checkpoint yet; train it first"):
        settings_from_table({"model": {"from": str(run)}}, Path("run.toml"))
    (run / "checkpoints").rename(run / "elsewhere")  # the folder is made by the first checkpoint
    with pytest.raises(UserError, match="this run has no checkpoint yet; train it first"):
        settings_from_table({"model": {"from": str(run)}}, Path("run.toml"))


def test_a_run_starts_from_its_newest_checkpoint_that_is_whole(tmp_path: Path) -> None:
    run, _ = run_of(tmp_path)
    newer = run / "checkpoints/step-00000002"
    newer.mkdir()
    (newer / "state.json").write_text('{"step": 2, "mod')
    settings = settings_from_table({"model": {"from": str(run)}}, Path("run.toml"))
    assert settings.model.num_layers == 2
    new_model(settings, WHOLE, 67, begins=True)
