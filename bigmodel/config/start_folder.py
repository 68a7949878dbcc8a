"""A run file that starts from a Hugging Face folder (`model.from`): its config.json completes [model].

In: a run file's table. Out: the table with the model settings of the folder's config.json under those of the run file,
and the folder's tokenizer where the run file has none. Guarantee: a setting that decides the shape of a weight equals
the folder's. Other settings of the run file apply: dropout, windows, rotary positions, multi-token prediction.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigmodel.config.huggingface import read_config
from bigmodel.config.user_error import UserError

SHAPES = (
    "kind", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size",
    "encoder_num_layers", "encoder_hidden_size", "encoder_num_heads", "encoder_num_kv_heads",
    "encoder_intermediate_size", "source_attention", "separate_embeddings", "position_embedding", "max_positions",
    "relative_buckets", "attention_bias", "gated", "feed_forward_bias", "norm", "norm_bias", "norm_placement",
    "embedding_norm", "num_token_types", "qk_norm", "qk_norm_over", "tied_embeddings",
)  # fmt: skip
MAY_UNTIE = ("t5", "mt5")  # transformers 5 writes `tie_word_embeddings = true` for any T5: the weights decide


def completed(table: Mapping[str, Any], origin: Path) -> dict[str, Any]:
    """Raises `UserError` for a folder without a readable config.json, and for settings that contradict it."""
    model = table.get("model")
    folder = model.get("from") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(folder, str) or not folder:
        return dict(table)
    try:
        config = read_config_json(Path(folder))
        theirs = read_config(config)
    except UserError as error:
        raise UserError(f"{origin}: model.from = {json.dumps(folder)}: {error}") from None
    fixed = [name for name in SHAPES if name != "tied_embeddings" or config["model_type"] not in MAY_UNTIE]
    different = [name for name in fixed if name in model and model[name] != getattr(theirs, name)]
    if different:
        listed = "; ".join(f"model.{name} = {model[name]!r} (there {getattr(theirs, name)!r})" for name in different)
        raise UserError(f"{origin}: {listed}: not the model of model.from = {json.dumps(folder)}; leave them out")
    settings = theirs.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    done = {**table, "model": settings | {"min_vocabulary": config.get("vocab_size", 0)} | model}
    prepare = table.get("prepare", {})
    has_own = not isinstance(prepare, dict) or {"tokenizer", "vocabulary"} & set(prepare)
    if not has_own and (Path(folder) / "tokenizer.json").is_file():
        done["prepare"] = {**prepare, "tokenizer": folder}
    return done


def read_config_json(folder: Path) -> dict[str, Any]:
    """Raises `UserError` if it is missing or no JSON object."""
    path = folder / "config.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}; name a folder of a Hugging Face model") from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: cannot be read: it must be a JSON object")
    return table
