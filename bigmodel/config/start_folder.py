"""A run file that starts from a Hugging Face folder or another run (`model.from`), whose settings complete [model].

In: a run file's table. Out: the table with the model settings of config.json, or of the run's newest checkpoint, under
those of the run file, and the folder's or run's tokenizer where the run file has none. Guarantee: a setting that
decides the shape of a weight equals the folder's. Other settings of the run file apply: dropout, windows, rotary
positions, multi-token prediction.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigmodel.config.expert_settings import TRAINING_ONLY, ExpertSettings
from bigmodel.config.huggingface import read_config
from bigmodel.config.json_file import read_json
from bigmodel.config.model_settings import DRAWN, ModelSettings
from bigmodel.config.sections import SAVED, without_effect
from bigmodel.config.user_error import UserError

SHAPES = (
    "kind", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size",
    "encoder_num_layers", "encoder_hidden_size", "encoder_num_heads", "encoder_num_kv_heads",
    "encoder_intermediate_size", "source_attention", "separate_embeddings", "position_embedding", "max_positions",
    "relative_buckets", "attention_bias", "gated", "feed_forward_bias", "norm", "norm_bias", "norm_placement",
    "embedding_norm", "num_token_types", "qk_norm", "qk_norm_over", "tied_embeddings", "peepholes",
)  # fmt: skip

NOT_INHERITED = ("from", *DRAWN, "vectors", "vectors_absent")


def completed(table: Mapping[str, Any], origin: Path) -> dict[str, Any]:
    """Raises `UserError` for a folder without a readable config.json, and for settings that contradict it."""
    model = table.get("model")
    folder = model.get("from") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(folder, str) or not folder:
        return dict(table)
    try:
        theirs, rows, tokenizer = model_of(Path(folder))
    except UserError as error:
        raise UserError(f"{origin}: model.from = {json.dumps(folder)}: {error}") from None
    # transformers 5 writes `tie_word_embeddings = true` for any T5: the weights decide
    may_untie = theirs.position_embedding == "relative_bias" and not is_run(Path(folder))
    fixed = [name for name in SHAPES if name != "tied_embeddings" or not may_untie]
    different = [name for name in fixed if name in model and model[name] != getattr(theirs, name)]
    if "experts" in model and not _has_experts(theirs, model["experts"]):
        raise UserError(
            f"{origin}: model.experts: not those of model.from = {json.dumps(folder)}; leave them out, or change only "
            f"{', '.join(_changeable(theirs))}"
        )
    if different:
        listed = "; ".join(f"model.{name} = {model[name]!r} (there {getattr(theirs, name)!r})" for name in different)
        raise UserError(f"{origin}: {listed}: not the model of model.from = {json.dumps(folder)}; leave them out")
    settings = theirs.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    done = {**table, "model": settings | {"min_vocabulary": rows} | model}
    if theirs.experts is not None:
        given, inherited = model.get("experts", {}), settings["experts"]
        unread = without_effect(ExpertSettings.model_construct(**inherited | given))  # of another balance, say
        done["model"]["experts"] = {name: value for name, value in inherited.items() if name not in unread} | given
    prepare = table.get("prepare", {})
    has_own = not isinstance(prepare, dict) or {"tokenizer", "vocabulary"} & set(prepare)
    if not has_own and (tokenizer / "tokenizer.json").is_file():
        done["prepare"] = {**prepare, "tokenizer": str(tokenizer)}
    return done


def _has_experts(theirs: ModelSettings, given: Any) -> bool:
    """Whether a table of `model.experts` states only what the model of the folder has."""
    if theirs.experts is None or not isinstance(given, dict):
        return False
    known = theirs.experts.model_dump(mode="json")
    return all(value == known.get(name, value) for name, value in given.items() if name not in _changeable(theirs))


def _changeable(theirs: ModelSettings) -> tuple[str, ...]:
    """Settings of experts that change no weight of the start. Biases that balance experts are weights."""
    has_biases = theirs.experts is not None and theirs.experts.balance == "bias"
    return TRAINING_ONLY if has_biases else ("balance", *TRAINING_ONLY)


def is_run(folder: Path) -> bool:
    """Whether `model.from` is the directory of a run, perhaps without a checkpoint, and not a Hugging Face folder."""
    return (folder / "settings.json").is_file()


def model_of(folder: Path) -> tuple[ModelSettings, int, Path]:
    """Model settings, rows of the embedding and folder of the tokenizer of a Hugging Face folder or a run. Raises
    `UserError`."""
    return _of_run(folder) if is_run(folder) else _of_huggingface(folder)


def _of_huggingface(folder: Path) -> tuple[ModelSettings, int, Path]:
    config = read_config_json(folder)
    return read_config(config), config.get("vocab_size") or 0, folder


def _of_run(folder: Path) -> tuple[ModelSettings, int, Path]:
    """From its newest checkpoint whose state can be read: damaged ones are skipped at the start."""
    table, state, damage = _read(folder / "settings.json"), None, None
    for saved in sorted((folder / "checkpoints").glob("step-*/state.json"), reverse=True):
        try:
            state = _read(saved)
        except UserError as error:
            damage = damage or error
        else:
            break
    if state is None:
        raise damage or UserError("this run has no checkpoint yet; train it first")
    model = {name: value for name, value in state["model"].items() if name not in NOT_INHERITED}
    settings = ModelSettings.model_validate(model, context=SAVED)
    return settings, state["shapes"]["embedding.weight"][0], Path(table["data"]["directory"])


def read_config_json(folder: Path) -> dict[str, Any]:
    """Raises `UserError` if it is missing or no JSON object."""
    return _read(folder / "config.json")


def _read(path: Path) -> dict[str, Any]:
    table = read_json(path, "name a folder of a Hugging Face model")
    if not isinstance(table, dict):
        raise UserError(f"{path}: cannot be read: it must be a JSON object")
    return table
