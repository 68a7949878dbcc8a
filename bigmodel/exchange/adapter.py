"""Adapters in the form of peft: adapter_config.json and adapter_model.safetensors, both ways.

Out: the adapters of a run's checkpoint, which `peft.PeftModel.from_pretrained` loads on the base model in Hugging Face
form. In: weights of such a folder for a new run (`lora.from`). Where their matrix is fused (Phi-3, ModernBERT), ours
have an adapter for each part: written, they become one of a multiple of the rank, with equal function.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bigmodel.config.adapter_folder import CONFIG, read_adapter_config
from bigmodel.config.huggingface import fitting_type
from bigmodel.config.lora_settings import MATRICES
from bigmodel.config.settings import LoraSettings, ModelSettings, Settings, UserError
from bigmodel.config.start_folder import is_run, read_config_json
from bigmodel.model.huggingface.class_head import PREFIXES
from bigmodel.model.huggingface.weights import names_of, without_prefix
from bigmodel.model.lora import Adapters, first_row
from bigmodel.training.checkpoint import format as checkpoint

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
TASKS = {"decoder": "CAUSAL_LM", "encoder_decoder": "SEQ_2_SEQ_LM", "encoder": "FEATURE_EXTRACTION"}
SHOWN = 6


@dataclass(frozen=True)
class Module:
    """One of their matrices: its name, our matrix, and the parts of ours in it."""

    name: str
    matrix: str
    parts: tuple[str, ...]


def modules_of(kind: str, settings: ModelSettings) -> Iterator[Module]:
    """Their matrices that may have adapters, of type `kind`."""
    for ours, theirs in names_of(kind, settings).items():
        matrix = ours.removesuffix(".weight")
        parts = next((parts for path, parts in MATRICES.items() if f".{matrix}".endswith(f".{path}")), None)
        if parts is None or ours.startswith("extra_blocks.") or not ours.endswith(".weight"):
            continue
        groups = [(part,) for part in parts] if len(theirs) == len(parts) else [parts]
        for (name, _), group in zip(theirs, groups, strict=True):
            yield Module(name.removesuffix(".weight"), matrix, group)


def type_of(settings: Settings) -> str:
    """The Hugging Face type of the base: of `model.from`, else the first that holds the model."""
    folder = settings.model.start_folder
    if folder and not is_run(folder):
        return str(read_config_json(folder)["model_type"])
    return fitting_type(settings.model)


# --- out


def export_adapter(found: checkpoint.Checkpoint, settings: Settings, folder: Path, dtype: torch.dtype) -> str:
    """Write the adapters of a checkpoint; returns the base's folder, or "" where it is not one of Hugging Face.

    Raises `UserError` for a run without adapters, with other trained weights, and if the folder exists.
    """
    lora = checkpoint.lora_of(found)
    if not lora.rank:
        raise UserError(f"--adapter: {found.path} has no adapters ([lora] rank); leave --adapter out")
    names = names_of(type_of(settings), settings.model)
    others = [name for name, keys in found.description["keys"].items() if len(keys) > 1 and ".lora." not in name]
    if any(len(names.get(name, ())) != 1 for name in others):
        raise UserError(
            f"--adapter: {found.path} has trained weights beside its adapters: {', '.join(others[:SHOWN])}; leave "
            "--adapter out: the whole model has them"
        )
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another folder, or delete this one")
    base = settings.model.start_folder
    theirs = "" if base is None or is_run(base) else str(base)
    modules = [*modules_of(type_of(settings), settings.model)]
    with checkpoint.weights(found, merge=False) as source:
        tensors, counts = _to_theirs(source, modules, lora)
        tensors |= {f"{PREFIX}{names[name][0][0]}": _read(source, name) for name in others}
    config = _config(settings, lora, modules, counts, theirs)
    if others:  # of a classification head
        bare = [names[name][0][0].removeprefix(PREFIXES.get(type_of(settings), "")) for name in others]
        config |= {"modules_to_save": sorted({name.partition(".")[0] for name in bare}), "task_type": "SEQ_CLS"}
    partial = folder.parent / f"{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    (partial / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
    os.replace(partial, folder)
    return theirs


def _to_theirs(
    source: checkpoint.WeightSource, modules: list[Module], lora: LoraSettings
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Their tensors, and for each of their modules the number of our adapters in it."""
    tensors: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for module in modules:
        mine = [f"{module.matrix}.lora.{part}" for part in module.parts]
        present = [name for name in mine if f"{name}.a.weight" in source.shapes]
        if not present:
            continue
        total = source.shape(f"{module.matrix}.weight")[0]
        a_RH = torch.cat([_read(source, f"{name}.a.weight") for name in present])
        b_FR = _read(source, f"{present[0]}.b.weight")
        if len(module.parts) > 1:
            b_FR = torch.zeros(total, len(a_RH))
            for number, name in enumerate(present):
                rows = _read(source, f"{name}.b.weight")
                columns = slice(number * lora.rank, (number + 1) * lora.rank)
                first = first_row(name, total, len(rows))
                b_FR[first : first + len(rows), columns] = rows
        tensors |= {f"{PREFIX}{module.name}.lora_A.weight": a_RH, f"{PREFIX}{module.name}.lora_B.weight": b_FR}
        counts[module.name] = len(present)
    return tensors, counts


def _read(source: checkpoint.WeightSource, name: str) -> Tensor:
    shape = source.shape(name)
    return source.read(name, 0, math.prod(shape)).view(*shape)


def _config(
    settings: Settings, lora: LoraSettings, modules: list[Module], counts: Mapping[str, int], base: str
) -> dict[str, Any]:
    """counts: of our adapters in each of their modules that has one."""
    alpha = lora.alpha or lora.rank
    # More columns in A lower peft's scale, alpha / r or alpha / sqrt(r): a larger alpha undoes it.
    fused = {name: count for name, count in counts.items() if count > 1}
    return {
        "peft_type": "LORA",
        "task_type": TASKS[settings.model.kind],
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": settings.lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": _short([*counts], [module.name for module in modules]),
        "rank_pattern": {name: count * lora.rank for name, count in fused.items()},
        "alpha_pattern": {name: alpha * (math.sqrt(count) if lora.rslora else count) for name, count in fused.items()},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _short(chosen: list[str], known: list[str]) -> list[str]:
    """Last components, where each means no other matrix; else whole names. "dense" is also in heads of classes."""
    ends = {name.rpartition(".")[2] for name in chosen}
    meant = [name for name in known if name.rpartition(".")[2] in ends]
    return sorted(ends if len(meant) == len(chosen) and "dense" not in ends else chosen)


# --- in


@torch.no_grad()
def load_adapter(
    model: nn.Module, settings: Settings, whole: Callable[[nn.Parameter], AbstractContextManager] | None = None
) -> None:
    """Fill the model's adapters from `lora.from`. `whole` gathers a partitioned parameter while it is filled.

    Raises `UserError` for a folder with other matrices, shapes or scales than [lora] says.
    """
    folder = settings.lora.start_folder
    assert folder is not None, "lora.from is not set"
    theirs = _Adapter(folder, settings)
    mine = {
        f"{name}.{part}": (name.removesuffix(".lora"), part)
        for name, module in model.named_modules()
        if isinstance(module, Adapters)
        for part in module
    }
    there = {f"{module.matrix}.lora.{part}" for module in theirs.modules for part in module.parts}
    if different := sorted(mine.keys() ^ there):
        shown = ", ".join(f"{name} ({'here' if name in mine else 'there'})" for name in different[:SHOWN])
        raise UserError(f"lora.from = {folder}: lora.targets choose other matrices than the adapter has: {shown}")
    parameters = dict(model.named_parameters())
    for module in theirs.modules:
        for name, tensor in theirs.ours(module, parameters).items():
            with whole(parameters[name]) if whole else nullcontext():
                if parameters[name].shape != tensor.shape:
                    raise UserError(
                        f"lora.from = {folder}: {module.name}: {name} is {tuple(tensor.shape)} there and "
                        f"{tuple(parameters[name].shape)} here; it is an adapter of another model"
                    )
                parameters[name].copy_(tensor)


class _Adapter:
    """A folder of peft."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self._lora = folder, settings.lora
        self._config = read_adapter_config(folder)
        try:
            stored = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / WEIGHTS}: cannot be read: {error}; save the adapter again") from None
        kind = type_of(settings)
        bare = without_prefix(kind, [name.removeprefix(PREFIX) for name in stored])
        self._tensors = {bare[name.removeprefix(PREFIX)]: tensor.float() for name, tensor in stored.items()}
        pairs = {name.rpartition(".lora_")[0] for name in self._tensors}
        known = {module.name: module for module in modules_of(kind, settings.model)}
        wanted = {f"{name}.lora_{side}.weight" for name in pairs for side in "AB"}
        if strange := sorted((pairs - known.keys()) | (wanted ^ self._tensors.keys())):
            raise UserError(f"{folder / WEIGHTS}: not an adapter of matrices of a {kind}: {', '.join(strange[:SHOWN])}")
        self.modules = [known[name] for name in sorted(pairs)]
        for name, tensor in self._tensors.items():
            if not bool(tensor.isfinite().all()):
                raise UserError(f"{folder / WEIGHTS}: {name} holds NaN or infinite values; save the adapter again")

    def ours(self, module: Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """The adapters of the module's parts, by parameter name."""
        a_RH, b_FR = (self._tensors[f"{module.name}.lora_{side}.weight"] for side in "AB")
        rank, rows = self._lora.rank, [len_of(parameters[f"{module.matrix}.lora.{p}.b.weight"]) for p in module.parts]
        count = len(a_RH) // rank
        self._check_scale(module, len(a_RH))
        if len(a_RH) != rank and (count * rank != len(a_RH) or count != len(module.parts)):
            raise UserError(f"{self.folder}: {module.name} has the rank {len(a_RH)}, not lora.rank = {rank}")
        found: dict[str, Tensor] = {}
        for number, (part, b) in enumerate(zip(module.parts, b_FR.split(rows), strict=True)):
            a, columns = a_RH, slice(None)
            if count > 1:  # as `export_adapter` writes them
                columns = slice(number * rank, (number + 1) * rank)
                if bool(b.any()) and int(b.count_nonzero()) != int(b[:, columns].count_nonzero()):
                    raise UserError(
                        f"{self.folder}: {module.name}: one adapter of the rank {len(a_RH)} for several parts"
                    )
                a = a_RH[columns]
            name = f"{module.matrix}.lora.{part}"
            found |= {f"{name}.a.weight": a, f"{name}.b.weight": b[:, columns]}
        return found

    def _check_scale(self, module: Module, rank: int) -> None:
        alpha = _of_pattern(self._config.get("alpha_pattern") or {}, module.name, self._config.get("lora_alpha", 8))
        scale = alpha / (math.sqrt(rank) if self._lora.rslora else rank)
        if not math.isclose(scale, self._lora.scale, rel_tol=1e-6):
            raise UserError(f"{self.folder}: {module.name} has the scale {scale}; all of ours have {self._lora.scale}")


def len_of(parameter: Any) -> int:
    """Rows of a parameter, also of a partitioned one."""
    return int(getattr(parameter, "ds_shape", parameter.shape)[0])


def _of_pattern(table: Mapping[str, Any], name: str, default: float) -> float:
    """As peft looks a module up: a key is a whole name or its end."""
    return next((value for key, value in table.items() if name == key or name.endswith(f".{key}")), default)
