"""Operators of torchvision for packages that import it with a CPU build of torch: streaming and transformers."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_library: list[Any] = []  # torch forgets definitions whose Library object is gone


def define_missing_torchvision_operators() -> None:
    """Let packages that import torchvision load with a CPU build of torch.

    A torchvision built for CUDA cannot load its compiled part there, and its import fails on two operators that are
    never called. If the compiled part loads, nothing is done. Call this before importing streaming or transformers.
    """
    import torch
    from torch import library

    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations or hasattr(torch.ops.torchvision, "nms"):
        return
    for compiled in _compiled_parts(spec.submodule_search_locations):
        try:
            torch.ops.load_library(str(compiled))
            return
        except (OSError, ImportError):
            continue
    operators = library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.append(operators)


def _compiled_parts(folders: Iterable[str]) -> list[Path]:
    return [path for folder in folders for path in sorted(Path(folder).glob("_C*.so"))]
