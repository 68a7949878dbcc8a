"""Measured times of the implementations of attention, kept per user: `attention.json`.

In: seconds and errors measured by `python -m tools.tune_attention`. Out: the fastest exact implementation for the
layers of a run. A measurement holds for one device, one set of versions, one state of our kernels and one shape; with
any other of these there is none. Reading measures nothing.

    {"measurements": [{"of": {"device": "NVIDIA H200", "torch": "2.13.0", ..., "heads": 32, ..., "tokens": 16384},
                       "kernels": {"triton": {"forward_seconds": 1e-3, "backward_seconds": 2.5e-3,
                                              "errors": {"out": [1.1e-3, 2e-3], ...}},
                                   "hopper": {"forward_seconds": ..., "wrong": "dq: error 0.3, at most 0.02"},
                                   "flash-attn": {"not_run": "the package flash-attn is not installed; ..."}}}]}

errors: [found, allowed] against float64, by the rule of tests/gpu.
"""

import fcntl
import hashlib
import importlib.metadata
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bigmodel.config.settings import UserError
from bigmodel.kernels.attention import KERNELS
from bigmodel.run_directory import read_json, write_json

COMMAND = "python -m tools.tune_attention"
SOURCES = Path(__file__).parents[1] / "kernels"


class Shape(NamedTuple):
    """Self-attention of one layer on one rank. left, right: of the mask (`kernels/mask.py`), None without a limit."""

    heads: int
    key_heads: int
    channels: int
    dtype: str  # "bfloat16", "float16"
    left: int | None
    right: int | None
    tokens: int  # of a micro-batch, padding included

    def __str__(self) -> str:
        left, right = ("all" if side is None else side for side in (self.left, self.right))
        return (
            f"{self.heads} heads on {self.key_heads} of {self.channels} channels, {self.dtype}, {left} keys before and "
            f"{right} after, {self.tokens} tokens"
        )


def measurements_file() -> Path:
    """`bigmodel/attention.json` in the user's cache folder, $XDG_CACHE_HOME or ~/.cache."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    return Path(folder if os.path.isabs(folder) else os.path.expanduser("~/.cache"), "bigmodel", "attention.json")


def machine_of(device: torch.device) -> dict[str, str]:
    """What a measurement depends on beside the shape: device, versions, and a digest of our kernels' sources."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.py")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "flash-attn": _version("flash-attn"),
        "kernels": digest.hexdigest()[:16],
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def read_measured(file: Path, machine: Mapping[str, str], shape: Shape) -> dict[str, dict[str, Any]]:
    """Results by implementation; {}: none. Raises `UserError` if the file is damaged."""
    of = {**machine, **shape._asdict()}
    return next((one["kernels"] for one in _read(file) if one["of"] == of), {})


def add_measured(
    file: Path, machine: Mapping[str, str], shape: Shape, kernel: str, result: dict[str, Any] | None
) -> None:
    """Put one result into the file, None: take it out. The others stay, also those that another process adds meanwhile.

    Raises `UserError` if the file is damaged.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(f"{file.name}.lock"), "a") as lock:
        with suppress(OSError):  # a file system without locks: two processes at once may lose a result
            fcntl.flock(lock, fcntl.LOCK_EX)
        measurements, of = _read(file), {**machine, **shape._asdict()}
        found = next((one for one in measurements if one["of"] == of), None)
        if found is None:
            found = {"of": of, "kernels": {}}
            measurements.append(found)
        found["kernels"] |= {kernel: result}
        if result is None:
            del found["kernels"][kernel]
        write_json(file, {"measurements": measurements})


def fastest(layers: Mapping[Shape, int], file: Path, machine: Mapping[str, str]) -> tuple[str, str]:
    """(name, reason) of the implementation with the least time forward and backward, summed over the layers.

    layers: number of layers by shape. Only implementations that are exact at every shape count. Without a measurement
    of each implementation at each shape, or with a damaged file: our kernel, "triton".
    """
    try:
        measured = {shape: read_measured(file, machine, shape) for shape in layers}
    except UserError as error:
        return "triton", str(error)
    for shape, results in measured.items():
        if not results.keys() >= KERNELS.keys():
            what = "a part of the measurements" if results else "no measurement"
            return "triton", f"{file} has {what} for {machine['device']}, these versions and {shape}; run {COMMAND}"
    seconds = {name: _seconds(name, measured, layers) for name in KERNELS}
    exact = {name: total for name, total in seconds.items() if math.isfinite(total)}
    if not exact:
        return "triton", f"{file}: no implementation is exact on {machine['device']}; see {COMMAND}"
    ordered = sorted(exact, key=exact.__getitem__)
    times = ", ".join(f"{name} {exact[name] * 1e3:.2f} ms" for name in ordered)
    return ordered[0], f"measured, attention of a micro-batch: {times}"


def problem_of(result: Mapping[str, Any]) -> str:
    """Why a result cannot be chosen; empty if it can."""
    return str(result.get("not_run") or result.get("wrong") or "")


def _seconds(name: str, measured: Mapping[Shape, Mapping[str, Any]], layers: Mapping[Shape, int]) -> float:
    results = {shape: found[name] for shape, found in measured.items()}
    if any(problem_of(result) for result in results.values()):
        return math.inf
    return sum(
        layers[shape] * (result["forward_seconds"] + result["backward_seconds"]) for shape, result in results.items()
    )


def _read(file: Path) -> list[dict[str, Any]]:
    """The measurements of a file, checked; [] if there is none."""
    remedy = f"delete it and run {COMMAND}"
    if not os.path.exists(file):
        return []
    measurements = read_json(file, remedy, keys=["measurements"])["measurements"]
    if not (isinstance(measurements, list) and all(map(_is_measurement, measurements))):
        raise UserError(f"{file}: is not a list of measurements; {remedy}")
    return measurements


def _is_measurement(one: Any) -> bool:
    return (
        isinstance(one, dict)
        and isinstance(one.get("of"), dict)
        and isinstance(one.get("kernels"), dict)
        and all(map(_is_result, one["kernels"].values()))
    )


def _is_result(result: Any) -> bool:
    if not isinstance(result, dict):
        return False
    times = [result.get(f"{part}_seconds") for part in ("forward", "backward")]
    return bool(problem_of(result)) or all(isinstance(time, float) and 0 < time < math.inf for time in times)
