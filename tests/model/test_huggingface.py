"""Against models nobody here wrote: transformers Llama, Qwen3 and T5 v1.1 with the same weights: logits, gradients."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bigmodel.config.huggingface import CLASSES, DEFAULTS, differences, write_config
from bigmodel.config.huggingface import read_config as settings_of
from bigmodel.config.settings import DataSettings, ModelSettings, UserError
from bigmodel.data.load.batch import IGNORED, Batch
from bigmodel.data.objectives.examples import Pair
from bigmodel.model.huggingface.folder import read_folder
from bigmodel.model.huggingface.start import StartWeights, read_settings
from bigmodel.model.huggingface.weights import from_transformers, names_of, to_theirs
from bigmodel.model.transformer import Transformer
from tests.support.example_batches import batch_of, text
from tools.torchvision_operators import define_missing_torchvision_operators

define_missing_torchvision_operators()
transformers = pytest.importorskip("transformers")
CONFIG_MAPPING = transformers.CONFIG_MAPPING

SIZE = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
DATA = {"max_document_length": 64, "sequence_length": 128, "max_documents": 4}
TOLERANCE = 1e-4


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0}
EIGHTFOLD = {"rope_type": "linear", "factor": 8.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "head_dim": 16}
EVERY_SECOND = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
TWO_SIDES = {
    "vocab_size": 64, "d_model": 48, "d_kv": 16, "d_ff": 80, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
    "relative_attention_max_distance": 20, "relative_attention_num_buckets": 16, "dropout_rate": 0.0,
}  # fmt: skip
UNTIED = {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, **EVERY_SECOND}
EXPERTS_OF_QWEN = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK = {
    "n_routed_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
}  # fmt: skip
GROUPS = {"n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
WITHOUT_DEFAULT = ("n_routed_experts", "num_experts_per_tok", "n_shared_experts")
MODERN = {"num_hidden_layers": 4, "global_attn_every_n_layers": 3, "local_attention": 6}

# By name: type, changes of its configuration, and what our settings are beside sizes.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama 3": ("llama", {"rope_scaling": LLAMA3}),
    "llama yarn": ("llama", {"rope_scaling": YARN}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "mistral without window": ("mistral", {"sliding_window": None, "head_dim": 20}),
    "qwen2": ("qwen2", {}),
    "qwen2 sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen3": ("qwen3", {"head_dim": 20}),
    "qwen3 sliding": ("qwen3", WINDOW | {"max_window_layers": 0}),
    "qwen3 every second": ("qwen3", WINDOW | EVERY_SECOND),
    "qwen3 no layer sliding": ("qwen3", WINDOW | {"max_window_layers": 2}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {**EVERY_SECOND, "rope_scaling": YARN}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {**GEMMA, "rope_local_base_freq": 100.0, "rope_scaling": EIGHTFOLD}),
    "phi3": ("phi3", {"sliding_window": 5}),
    "phi3 partial": ("phi3", {"partial_rotary_factor": 0.5, "head_dim": 16}),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}),
    "mixtral sliding": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 5}),
    "qwen3_moe": ("qwen3_moe", EXPERTS_OF_QWEN | {"norm_topk_prob": True, "mlp_only_layers": [0], "head_dim": 20}),
    "qwen3_moe sliding": ("qwen3_moe", EXPERTS_OF_QWEN | {"use_sliding_window": True, "sliding_window": 5}),
    "olmoe": ("olmoe", {"num_experts": 5, "num_experts_per_tok": 2}),
    "olmoe normalized": ("olmoe", {"num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "dots1": ("dots1", DEEPSEEK | {"norm_topk_prob": True}),
    "dots1 sliding": ("dots1", DEEPSEEK | EVERY_SECOND | {"attention_bias": True, "first_k_dense_replace": 0}),
    "dots1 groups": ("dots1", DEEPSEEK | GROUPS),
    "glm4_moe": ("glm4_moe", DEEPSEEK | {"attention_bias": True}),
    "glm4_moe groups": ("glm4_moe", DEEPSEEK | GROUPS | {"use_qk_norm": True, "head_dim": 20}),
    "t5 1.0": ("t5", {}),
    "t5 1.1": ("t5", UNTIED),
    "ul2": ("t5", {"tie_word_embeddings": False, "feed_forward_proj": "gated-silu"}),
    "mt5": ("mt5", {}),
    "bert": ("bert", {"max_position_embeddings": 64, "type_vocab_size": 2}),
    "modernbert": ("modernbert", MODERN),
}  # fmt: skip


def model_of(name: str) -> torch.nn.Module:
    kind, changes = MODELS[name]
    return made(kind, **changes)


def made(kind: str, **changes: Any) -> torch.nn.Module:
    sizes: dict[str, Any] = SIZE | {"num_key_value_heads": 2, "rope_theta": 5000.0}
    if kind in ("bert", "modernbert"):
        sizes = SIZE
    elif kind in ("t5", "mt5"):
        sizes = TWO_SIDES
    sizes |= {"attn_implementation": "eager", "pad_token_id": 2}  # no document has it: theirs gives it no gradient
    config = CONFIG_MAPPING[kind](**{**sizes, **changes})
    torch.manual_seed(3)
    return randomize(getattr(transformers, CLASSES[kind])(config))


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Norms too: their initial ones would hide a mix-up."""
    biases = [bias for name, bias in model.named_buffers() if name.endswith("e_score_correction_bias")]
    with torch.no_grad():
        for parameter in [*model.parameters(), *biases]:
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.05))
    return model.eval()


def ours_of(theirs: torch.nn.Module) -> Transformer:
    settings, weights = from_transformers(theirs.config.to_dict(), theirs.state_dict())
    model = Transformer(settings, len(weights["embedding.weight"]))
    with torch.no_grad():
        ours = dict(model.named_parameters()) | {
            name: bias for name, bias in model.named_buffers() if name.endswith(".bias")
        }
        assert set(ours) == set(weights)
        for name, weight in ours.items():
            weight.copy_(weights[name])
    return model


def documents_of(batch: Batch) -> list[tuple[slice, slice]]:
    from bigmodel.checks.leak import documents

    return [(place.targets, place.source) for place in documents(batch)]


def compare(theirs: torch.nn.Module, batch: Batch) -> None:
    """A pack through ours, its documents one by one through theirs: logits or states, and gradients."""
    ours, is_encoder = ours_of(theirs), theirs.config.model_type in ("bert", "modernbert")
    embedded = ours.embed(batch)
    out = ours.hidden(embedded[0], batch) if is_encoder else ours(batch, "logits")
    of_documents = torch.cat([out[target] for target, _ in documents_of(batch)])
    (of_documents.square().sum() if is_encoder else ours(batch)).backward()
    for target, source in documents_of(batch):
        tokens, labels = batch.tokens[None, target], batch.labels[target]
        if batch.source is not None:
            found = theirs(input_ids=batch.source.tokens[None, source], decoder_input_ids=tokens)[0][0]
        else:
            found = theirs(input_ids=tokens)[0][0]
        assert float((found - out[target]).abs().max()) < TOLERANCE * float(found.abs().max())
        if is_encoder:
            found.square().sum().backward()
        else:
            torch.nn.functional.cross_entropy(found, labels, reduction="sum", ignore_index=IGNORED).backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in theirs.named_parameters()}
    gradients |= {name: bias for name, bias in theirs.named_buffers() if name.endswith("e_score_correction_bias")}
    _, expected = from_transformers(theirs.config.to_dict(), gradients)
    for name, parameter in ours.named_parameters():
        scale = expected[name].abs().max()
        assert bool(expected[name].any()), name
        assert float((parameter.grad - expected[name]).abs().max() / scale) < TOLERANCE, name


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_transformers_own_and_goes_back_unchanged(name: str) -> None:
    theirs = model_of(name)
    kind = theirs.config.model_type
    if kind in ("t5", "mt5"):
        pairs = [[Pair(text(40), text(9)), Pair(text(1), text(30))], [Pair(text(25), text(1))]]
        batch = batch_of(pairs, DataSettings(**DATA, source_sequence_length=80))
    else:
        batch = batch_of([[text(20), text(1), text(40)], [text(33)]], DataSettings(**DATA))
    compare(theirs, batch)
    settings, weights = from_transformers(theirs.config.to_dict(), theirs.state_dict())
    assert differences(kind, settings) == []
    state = theirs.state_dict()
    back = to_theirs(names_of(kind, settings), weights)
    assert all(torch.equal(state[name], back[name]) for name in back)
    left = set(state) - set(back)
    assert all(name.startswith("pooler.") or name.endswith(("lm_head.weight", "embed_tokens.weight")) for name in left)
    config = write_config(
        kind,
        settings,
        len(weights["embedding.weight"]),
        theirs.config.max_position_embeddings if hasattr(theirs.config, "max_position_embeddings") else 1,
    )
    again = type(theirs)(
        CONFIG_MAPPING[kind](**config, attn_implementation="eager", pad_token_id=theirs.config.pad_token_id)
    )
    again.load_state_dict(back, strict=False)
    inputs = {"input_ids": batch.tokens[None, :10]} | (
        {"decoder_input_ids": batch.tokens[None, :10]} if kind in ("t5", "mt5") else {}
    )
    assert torch.equal(theirs(**inputs)[0], again.eval()(**inputs)[0])


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2': cannot be read; types read: llama, mistral, qwen2"),
        ({"model_type": "llama", "hidden_act": "tanh"}, "hidden_act = 'tanh': our model has"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention = true"),
        ({"model_type": "bert", "position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        ({"model_type": "llama", "num_hidden_layers": 2.5}, "config.json of a llama: .*num_layers"),
        ({"model_type": ["llama"]}, r"model_type = \['llama'\]: cannot be read"),
        ({"model_type": "llama", "num_hidden_layers": "two"}, "num_hidden_layers = 'two': .* a number of at least 0"),
        ({"model_type": "llama", "num_attention_heads": 0}, "num_attention_heads = 0: .* a number of at least 1 here"),
        (
            {"model_type": "llama", "vocab_size": "64"},
            "vocab_size = '64': config.json must have a number of at least 1",
        ),
        ({"model_type": "llama", "attention_bias": "no"}, "attention_bias = 'no': config.json must have true or false"),
        ({"model_type": "llama", "hidden_act": ["silu"]}, r"hidden_act = \['silu'\]: config.json must have a name"),
        ({"model_type": "llama", "rope_scaling": "linear"}, "rope_scaling = 'linear': config.json must have a table"),
        (
            {"model_type": "llama", "rope_scaling": {"rope_type": [1]}},
            r"rope_type = \[1\]: config.json must have a name",
        ),
        (
            {"model_type": "mixtral", "router_jitter_noise": 0.1},
            "router_jitter_noise = 0.1: our routers have no noise, .* set it to 0",
        ),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv = 8.0: our model does not clip"),
        (
            {"model_type": "dots1", **DEEPSEEK, "n_group": 4, "topk_group": 2},
            "config.json of a dots1: .*groups = 4 with model.experts.count = 5: groups have equally many experts",
        ),
        ({"model_type": "deepseek_v3"}, "model_type = 'deepseek_v3': cannot be read: its attention, by latent vectors"),
        ({"model_type": "dots1"}, "config.json of a dots1: n_routed_experts is missing"),
        (
            {"model_type": "qwen3_moe", "decoder_sparse_step": 2},
            r"decoder_sparse_step = 2, mlp_only_layers = \(\), num_experts = 128: our layers have experts from one on",
        ),
        (
            {"model_type": "qwen3_moe", "mlp_only_layers": [0, 2]},
            r"mlp_only_layers = \[0, 2\], .*: our layers have exp",
        ),
        ({"model_type": "qwen3_moe", "num_experts": 0}, "num_experts = 0: our layers have experts from one on"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": 1}, "mlp_only_layers = 1: .* a list of numbers of layers here"),
        ({"model_type": "olmoe", "num_experts_per_tok": 65}, "per_token = 65 exceeds model.experts.count = 64"),
        ({"model_type": "qwen3", "layer_types": "full"}, "layer_types = 'full': config.json must have a list of names"),
        (
            {"model_type": "llama", "rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}},
            "rope_theta = 5.0 and 6.0: config.json gives two values",
        ),
        ({"model_type": "qwen3", "rope_scaling": {"type": "linear"}}, "rope_scaling = .*linear.*: factor"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling = .*llama3.*original_max_position_embeddings is missing",
        ),
        (
            {"model_type": "phi3", "rope_scaling": {"rope_type": "longrope", "factor": 8.0}},
            "rope_scaling = .*longrope.*: cannot be read; kinds read: linear, llama3, yarn",
        ),
        ({"model_type": "llama", "use_sliding_window": True, "sliding_window": 4}, "use_sliding_window = True"),
        (
            {"model_type": "qwen3", **WINDOW, "num_hidden_layers": 3, "max_window_layers": 1},
            r"layer_types = \['full_attention', 'sliding_attention', 'sliding_attention'\]: our model has full",
        ),
        (
            {"model_type": "qwen3", **WINDOW, "num_hidden_layers": 3, "max_window_layers": 0, "rope_scaling": YARN},
            "rope_scaling = .* with sliding_window = 5: our sliding layers do not scale rotary positions",
        ),
        (
            {"model_type": "qwen3", **WINDOW, **EVERY_SECOND, "num_hidden_layers": 2, "rope_parameters": YARN},
            "rope_scaling = .*yarn.* with sliding_window = 5: our sliding layers do not scale rotary positions",
        ),
    ],
)
def test_what_has_no_counterpart_is_refused(config: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        settings_of(config)


def test_modules_of_glm_for_multi_token_prediction_are_left_out() -> None:
    """As by its class: GLM-4.5 numbers them as layers behind the last one."""
    theirs = model_of("glm4_moe")
    state = theirs.state_dict()
    beside = {"eh_proj.weight": torch.zeros(48, 96), "mlp.gate.weight": torch.zeros(5, 48)}
    more = state | {f"model.layers.2.{name}": weight for name, weight in beside.items()}
    _, weights = from_transformers(theirs.config.to_dict(), more)
    _, wanted = from_transformers(theirs.config.to_dict(), state)
    assert weights.keys() == wanted.keys()
    del more["model.layers.2.eh_proj.weight"]
    with pytest.raises(UserError, match=r"without a counterpart in our model: model.layers.2.mlp.gate.weight"):
        from_transformers(theirs.config.to_dict(), more)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_a_key_that_is_left_out_has_the_default_of_its_class(kind: str) -> None:
    needed = {name: DEEPSEEK[name] for name in WITHOUT_DEFAULT} if kind == "dots1" else {}
    needed |= {"head_dim": 128} if kind == "glm4_moe" else {}  # of its own default, 42, half is odd
    full = CONFIG_MAPPING[kind](**needed).to_dict()
    assert resolved({"model_type": kind} | needed) == resolved(full)
    for name in DEFAULTS[kind].keys() & full.keys():
        assert resolved({key: value for key, value in full.items() if key != name}) == resolved(full), name


def resolved(config: dict[str, Any]) -> ModelSettings:
    settings = settings_of(config)
    return settings.model_copy(update={"head_dim": settings.resolved_head_dim})


def test_the_weight_of_the_balance_loss_comes_back_as_it_was() -> None:
    """Theirs is one loss of all layers, ours the sum over layers."""
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 4, "mlp_only_layers": [0], "router_aux_loss_coef": 0.001}
    experts = settings_of(config).experts
    assert experts is not None
    assert (experts.balance, experts.first_dense_layers) == ("loss", 1)
    assert experts.balance_weight == pytest.approx(0.001 / 3)
    back = write_config("qwen3_moe", settings_of(config), 64, 64)
    assert {name: back[name] for name in ("mlp_only_layers", "router_aux_loss_coef")} == {
        "mlp_only_layers": [0], "router_aux_loss_coef": 0.001,
    }  # fmt: skip
    without = settings_of(config | {"router_aux_loss_coef": 0.0})
    assert without.experts is not None
    assert without.experts.balance == "none"
    assert write_config("qwen3_moe", without, 64, 64)["router_aux_loss_coef"] == 0.0


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_a_t5_of_transformers_5_is_tied_or_not_by_its_weights(kind: str) -> None:
    """It writes `tie_word_embeddings = true` into every config.json and never ties unequal matrices."""
    theirs = made("t5", **UNTIED)
    state = theirs.state_dict()
    config = {**theirs.config.to_dict(), "tie_word_embeddings": True, "transformers_version": "5.0.0"}
    config |= {"model_type": kind} | ({"scale_decoder_outputs": False} if kind == "t5" else {})
    settings, weights = from_transformers(config, state)
    assert not settings.tied_embeddings
    assert torch.equal(weights["head.weight"], state["lm_head.weight"])
    settings, weights = from_transformers(config, {**state, "lm_head.weight": state["shared.weight"]})
    assert settings.tied_embeddings
    assert "head.weight" not in weights


def test_the_base_of_the_rotary_frequencies_is_found_where_newer_versions_write_it() -> None:
    model = made("llama")
    config, state = model.config.to_dict(), model.state_dict()
    newer = {name: value for name, value in config.items() if not name.startswith("rope_")}
    newer["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    assert from_transformers(newer, state)[0] == from_transformers(config, state)[0]
    for table in ({"rope_type": "default"}, {"type": "default"}, {"full_attention": newer["rope_parameters"]}):
        assert settings_of({**config, "rope_scaling": None, "rope_parameters": table}) == settings_of(config)
        assert settings_of({**config, "rope_scaling": table}) == settings_of(config)
    assert from_transformers(config, state)[0].rope_theta == 5000.0


def test_a_part_of_a_head_that_turns_is_read_in_old_and_new_spelling() -> None:
    model = made("llama")
    config, state = model.config.to_dict(), model.state_dict()
    newer = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}}
    for changes in ({"partial_rotary_factor": 0.5}, newer):
        assert from_transformers(config | changes, state)[0].rotary_fraction == 0.5
    assert from_transformers(config, state)[0].rotary_fraction == 1.0


def test_weights_that_nothing_takes_or_that_are_missing_are_listed_by_name() -> None:
    model = made("qwen3", head_dim=20)
    config, state = model.config.to_dict(), model.state_dict()
    changed = {name: value for name, value in state.items() if "o_proj" not in name}
    changed |= {"model.layers.2.mlp.up_proj.weight": torch.ones(1), "lm_head.bias": torch.ones(64)}
    changed["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(10)  # old files have it; it is not learned
    changed["model.norm.weight"] = torch.ones(48, dtype=torch.int8)
    with pytest.raises(UserError) as raised:
        from_transformers(config, changed)
    assert str(raised.value) == (
        "weights missing: model.layers.0.self_attn.o_proj.weight, model.layers.1.self_attn.o_proj.weight; "
        "without a counterpart in our model: model.layers.2.mlp.up_proj.weight, lm_head.bias; "
        "of a type that cannot be read: model.norm.weight (torch.int8); "
        "check that config.json belongs to these weights"
    )


def test_joined_experts_are_named_with_the_remedy() -> None:
    model = made("mixtral", num_local_experts=3)
    joined = {"model.layers.0.mlp.experts.gate_up_proj": torch.ones(3, 2, 48)}
    with pytest.raises(
        UserError, match=r"0\.mlp\.experts\.gate_up_proj: .* are joined.*; load .* and save it with save_"
    ):
        from_transformers(model.config.to_dict(), model.state_dict() | joined)


def test_a_classification_model_is_named_as_the_reason_where_only_the_output_matrix_is_missing() -> None:
    model = made("llama")
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    with pytest.raises(UserError, match=r"weights missing: lm_head\.weight; .*; a classification model has no output"):
        from_transformers(model.config.to_dict(), state | {"score.weight": torch.ones(3, 48)})


def test_a_head_that_config_json_ties_to_other_values_is_refused() -> None:
    model = made("llama")
    tied = {**model.config.to_dict(), "tie_word_embeddings": True}
    with pytest.raises(UserError, match=r"no copies, .*: lm_head.weight \(model.embed_tokens.weight\)"):
        from_transformers(tied, model.state_dict())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        # As many rows of queries, keys and values together.
        (
            {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
            "layers.0.self_attn.q_proj.weight (48, 48) instead of (32, 48), "
            "model.layers.0.self_attn.k_proj.weight (24, 48) instead of (32, 48), ",
        ),
        ({"vocab_size": 63}, "model.embed_tokens.weight (64, 48) instead of (63, 48), lm_head.weight (64, 48)"),
        ({"hidden_size": 24}, "model.norm.weight (48,) instead of (24,)"),
    ],
    ids=["heads", "vocabulary", "hidden_size"],
)
def test_weights_of_another_shape_are_named(changes: dict[str, Any], complaint: str) -> None:
    model = made("llama")
    with pytest.raises(UserError, match=re.escape(complaint)):
        from_transformers(model.config.to_dict() | changes, model.state_dict())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama in bf16, in several shards."""
    made("llama").to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return tmp_path


def test_a_folder_is_read_from_its_shards_in_the_type_that_they_have(folder: Path) -> None:
    settings, weights = read_folder(folder)
    model = made("llama").to(torch.bfloat16)
    expected = from_transformers(model.config.to_dict(), model.state_dict())
    assert settings == expected[0]
    assert {name: value.dtype for name, value in weights.items()} == dict.fromkeys(weights, torch.bfloat16)
    assert all(torch.equal(value, expected[1][name]) for name, value in weights.items())
    assert weights.keys() == expected[1].keys()
    (folder / "one").mkdir()
    made("llama").save_pretrained(folder / "one")
    assert read_folder(folder / "one")[0] == settings


@pytest.mark.parametrize(
    ("file", "change", "complaint"),
    [
        ("config.json", lambda text: text[:-3], r"config.json: cannot be read as JSON"),
        ("model.safetensors.index.json", lambda text: "[]", "it must be a JSON object"),
        ("model.safetensors.index.json", lambda text: "{}", "weight_map is missing"),
        (
            "model.safetensors.index.json",
            lambda text: text.replace("model-00001", "../model-00001"),
            "weight_map names '../model-00001.*'; it must be a file in this folder",
        ),
        (
            "model.safetensors.index.json",
            lambda text: text.replace("model.norm.weight", "model.norm.bias"),
            "lacks model.norm.bias, which the index names; download it again",
        ),
        ("model-00001-of-*", lambda text: text[: len(text) // 2], "cannot be read as safetensors"),
        ("model-00001-of-*", None, "cannot be read as safetensors"),
        ("model.safetensors.index.json", None, "neither model.safetensors nor model.safetensors.index.json is there"),
    ],
)
def test_a_damaged_folder_is_refused_with_its_file(folder: Path, file: str, change: Any, complaint: str) -> None:
    (path,) = folder.glob(file)
    text = path.read_text(encoding="latin-1")
    path.unlink()
    if change:
        path.write_text(change(text), encoding="latin-1")
    with pytest.raises(UserError, match=f"{re.escape(str(folder))}.*{complaint}"):
        read_folder(folder)


def test_a_weight_in_two_shards_is_refused(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file({**load_file(first), **load_file(second)}, second)
    with pytest.raises(UserError, match=f"{second.name}: has again .*; download the folder again"):
        read_folder(folder)


def test_a_file_is_opened_for_many_weights_and_again_after_a_number_of_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = model_of("mixtral")
    theirs.save_pretrained(tmp_path, max_shard_size="300KB")
    opened: list[str] = []

    def counting(path: Path, **options: Any) -> Any:
        opened.append(path.name)
        return safe_open(path, **options)

    monkeypatch.setattr("bigmodel.model.huggingface.folder.safe_open", counting)
    settings = read_settings(tmp_path)
    opened.clear()
    weights = StartWeights(tmp_path, settings)
    for name in weights:
        weights.read(name)
    num_weights = len(theirs.state_dict())
    assert len(set(opened)) == 2
    assert len(opened) < num_weights, "for names, types, shapes and values together"
    few = len(opened)
    monkeypatch.setattr("bigmodel.model.huggingface.folder.OPEN_BYTES", 0)
    for name in weights:
        weights.read(name)
    assert len(opened) - few >= num_weights - 1, "each weight exceeds 0 bytes"
