"""Folders of Hugging Face: config.json with weights in safetensors files.

In and out: `config.json`, and `model.safetensors`, or several files with `model.safetensors.index.json`. Guarantees: a
folder appears whole, by one rename; files and bytes are a pure function of weights and arguments. Costs: writing holds
one tensor at a time; reading has one file open, for `OPEN_BYTES` of its weights, because pages that were read stay in
memory until it is closed. A mixture of experts has thousands of weights in a file, in the order of its layers.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bigmodel.config.settings import ModelSettings, UserError
from bigmodel.config.start_folder import read_config_json
from bigmodel.model.huggingface.weights import Weights, from_transformers
from bigmodel.run_directory import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BESIDE = "mtp.safetensors"  # no reader of the class opens it
OPEN_BYTES = 1 << 30
MAX_BYTES = 5 << 30  # of a file, as transformers writes them
WRITTEN = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip


class FolderWeights(Mapping[str, Tensor]):
    """The weights of a folder by name, each read when it is asked for.

    Raises `UserError` for a folder without safetensors, a file that is missing or damaged, and for a weight that the
    index places in a file that lacks it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _files_by_name(folder)
        self._open: Any = None
        self._file, self._bytes = "", 0  # the open one, and the bytes of its weights that were asked for

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, name: str) -> Tensor:
        file = self._files[name]
        try:
            if file != self._file or self._bytes > OPEN_BYTES:
                self._open, self._file, self._bytes = safe_open(self.folder / file, framework="pt"), file, 0
            weight: Tensor = self._open.get_tensor(name)
            self._bytes += weight.nbytes
            return weight
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder / file}: {name}: cannot be read: {error}; download it again") from None


class RenamedWeights(Mapping[str, Tensor]):
    """Weights under other names. `stored`: their name there, by name."""

    def __init__(self, weights: Mapping[str, Tensor], stored: Mapping[str, str]) -> None:
        self._weights, self._stored = weights, stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[self._stored[name]]


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


class Described(Protocol):
    """Weights by name, in order; shape and type without reading them."""

    def __iter__(self) -> Iterator[str]: ...
    def __getitem__(self, name: str) -> Tensor: ...
    def dtype_of(self, name: str) -> torch.dtype: ...
    def shape(self, name: str) -> list[int]: ...


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    weights: Described,
    max_bytes: int,
    more: Mapping[str, bytes],
    beside: Sequence[str] = (),
) -> None:
    """Write config.json, weights, and other files by name. `beside`: names of weights that are not of the class; they
    go into `BESIDE`. Raises `UserError` if the folder exists."""
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another folder, or delete this one")
    partial = folder.parent / f"{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, content in more.items():
        (partial / name).write_bytes(content)
    _write_json(partial / "config.json", config)
    sizes = {name: _bytes_of(weights, name) for name in weights if name not in beside}
    files = _divided(sizes, max_bytes)
    places: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = WEIGHTS if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        write_weights(partial / file, weights, names)
        places |= dict.fromkeys(names, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places.items()))}
        _write_json(partial / INDEX, index)
    if beside:
        write_weights(partial / BESIDE, weights, beside)
    os.replace(partial, folder)


def _bytes_of(weights: Described, name: str) -> int:
    return math.prod(weights.shape(name)) * weights.dtype_of(name).itemsize


def _divided(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names by file, in order; a file has at most `max_bytes`, or one weight."""
    files: list[list[str]] = [[]]
    size = 0
    for name, more in sizes.items():
        if files[-1] and size + more > max_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += more
    return files


def write_weights(path: Path, weights: Described, names: Sequence[str]) -> None:
    """A safetensors file: length of the header, header, tensors (https://github.com/huggingface/safetensors). The
    library's `save_file` would hold all of them in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        begin, end = end, end + _bytes_of(weights, name)
        header[name] = {
            "dtype": WRITTEN[weights.dtype_of(name)],
            "shape": weights.shape(name),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(memoryview(weights[name].contiguous().view(-1).view(torch.uint8).numpy()))


def _write_json(path: Path, table: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
