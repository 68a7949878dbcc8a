"""muP's factors in an export: the same logits without them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bigmodel.config.settings import ModelSettings, Settings, UserError
from bigmodel.exchange.export import write_model
from bigmodel.exchange.mup import without_mup
from bigmodel.model.huggingface.weights import from_transformers
from bigmodel.model.init import init_weights
from bigmodel.model.transformer import Transformer
from bigmodel.training.checkpoint.format import WeightSource
from tests.system.test_guarantee_leak import make_batch

WIDE = {"num_layers": 1, "hidden_size": 48, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 48}
MUP = {"mup_base_width": 16, "mup_base_head_dim": 8}
GEMMA3 = {
    "qk_norm": True, "zero_centered_norm": True, "norm_placement": "sandwich", "tied_embeddings": True,
    "mup_base_width": 48, "mup_base_head_dim": 8, "activation": "gelu", "attention_scale": 0.25,
    "embedding_scale": 48**0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", MUP),
        ("qwen2", MUP | {"attention_bias": "qkv"}),
        ("qwen3", MUP | {"qk_norm": True}),
        ("gemma3_text", GEMMA3),
    ],
)
def test_an_export_has_the_logits_of_the_model(
    kind: str, changes: dict[str, Any], tmp_path: Path, shards: Path
) -> None:
    settings = Settings.model_validate(
        {"model": WIDE | changes, "data": {"max_document_length": 48, "sequence_length": 96}}
    )
    ours = Transformer(settings.model, 407).eval()
    init_weights(ours, 1)
    with torch.no_grad():  # biases and norms are as after a training
        for name, parameter in ours.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    weights = {name: weight.detach() for name, weight in ours.named_parameters()}
    source = WeightSource(
        {name: list(weight.shape) for name, weight in weights.items()},
        "weight",
        lambda name, key, start, numel: weights[name].flatten()[start : start + numel],
    )
    write_model(tmp_path / "out", settings, kind, source, {"tokenizer.json": shards / "tokenizer.json"})
    plain, theirs = from_transformers(
        json.loads((tmp_path / "out" / "config.json").read_text()), load_file(tmp_path / "out" / "model.safetensors")
    )
    assert (plain.mup_base_width, plain.mup_base_head_dim) == (0, 0)
    read = Transformer(plain, 407).eval()
    read.load_state_dict(theirs, strict=False)
    batch = make_batch()
    wanted = ours(batch, "logits").detach()
    assert float(wanted.abs().max()) > 0.01
    torch.testing.assert_close(read(batch, "logits"), wanted, rtol=1e-4, atol=1e-6)


def test_a_tied_output_matrix_cannot_hold_the_factor() -> None:
    with pytest.raises(UserError, match=r"mup_base_width = 16 with model.tied_embeddings = true: logits are divided"):
        without_mup(ModelSettings(**WIDE | MUP | {"tied_embeddings": True}))
    assert without_mup(ModelSettings(**WIDE, tied_embeddings=True)) == ModelSettings(**WIDE, tied_embeddings=True)
