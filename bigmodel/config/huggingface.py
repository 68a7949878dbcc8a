"""Settings of our model from a Hugging Face config.json, and back.

In: config.json as a table, of a type in `READERS`. Out: `ModelSettings`. The way back writes a config.json for a type
and reads it again: a type can hold a model if every setting comes back. Guarantee: a key or a setting without a
counterpart is an error that names it. `transformers` is not imported; `DEFAULTS` has the values of keys that its
classes let a config.json leave out, compared with transformers by a test.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from bigmodel.config.huggingface_classes import CLASSES_WITH_LABELS, config_of_labels, lacking_for_labels
from bigmodel.config.huggingface_experts import COUNT, differences_of_experts, read_experts, write_experts
from bigmodel.config.huggingface_rope import read_rope, write_rope
from bigmodel.config.huggingface_values import check_values
from bigmodel.config.model_settings import DRAWN, ModelSettings
from bigmodel.config.sections import UserError, explain

Config = Mapping[str, Any]

# Our names of their activations, in both directions; the last of equal ones is written.
ACTIVATIONS = {
    "swish": "silu", "silu": "silu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_erf",
    "relu": "relu",
}  # fmt: skip
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "dots1": "Dots1ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "bert": "BertModel",
    "modernbert": "ModernBertModel",
}
KINDS = {"encoder_decoder": ("t5", "mt5"), "encoder": ("bert", "modernbert")}  # the others are decoders
DECODER_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11_008,
    "max_position_embeddings": 2048,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta_default": 10_000.0, "attention_bias": False,
    "mlp_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "intermediate_size": 22_016, "num_key_value_heads": 32, "max_position_embeddings": 32_768,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
GEMMA: dict[str, Any] = {
    "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 9216, "max_position_embeddings": 8192,
    "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "tie_word_embeddings": True,
}  # fmt: skip
T5: dict[str, Any] = {
    "d_model": 512, "d_kv": 64, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": DECODER_DEFAULTS,
    "mistral": DECODER_DEFAULTS | {
        "num_key_value_heads": 8, "sliding_window": 4096, "intermediate_size": 14_336,
        "max_position_embeddings": 131_072,
    },
    "qwen2": DECODER_DEFAULTS | QWEN,
    "qwen3": DECODER_DEFAULTS | QWEN | {"head_dim": 128},
    "olmo2": DECODER_DEFAULTS | {"rms_norm_eps": 1e-5},
    "olmo3": DECODER_DEFAULTS | {"rms_norm_eps": 1e-5, "sliding_window": 4096},
    "gemma2": DECODER_DEFAULTS | GEMMA | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "gemma3_text": DECODER_DEFAULTS | GEMMA | {
        "rope_theta_default": 1_000_000.0, "rope_local_base_freq": 10_000.0, "max_position_embeddings": 131_072,
    },
    "phi3": DECODER_DEFAULTS | {
        "rms_norm_eps": 1e-5, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
    },
    "mixtral": DECODER_DEFAULTS | {
        "num_key_value_heads": 8, "intermediate_size": 14_336, "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5, "rope_theta_default": 1_000_000.0, "num_local_experts": 8, "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
    },
    "qwen3_moe": DECODER_DEFAULTS | {
        "hidden_size": 2048, "num_hidden_layers": 24, "num_key_value_heads": 4, "intermediate_size": 6144,
        "max_position_embeddings": 32_768, "use_sliding_window": False, "sliding_window": 4096, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001, "decoder_sparse_step": 1, "mlp_only_layers": (),
    },
    "olmoe": DECODER_DEFAULTS | {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "intermediate_size": 2048,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8,
        "norm_topk_prob": False, "router_aux_loss_coef": 0.01,
    },
    "dots1": DECODER_DEFAULTS | {
        "hidden_size": 4608, "num_hidden_layers": 62, "num_key_value_heads": 32, "intermediate_size": 10_944,
        "sliding_window": 4096, "max_window_layers": 62, "moe_intermediate_size": 1408, "norm_topk_prob": False,
        "routed_scaling_factor": 1.0, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1,
    },
    "glm4_moe": DECODER_DEFAULTS | {
        "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8, "intermediate_size": 10_944,
        "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "partial_rotary_factor_default": 0.5,
        "use_qk_norm": False, "moe_intermediate_size": 1408, "num_experts_per_tok": 8, "n_shared_experts": 1,
        "n_routed_experts": 128, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "norm_topk_prob": True,
    },
    "t5": T5 | {
        "d_ff": 2048, "num_layers": 6, "num_heads": 8, "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
    },
    "mt5": T5 | {
        "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "bert": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2, "max_position_embeddings": 512,
        "position_embedding_type": "absolute",
    },
    "modernbert": {
        "hidden_size": 768, "num_hidden_layers": 22, "num_attention_heads": 12, "intermediate_size": 1152,
        "hidden_activation": "gelu", "norm_eps": 1e-5, "norm_bias": False, "global_rope_theta": 160_000.0,
        "local_rope_theta": 10_000.0, "attention_bias": False, "mlp_bias": False, "global_attn_every_n_layers": 3,
        "local_attention": 128,
    },
}  # fmt: skip
# What sets a type apart, in our settings.
OLMO = {"norm_placement": "output", "qk_norm": True, "qk_norm_over": "all_heads"}
FIXED: dict[str, dict[str, Any]] = {
    "qwen2": {"attention_bias": "qkv"},
    "qwen3": {"qk_norm": True},
    "olmo2": OLMO,
    "olmo3": OLMO,
    "gemma2": {"norm_placement": "sandwich", "zero_centered_norm": True},
    "gemma3_text": {"norm_placement": "sandwich", "zero_centered_norm": True, "qk_norm": True},
    "qwen3_moe": {"qk_norm": True},
    "olmoe": {"qk_norm": True, "qk_norm_over": "all_heads"},
    "dots1": {"qk_norm": True},
}
WITHOUT_WINDOW = ("llama", "olmo2", "olmoe", "glm4_moe")
FULL_EVERY = {"gemma2": 2, "gemma3_text": 6, "olmo3": 4}  # where layer_types is absent
PARTLY_ROTATED = ("phi3", "glm4_moe")  # the other classes rotate whole heads, whatever partial_rotary_factor says
# Types that are asked for, and what of them has no counterpart.
LATENT = "its attention, by latent vectors (MLA), has no counterpart in our model; dots1 and glm4_moe have its experts"
NOT_READ = dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2"), LATENT)
# A config.json does not hold them; the rows of the vocabulary are the embedding's.
NOT_OF_THE_MODEL = (
    "from", *DRAWN, "num_mtp_modules", "mtp_loss_weight", "min_vocabulary", "vocabulary_multiple", "vectors",
    "vectors_absent",
)  # fmt: skip


def read_config(config: Config) -> ModelSettings:
    """`config`: as `model.config.to_dict()` or config.json. Raises `UserError` for other types of models, and for keys
    that our model lacks."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        if isinstance(kind, str) and kind in NOT_READ:
            raise UserError(f"model_type = {kind!r}: cannot be read: {NOT_READ[kind]}")
        raise UserError(f"model_type = {kind!r}: cannot be read; types read: {', '.join(DEFAULTS)}")
    if config.get("quantization_config"):
        raise UserError(f"quantization_config = {config['quantization_config']!r}: quantized weights cannot be read")
    check_values(config, DEFAULTS[kind])
    full = DEFAULTS[kind] | {name: value for name, value in config.items() if value is not None or name in NULLABLE}
    try:
        return READERS.get(kind, _read_decoder)(full)
    except ValidationError as error:
        raise UserError(f"config.json of a {kind}: {explain(error, ModelSettings)}") from None
    except KeyError as error:
        raise UserError(f"config.json of a {kind}: {error.args[0]} is missing") from None


def write_config(kind: str, settings: ModelSettings, vocabulary: int, max_positions: int) -> dict[str, Any]:
    """A config.json of that type. Settings that the type lacks are lost: `differences` names them."""
    theirs = WRITERS.get(kind, _write_decoder)(kind, settings)
    theirs |= {"model_type": kind, "architectures": [CLASSES[kind]], "vocab_size": vocabulary}
    theirs |= config_of_labels(kind, settings.classification) if settings.classification else {}
    return theirs if kind in ("t5", "mt5") else {"max_position_embeddings": max_positions} | theirs


def class_of(kind: str, settings: ModelSettings) -> str:
    """The name of the class that loads an export."""
    return CLASSES_WITH_LABELS[kind] if settings.classification else CLASSES[kind]


def differences(kind: str, settings: ModelSettings) -> list[str]:
    """The settings that a config.json of that type cannot hold, as "model.name = value"."""
    if settings.classification:
        body = settings.with_classes_of(None)
        bodies = [body.model_copy(update={"tied_embeddings": tied}) for tied in (True, False)]  # of no effect here
        lacking = min((differences(kind, one) for one in bodies), key=len)
        return lacking + lacking_for_labels(kind, settings.classification)
    if (kind in COUNT) != (settings.experts is not None):
        return [f"model.experts.count = {settings.experts.count}" if settings.experts else "a model without experts"]
    try:
        read = read_config(write_config(kind, settings, 1, settings.max_positions or 1))
    except (UserError, ValueError):
        return ["model.kind"]
    ours, back = settings.model_dump(exclude={"experts"}), read.model_dump(exclude={"experts"})
    if kind not in PARTLY_ROTATED:
        back["rotary_fraction"] = 1.0
    if kind in ("t5", "mt5"):  # transformers 4 scales the output if and only if it is tied; 5 never scales mT5's
        back["logit_scale"] = settings.hidden_size**-0.5 if settings.tied_embeddings else 1.0
        back["tied_embeddings"] = settings.tied_embeddings and kind == "t5"
    if settings.experts and not settings.experts.first_dense_layers:  # no layer has it
        back["intermediate_size"] = settings.intermediate_size
    for table in (ours, back):
        table["head_dim"] = table["head_dim"] or table["hidden_size"] // table["num_heads"]
        for name in ENCODER_SIZES if table["kind"] == "encoder_decoder" else ():
            table[f"encoder_{name}"] = table[f"encoder_{name}"] or table[name]
    return [
        f"model.{name} = {value!r}"
        for name, value in ours.items()
        if value != back[name] and name not in NOT_OF_THE_MODEL
    ] + differences_of_experts(settings, read)


def refuse_recurrent(settings: ModelSettings) -> None:
    """Raise `UserError` for a model that no Hugging Face type is like."""
    if settings.is_recurrent:
        raise UserError(
            f"model.kind = {settings.kind!r}: transformers has no recurrent language model of this form, so it cannot "
            "be exported; `bigmodel generate`, `evaluate` and `serve` read the run directory"
        )


def fitting_type(settings: ModelSettings, preferred: str = "") -> str:
    """The type that holds this model, the preferred one if it does. Raises `UserError` that names what the nearest
    type lacks."""
    refuse_recurrent(settings)
    lacking = {
        kind: differences(kind, settings) for kind in dict.fromkeys([*([preferred] if preferred else []), *CLASSES])
    }
    fitting = [kind for kind, lacks in lacking.items() if not lacks]
    if fitting:
        return fitting[0]
    decoders = [kind for kind in CLASSES if (kind in COUNT) == (settings.experts is not None)]
    of_its_kind = KINDS.get(settings.kind) or [kind for kind in decoders if kind not in sum(KINDS.values(), ())]
    nearest = min(of_its_kind, key=lambda kind: len(lacking[kind]))
    raise UserError(
        f"{', '.join(lacking[nearest])}: no Hugging Face class has it; the nearest is {CLASSES[nearest]}; "
        f"types written: {', '.join(CLASSES)}"
    )


# ---- decoders -------------------------------------------------------------------------------------------------


def _read_decoder(config: Config) -> ModelSettings:
    kind, heads = config["model_type"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    window, rope = _read_window(config), read_rope(config)
    if window and rope["rope_scaling"] and kind in ("qwen2", "qwen3", "mistral", "phi3", *COUNT):
        theirs = config.get("rope_scaling") or config.get("rope_parameters")
        raise UserError(
            f"rope_scaling = {theirs} with sliding_window = {config['sliding_window']}: our "
            f"sliding layers do not scale rotary positions, those of {kind} do; convert a model with only one of them"
        )
    settings = rope | window | {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": 0 if head_dim * heads == config["hidden_size"] else head_dim,
        "intermediate_size": config["intermediate_size"],
        "activation": _activation(config, "hidden_activation" if kind.startswith("gemma") else "hidden_act"),
        "attention_bias": ("qkv" if kind == "glm4_moe" else "all") if config["attention_bias"] else "none",
        "feed_forward_bias": config["mlp_bias"],
        "norm_epsilon": config["rms_norm_eps"],
        "tied_embeddings": config["tie_word_embeddings"],
    }  # fmt: skip
    if kind.startswith("gemma"):
        if config.get("use_bidirectional_attention"):
            raise UserError("use_bidirectional_attention = true: our decoders are causal")
        settings |= {
            "embedding_scale": math.sqrt(config["hidden_size"]),
            "attention_scale": _scale(config["query_pre_attn_scalar"], head_dim),
            "attention_softcap": config.get("attn_logit_softcapping") or 0.0,
            "logit_softcap": config.get("final_logit_softcapping") or 0.0,
        }
    if kind == "glm4_moe":
        settings["qk_norm"] = config["use_qk_norm"]
    if not window:
        settings.pop("sliding_rope_theta", None)
    return ModelSettings(**settings | FIXED.get(kind, {}) | read_experts(config))


def _write_decoder(kind: str, settings: ModelSettings) -> dict[str, Any]:
    theirs = write_rope(settings) | {
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "num_key_value_heads": settings.num_kv_heads,
        "head_dim": settings.resolved_head_dim,
        "hidden_act": _their_activation(settings.activation),
        "rms_norm_eps": settings.norm_epsilon,
        "attention_bias": settings.attention_bias == "all",
        "mlp_bias": settings.feed_forward_bias,
        "tie_word_embeddings": settings.tied_embeddings,
    }
    if kind != "llama" and not theirs["mlp_bias"]:
        del theirs["mlp_bias"]
    if kind in ("mistral", "qwen2", "phi3", "mixtral"):
        del theirs["attention_bias"]
    if kind == "olmoe":
        del theirs["head_dim"]
    if kind == "glm4_moe":
        theirs |= {
            "attention_bias": settings.attention_bias == "qkv",
            "partial_rotary_factor": settings.rotary_fraction,
            "use_qk_norm": settings.qk_norm,
        }
    if kind == "phi3" and settings.resolved_head_dim * settings.num_heads == settings.hidden_size:
        del theirs["head_dim"]
    if kind.startswith("gemma"):
        theirs |= {
            "hidden_activation": theirs.pop("hidden_act"),
            "query_pre_attn_scalar": round((settings.attention_scale or settings.resolved_head_dim**-0.5) ** -2),
            "attn_logit_softcapping": settings.attention_softcap or None,
            "final_logit_softcapping": settings.logit_softcap or None,
        }
    if kind == "gemma3_text":
        theirs["rope_local_base_freq"] = settings.sliding_rope_theta or settings.rope_theta
    if kind == "olmo3":  # transformers 5.24 reads `rope_theta` for full-attention layers only; this has both
        of_full = {"rope_type": "default", "rope_theta": settings.rope_theta} | (theirs["rope_scaling"] or {})
        of_sliding = {"rope_type": "default", "rope_theta": settings.rope_theta}
        theirs["rope_parameters"] = {"full_attention": of_full, "sliding_attention": of_sliding}
    return theirs | _write_window(kind, settings) | write_experts(kind, settings)


def _read_window(config: Config) -> dict[str, int]:
    """sliding_window, full_attention_every and first_full_attention."""
    kind, layers, window = config["model_type"], config["num_hidden_layers"], config.get("sliding_window")
    may_slide = config["use_sliding_window"] if kind.startswith("qwen") else kind not in WITHOUT_WINDOW
    if not window or not may_slide:
        if config.get("use_sliding_window") and kind == "llama":
            raise UserError("use_sliding_window = True: Llama has no sliding layers")
        return {}
    kinds = config.get("layer_types")
    if not kinds and kind in ("qwen2", "qwen3", "dots1"):
        kinds = _pattern(layers, lambda number: number <= config["max_window_layers"])
    elif not kinds:
        every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or FULL_EVERY.get(kind, 0)
        kinds = _pattern(layers, lambda number: every > 0 and number % every == 0)
    return _from_pattern(window, kinds)


def _pattern(layers: int, is_full: Callable[[int], bool]) -> list[str]:
    return ["full_attention" if is_full(number) else "sliding_attention" for number in range(1, layers + 1)]


def _from_pattern(window: int, kinds: list[str]) -> dict[str, int]:
    full = [number for number, kind in enumerate(kinds, 1) if kind == "full_attention"]
    if len(full) == len(kinds):
        return {}
    if not full:
        return {"sliding_window": window}
    every = full[1] - full[0] if full[1:] else full[0]
    if full != list(range(full[0], len(kinds) + 1, every)) or full[0] > every:
        raise UserError(
            f"layer_types = {kinds}: our model has full attention in every k-th layer (model.full_attention_every) or "
            "in none"
        )
    first = {} if full[0] == every else {"first_full_attention": full[0]}
    return {"sliding_window": window, "full_attention_every": every, **first}


def _write_window(kind: str, settings: ModelSettings) -> dict[str, Any]:
    every, first = settings.full_attention_every, settings.first_full_attention
    window = settings.sliding_window or None
    if kind in WITHOUT_WINDOW:
        return {}
    if kind in ("mistral", "phi3", "mixtral", "qwen3_moe"):
        return {"sliding_window": window} | ({"use_sliding_window": bool(window)} if kind == "qwen3_moe" else {})
    kinds = _pattern(
        settings.num_layers,
        lambda number: not window or (every > 0 and number >= first and (number - first) % every == 0),
    )
    used = {"use_sliding_window": bool(window), "max_window_layers": 0} if kind in ("qwen2", "qwen3") else {}
    return used | {"sliding_window": window, "layer_types": kinds}


# ---- encoder-decoders -----------------------------------------------------------------------------------------


def _read_t5(config: Config) -> ModelSettings:
    gate, _, name = config["feed_forward_proj"].rpartition("-")
    activation = "gelu_new" if (gate, name) == ("gated", "gelu") else name
    width, heads = config["d_model"], config["num_heads"]
    return ModelSettings(
        kind="encoder_decoder",
        num_layers=config.get("num_decoder_layers") or config["num_layers"],
        encoder_num_layers=config["num_layers"],
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=0 if heads * config["d_kv"] == width else config["d_kv"],
        intermediate_size=config["d_ff"],
        activation=_activation({"feed_forward_proj": activation}, "feed_forward_proj"),
        gated=gate == "gated",
        position_embedding="relative_bias",
        relative_buckets=config["relative_attention_num_buckets"],
        relative_distance=config["relative_attention_max_distance"],
        attention_scale=1.0,
        norm_epsilon=config["layer_norm_epsilon"],
        tied_embeddings=config["tie_word_embeddings"],
        logit_scale=width**-0.5 if _t5_scales_its_output(config) else 1.0,
    )


def _t5_scales_its_output(config: Config) -> bool:
    """Whether the decoder's output is divided by sqrt(d_model) before the output matrix, as in version 1.0.

    In transformers 4 `tie_word_embeddings` says so. 5 writes `true` into every file; T5 then has a key of its own for
    the scale, and mT5 never scales.
    """
    if "scale_decoder_outputs" in config:
        return bool(config["scale_decoder_outputs"])
    version = str(config.get("transformers_version", "")).partition(".")[0]
    if config["model_type"] == "mt5" and version.isdecimal() and int(version) >= 5:
        return False
    return bool(config["tie_word_embeddings"])


def _write_t5(kind: str, settings: ModelSettings) -> dict[str, Any]:
    activation = {"gelu": "gelu"}.get(settings.activation, _their_activation(settings.activation))
    return {
        "d_model": settings.hidden_size,
        "d_kv": settings.resolved_head_dim,
        "d_ff": settings.intermediate_size,
        "num_layers": settings.encoder.num_layers,
        "num_decoder_layers": settings.num_layers,
        "num_heads": settings.num_heads,
        "feed_forward_proj": f"gated-{activation}" if settings.gated else activation,
        "relative_attention_num_buckets": settings.relative_buckets,
        "relative_attention_max_distance": settings.relative_distance,
        "layer_norm_epsilon": settings.norm_epsilon,
        "tie_word_embeddings": settings.tied_embeddings,
        "scale_decoder_outputs": settings.logit_scale != 1.0,
        "is_encoder_decoder": True,
        "dropout_rate": settings.dropout,
    }


# ---- encoders -------------------------------------------------------------------------------------------------


def _read_bert(config: Config) -> ModelSettings:
    if config["position_embedding_type"] != "absolute":
        raise UserError(f"position_embedding_type = {config['position_embedding_type']!r}: only 'absolute' can be read")
    return ModelSettings(
        kind="encoder",
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        intermediate_size=config["intermediate_size"],
        position_embedding="learned",
        max_positions=config["max_position_embeddings"],
        attention_bias="all",
        activation=_activation(config, "hidden_act"),
        gated=False,
        feed_forward_bias=True,
        norm="layer",
        norm_placement="post",
        embedding_norm=True,
        num_token_types=config["type_vocab_size"],
        norm_epsilon=config["layer_norm_eps"],
        tied_embeddings=True,
    )


def _write_bert(kind: str, settings: ModelSettings) -> dict[str, Any]:
    return {
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "intermediate_size": settings.intermediate_size,
        "hidden_act": _their_activation(settings.activation),
        "max_position_embeddings": settings.max_positions,
        "type_vocab_size": settings.num_token_types,
        "layer_norm_eps": settings.norm_epsilon,
        "hidden_dropout_prob": settings.dropout,
        "attention_probs_dropout_prob": settings.attention_dropout,
        "tie_word_embeddings": settings.tied_embeddings,
    }


def _read_modernbert(config: Config) -> ModelSettings:
    new = config.get("rope_parameters") or {}
    thetas = {side: (new.get(f"{side}_attention") or {}).get("rope_theta") for side in ("full", "sliding")}
    layers, every = config["num_hidden_layers"], config["global_attn_every_n_layers"]
    kinds = config.get("layer_types") or _pattern(layers, lambda number: (number - 1) % every == 0)
    window = _from_pattern(config["local_attention"], kinds)
    sliding = {"sliding_rope_theta": thetas["sliding"] or config["local_rope_theta"]} if window else {}
    return ModelSettings(
        kind="encoder",
        num_layers=layers,
        hidden_size=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        intermediate_size=config["intermediate_size"],
        rope_theta=thetas["full"] or config["global_rope_theta"],
        attention_bias="all" if config["attention_bias"] else "none",
        activation=_activation(config, "hidden_activation"),
        feed_forward_bias=config["mlp_bias"],
        norm="layer",
        norm_bias=config["norm_bias"],
        embedding_norm=True,
        norm_epsilon=config["norm_eps"],
        tied_embeddings=True,
        **window,
        **sliding,
    )


def _write_modernbert(kind: str, settings: ModelSettings) -> dict[str, Any]:
    return {
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": settings.num_heads,
        "intermediate_size": settings.intermediate_size,
        "hidden_activation": _their_activation(settings.activation),
        "norm_eps": settings.norm_epsilon,
        "norm_bias": settings.norm_bias,
        "global_rope_theta": settings.rope_theta,
        "local_rope_theta": settings.sliding_rope_theta or settings.rope_theta,
        "attention_bias": settings.attention_bias == "all",
        "mlp_bias": settings.feed_forward_bias,
        "global_attn_every_n_layers": settings.full_attention_every or 1,
        "local_attention": settings.sliding_window or 128,
        "tie_word_embeddings": settings.tied_embeddings,
    }


# ---- all ------------------------------------------------------------------------------------------------------

ENCODER_SIZES = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "intermediate_size")  # 0: the decoder's
NULLABLE = ("sliding_window", "final_logit_softcapping", "attn_logit_softcapping")  # null is not the default
READERS: dict[str, Callable[[Config], ModelSettings]] = {
    "t5": _read_t5, "mt5": _read_t5, "bert": _read_bert, "modernbert": _read_modernbert,
}  # fmt: skip
WRITERS: dict[str, Callable[[str, ModelSettings], dict[str, Any]]] = {
    "t5": _write_t5, "mt5": _write_t5, "bert": _write_bert, "modernbert": _write_modernbert,
}  # fmt: skip


def _activation(config: Config, key: str) -> str:
    if config[key] not in ACTIVATIONS:
        raise UserError(f"{key} = {config[key]!r}: our model has {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[config[key]]


def _their_activation(ours: str) -> str:
    return {mine: theirs for theirs, mine in ACTIVATIONS.items()}[ours]


def _scale(query_pre_attn_scalar: float, head_dim: int) -> float:
    return 0.0 if query_pre_attn_scalar == head_dim else query_pre_attn_scalar**-0.5
