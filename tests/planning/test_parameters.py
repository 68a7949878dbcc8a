"""The planned parameters are those of the built model: names, shapes, roles, which are trained."""

from typing import Any

import pytest
from torch import nn

from bigmodel.config.settings import Settings
from bigmodel.inspect.memory import model_without_memory
from bigmodel.planning.parameters import active_of, parameters_of
from bigmodel.training.optimizers.groups import rows_of_parts
from bigmodel.training.trained import active_of as active_of_model

ROWS = 96
SMALL = {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {
        "position_embedding": "learned",
        "max_positions": 64,
        "norm": "layer",
        "gated": False,
        "attention_bias": "all",
        "feed_forward_bias": True,
        "tied_embeddings": True,
    },
    "gemma2": {"norm_placement": "sandwich", "head_dim": 16, "num_mtp_modules": 2, "sliding_window": 8},
    "olmo2": {"norm_placement": "output", "qk_norm": True, "qk_norm_over": "all_heads"},
    "qwen": {"attention_bias": "qkv", "qk_norm": True},
    "bert": {
        "kind": "encoder",
        "norm": "layer",
        "norm_placement": "post",
        "embedding_norm": True,
        "num_token_types": 2,
        "position_embedding": "learned",
        "max_positions": 64,
        "attention_bias": "all",
        "gated": False,
        "feed_forward_bias": True,
    },
    "modernbert": {"kind": "encoder", "norm": "layer", "norm_bias": False, "embedding_norm": True},
    "t5": {"kind": "encoder_decoder", "position_embedding": "relative_bias", "encoder_num_layers": 2},
    "two widths": {
        "kind": "encoder_decoder",
        "encoder_hidden_size": 48,
        "encoder_num_heads": 6,
        "encoder_num_kv_heads": 2,
        "separate_embeddings": True,
        "norm_placement": "sandwich",
    },
    "mixed": {"kind": "encoder_decoder", "source_attention": "mixed", "attention_bias": "qkv", "qk_norm": True},
}
RECURRENT: dict[str, dict[str, Any]] = {
    "rnn": {},
    "gru": {},
    "lstm": {"peepholes": True},
    "lstm_encoder_decoder": {"separate_embeddings": True},
}


def settings_of(model: dict[str, Any], **sections: Any) -> Settings:
    data: dict[str, Any] = {"max_document_length": 64, "sequence_length": 64}
    if "encoder_decoder" in model.get("kind", ""):
        data |= {"source_sequence_length": 64, "max_source_length": 64}
    if model.get("kind") == "encoder":
        data["objectives"] = [{"kind": "masked"}]
    return Settings.model_validate({"model": model, "data": data} | sections)


EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"experts": {"count": 8, "per_token": 2}},
    "deepseek": {
        "experts": {"count": 8, "per_token": 3, "width": 16, "shared": 2, "first_dense_layers": 1, "balance": "bias"},
        "num_mtp_modules": 1,
    },
}
CASES = {name: settings_of(SMALL | model) for name, model in (MODELS | EXPERTS).items()}
CASES |= {
    name: settings_of({"kind": name, "num_layers": 2, "hidden_size": 32} | model) for name, model in RECURRENT.items()
}
for _name in ("llama", "gpt2", "t5", "mixed", "gemma2"):
    _model = SMALL | MODELS[_name]
    CASES[f"{_name}, adapters"] = settings_of(_model, lora={"rank": 4})
CASES["qwen, some adapters"] = settings_of(SMALL | MODELS["qwen"], lora={"rank": 4, "targets": ["q_proj", "Wi"]})
CASES["llama, frozen"] = settings_of(SMALL, training={"freeze": ["embedding", "blocks.0.*", "*.down.weight"]})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_they_are_those_of_the_built_model(case: str) -> None:
    settings = CASES[case]
    model = model_without_memory(settings, ROWS)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    parts = rows_of_parts(model)
    built = {
        name: (
            tuple(one.shape),
            "embedding" if id(one) in embeddings else "matrix" if one.dim() > 1 else "vector",
            one.requires_grad,
            parts.get(id(one), ()),
        )
        for name, one in model.named_parameters()
    }
    planned = parameters_of(settings, ROWS)
    assert len({one.name for one in planned}) == len(planned)
    assert {one.name: (one.shape, one.role, one.is_trained, one.rows) for one in planned} == built
    assert active_of(planned, settings) == active_of_model(model)


def test_active_parameters_are_the_experts_that_a_token_passes() -> None:
    settings = CASES["mixtral"]
    planned = parameters_of(settings, ROWS)
    experts = sum(one.numel for one in planned if ".experts." in one.name and len(one.shape) == 3)
    assert experts, "there are experts"
    assert sum(one.numel for one in planned) - active_of(planned, settings) == experts * 6 // 8
