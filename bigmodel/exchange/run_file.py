"""Import: a run file that continues the training of a Hugging Face folder.

In: a folder with config.json, safetensors and tokenizer.json. Out: a run file that `bigmodel prepare` and `bigmodel
train` take as it is. Guarantees: every weight of the folder was found, of the right shape and finite; the tokenizer is
the model's; an existing file is never overwritten. Costs: the weights are read once, one at a time.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bigmodel.config.huggingface import CLASSES
from bigmodel.config.settings import ModelSettings, UserError, load_settings
from bigmodel.config.start_folder import read_config_json
from bigmodel.data.store.tokenizer import Tokenizer, tokenizer_file
from bigmodel.model.huggingface.start import StartWeights, read_settings
from bigmodel.run_directory import write_atomically

LONGEST = 2048  # tokens of a document, where the model could take more
SENTINELS = ("<extra_id_{}>", "▁<extra_id_{}>")  # of T5 and of mT5
UNUSED_SHARE = 0.1  # rows without a token, above which a tokenizer is another model's
MODELS = {"decoder": "a decoder", "encoder_decoder": "an encoder-decoder", "encoder": "an encoder"}
# Our settings -> keys of a config.json, of which a type has at most one: BERT, GPT-NeoX, Phi, T5, ModernBERT, Llama.
DROPOUT = {
    "dropout": ("hidden_dropout_prob", "hidden_dropout", "resid_pdrop", "dropout_rate"),
    "attention_dropout": ("attention_probs_dropout_prob", "attention_dropout", "dropout_rate"),
    "embedding_dropout": ("hidden_dropout_prob", "embd_pdrop", "embedding_dropout", "dropout_rate"),
}

RUN_FILE = """\
# Continues the training of {class_name} ({kind}) in {folder}. Next:
#
#     bigmodel prepare {run_file}
#     bigmodel launch local {run_file}
#
# docs/settings.md has all settings.

[run]
directory = {run_directory}
seed = 1

[prepare]
tokenizer = {tokenizer}
# The text to train on. Without a source it is Python's own standard library, which is enough to try this file:
#
# [[prepare.sources]]
# name = "mine"
# files = ["text/*.jsonl"]
# column = "text"

[data]
directory = {data_directory}
# {about_lengths}
{data}

[model]
# The model of the folder. These settings decide the shapes of its weights and must stay; dropout may be added, changed
# or removed.
from = {folder}
{model}

[optimizer]
# A tenth of the usual rate for training from scratch. Text that differs much from the earlier text (another language)
# can take a higher rate.
learning_rate = {rate}

[schedule]
# The rate rises again from 0, because the optimizer has no moments yet, and falls to 0 at the end.
kind = "wsd"
warmup_steps = 50
decay_steps = 200
final_ratio = 0.0

[training]
steps = 1000
global_batch_size = 8

[evaluation]
every_steps = 200
sequences = 64

[checkpoint]
every_steps = 200
"""


def write_run_file(folder: Path, run_file: Path, tokenizer: Path | None = None) -> str:
    """Check the folder, write the run file, and say in a line what was found.

    tokenizer: instead of the folder's; it may have more tokens than the model has rows. Raises `UserError` for a folder
    that cannot be continued, with the file and the reason, and for a run file that exists.
    """
    if run_file.suffix != ".toml":
        raise UserError(f"{run_file}: is no name of a run file; end it in .toml")
    if run_file.exists():
        raise UserError(f"{run_file}: exists already; choose another name, or delete it")
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; give a folder with config.json, safetensors files and tokenizer.json")
    config = read_config_json(folder)
    settings = read_settings(folder)
    num_weights = _check_weights(folder, settings)
    used = Tokenizer.load(tokenizer or _tokenizer_in(folder), fast=False)
    if not tokenizer:
        _check_size(folder, used.vocabulary, config.get("vocab_size") or 0)
    name = run_file.stem
    values = {
        "folder": _toml(str(folder)),
        "class_name": CLASSES[config["model_type"]],
        "kind": MODELS[settings.kind],
        "run_file": run_file,
        "run_directory": _toml(f"runs/{name}"),
        "tokenizer": _toml(str(tokenizer or folder)),
        "data_directory": _toml(f"data/{name}"),
        "rate": "1e-4" if settings.kind == "encoder_decoder" else "3e-5",
        "model": _lines(_model_table(settings, config)),
        **_data(settings, _positions(settings, config), special_tokens(used)),
    }
    run_file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(run_file, RUN_FILE.format(**values).encode())
    load_settings(run_file)
    rows = settings.num_rows(config.get("vocab_size") or 0)
    return f"{num_weights} weights, {used.vocabulary:,} tokens of {rows:,} rows"


def _check_weights(folder: Path, settings: ModelSettings) -> int:
    """Their number. Raises `UserError` for what is missing, left over, misshapen or NaN."""
    weights = StartWeights(folder, settings)
    names = list(weights)
    for name in names:
        weights.read(name)
    return len(names)


def _tokenizer_in(folder: Path) -> Path:
    if not tokenizer_file(folder).is_file():
        raise UserError(
            f"{tokenizer_file(folder)}: missing; save it there with AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...), or name a tokenizer with --tokenizer"
        )
    return folder


def _check_size(folder: Path, tokens: int, rows: int) -> None:
    if rows and (tokens > rows or tokens < (1 - UNUSED_SHARE) * rows):
        raise UserError(
            f"{tokenizer_file(folder)}: has {tokens:,} tokens, and vocab_size = {rows:,} in config.json: not the "
            f"tokenizer of this model; name the right one with --tokenizer (--tokenizer {folder} for this one: rows "
            "are added for tokens that have none)"
        )


def _positions(settings: ModelSettings, config: Mapping[str, Any]) -> int:
    """The longest document that the model was made for; 0: not said."""
    return settings.max_positions or config.get("max_position_embeddings") or config.get("n_positions") or 0


def _model_table(settings: ModelSettings, config: Mapping[str, Any]) -> dict[str, Any]:
    """All settings that are not the defaults, without `from`; their order is that of docs/settings.md."""
    table = settings.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    sizes = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "intermediate_size", "tied_embeddings")
    table |= {name: getattr(settings, name) for name in sizes} | dropout_in(config)
    ordered = {name: table[name] for name in ModelSettings.model_fields if name in table}
    return ordered | ({"min_vocabulary": config["vocab_size"]} if config.get("vocab_size") else {})


def dropout_in(config: Mapping[str, Any]) -> dict[str, float]:
    """The dropout that a config.json states, which transformers uses in training; without what is off."""
    stated = {name: next((config[key] for key in keys if key in config), 0.0) for name, keys in DROPOUT.items()}
    return {name: float(rate) for name, rate in stated.items() if rate}


def special_tokens(tokenizer: Tokenizer) -> dict[str, dict[str, int]]:
    """By objective, the settings that make it use the tokenizer's own special tokens, which the model knows: T5's
    <extra_id_0>, <extra_id_1> ... for hidden spans, whose ids count down, and the mask token."""
    name = next((one for one in SENTINELS if tokenizer.number_of(one.format(0))), SENTINELS[0])
    first, count = tokenizer.number_of(name.format(0)) or 0, 1
    while first and tokenizer.number_of(name.format(count)) == first - count:
        count += 1
    mask = tokenizer.number_of(tokenizer.special_names.get("mask_token", "[MASK]"))
    return {
        "span_corruption": {"first_sentinel": first, "sentinels": count} if first and count > 1 else {},
        "masked": {"mask_token": mask} if mask else {},
    }


def _data(settings: ModelSettings, positions: int, own: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """The settings of [data] that suit the model, and a comment about them. own: of `special_tokens`."""
    longest = min(LONGEST, positions or LONGEST)
    if settings.kind == "encoder_decoder":
        source = min(512, longest)
        table: dict[str, Any] = {
            "max_document_length": source // 2,
            "sequence_length": source,
            "max_source_length": source,
            "source_sequence_length": 4 * source,
            **own["span_corruption"],
            "objectives": [{"kind": "span_corruption", "density": 0.15, "mean_span": 3.0}],
        }
        return {
            "data": _lines(table),
            "about_lengths": f"Sources of at most {source} tokens; short texts share a packed sequence.",
        }
    table = {"max_document_length": longest, "sequence_length": LONGEST}
    if settings.kind == "encoder":
        table |= own["masked"]
        table["objectives"] = [{"kind": "masked", "density": 0.15 if settings.norm_placement == "post" else 0.3}]
    said = f"config.json says {positions:,} positions. " if positions else ""
    return {
        "data": _lines(table),
        "about_lengths": f"{said}Longer documents are split; short ones share a packed sequence.",
    }


def _lines(table: Mapping[str, Any]) -> str:
    return "\n".join(f"{name} = {_toml(value)}" for name, value in table.items())


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(one)}" for name, one in value.items()) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)
