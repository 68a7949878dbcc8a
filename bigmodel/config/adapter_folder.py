"""A run file that continues a peft adapter (`lora.from`): its adapter_config.json completes [lora].

In: a run file's table. Out: the table with the adapter's rank, alpha, rslora, dropout and targets. Guarantees: rank and
scale equal the adapter's; a key that changes the adapter's function and has no counterpart is an error that names it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigmodel.config.json_file import read_json
from bigmodel.config.lora_settings import ALL, PARTS
from bigmodel.config.user_error import UserError

CONFIG = "adapter_config.json"
# Keys of peft 0.21 with their values in an adapter of ours; None and empty values are always accepted.
REQUIRED = {
    "peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "lora_bias": False,
    "modules_to_save": None, "layer_replication": None, "trainable_token_indices": None, "target_parameters": None,
    "use_qalora": False, "use_bdlora": None, "alora_invocation_tokens": None, "arrow_config": None,
    "velora_config": None, "monteclora_config": None, "kasa_config": None,
}  # fmt: skip
FIXED = {"rank": ("r", 8), "alpha": ("lora_alpha", 8), "rslora": ("use_rslora", False)}  # ours: theirs, its default
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights


def with_adapter(table: Mapping[str, Any], origin: Path) -> dict[str, Any]:
    """Raises `UserError` for a folder without an adapter of this kind, and for settings that contradict it."""
    lora = table.get("lora")
    folder = lora.get("from") if isinstance(lora, dict) else None
    if not isinstance(lora, dict) or not isinstance(folder, str) or not folder:
        return dict(table)
    where = f"{origin}: lora.from = {json.dumps(folder)}"
    try:
        config = read_adapter_config(Path(folder))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    theirs = {name: config.get(key, default) for name, (key, default) in FIXED.items()}
    different = [name for name, value in theirs.items() if name in lora and lora[name] != value]
    if different:
        listed = "; ".join(f"lora.{name} = {lora[name]!r} (there {theirs[name]!r})" for name in different)
        raise UserError(f"{where}: {listed}: not that adapter; leave them out")
    done = theirs | {"dropout": config.get("lora_dropout", 0.0)} | lora
    if "targets" not in lora:
        done["targets"] = _targets(config, where)
    return {**table, "lora": done}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Raises `UserError` if it is missing, no JSON object, or an adapter of another kind than ours."""
    path = folder / CONFIG
    config = read_json(path, "name a folder of a peft adapter")
    if not isinstance(config, dict):
        raise UserError(f"{path}: cannot be read: it must be a JSON object")
    for key, value in REQUIRED.items():
        if config.get(key) and config[key] != value:
            raise UserError(f"{path}: {key} = {json.dumps(config[key])}: no adapter of ours; make one without it")
    if str(config.get("init_lora_weights", True)).lower().startswith(CHANGE_THE_BASE):
        raise UserError(
            f"{path}: init_lora_weights = {json.dumps(config['init_lora_weights'])} changes the base model; convert "
            "the adapter first: peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    return config


def _targets(config: Mapping[str, Any], where: str) -> list[str]:
    given = config.get("target_modules")
    names = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    found = list(dict.fromkeys(str(name).rpartition(".")[2] for name in names))
    known = {ALL, *(alias for aliases in PARTS.values() for alias in aliases)}
    if isinstance(given, list) and (others := sorted(set(found) - known)):
        raise UserError(
            f"{where}: target_modules = {json.dumps(given)}: ours are adapters of matrices in blocks, not of "
            f"{', '.join(others)}; make an adapter without them"
        )
    if not found or set(found) - known or config.get("layers_to_transform") is not None:
        raise UserError(
            f"{where}: target_modules = {json.dumps(given)}, layers_to_transform = "
            f"{json.dumps(config.get('layers_to_transform'))}: name the same matrices in lora.targets"
        )
    return found
