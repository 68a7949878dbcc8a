"""Types of values in a Hugging Face config.json, checked before they are computed with.

In: config.json as a table, and the defaults of its type. Guarantee: a value of another type is an error that names the
key and the value. The type of a key is that of its default.
"""

import math
from collections.abc import Mapping
from typing import Any

from bigmodel.config.sections import UserError

NUMBERS = (
    "vocab_size", "num_key_value_heads", "head_dim", "sliding_window", "num_decoder_layers", "partial_rotary_factor",
    "rope_theta", "rope_local_base_freq", "max_position_embeddings", "n_positions", "sliding_window_pattern",
    "_sliding_window_pattern", "attn_logit_softcapping", "final_logit_softcapping", "factor",
    "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
)  # fmt: skip
AT_LEAST_1 = (
    "vocab_size", "num_attention_heads", "num_heads", "head_dim", "d_kv", "global_attn_every_n_layers",
    "decoder_sparse_step", "n_group", "topk_group",
)  # fmt: skip
TABLES = ("rope_scaling", "rope_parameters", "full_attention", "sliding_attention")
NAMES = ("model_type", "rope_type", "type")


def check_values(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raises `UserError` for the first value of a wrong type; tables of rotary positions included."""
    for name, value in config.items():
        if value is None or (wanted := _wanted(name, value, defaults)) == "":
            continue
        raise UserError(f"{name} = {value!r}: config.json must have {wanted} here; correct it, or download it again")
    for name in TABLES:
        if config.get(name):
            check_values(config[name], {})


def _wanted(name: str, value: Any, defaults: Mapping[str, Any]) -> str:
    """What the value should be, in words; empty: it is that."""
    default = defaults.get(name)
    if name in NUMBERS or (isinstance(default, int | float) and not isinstance(default, bool)):
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        lowest = 1 if name in AT_LEAST_1 else 0
        return "" if is_number and value >= lowest else f"a number of at least {lowest}"
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "true or false"
    if name in NAMES or isinstance(default, str):
        return "" if isinstance(value, str) else "a name"
    if name in TABLES:
        return "" if isinstance(value, Mapping) else "a table"
    if name == "mlp_only_layers":
        is_list = isinstance(value, list | tuple) and all(isinstance(layer, int) for layer in value)
        return "" if is_list else "a list of numbers of layers"
    if name == "layer_types":
        is_list = isinstance(value, list | tuple) and all(isinstance(kind, str) for kind in value)
        return "" if is_list else "a list of names"
    return ""
