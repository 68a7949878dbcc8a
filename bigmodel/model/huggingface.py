"""Hugging Face models as ours: their config.json, and their folders.

In: the configuration and weights of a Llama, Qwen3 or T5 v1.1 (also Flan-T5, mT5) model, as `transformers` 4 and 5
write them. Out: our settings and weights. Guarantees: a key that is left out has the default of its configuration class
(`DEFAULTS`); a configuration without a counterpart here is an error that names the key; of the weights none is dropped
(`bigmodel.model.huggingface_weights`). `transformers` itself is not imported.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bigmodel.config.model_settings import ROPE_SCALING_KEYS, ModelSettings, RopeScalingSettings
from bigmodel.config.settings import UserError, explain
from bigmodel.model.huggingface_weights import Weights, convert_weights, head_differs, listed

# Of the configuration classes, the same in transformers 4.57 and 5.24 (where not, see `_t5_scales_its_output`).
DECODER_DEFAULTS = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip
T5_DEFAULTS = {
    "d_model": 512, "d_kv": 64, "num_decoder_layers": None, "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": DECODER_DEFAULTS | {
        "intermediate_size": 11_008, "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048,
        "mlp_bias": False,
    },
    "qwen3": DECODER_DEFAULTS | {
        "intermediate_size": 22_016, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32_768,
        "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
    },
    "t5": T5_DEFAULTS | {
        "d_ff": 2048, "num_layers": 6, "num_heads": 8, "feed_forward_proj": "relu", "tie_word_embeddings": True,
    },
    "mt5": T5_DEFAULTS | {
        "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    },
}  # fmt: skip
ROPE_THETA = 10_000.0  # of both decoders


def from_transformers(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[ModelSettings, Weights]:
    """`config`: as `model.config.to_dict()` or config.json; `state`: as `model.state_dict()`.

    Raises `UserError` for other kinds of models, for settings that our model lacks, and for weights that do not fit.
    """
    settings = settings_of(config)
    if settings.kind == "encoder_decoder" and settings.tied_embeddings and head_differs(state, "shared.weight"):
        settings = settings.model_copy(update={"tied_embeddings": False})  # transformers 5 writes `true` for both
    return settings, convert_weights(settings, state, config.get("vocab_size") or 0)


def read_folder(folder: Path) -> tuple[ModelSettings, Weights]:
    """A folder as `save_pretrained` writes it: config.json, and model.safetensors or shards with their index.

    Reads all weights into memory, in the type that they have in the files. Raises `UserError` with the folder.
    """
    config = _read_json(folder / "config.json")
    try:
        return from_transformers(config, _read_weights(folder))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def settings_of(config: Mapping[str, Any]) -> ModelSettings:
    """Our settings. Raises `UserError` for what our model lacks."""
    kind = config.get("model_type")
    if kind not in DEFAULTS:
        raise UserError(f"model_type = {kind!r}: cannot be read; needed: llama, qwen3, t5 (version 1.1) or mt5")
    _refuse(config, quantization_config=None)
    full = DEFAULTS[kind] | dict(config)
    try:
        return ModelSettings(**(_t5_settings(full) if "t5" in kind else _decoder_settings(full)))
    except ValidationError as error:
        raise UserError(f"config.json of a {kind}: {explain(error, ModelSettings)}") from None


# ---- Llama and Qwen3 ------------------------------------------------------------------------------------------


def _decoder_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    _refuse(config, attention_bias=False, mlp_bias=False, hidden_act="silu")
    if config["model_type"] == "llama":
        _refuse(config, use_sliding_window=False)
    rotary, window = _rotary(config), _window(config)
    scaling = rope_scaling(rotary, config["max_position_embeddings"])
    if scaling and window:
        raise UserError(
            f"rope_scaling = {rotary} with sliding_window = {config['sliding_window']}: our sliding layers do not "
            "scale rotary positions, Qwen3's do; convert a model with only one of the two"
        )
    return {
        **window,
        "rope_scaling": scaling,
        "rotary_fraction": rotary.get("partial_rotary_factor") or 1.0,
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"] or config["num_attention_heads"],
        "head_dim": config["head_dim"] or 0,
        "intermediate_size": config["intermediate_size"],
        "rope_theta": rotary.get("rope_theta") or ROPE_THETA,
        "norm_epsilon": config["rms_norm_eps"],
        "tied_embeddings": config["tie_word_embeddings"],
        "qk_norm": config["model_type"] == "qwen3",
    }


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about rotary positions: transformers 4 writes `rope_scaling`, with `rope_theta` and
    `partial_rotary_factor` beside it; 5 writes all of them into `rope_parameters`, perhaps once per kind of layer.

    Raises `UserError` for two values of one key.
    """
    old, new = (config.get(name) or {} for name in ("rope_scaling", "rope_parameters"))
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        raise UserError(f"rope_scaling = {old!r}, rope_parameters = {new!r}: cannot be read; each is a table or absent")
    tables = [table for kind in ("full_attention", "sliding_attention") if (table := new.get(kind))] or [new]
    beside = {name: config[name] for name in ("rope_theta", "partial_rotary_factor") if config.get(name) is not None}
    found: dict[str, Any] = {}
    for table in (beside, old, *tables):
        for name, value in table.items():
            if found.setdefault(name, value) != value:
                raise UserError(
                    f"{name} = {found[name]!r} and {value!r}: config.json gives two values for rotary positions; our "
                    "model has one for all layers; delete the wrong one"
                )
    return found


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
    if not config.get("use_sliding_window") or not config["sliding_window"]:
        return {}
    layers, first = config["num_hidden_layers"], config["max_window_layers"]
    kinds = config["layer_types"] or [
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


# ---- T5 -------------------------------------------------------------------------------------------------------


def _t5_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    _refuse(config, feed_forward_proj="gated-gelu", scale_decoder_outputs=False)
    if _t5_scales_its_output(config):
        _refuse(config, tie_word_embeddings=False)
    return {
        "kind": "encoder_decoder",
        "num_layers": config["num_decoder_layers"] or config["num_layers"],
        "encoder_num_layers": config["num_layers"],
        "hidden_size": config["d_model"],
        "num_heads": config["num_heads"],
        "num_kv_heads": config["num_heads"],
        "head_dim": config["d_kv"],
        "intermediate_size": config["d_ff"],
        "activation": "gelu",
        "position_embedding": "relative_bias",
        "relative_buckets": config["relative_attention_num_buckets"],
        "relative_distance": config["relative_attention_max_distance"],
        "attention_scale": 1.0,
        "norm_epsilon": config["layer_norm_epsilon"],
        "tied_embeddings": config["tie_word_embeddings"],
    }


def _t5_scales_its_output(config: Mapping[str, Any]) -> bool:
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


# ---- files ----------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: cannot be read: it must be a JSON object")
    return table


def _read_weights(folder: Path) -> Weights:
    index: dict[str, str] = {}
    files = ["model.safetensors"]
    if not (folder / files[0]).exists():
        path = folder / "model.safetensors.index.json"
        if not path.exists():
            raise UserError(
                "neither model.safetensors nor model.safetensors.index.json is there; save the model with "
                "save_pretrained(..., safe_serialization=True)"
            )
        index = _read_index(path)
        files = sorted(set(index.values()))
    state: Weights = {}
    for file in files:
        found = _read_file(folder / file)
        twice, absent = state.keys() & found.keys(), {name for name in index if index[name] == file} - found.keys()
        if twice:
            raise UserError(f"{file} has again {listed(sorted(twice))}; download the folder again")
        if absent:
            raise UserError(f"{file} lacks {listed(sorted(absent))}, which the index names; download it again")
        state |= found
    return state


def _read_index(path: Path) -> dict[str, str]:
    """Weight -> file. A file must lie beside the index."""
    table = _read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{path.name}: weight_map is missing")
    for file in table.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{path.name}: weight_map names {file!r}; it must be a file in this folder")
    return table


def _read_file(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path.name}: cannot be read as safetensors: {error}; download it again") from None


def _refuse(config: Mapping[str, Any], **needed: Any) -> None:
    for name, value in needed.items():
        if config.get(name, value) != value:
            raise UserError(f"{name} = {config[name]!r}: our model supports only {value!r}")
