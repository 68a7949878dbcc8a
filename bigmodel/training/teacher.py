"""The teacher of a run ([distillation]): found, checked, read, and the same one after every resume.

In: settings, number of tokens of the data. Out: a `Teacher` on this rank's device. Guarantees: it reads the ids of the
data (same tokenizer, same kind of model, positions for the longest document), has all its weights, and is equal on all
ranks; a resumed run has the teacher that it began with, by the sha256 of its settings and weights. Costs: one weight at
a time in fp32 beside the teacher in its own precision; the sha256 takes about a second for each GB.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigmodel.config.settings import ModelSettings, Settings, UserError
from bigmodel.config.start_folder import is_run, model_of
from bigmodel.data.store.manifest import sha256_of
from bigmodel.data.store.same_tokenizer import difference
from bigmodel.distributed.world import World
from bigmodel.kernels.linear_distillation import Divergence
from bigmodel.model.huggingface.start import fill, read_settings
from bigmodel.model.recurrent.model import build_model
from bigmodel.model.teacher import Teacher
from bigmodel.model.transformer import Transformer
from bigmodel.run_directory import read_json, tokenizer_of
from bigmodel.sizes import counted_noun
from bigmodel.training.start import open_weights

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def open_teacher(settings: Settings, num_tokens: int, world: World) -> Teacher | None:
    """None without `distillation.teacher`. num_tokens: of the data, special ones included. Collective.

    Raises `UserError` for a folder that is no model, and for a model that cannot teach this student.
    """
    folder = settings.distillation.teacher
    if folder is None:
        return None
    world.on_rank_zero(lambda: _check_tokenizer(folder, settings.data.directory))
    model = teacher_model(settings, num_tokens, world.device)
    try:
        with ExitStack() as closing:
            weights = open_weights(folder, model.settings, closing)
            if missing := [name for name, _ in model.named_parameters() if name not in weights]:
                raise UserError(f"{folder}: lacks {', '.join(missing[:3])}")
            fill(model, weights, settings.run.seed)
    except UserError as error:
        raise UserError(f"distillation.teacher: {error}") from None
    sha256 = _content(model)
    if len(set(world.gather_objects(sha256))) > 1:
        raise UserError(f"{_named(folder)}: nodes differ in its content; give every node the same folder")
    return Teacher(model, num_tokens, divergence_of(settings), str(folder), sha256)


def teacher_model(settings: Settings, num_tokens: int, device: torch.device | str) -> Transformer:
    """The teacher without its weights, in its precision. Raises what `open_teacher` raises."""
    folder, model = settings.distillation.teacher, settings.model
    assert folder is not None, "a run without a teacher"
    theirs, rows = _settings_of(folder)
    if (mine := _role(model)) != (its := _role(theirs)):
        raise UserError(f"{_named(folder)} is an {its} model, and the student an {mine} model; name one of its kind")
    if rows < num_tokens:
        raise UserError(
            f"{_named(folder)} knows {rows:,} tokens, and the data have {num_tokens:,}, special ones of the objectives "
            "included; name a teacher that was trained on data with the same tokens"
        )
    longest = max(settings.data.max_document_length, settings.data.max_source_length)
    if theirs.position_embedding == "learned" and longest > theirs.max_positions:
        raise UserError(
            f"{_named(folder)} has {theirs.max_positions:,} learned positions, and the longest document {longest:,} "
            "tokens (data.max_document_length, data.max_source_length); shorten documents"
        )
    if torch.device(device).type == "cuda" and not theirs.is_recurrent and theirs.resolved_head_dim > 256:
        raise UserError(
            f"{_named(folder)} has heads of {theirs.resolved_head_dim} channels; the GPU kernels take at most 256"
        )
    with _new_parameters(TYPES[settings.distillation.precision or settings.training.precision], device):
        return build_model(theirs.without_draws().model_copy(update={"num_mtp_modules": 0}), rows)


def divergence_of(settings: Settings) -> Divergence:
    asked = settings.distillation
    return Divergence(asked.weight, asked.temperature, asked.top_k, asked.direction)


def in_words(teacher: Teacher, settings: Settings) -> str:
    size = sum(parameter.numel() for parameter in teacher.model.parameters())
    return (
        f"teacher {teacher.origin}: {counted_noun(size, 'parameter')}, "
        f"{settings.distillation.precision or settings.training.precision}, whole on each rank"
    )


def state_of(teacher: Teacher | None) -> dict[str, Any]:
    """For a checkpoint."""
    return {"teacher": {"folder": teacher.origin, "sha256": teacher.sha256}} if teacher else {}


def refuse_another(teacher: Teacher | None, state: Mapping[str, Any]) -> None:
    """Raises `UserError` unless the teacher is that of the resumed checkpoint. A run may begin or end to have one."""
    then = state.get("teacher")
    if teacher and then and then["sha256"] != teacher.sha256:
        raise UserError(
            f"{_named(teacher.origin)} is not the teacher that the run began with, {then['folder']}: its weights, "
            "settings or precision differ (a run that went on has a newer checkpoint: keep a copy of the older one); "
            "set it back, or start over with --fresh"
        )


def _settings_of(folder: Path) -> tuple[ModelSettings, int]:
    """Model settings and rows of the output matrix. Raises `UserError`."""
    if not folder.is_dir():
        raise UserError(f"{_named(folder)}: no such folder; name the directory of a run or a Hugging Face folder")
    try:
        theirs, rows, _ = model_of(folder)
        if not is_run(folder):
            theirs = read_settings(folder)
    except UserError as error:
        raise UserError(f"{_named(folder)}: {error}") from None
    classes = read_json(folder / "settings.json").get("classification", {}).get("classes") if is_run(folder) else None
    if classes:
        raise UserError(f"{_named(folder)} predicts classes, not tokens; name a model that predicts tokens")
    if theirs.kind == "encoder" and not is_run(folder):
        raise UserError(
            f"{_named(folder)}: the head for masked tokens of a Hugging Face encoder is not read; name the directory "
            "of a run"
        )
    return theirs, rows


def _check_tokenizer(folder: Path, data: Path) -> None:
    _settings_of(folder)
    _, _, theirs = model_of(folder)
    if not (theirs / "tokenizer.json").is_file():
        raise UserError(
            f"{_named(folder)}: {theirs / 'tokenizer.json'} is missing: a teacher must have the tokenizer of the data, "
            "and this cannot be seen; copy the file there"
        )
    then = tokenizer_of(folder)
    if then and then != sha256_of(str(theirs / "tokenizer.json")):
        raise UserError(
            f"{_named(folder)}: {theirs / 'tokenizer.json'} is not the tokenizer that this run was trained with "
            "(its SHA-256 differs from data_manifest.json's): the folder was prepared again; restore it, or train the "
            "teacher again"
        )
    if what := difference(data, theirs):
        raise UserError(
            f"{_named(folder)} has another tokenizer than data.directory = {data}: {what}; prepare data with "
            f"prepare.tokenizer = {json.dumps(str(theirs))}"
        )


def _role(model: ModelSettings) -> str:
    if model.kind.endswith("encoder_decoder"):
        return "encoder-decoder"
    return "encoder" if model.kind == "encoder" else "autoregressive"


@contextmanager
def _new_parameters(dtype: torch.dtype, device: torch.device | str) -> Iterator[None]:
    """New parameters inside are of this type, on this device: never whole in fp32, never in the host's memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _content(model: nn.Module) -> str:
    """sha256 of a model's settings and of the names, types, shapes and bytes of its parameters and buffers."""
    table = model.settings.model_dump(mode="json", exclude_defaults=True)  # later versions have more settings
    digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode())
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _named(folder: Path | str) -> str:
    return f"distillation.teacher = {json.dumps(str(folder))}"
