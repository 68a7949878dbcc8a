"""A Hugging Face folder with a small random model and the tiny corpus' tokenizer, written in a tenth of a second."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bigmodel.config.huggingface import write_config
from bigmodel.config.settings import ModelSettings
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.model.huggingface.weights import names_of, to_theirs
from bigmodel.model.init import init_weights
from bigmodel.model.transformer import Transformer

SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48}
TWO_SIDES: dict[str, Any] = {
    "kind": "encoder_decoder", "position_embedding": "relative_bias", "attention_scale": 1.0,
}  # fmt: skip


def write_model(folder: Path, shards: Path, kind: str = "llama", context: int = 128, template: str = "") -> Path:
    """`kind`: llama or t5. The weights are far from their initial ones: texts differ from prompt to prompt."""
    folder.mkdir(parents=True)
    shutil.copy(shards / "tokenizer.json", folder)
    settings = ModelSettings.model_validate(SIZES | (TWO_SIDES if kind == "t5" else {"num_kv_heads": 2}))
    vocabulary = Tokenizer.load(folder, fast=False).vocabulary
    model = Transformer(settings, vocabulary)
    init_weights(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    config = write_config(kind, settings, vocabulary, context)
    (folder / "config.json").write_text(json.dumps(config))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    save_file(to_theirs(names_of(kind, settings), dict(model.named_parameters())), folder / "model.safetensors")
    return folder
