"""A recurrent model refuses what it does not read, with the reason."""

from pathlib import Path
from typing import Any

import pytest

from bigmodel.config.huggingface import fitting_type
from bigmodel.config.recurrent_settings import READ
from bigmodel.config.settings import ModelSettings, Settings, UserError, settings_from_table, to_toml_table

LSTM = {"kind": "lstm", "num_layers": 2, "hidden_size": 96}


def load(table: dict[str, Any]) -> Settings:
    return settings_from_table(table, Path("run.toml"))


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"num_heads": 4}, "model.num_heads = 4 has no effect with model.kind = .lstm. .a recurrent layer has neither"),
        ({"intermediate_size": 300}, "nor a feed-forward part"),
        ({"position_embedding": "learned", "max_positions": 9}, "model.position_embedding = .learned. has no effect"),
        ({"num_mtp_modules": 1}, "model.num_mtp_modules = 1 has no effect with kind = .lstm. .a module is a further"),
        ({"embedding_norm": True}, "always normalised before the first layer"),
        ({"encoder_num_layers": 1}, "model.encoder_num_layers = 1 has no effect with kind = .lstm."),
        ({"backpropagation_tokens": -1}, "greater than or equal to 0"),
    ],
)
def test_a_setting_of_transformers_is_refused(setting: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load({"model": LSTM | setting})


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"lora": {"rank": 4}}, "lora.rank = 4 with model.kind = .lstm.: adapters belong to"),
        ({"training": {"compile": True}}, "training.compile = true with model.kind = .lstm.: a layer is one kernel"),
        ({"training": {"sequence_parallel_ranks": 2}}, "each state needs the one before it"),
        ({"data": {"source_sequence_length": 512}}, "model.kind = .lstm. and data.source_sequence_length = 512 do not"),
        (
            {"classification": {"classes": ["a", "b"], "pooling": "first"}},
            "with model.kind = .lstm.: the first token sees",
        ),
        (
            {
                "model": LSTM | {"kind": "lstm_encoder_decoder"},
                "data": {"source_sequence_length": 512, "dropped_decoder_share": 0.1},
            },
            "data.dropped_decoder_share = 0.1 .*without positions",
        ),
    ],
)
def test_another_section_that_does_not_fit_is_refused(table: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load({"model": LSTM} | table)


def test_what_a_recurrent_model_reads_exists_and_is_accepted_also_when_saved() -> None:
    assert set(ModelSettings.model_fields) >= READ
    settings = load({"model": LSTM | {"peepholes": True, "norm": "layer", "norm_bias": False, "logit_softcap": 30.0}})
    assert load(to_toml_table(settings)) == settings  # num_kv_heads, which follows num_heads, is among the saved ones
    assert not settings.model.has_source
    assert settings.model.cell == "lstm"


def test_no_hugging_face_class_holds_it() -> None:
    with pytest.raises(UserError, match=r"model.kind = 'lstm': transformers has no recurrent language model"):
        fitting_type(load({"model": LSTM}).model)
