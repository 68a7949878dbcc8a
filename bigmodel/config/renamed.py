"""Settings renamed in version 0.2; the old names are read until 0.3. Names of other systems, for hints.

A run file with old keys is read with one warning (`bigmodel.config.settings.load_settings`). Files of runs
(settings.json, checkpoints, the identity of a plan) are read under both names without a warning. The identity of a
plan is stored and hashed under the old names, so that runs of version 0.1 can resume.
"""

import re
from collections.abc import Mapping
from typing import Any

# section -> old key -> new key
RENAMED = {
    "data": {
        "pack_tokens": "sequence_length",
        "context_tokens": "max_document_length",
        "source_pack_tokens": "source_sequence_length",
        "source_context_tokens": "max_source_length",
        "pack_documents": "max_documents",
        "window_packs": "packing_buffer",
    },
    "model": {
        "layers": "num_layers",
        "width": "hidden_size",
        "heads": "num_heads",
        "key_value_heads": "num_kv_heads",
        "head_size": "head_dim",
        "feed_forward_width": "intermediate_size",
        "gate": "activation",
        "positions": "position_embedding",
        "extra_heads": "num_mtp_modules",
        "extra_head_weight": "mtp_loss_weight",
        "encoder_layers": "encoder_num_layers",
        "encoder_width": "encoder_hidden_size",
        "encoder_heads": "encoder_num_heads",
        "encoder_key_value_heads": "encoder_num_kv_heads",
        "encoder_feed_forward_width": "encoder_intermediate_size",
    },
    "training": {"packs_per_step": "global_batch_size"},
    "evaluation": {"packs": "sequences"},
}
# What Megatron-LM, torchtitan and Hugging Face call what letters alone do not find: a pattern of the whole name -> the
# remedy.
ELSEWHERE = {
    r"model\.(experts\.)?(num|n)_(local_|routed_)?experts": "set model.experts.count",
    r"model\.(experts\.)?(moe_)?(router_)?(top_?k|num_experts_per_tok(en)?)": "set model.experts.per_token",
    r"model\.(experts\.)?(num|n)_shared_experts": "set model.experts.shared",
    r"model\.experts\.(moe_)?intermediate_size": "set model.experts.width",
    r"training\.(context|sequence)_(model_)?parallel.*": "set training.sequence_parallel_ranks",
    r"training\.pipeline_(model_)?parallel.*": "bigmodel has no pipeline parallelism; see docs/model-parallel.md",
}
NEW_NAMES = {f"{section}.{old}": f"{section}.{new}" for section, keys in RENAMED.items() for old, new in keys.items()}
OLD_NAMES = {new: old for old, new in NEW_NAMES.items()}


def new_keys(section: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """The table of a section under its new keys. Raises ValueError if a key is set under both names."""
    renamed = RENAMED.get(section, {})
    for old, new in renamed.items():
        if old in table and new in table:
            raise ValueError(f"{section}.{old} is the old name of {section}.{new}; both are set: remove the first")
    return {renamed.get(key, key): value for key, value in table.items()}


def remedy_elsewhere(name: str) -> str:
    """What to do instead of a setting that other systems have, by its whole name; empty: none is known."""
    return next((remedy for pattern, remedy in ELSEWHERE.items() if re.fullmatch(pattern, name)), "")


def old_keys_in(table: Mapping[str, Any]) -> list[str]:
    """The old names, as section.key, in the plain values of a run file."""
    return [
        name
        for name in NEW_NAMES
        if isinstance(section := table.get(name.partition(".")[0]), Mapping) and name.partition(".")[2] in section
    ]
