"""Export: a run as a Hugging Face folder that transformers loads without code of ours.

In: a run directory. Out: config.json, generation_config.json, weights in safetensors files, and the tokenizer.
Guarantees: the weights are those of the newest good checkpoint, of any ZeRO stage and number of ranks; the type of
model is one whose config.json holds every setting of the model; the folder appears whole. Costs: memory of one file of
weights (`max_bytes`), because they are read from the checkpoint one by one.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigmodel.config.huggingface import CLASSES, differences, fitting_type, write_config
from bigmodel.config.settings import Settings, UserError, settings_from_table
from bigmodel.config.start_folder import read_config_json
from bigmodel.data.store.shards import ShardStore
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.model.huggingface.folder import MAX_BYTES, write_folder
from bigmodel.model.huggingface.weights import Names, names_of
from bigmodel.run_directory import read_json
from bigmodel.training.checkpoint import format as checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """What was written: the class that loads it, and what it does not hold."""

    folder: Path
    step: int
    class_name: str
    left_out: list[str]


class CheckpointWeights(Mapping[str, Tensor]):
    """The weights of a checkpoint under their names, each read when it is asked for."""

    def __init__(self, source: checkpoint.WeightSource, names: Names, dtype: torch.dtype) -> None:
        self._source, self.dtype = source, dtype
        self._places: dict[str, tuple[str, int, list[int]]] = {}
        for ours, parts in names.items():
            shape = source.shape(ours)
            first = 0
            for theirs, rows in parts:
                rows = rows or shape[0]
                self._places[theirs] = (ours, first, [rows, *shape[1:]])
                first += rows
            assert first == shape[0], f"{ours}: {first} of {shape[0]} rows have a name"

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, name: str) -> Tensor:
        ours, first, shape = self._places[name]
        row = torch.Size(shape[1:]).numel()
        return self._source.read(ours, first * row, torch.Size(shape).numel()).view(shape).to(self.dtype)

    def shape(self, name: str) -> list[int]:
        return self._places[name][2]


def export(
    run_directory: Path, folder: Path, kind: str = "", dtype: str = "float32", max_bytes: int = MAX_BYTES
) -> Exported:
    """Write the newest good checkpoint of a run as a Hugging Face folder.

    kind: its `model_type`; empty: the first type that holds the model. Raises `UserError` that names the settings which
    the type lacks.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: unknown; use {', '.join(DTYPES)}")
    settings = _settings_of(run_directory)
    kind = _type_of(settings, kind)
    found = checkpoint.newest(run_directory / "checkpoints")
    if found is None:
        raise UserError(f"{run_directory}: no checkpoint yet; train until checkpoint.every_steps is reached")
    tokenizer_file = ShardStore.of_run(settings.data, "validation").file("tokenizer.json")
    tokenizer = Tokenizer.load(tokenizer_file, fast=False)
    with checkpoint.weights(found, kept_open=0) as source:
        names = names_of(kind, settings.model)
        vocabulary = source.shape("embedding.weight")[0]
        config = write_config(kind, settings.model, vocabulary, settings.data.max_document_length)
        config |= _token_ids(settings, tokenizer) | {"dtype": dtype, "torch_dtype": dtype}
        extra = _files(settings, tokenizer, tokenizer_file)
        write_folder(folder, config, CheckpointWeights(source, names, DTYPES[dtype]), max_bytes, extra)
    return Exported(folder, found.state["step"], CLASSES[kind], _left_out(settings, names, source))


def _settings_of(run_directory: Path) -> Settings:
    saved = run_directory / "settings.json"
    if not saved.exists():
        raise UserError(
            f"{run_directory}: not a run directory (no settings.json); give the run.directory of a training run"
        )
    return settings_from_table(read_json(saved), saved, saved=True)


def _type_of(settings: Settings, kind: str) -> str:
    if not kind:
        return fitting_type(settings.model, _type_of_start(settings.model.start_folder))
    if kind not in CLASSES:
        raise UserError(f"--as {kind}: unknown; use {', '.join(CLASSES)}")
    if lacking := differences(kind, settings.model):
        raise UserError(
            f"--as {kind}: {CLASSES[kind]} cannot hold {', '.join(lacking)}; leave --as out, or use another"
        )
    return kind


def _type_of_start(folder: Path | None) -> str:
    """`model_type` of the folder that the run started from, if it is still there."""
    with contextlib.suppress(UserError):
        kind = read_config_json(folder).get("model_type") if folder else ""
        return kind if kind in CLASSES else ""
    return ""


def _token_ids(settings: Settings, tokenizer: Tokenizer) -> dict[str, Any]:
    """Begin and end, in config.json and generation_config.json. A target begins with the begin token."""
    ids: dict[str, Any] = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.eos}
    if settings.model.kind == "encoder_decoder":
        ids["decoder_start_token_id"] = tokenizer.bos
    return ids


def _files(settings: Settings, tokenizer: Tokenizer, tokenizer_file: Path) -> dict[str, bytes]:
    """The tokenizer and generation_config.json. A text gets the ends that it has in training: begin, or for a source
    side end, unless the tokenizer's own post-processor puts some."""
    description = json.loads(tokenizer_file.read_bytes())
    names = {role: tokenizer.token_of(token) for role, token in (("bos", tokenizer.bos), ("eos", tokenizer.eos))}
    if not _adds_tokens(description.get("post_processor")):
        before = None if settings.model.kind == "encoder_decoder" else names["bos"]
        after = None if settings.model.kind == "decoder" else names["eos"]
        ids = {names["bos"]: tokenizer.bos, names["eos"]: tokenizer.eos}
        description["post_processor"] = _template(before, after, ids)
    for_class = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names["bos"],
        "eos_token": names["eos"],
        "pad_token": names["eos"],
        "model_max_length": settings.data.max_source_length or settings.data.max_document_length,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": (json.dumps(description, indent=2, ensure_ascii=False) + "\n").encode(),
        "tokenizer_config.json": _json(for_class),
        "special_tokens_map.json": _json({name: for_class[name] for name in ("bos_token", "eos_token", "pad_token")}),
        "generation_config.json": _json(_token_ids(settings, tokenizer)),
    }


def _adds_tokens(post_processor: dict[str, Any] | None) -> bool:
    parts = (post_processor or {}).get("processors", [post_processor])
    return any(part and part["type"] != "ByteLevel" for part in parts)


def _template(before: str | None, after: str | None, ids: dict[str, int]) -> dict[str, Any]:
    def special(name: str | None, of: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": name, "type_id": of}}] if name else []

    def text(sequence: str, of: int) -> list[dict[str, Any]]:
        return [*special(before, of), {"Sequence": {"id": sequence, "type_id": of}}, *special(after, of)]

    used = {name: ids[name] for name in (before, after) if name}
    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": [*text("A", 0), *text("B", 1)],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]} for name, token in used.items()},
    }


def _left_out(settings: Settings, names: Names, source: checkpoint.WeightSource) -> list[str]:
    left = [name for name in source.names() if name not in names]
    if settings.model.num_mtp_modules and not left:
        first = settings.model.num_layers
        left = [f"nothing: MTP modules are model.layers.{first} and on, which the class passes over"]
    return left


def _json(table: Mapping[str, Any]) -> bytes:
    return (json.dumps(table, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
