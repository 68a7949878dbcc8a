"""Folders of Hugging Face: config.json with weights in safetensors files.

In and out: `config.json`, and `model.safetensors`, or several files with `model.safetensors.index.json`. Guarantees: a
folder appears whole, by one rename; files and bytes are a pure function of weights and arguments. Costs: reading holds
one tensor at a time beside those asked for, writing one file (`max_bytes`).
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bigmodel.config.settings import ModelSettings, UserError
from bigmodel.config.start_folder import read_config_json
from bigmodel.model.huggingface.weights import Weights, from_transformers
from bigmodel.run_directory import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_BYTES = 5 << 30  # of a file, as transformers writes them


class FolderWeights(Mapping[str, Tensor]):
    """The weights of a folder by name, each read when it is asked for.

    Raises `UserError` for a folder without safetensors, a file that is missing or damaged, and for a weight that the
    index places in a file that lacks it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _files_by_name(folder)
        self._open: dict[str, Any] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, name: str) -> Tensor:
        file = self._files[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            return self._open[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder / file}: {name}: cannot be read: {error}; download it again") from None


def read_folder(folder: Path) -> tuple[ModelSettings, Weights]:
    """Settings and weights of ours, in the type of the files. Raises `UserError` with the folder."""
    try:
        return from_transformers(read_config_json(folder), FolderWeights(folder))
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(str(folder)) else f"{folder}: {error}") from None


def _files_by_name(folder: Path) -> dict[str, str]:
    """File of each weight, by the names in the files. An index must agree with them."""
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(_names_in(folder / WEIGHTS), WEIGHTS)
    index = folder / INDEX
    if not index.is_file():
        raise UserError(
            f"{folder}: neither {WEIGHTS} nor {INDEX} is there; save the model with save_pretrained(..., "
            "safe_serialization=True)"
        )
    table = read_json(index)
    if not isinstance(table, dict):
        raise UserError(f"{index}: it must be a JSON object; download it again")
    said = table.get("weight_map")
    if not isinstance(said, dict) or not said:
        raise UserError(f"{index}: weight_map is missing; download it again")
    for file in said.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index}: weight_map names {file!r}; it must be a file in this folder")
    places: dict[str, str] = {}
    for file in sorted(set(said.values())):
        found = _names_in(folder / file)
        twice, lacking = places.keys() & found, {name for name in said if said[name] == file} - found
        if twice:
            raise UserError(f"{folder / file}: has again {', '.join(sorted(twice))}; download the folder again")
        if lacking:
            raise UserError(
                f"{folder / file}: lacks {', '.join(sorted(lacking))}, which the index names; download it again"
            )
        for name in sorted(found):
            places[name] = file
    return places


def _names_in(path: Path) -> set[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors: {error}; download it again") from None


class Sized(Protocol):
    """Weights by name, in order; `nbytes` without reading them."""

    def __iter__(self) -> Iterator[str]: ...
    def __getitem__(self, name: str) -> Tensor: ...
    def nbytes(self, name: str) -> int: ...


def write_folder(
    folder: Path, config: Mapping[str, Any], weights: Sized, max_bytes: int, more: Mapping[str, bytes]
) -> None:
    """Write config.json, weights, and other files by name. Raises `UserError` if the folder exists."""
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another folder, or delete this one")
    partial = folder.parent / f"{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, content in more.items():
        (partial / name).write_bytes(content)
    _write_json(partial / "config.json", config)
    files = _divided(weights, max_bytes)
    places: dict[str, str] = {}
    total = sum(weights.nbytes(name) for name in weights)
    for number, names in enumerate(files, 1):
        file = WEIGHTS if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        save_file({name: weights[name] for name in names}, partial / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(files) > 1:
        _write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
    os.replace(partial, folder)


def _divided(weights: Sized, max_bytes: int) -> list[list[str]]:
    """Names by file, in order; a file has at most `max_bytes`, or one weight."""
    files: list[list[str]] = [[]]
    size = 0
    for name in weights:
        if files[-1] and size + weights.nbytes(name) > max_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += weights.nbytes(name)
    return files


def _write_json(path: Path, table: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
