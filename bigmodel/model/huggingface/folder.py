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

from bigmodel.config.settings import UserError
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
            raise UserError(f"{self.folder / file}: {name}: cannot be read: {error}; fetch the file again") from None


def _files_by_name(folder: Path) -> dict[str, str]:
    if (folder / INDEX).exists():
        table = read_json(folder / INDEX)
        places = table.get("weight_map") if isinstance(table, dict) else None
        if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
            raise UserError(f"{folder / INDEX}: has no weight_map; fetch the file again")
        outside = [file for file in places.values() if Path(file).name != file]
        missing = sorted({file for file in places.values() if not (folder / file).is_file()})
        if outside or missing:
            what = f"names {outside[0]!r}, a path" if outside else f"{', '.join(missing)}: missing"
            raise UserError(f"{folder / INDEX}: {what}; fetch the folder again")
        return places
    if not (folder / WEIGHTS).is_file():
        old = sorted(file.name for file in folder.glob("*.bin"))
        remedy = (
            "load the model in transformers and save it anew, which writes safetensors" if old else "fetch it again"
        )
        raise UserError(f"{folder}: no {WEIGHTS} and no {INDEX}{f', only {old[0]}' if old else ''}; {remedy}")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return dict.fromkeys(file.keys(), WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read: {error}; fetch the file again") from None


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
    places, total = {}, sum(weights.nbytes(name) for name in weights)
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
