"""Hugging Face models as ours: conversion of settings and weights.

In: the configuration and weights of a Llama, Qwen3 or T5 v1.1 (also Flan-T5, mT5) model, under `transformers`' names.
Out: our settings and weights. Guarantees: every weight goes to one of ours (queries, keys and values are concatenated,
likewise gate and up); a configuration without a counterpart here is an error that names the key.
`transformers` itself is not imported: a state dict and its config.json are enough.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from bigmodel.config.model_settings import ROPE_SCALING_KEYS, ModelSettings, RopeScalingSettings
from bigmodel.config.settings import UserError, explain

Weights = dict[str, Tensor]


def from_transformers(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[ModelSettings, Weights]:
    """`config`: as `model.config.to_dict()` or config.json; `state`: as `model.state_dict()`.

    Raises `UserError` for other kinds of models, and for settings that our model lacks.
    """
    kind = config.get("model_type")
    if kind in ("llama", "qwen3"):
        return _decoder_settings(config), _decoder_weights(config, state)
    if kind in ("t5", "mt5"):
        return _t5_settings(config), _t5_weights(config, state)
    raise UserError(f"model_type = {kind!r}: cannot be read; needed: llama, qwen3, t5 (version 1.1) or mt5")


# ---- Llama and Qwen3 ------------------------------------------------------------------------------------------


def _decoder_settings(config: Mapping[str, Any]) -> ModelSettings:
    _refuse(config, attention_bias=False, mlp_bias=False, hidden_act="silu")
    if config["model_type"] == "llama":
        _refuse(config, use_sliding_window=False)
    rotary = {"rope_theta": config.get("rope_theta", 10_000.0)} | (config.get("rope_parameters") or {})  # from 5 on
    scaling = rope_scaling(config.get("rope_scaling") or rotary, config.get("max_position_embeddings", 0))
    window = _window(config)
    if scaling and window:
        raise UserError(
            f"rope_scaling = {config.get('rope_scaling') or rotary} with sliding_window = {config['sliding_window']}: "
            "our sliding layers do not scale rotary positions, Qwen3's do; convert a model with only one of the two"
        )
    return ModelSettings(
        **window,
        rope_scaling=scaling,
        rotary_fraction=rotary.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=config.get("head_dim") or 0,
        intermediate_size=config["intermediate_size"],
        rope_theta=rotary["rope_theta"],
        norm_epsilon=config["rms_norm_eps"],
        tied_embeddings=config["tie_word_embeddings"],
        qk_norm=config["model_type"] == "qwen3",
    )


def rope_scaling(theirs: Mapping[str, Any], max_position_embeddings: int = 0) -> RopeScalingSettings | None:
    """From `rope_scaling`, or `rope_parameters` of newer versions; None: positions are not scaled."""
    kind = theirs.get("rope_type") or theirs.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ROPE_SCALING_KEYS:
        raise UserError(f"rope_scaling = {dict(theirs)}: cannot be read; kinds read: {', '.join(ROPE_SCALING_KEYS)}")
    table = {name: theirs.get(name) for name in ("factor", *ROPE_SCALING_KEYS[kind])}
    if kind == "yarn":
        table["original_max_position_embeddings"] = table["original_max_position_embeddings"] or max_position_embeddings
        table["attention_factor"] = table["attention_factor"] or _yarn_attention_factor(theirs)
    try:
        return RopeScalingSettings(kind=kind, **{name: value for name, value in table.items() if value is not None})
    except ValidationError as error:
        raise UserError(f"rope_scaling = {dict(theirs)}: {explain(error, RopeScalingSettings)}") from None


def _yarn_attention_factor(theirs: Mapping[str, Any]) -> float:
    """From DeepSeek's `mscale` and `mscale_all_dim`; 0 (the default, here and there) unless both are given."""
    scales = theirs.get("mscale"), theirs.get("mscale_all_dim")
    if not all(scales):
        return 0.0
    own, of_all = (0.1 * float(scale or 0) * math.log(theirs["factor"]) + 1.0 for scale in scales)
    return own / of_all


def _window(config: Mapping[str, Any]) -> dict[str, int]:
    """sliding_window and full_attention_every, from Qwen3's `layer_types`, in older files from `max_window_layers`."""
    if not config.get("use_sliding_window") or not config.get("sliding_window"):
        return {}
    layers, first = config["num_hidden_layers"], config.get("max_window_layers", 28)  # Qwen3's default
    kinds = config.get("layer_types") or [
        "full_attention" if layer < first else "sliding_attention" for layer in range(layers)
    ]
    full = [number for number, kind in enumerate(kinds, 1) if kind == "full_attention"]
    if len(full) == layers:
        return {}
    every = full[0] if full else 0
    if full != [number for number in range(1, layers + 1) if every and number % every == 0]:
        raise UserError(
            f"layer_types = {kinds}: our model has full attention in every k-th layer (model.full_attention_every) or "
            "in none"
        )
    return {"sliding_window": config["sliding_window"], "full_attention_every": every}


def _decoder_weights(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Weights:
    weights = {"embedding.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"]}
    if not config["tie_word_embeddings"]:
        weights["head.weight"] = state["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{layer}.", f"blocks.{layer}."
        weights |= {
            f"{ours}attention_norm.weight": state[f"{theirs}input_layernorm.weight"],
            f"{ours}attention.query_key_value.weight": _joined(
                state, f"{theirs}self_attn.", "q_proj", "k_proj", "v_proj"
            ),
            f"{ours}attention.output.weight": state[f"{theirs}self_attn.o_proj.weight"],
            f"{ours}feed_forward_norm.weight": state[f"{theirs}post_attention_layernorm.weight"],
            f"{ours}feed_forward.gate_up.weight": _joined(state, f"{theirs}mlp.", "gate_proj", "up_proj"),
            f"{ours}feed_forward.down.weight": state[f"{theirs}mlp.down_proj.weight"],
        }
        if config["model_type"] == "qwen3":
            weights[f"{ours}attention.query_norm.weight"] = state[f"{theirs}self_attn.q_norm.weight"]
            weights[f"{ours}attention.key_norm.weight"] = state[f"{theirs}self_attn.k_norm.weight"]
    return weights


# ---- T5 -------------------------------------------------------------------------------------------------------


def _t5_settings(config: Mapping[str, Any]) -> ModelSettings:
    if config["model_type"] == "t5":  # a missing key means version 1.0, which is refused; mT5's defaults are as needed
        config = {"feed_forward_proj": "relu", "tie_word_embeddings": True} | dict(config)
    _refuse(config, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    return ModelSettings(
        kind="encoder_decoder",
        num_layers=config.get("num_decoder_layers") or config["num_layers"],
        encoder_num_layers=config["num_layers"],
        hidden_size=config["d_model"],
        num_heads=config["num_heads"],
        num_kv_heads=config["num_heads"],
        head_dim=config["d_kv"],
        intermediate_size=config["d_ff"],
        activation="gelu",
        position_embedding="relative_bias",
        relative_buckets=config["relative_attention_num_buckets"],
        relative_distance=config.get("relative_attention_max_distance", 128),
        attention_scale=1.0,
        norm_epsilon=config["layer_norm_epsilon"],
    )


def _t5_weights(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Weights:
    weights = {"embedding.weight": state["shared.weight"], "head.weight": state["lm_head.weight"]}
    sides = (
        ("encoder.", "encoder.", config["num_layers"]),
        ("decoder.", "", config.get("num_decoder_layers") or config["num_layers"]),
    )
    for side, ours, layers in sides:
        bias = f"{side}block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        weights[f"{ours}relative_bias.weight"] = state[bias]
        weights[f"{ours}norm.weight"] = state[f"{side}final_layer_norm.weight"]
        for layer in range(layers):
            weights |= _t5_block(state, f"{side}block.{layer}.layer.", f"{ours}blocks.{layer}.", side == "decoder.")
    return weights


def _t5_block(state: Mapping[str, Tensor], theirs: str, ours: str, crosses: bool) -> Weights:
    last = 2 if crosses else 1
    weights = {
        f"{ours}attention_norm.weight": state[f"{theirs}0.layer_norm.weight"],
        f"{ours}attention.query_key_value.weight": _joined(state, f"{theirs}0.SelfAttention.", "q", "k", "v"),
        f"{ours}attention.output.weight": state[f"{theirs}0.SelfAttention.o.weight"],
        f"{ours}feed_forward_norm.weight": state[f"{theirs}{last}.layer_norm.weight"],
        f"{ours}feed_forward.gate_up.weight": _joined(state, f"{theirs}{last}.DenseReluDense.", "wi_0", "wi_1"),
        f"{ours}feed_forward.down.weight": state[f"{theirs}{last}.DenseReluDense.wo.weight"],
    }
    if crosses:
        weights |= {
            f"{ours}cross_attention_norm.weight": state[f"{theirs}1.layer_norm.weight"],
            f"{ours}cross_attention.query.weight": state[f"{theirs}1.EncDecAttention.q.weight"],
            f"{ours}cross_attention.key_value.weight": _joined(state, f"{theirs}1.EncDecAttention.", "k", "v"),
            f"{ours}cross_attention.output.weight": state[f"{theirs}1.EncDecAttention.o.weight"],
        }
    return weights


def _joined(state: Mapping[str, Tensor], prefix: str, *names: str) -> Tensor:
    return torch.cat([state[f"{prefix}{name}.weight"] for name in names])


def _refuse(config: Mapping[str, Any], **needed: Any) -> None:
    for name, value in needed.items():
        if config.get(name, value) != value:
            raise UserError(f"{name} = {config[name]!r}: our model supports only {value!r}")
