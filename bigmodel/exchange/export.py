"""Export: a run as a Hugging Face folder that transformers loads without code of ours.

In: a run directory. Out: config.json, generation_config.json, weights in safetensors files, and the tokenizer.
Guarantees: the weights are those of the newest good checkpoint, of any ZeRO stage and number of ranks; the type of
model is one whose config.json holds every setting of the model; the folder appears whole. Costs: memory of one weight:
they are read from the checkpoint and written one by one.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigmodel.config.huggingface import CLASSES, class_of, differences, fitting_type, refuse_recurrent, write_config
from bigmodel.config.settings import Settings, UserError, settings_from_table
from bigmodel.data.objectives.table import OBJECTIVES
from bigmodel.data.store.shards import ShardStore
from bigmodel.data.store.tokenizer import Tokenizer
from bigmodel.exchange.adapter import export_adapter
from bigmodel.exchange.mup import folded, without_mup
from bigmodel.exchange.quantization import Card, Form, Gguf, form_of, losses_of
from bigmodel.exchange.tokenizer_files import as_json, read_description, token_ids, tokenizer_files
from bigmodel.model.huggingface.folder import BESIDE, MAX_BYTES, write_folder
from bigmodel.model.huggingface.weights import Names, names_of, shape_of_rows
from bigmodel.run_directory import read_json
from bigmodel.training.checkpoint import format as checkpoint

MTP = "extra_blocks."  # our names
ROUTER_BIAS = ".router.bias"  # moves by 0.001, which bf16 rounds away: fp32 in DeepSeek-V3's files too
TRAINING_STATE = ".router.load"  # of the last step: no weight of the model
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Exported:
    """What was written: the class that loads it, and sentences on what it does not hold or does otherwise."""

    folder: Path
    step: int
    class_name: str
    remarks: list[str]


class CheckpointWeights(Mapping[str, Tensor]):
    """The weights of a checkpoint under their names, each read when it is asked for."""

    def __init__(self, source: checkpoint.WeightSource, names: Names, dtype: torch.dtype) -> None:
        self._source, self._dtype = source, dtype
        self._places: dict[str, tuple[str, int, list[int]]] = {}
        for ours, parts in names.items():
            shape = shape_of_rows(source.shape(ours))
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
        return self._source.read(ours, first * row, torch.Size(shape).numel()).view(shape).to(self.dtype_of(name))

    def dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if self._places[name][0].endswith(ROUTER_BIAS) else self._dtype

    def shape(self, name: str) -> list[int]:
        return self._places[name][2]


def export(
    run_directory: Path,
    folder: Path,
    kind: str = "",
    dtype: str = "float32",
    max_bytes: int = MAX_BYTES,
    best: bool = False,
    quantize: str = "",
    evaluate: bool = True,
) -> Exported:
    """Write the newest or the best good checkpoint of a run as a Hugging Face folder, with its adapters merged.

    kind: its `model_type`; empty: that of `model.from`, or the first type that holds the model. quantize: a key of
    `FORMS`; empty: none. evaluate: measure the loss before and after quantization, which holds the whole model in
    memory. Raises `UserError` that names the settings which the type lacks.
    """
    as_dtype = _dtype(dtype)
    settings = _settings_of(run_directory)
    plain = settings.model_copy(update={"model": without_mup(settings.model)})
    kind = _type_of(plain, kind)
    form = form_of(quantize, kind, plain, dtype, max_bytes)
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another folder, or delete this one")
    found = checkpoint.of_run(run_directory, best)
    store = ShardStore.of_run(settings.data, "validation")
    wanted = ("tokenizer.json", *((CHAT_TEMPLATE,) if CHAT_TEMPLATE in store.manifest.files else ()))
    files = {name: store.file(name) for name in wanted}
    losses = losses_of(run_directory, best, kind, form) if form and evaluate else []
    with checkpoint.weights(found, kept_open=0) as source:
        remarks = write_model(folder, settings, kind, source, files, as_dtype, max_bytes, form, losses)
    return Exported(folder, found.state["step"], class_of(kind, settings.model), [*losses, *remarks])


def write_model(
    folder: Path,
    settings: Settings,
    kind: str,
    source: checkpoint.WeightSource,
    files: Mapping[str, Path],
    dtype: torch.dtype = torch.float32,
    max_bytes: int = MAX_BYTES,
    form: Form | None = None,
    losses: Sequence[str] = (),
) -> list[str]:
    """Write weights as a Hugging Face folder of type `kind`; gives remarks. files: tokenizer.json of the data, and
    chat_template.jinja if there is one. form: of quantized weights. losses: said in README.md."""
    source = folded(source, settings.model)
    settings = settings.model_copy(update={"model": without_mup(settings.model)})
    tokenizer = Tokenizer.load(files["tokenizer.json"], fast=False)
    description = read_description(files["tokenizer.json"])
    names, start = names_of(kind, settings.model), _object_of(settings.model.start_folder, "config.json")
    longest = max(settings.data.max_document_length, settings.data.longest_source)
    positions = settings.model.max_positions or max(longest, start.get("max_position_embeddings") or 0)
    ids = token_ids(settings, tokenizer, description)
    name = str(dtype).removeprefix("torch.")
    config = write_config(kind, settings.model, source.shape("embedding.weight")[0], positions)
    config |= ids | {"dtype": name, "torch_dtype": name}
    more = tokenizer_files(settings, tokenizer, description, positions)
    if settings.model.kind != "encoder" and not settings.model.classification:
        more["generation_config.json"] = as_json(ids | _more_ends(settings.model.start_folder, tokenizer))
    if CHAT_TEMPLATE in files:
        more[CHAT_TEMPLATE] = files[CHAT_TEMPLATE].read_bytes()
    beside = [theirs for ours, parts in names.items() if ours.startswith(MTP) for theirs, _ in parts]
    weights, remarks = CheckpointWeights(source, names, dtype), _remarks(settings, kind, names, source, description)
    if form is None:
        write_folder(folder, config, weights, max_bytes, more, beside)
        return remarks
    card = Card(class_of(kind, settings.model), folder.name, losses)
    if isinstance(form, Gguf):
        return [*form.write_file(folder, weights, positions, ids, more, beside, card), *remarks]
    more["README.md"] = card.text(form).encode()
    config["quantization_config"] = form.config(names)
    write_folder(folder, config, form.weights(weights, names, beside), max_bytes, more, beside)
    return remarks


def export_adapter_of(
    run_directory: Path,
    folder: Path,
    dtype: str = "float32",
    best: bool = False,
    kind: str = "",
    max_gib: float | None = None,
) -> str:
    """Write only the adapters of a run as a peft folder; returns what was written, in words.

    kind, max_gib: refused, because an adapter has the type of its base, and peft reads one file.
    """
    if max_gib is not None:
        raise UserError(
            f"--max-gib {max_gib:g}: has no effect with --adapter (peft reads the weights of an adapter from one "
            "file); leave one of them out"
        )
    if kind:
        raise UserError(
            f"--as {kind}: has no effect with --adapter (an adapter has the type of the model that it is for); leave "
            "one of them out"
        )
    settings, found = _settings_of(run_directory), checkpoint.of_run(run_directory, best)
    base = export_adapter(found, settings, folder, _dtype(dtype))
    on = base or "the base model, exported"
    return f"{folder}: adapter of step {found.state['step']}, for {on}"


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: unknown; use {', '.join(DTYPES)}")
    return DTYPES[name]


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
    refuse_recurrent(settings.model)
    if kind not in CLASSES:
        raise UserError(f"--as {kind}: unknown; use {', '.join(CLASSES)}")
    if lacking := differences(kind, settings.model):
        name = class_of(kind, settings.model)
        raise UserError(f"--as {kind}: {name} cannot hold {', '.join(lacking)}; leave --as out, or use another")
    return kind


def _type_of_start(folder: Path | None) -> str:
    """`model_type` of the folder that the run started from, if it is still there."""
    kind = _object_of(folder, "config.json").get("model_type", "")
    return kind if kind in CLASSES else ""


def _object_of(folder: Path | None, name: str) -> dict[str, Any]:
    """A JSON object of the folder that the run started from; empty if it is not there any more."""
    with contextlib.suppress(UserError):
        table = read_json(folder / name) if folder else {}
        return table if isinstance(table, dict) else {}
    return {}


def _more_ends(folder: Path | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """All tokens that end a text, if the folder that the run started from has several: chat models end a turn too."""
    theirs = _object_of(folder, "generation_config.json").get("eos_token_id")
    if not isinstance(theirs, list):
        return {}
    ends = [token for token in theirs if isinstance(token, int) and 0 <= token < tokenizer.vocabulary]
    return {"eos_token_id": list(dict.fromkeys([tokenizer.eos, *ends]))}


def _remarks(
    settings: Settings, kind: str, names: Names, source: checkpoint.WeightSource, description: Mapping[str, Any]
) -> list[str]:
    """What the class does not hold, or does otherwise than the run."""
    found, name_of_class = [], class_of(kind, settings.model)
    first, modules = settings.model.num_layers, settings.model.num_mtp_modules
    if modules and any(name.startswith(MTP) for name in names):
        last = f" to {first + modules - 1}" if modules > 1 else ""
        found.append(
            f"MTP modules: {name_of_class} has none; they are in {BESIDE} as model.layers.{first}{last}, DeepSeek-V3's "
            "names, without enorm, hnorm and eh_proj, because ours read no further token"
        )
    if left := [name for name in source.names() if name not in names and not name.endswith(TRAINING_STATE)]:
        found.append(f"left out, because {name_of_class} has none: {', '.join(left)}")
    objectives = settings.data.wanted_objectives
    reads_both_ways = settings.model.kind == "decoder" and settings.data.bidirectional_prefix
    if reads_both_ways and any(OBJECTIVES[one.kind].has_source for one in objectives):
        found.append(
            "data.bidirectional_prefix = true: prefixes were read in both directions, which "
            f"{name_of_class} does not do"
        )
    far = max(settings.data.target_ahead, min(one.ahead for one in objectives))
    if far > 1:
        found.append(
            f"labels {far} tokens ahead of their inputs: {name_of_class} takes every prediction for the next token"
        )
    if kind == "qwen2" and (description.get("normalizer") or {}).get("type") != "NFC":
        found.append(
            "AutoTokenizer of transformers 5 uses Qwen2's own rules for a qwen2, whatever tokenizer.json says; "
            "PreTrainedTokenizerFast.from_pretrained follows it"
        )
    return found
