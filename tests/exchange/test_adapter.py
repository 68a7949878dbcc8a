"""Adapters against peft: one that peft made computes the same in our model, one of ours the same in peft."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bigmodel.config.adapter_folder import with_adapter
from bigmodel.config.huggingface import CLASSES
from bigmodel.config.settings import DataSettings, LoraSettings, Settings, UserError
from bigmodel.data.load.batch import Batch
from bigmodel.data.objectives.examples import Pair
from bigmodel.distributed.world import ALONE
from bigmodel.exchange.adapter import export_adapter, load_adapter
from bigmodel.model.huggingface.folder import read_folder
from bigmodel.model.init import init_weights
from bigmodel.model.lora import add_adapters
from bigmodel.model.transformer import Transformer
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.checkpoint import saver
from bigmodel.training.start import load_weights
from bigmodel.training.trained import choose_trained
from tests.support.example_batches import batch_of, text
from tools.torchvision_operators import define_missing_torchvision_operators

define_missing_torchvision_operators()
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

NAMES = ["q_proj", "v_proj", "up_proj", "down_proj"]
# Type -> target_modules of peft; and matrices of ours without which no adapter is complete.
TYPES: dict[str, Any] = {
    "llama": NAMES,
    "qwen2": "all-linear",
    "phi3": ["qkv_proj", "gate_up_proj", "o_proj"],
    "t5": ["q", "v", "wi", "o"],
    "bert": ["query", "value", "dense"],
    "modernbert": ["Wqkv", "Wo"],
}


SIZE = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
SIDES = {"vocab_size": 64, "d_model": 48, "d_kv": 16, "d_ff": 80, "num_layers": 2, "num_heads": 4}
DATA = {"max_document_length": 64, "sequence_length": 64, "max_documents": 4}


def config_of(kind: str) -> Any:
    sizes = SIDES if kind == "t5" else SIZE | {"max_position_embeddings": 64}
    if kind in ("llama", "qwen2", "phi3"):
        sizes |= {"num_key_value_heads": 2}
    if kind == "modernbert":
        sizes |= {"num_hidden_layers": 4}  # one of three attends to the whole document
    return transformers.CONFIG_MAPPING[kind](**sizes, pad_token_id=0)


def made(kind: str) -> Any:
    torch.manual_seed(3)
    return getattr(transformers, CLASSES[kind])(config_of(kind)).eval()


def base_in(folder: Path) -> Any:
    kind = json.loads((folder / "base/config.json").read_text())["model_type"]
    return getattr(transformers, CLASSES[kind]).from_pretrained(folder / "base").eval()


def batch_for(kind: str) -> Batch:
    """One document, or a pair."""
    if kind == "t5":
        data = DataSettings(**DATA, source_sequence_length=64, max_source_length=64)
        return batch_of([[Pair(text(30), text(20))]], data)
    return batch_of([[text(40)]], DataSettings(**DATA))


class States:
    """The weights of a model as the state of an engine."""

    updates = 1

    def __init__(self, model: Transformer) -> None:
        self._weights = dict(model.named_parameters())
        self._has_classes = model.settings.classification is not None

    def names(self) -> list[str]:
        return list(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._weights[name].shape)

    def keys(self, name: str) -> list[str]:
        is_trained = ".lora." in name or (self._has_classes and name.startswith("head."))
        return ["weight", "exp_avg"] if is_trained else ["weight"]

    def owned(self, name: str) -> dict[str, tuple[int, Tensor]]:
        return {key: (0, self._weights[name].detach().flatten()) for key in self.keys(name)}

    def scaler_state(self) -> dict[str, float]:
        return {}


@pytest.fixture(scope="module", params=TYPES)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A base and an adapter of peft on it, with random values."""
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    base = made(kind)
    base.save_pretrained(folder / "base")
    config = peft.LoraConfig(
        r=3, lora_alpha=7, use_rslora=kind in ("llama", "phi3"), lora_dropout=0.1, target_modules=TYPES[kind]
    )
    if kind == "bert":
        config.exclude_modules = ["pooler.dense"]
    wrapped = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    wrapped.save_pretrained(folder / "adapter")
    return kind, folder


def settings_of(folder: Path, adapter: Path) -> Settings:
    table = {"lora": {"from": str(adapter)}, "model": {"from": str(folder / "base")}}
    lora = LoraSettings.model_validate(with_adapter(table, Path("run.toml"))["lora"])
    model = read_folder(folder / "base")[0].model_copy(update={"from": folder / "base"})
    return Settings().model_copy(update={"model": model, "lora": lora})


def ours_with(folder: Path, settings: Settings) -> Transformer:
    _, weights = read_folder(folder / "base")
    model = Transformer(settings.model, len(weights["embedding.weight"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    add_adapters(model, settings.lora)
    load_adapter(model, settings)
    return model.eval()


def outputs(model: Transformer, batch: Batch) -> Tensor:
    """Logits of the document; of an encoder its states."""
    with torch.no_grad():
        is_encoder = model.settings.kind == "encoder"
        found = model.hidden(model.embed(batch)[0], batch) if is_encoder else model(batch, "logits")
    return found[: int(batch.cu_seqlens[1])]


def theirs(model: Any, batch: Batch) -> Tensor:
    tokens = batch.tokens[None, : int(batch.cu_seqlens[1])]
    with torch.no_grad():
        if batch.source is None:
            return model(input_ids=tokens)[0][0]
        source = batch.source.tokens[None, : int(batch.source.cu_seqlens[1])]
        return model(input_ids=source, decoder_input_ids=tokens)[0][0]


def in_peft(folder: Path, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(base_in(folder), adapter).eval()


def close(one: Tensor, two: Tensor) -> None:
    assert float((one - two).abs().max() / two.abs().max()) < 1e-5


def saved(model: Transformer, settings: Settings, folder: Path) -> checkpoint.Checkpoint:
    saver.save(folder / "run/checkpoints", States(model), {"step": 1}, settings, ALONE)
    found = checkpoint.newest(folder / "run/checkpoints")
    assert found is not None
    return found


def test_an_adapter_of_peft_goes_in_and_out_and_can_be_merged(folders: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = folders
    settings, batch = settings_of(folder, folder / "adapter"), batch_for(kind)
    assert (settings.lora.rank, settings.lora.alpha, settings.lora.dropout) == (3, 7, 0.1)
    ours = ours_with(folder, settings)
    plain = theirs(base_in(folder), batch)
    expected = theirs(in_peft(folder, folder / "adapter"), batch)
    assert float((plain - expected).abs().max()) > 0.01, "the adapter changes nothing"
    close(outputs(ours, batch), expected)
    found = saved(ours, settings, tmp_path)
    assert export_adapter(found, settings, tmp_path / "out", torch.float32) == str(folder / "base")
    close(theirs(in_peft(folder, tmp_path / "out"), batch), expected)
    again = settings_of(folder, tmp_path / "out")
    assert set(dict(ours_with(folder, again).named_parameters())) == set(dict(ours.named_parameters()))
    close(outputs(ours_with(folder, again), batch), expected)
    merged = Transformer(settings.model, 64)
    weights = checkpoint.read_weights(found)
    assert set(weights) == set(dict(merged.named_parameters()))
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter.copy_(weights[name])
    close(outputs(merged.eval(), batch), outputs(ours, batch))


# What is not an adapter of ours.

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora = true: no adapter of ours"),
    "kind": ({"peft_type": "IA3"}, 'peft_type = "IA3"'),
    "bias": ({"bias": "all"}, 'bias = "all"'),
    "modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "pissa": ({"init_lora_weights": "pissa"}, "changes the base model"),
    "pattern": ({"target_modules": ".*q_proj"}, "name the same matrices in lora.targets"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "not of embed_tokens; make an adapter without them"),
    "layers": ({"layers_to_transform": [0]}, "name the same matrices in lora.targets"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_of_another_kind_is_refused_by_its_key(tmp_path: Path, name: str) -> None:
    changes, words = REFUSED[name]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=words):
        with_adapter({"lora": {"from": str(tmp_path)}}, Path("run.toml"))


def test_settings_that_contradict_the_adapter_are_refused(tmp_path: Path) -> None:
    table = {"lora": {"from": str(tmp_path), "rank": 8}}
    with pytest.raises(UserError, match=r"adapter_config\.json: cannot be read as JSON"):
        with_adapter(table, Path("run.toml"))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["model.layers.0.self_attn.q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"lora.rank = 8 \(there 4\): not that adapter"):
        with_adapter(table, Path("run.toml"))
    done = with_adapter({"lora": {"from": str(tmp_path)}}, Path("run.toml"))
    assert done["lora"]["targets"] == ["q_proj"]


@pytest.mark.parametrize("folders", ["llama"], indirect=True)
def test_weights_that_do_not_fit_are_refused(folders: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = folders
    settings = settings_of(folder, folder / "adapter")
    few = settings.lora.model_copy(update={"targets": ["q_proj"]})
    with pytest.raises(UserError, match=r"choose other matrices than the adapter has: .*v_proj \(there\)"):
        ours_with(folder, settings.model_copy(update={"lora": few}))
    stored = load_file(folder / "adapter/adapter_model.safetensors")
    first = next(iter(stored))
    damaged = {
        "holds NaN": stored | {first: torch.full_like(stored[first], float("nan"))},
        "not an adapter of matrices of a llama: lm_head": stored
        | {f"base_model.model.lm_head.lora_{side}.weight": torch.ones(3, 3) for side in "AB"},
        "not an adapter of matrices": {name: tensor for name, tensor in stored.items() if name != first},
        "has the rank 5, not lora.rank = 3|has the scale": stored | {first: torch.ones(5, 48)},
        "it is an adapter of another model": stored | {first: torch.ones(3, 50)},
    }
    for number, (words, tensors) in enumerate(damaged.items()):
        other = tmp_path / str(number)
        other.mkdir()
        (other / "adapter_config.json").write_bytes((folder / "adapter/adapter_config.json").read_bytes())
        save_file(tensors, other / "adapter_model.safetensors")
        with pytest.raises(UserError, match=words):
            ours_with(folder, settings_of(folder, other))


@pytest.mark.parametrize("folders", ["llama"], indirect=True)
def test_only_adapters_are_exported_as_one(folders: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = folders
    settings = settings_of(folder, folder / "adapter")
    model = ours_with(folder, settings)
    plain = settings.model_copy(update={"lora": LoraSettings()})
    with pytest.raises(UserError, match="has no adapters"):
        export_adapter(saved(model, plain, tmp_path / "plain"), plain, tmp_path / "out", torch.float32)
    found = saved(model, settings, tmp_path)
    found.description["keys"]["blocks.0.attention.query_key_value.weight"].append("exp_avg")
    with pytest.raises(UserError, match=r"has trained weights beside its adapters: blocks\.0\.attention"):
        export_adapter(found, settings, tmp_path / "out", torch.float32)
    with pytest.raises(UserError, match="exists already"):
        export_adapter(saved(model, settings, tmp_path / "more"), settings, tmp_path, torch.float32)


@pytest.mark.parametrize("folders", ["llama", "bert", "modernbert"], indirect=True)
def test_a_classification_head_beside_adapters_is_loaded_by_peft(folders: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = folders
    table = {"classification": {"classes": ["sport", "politics", "science"]}, "lora": {"rank": 2}}
    model = read_folder(folder / "base")[0].model_copy(update={"from": folder / "base"})
    settings = Settings.model_validate({"model": model.model_dump(), "data": DATA, **table})
    ours = Transformer(settings.model, 64)
    add_adapters(ours, settings.lora)
    init_weights(ours, 1)
    load_weights(ours, folder / "base", 1)
    choose_trained(ours, settings)
    with torch.no_grad():
        for number, parameter in enumerate(ours.parameters()):
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(number))
    export_adapter(saved(ours.eval(), settings, tmp_path), settings, tmp_path / "out", torch.float32)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=3)
    batch = batch_of([[text(40)]], DataSettings(**DATA))
    expected = ours(batch, "logits")[0].detach()
    close(theirs(peft.PeftModel.from_pretrained(base, tmp_path / "out").eval(), batch), expected)
