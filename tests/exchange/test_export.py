"""What an export says and refuses: settings without a counterpart, parts that a class lacks, files beside weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bigmodel.config.huggingface import differences, fitting_type
from bigmodel.config.settings import ModelSettings, Settings, UserError
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.exchange.export import export, export_adapter_of, write_model
from bigmodel.model.init import init_weights
from bigmodel.model.transformer import Transformer
from bigmodel.training.checkpoint.format import WeightSource
from tools.torchvision_operators import define_missing_torchvision_operators

SMALL = {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48}
DATA = {"max_document_length": 48, "sequence_length": 96}

Written = Callable[..., tuple[Path, list[str]]]


@pytest.fixture
def written(tmp_path: Path, shards: Path) -> Written:
    """Writes a model with initial weights, of type `kind`; gives the folder and the remarks."""

    def write(kind: str, model: dict[str, Any], data: dict[str, Any], **files: Path) -> tuple[Path, list[str]]:
        settings = Settings.model_validate({"model": SMALL | model, "data": DATA | data})
        ours = Transformer(settings.model, 407)
        init_weights(ours, 1)
        weights = {name: weight.detach() for name, weight in [*ours.named_parameters(), *ours.named_buffers()]}
        source = WeightSource(
            {name: list(weight.shape) for name, weight in weights.items()},
            "weight",
            lambda name, key, start, numel: weights[name].flatten()[start : start + numel],
        )
        files = {"tokenizer.json": shards / "tokenizer.json", **files}
        return tmp_path / "out", write_model(tmp_path / "out", settings, kind, source, files, torch.bfloat16)

    return write


def test_mtp_modules_lie_beside_the_model_under_deepseeks_names(written: Written) -> None:
    folder, remarks = written("qwen3", {"qk_norm": True, "num_mtp_modules": 2}, {})
    assert remarks == [
        "MTP modules: Qwen3ForCausalLM has none; they are in mtp.safetensors as model.layers.2 to 3, DeepSeek-V3's "
        "names, without enorm, hnorm and eh_proj, because ours read no further token"
    ]
    of_class, beside = load_file(folder / "model.safetensors"), load_file(folder / "mtp.safetensors")
    assert {name.split(".")[2] for name in beside} == {"2", "3"}
    assert {name.split(".")[2] for name in of_class if "layers" in name} == {"0", "1"}
    assert of_class["model.norm.weight"].dtype == beside["model.layers.2.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_a_prefix_read_in_both_directions_is_said(written: Written) -> None:
    _, remarks = written("llama", {}, {"objectives": [{"kind": "prefix"}]})
    assert remarks == [
        "data.bidirectional_prefix = true: prefixes were read in both directions, which LlamaForCausalLM does not do"
    ]


def test_labels_further_ahead_than_the_next_token_are_said(written: Written) -> None:
    _, remarks = written("llama", {}, {"objectives": [{"kind": "causal", "ahead": 3}]})
    assert remarks == [
        "labels 3 tokens ahead of their inputs: LlamaForCausalLM takes every prediction for the next token"
    ]


def test_what_lies_beside_the_weights_says_how_texts_begin_and_end(written: Written, tmp_path: Path) -> None:
    template = tmp_path / "chat_template.jinja"
    template.write_text("{{ messages }}")
    folder, remarks = written("llama", {}, {}, **{"chat_template.jinja": template})
    assert remarks == []
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    assert json.loads((folder / "generation_config.json").read_text()) == ids
    config = json.loads((folder / "config.json").read_text())
    assert config.items() >= {**ids, "max_position_embeddings": 48, "dtype": "bfloat16", "vocab_size": 407}.items()
    again = Tokenizer.load(folder)
    assert (again.bos, again.eos) == (0, 1)


def test_a_model_without_token_types_can_generate_from_all_that_its_tokenizer_returns(written: Written) -> None:
    define_missing_torchvision_operators()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = written("llama", {}, {})
    inputs = AutoTokenizer.from_pretrained(folder)("a text", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert len(model.generate(**inputs, max_new_tokens=2, min_new_tokens=2)[0]) == inputs["input_ids"].shape[1] + 2


def test_a_target_begins_with_the_begin_token_and_every_end_of_the_start_is_kept(
    written: Written, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    start.mkdir()
    (start / "generation_config.json").write_text('{"eos_token_id": [1, 5, 4000]}')
    (start / "config.json").write_text('{"model_type": "t5", "max_position_embeddings": 4096}')
    t5 = {"kind": "encoder_decoder", "position_embedding": "relative_bias", "attention_scale": 1.0, "num_kv_heads": 4}
    t5 |= {"tied_embeddings": True, "norm_epsilon": 1e-6, "from": start}
    folder, _ = written("t5", t5, {"source_sequence_length": 96})
    said = json.loads((folder / "generation_config.json").read_text())
    assert (said["eos_token_id"], said["decoder_start_token_id"]) == ([1, 5], 0)
    shutil.rmtree(start)
    with pytest.raises(UserError, match=r"out: exists already; choose another folder, or delete this one"):
        written("t5", t5, {"source_sequence_length": 96})


def test_experts_have_the_type_that_computes_them() -> None:
    """`intermediate_size` is of dense layers only, and strengths of the balance are of training only."""
    deepseek = {"scores": "sigmoid", "balance": "bias", "shared": 1, "first_dense_layers": 1, "route_scale": 2.5}
    for kind, model, experts in (
        ("mixtral", {}, {"width": 24, "router_z_weight": 0.001}),
        ("qwen3_moe", {"qk_norm": True}, {"first_dense_layers": 1, "width": 24}),
        ("olmoe", {"qk_norm": True, "qk_norm_over": "all_heads"}, {"normalize_weights": False, "balance": "none"}),
        ("dots1", {"qk_norm": True}, deepseek | {"groups": 2}),
        ("glm4_moe", {"rotary_fraction": 0.5, "attention_bias": "qkv"}, deepseek),
    ):
        assert fitting_type(ModelSettings.model_validate(SMALL | model | {"experts": {"count": 4} | experts})) == kind
    assert differences("mixtral", ModelSettings(**SMALL)) == ["a model without experts"]
    assert differences("llama", ModelSettings(**SMALL, experts={"count": 4})) == ["model.experts.count = 4"]


def test_biases_of_experts_are_written_in_fp32_and_loads_are_not_written(written: Written) -> None:
    experts = {"count": 4, "width": 24, "scores": "sigmoid", "balance": "bias", "shared": 1}
    folder, remarks = written("dots1", {"qk_norm": True, "experts": experts}, {})
    weights = load_file(folder / "model.safetensors")
    assert weights["model.layers.0.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert weights["model.layers.1.mlp.experts.3.up_proj.weight"].shape == (24, 32)
    assert weights["model.layers.1.mlp.experts.3.up_proj.weight"].dtype == torch.bfloat16
    assert remarks == []
    shutil.rmtree(folder)
    folder, remarks = written("mixtral", {"experts": {"count": 4, "width": 24}}, {})
    assert remarks == []
    assert not any("load" in name for name in load_file(folder / "model.safetensors"))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"experts": {"count": 4, "shared": 1}}, r"model.experts.shared = 1: no Hugging Face class has it; .* Mixtral"),
        ({"experts": {"count": 4, "scores": "sigmoid"}}, r"model.experts.scores = 'sigmoid': no Hugging Face class"),
        ({"experts": {"count": 4, "balance": "bias"}}, r"model.experts.balance = 'bias': no Hugging Face class has it"),
        (
            {"kind": "encoder_decoder", "source_attention": "mixed"},
            r"model.source_attention = 'mixed'.*: no Hugging Face class has it; the nearest is T5ForConditionalGen",
        ),
        (
            {"logit_scale": 0.5},
            r"model.logit_scale = 0.5: no Hugging Face class has it; the nearest is LlamaForCausalLM",
        ),
        ({"rotary_fraction": 0.5, "qk_norm": True}, r"model.rotary_fraction = 0.5: no Hugging Face class has it"),
        (
            {"sliding_window": 4, "full_attention_every": 2, "attention_bias": "qkv", "qk_norm": True},
            r"no Hugging Face",
        ),
    ],
)
def test_a_setting_that_no_class_has_is_refused_by_its_name(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        fitting_type(ModelSettings(**SMALL | changes))


T5 = SMALL | {
    "kind": "encoder_decoder", "position_embedding": "relative_bias", "attention_scale": 1.0, "num_kv_heads": 4
}  # fmt: skip


def test_an_encoder_of_the_decoders_size_is_a_t5() -> None:
    assert fitting_type(ModelSettings(**T5)) == "t5"


def test_the_output_of_a_t5_is_scaled_if_and_only_if_it_is_tied() -> None:
    """transformers 4 reads no more than `tie_word_embeddings`; 5 never scales mT5's output."""
    scale = T5["hidden_size"] ** -0.5
    assert fitting_type(ModelSettings(**T5, tied_embeddings=True, logit_scale=scale), "mt5") == "t5"
    for tied, wrong in ((True, 1.0), (False, scale)):
        with pytest.raises(UserError, match=rf"model.logit_scale = {wrong}: no Hugging Face class has it"):
            fitting_type(ModelSettings(**T5, tied_embeddings=tied, logit_scale=wrong))


def test_a_wrong_request_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--dtype int8: unknown; use float32, bfloat16, float16"):
        export(tmp_path, tmp_path / "out", dtype="int8")
    with pytest.raises(UserError, match=r"--as llama: has no effect with --adapter .*; leave one of them out"):
        export_adapter_of(tmp_path, tmp_path / "out", kind="llama")
    with pytest.raises(UserError, match=r"--max-gib 0.5: has no effect with --adapter .*; leave one of them out"):
        export_adapter_of(tmp_path, tmp_path / "out", max_gib=0.5)
    with pytest.raises(UserError, match=r"not a run directory \(no settings.json\)"):
        export(tmp_path, tmp_path / "out")
    settings = Settings.model_validate({"model": SMALL, "data": DATA | {"directory": str(tmp_path)}})
    (tmp_path / "settings.json").write_text(settings.model_dump_json(exclude_none=True))
    for kind, complaint in (
        ("gpt9", r"--as gpt9: unknown; use llama, mistral"),
        ("qwen3", r"--as qwen3: Qwen3ForCausalLM cannot hold model.qk_norm = False; leave --as out, or use another"),
        ("", r"no checkpoint yet; train until checkpoint.every_steps is reached"),
    ):
        with pytest.raises(UserError, match=complaint):
            export(tmp_path, tmp_path / "out", kind)
