"""The folder of checkpoints: names of steps, manifests.

In: a folder on a file system shared by all ranks. Out: its published checkpoints, which format.py reads and saver.py
writes. Guarantee: a manifest is taken only if its bytes are those that were written, and its format is ours.
"""

import contextlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from bigmodel import __version__
from bigmodel.config.settings import UserError
from bigmodel.data.store.files import is_inside
from bigmodel.run_directory import package_versions
from bigmodel.training.checkpoint import checksum

FORMAT = 3
ALGORITHMS = {2: "sha256", FORMAT: checksum.ALGORITHM}  # of the checksums, by format that this version reads


def path_of(directory: Path, step: int) -> Path:
    return Path(directory) / f"step-{step:08d}"


def steps(directory: Path) -> list[int]:
    """Steps of the published checkpoints, ascending. A folder of another name, as step-400, is none of them."""
    found = Path(directory).glob("step-*") if Path(directory).is_dir() else iter(())
    numbers = [int(path.name[5:]) for path in found if path.name[5:].isdecimal() and path.is_dir()]
    return sorted(step for step in set(numbers) if path_of(directory, step).is_dir())


def state_of(path: Path) -> dict[str, Any]:
    """The caller's state of a checkpoint, without verifying its files. Raises `OSError`, `ValueError` or `LookupError`
    if it or the manifest is damaged, `UserError` for another format."""
    if problem := read_manifest(path)[1]:
        raise ValueError(f"{path}: {problem}")
    return dict(json.loads((path / "state.json").read_bytes())["state"])


def newest_state(directory: Path) -> dict[str, Any] | None:
    """The state of the newest readable checkpoint; None if there is none."""
    for step in reversed(steps(directory)):
        with contextlib.suppress(OSError, ValueError, LookupError):
            return state_of(path_of(directory, step))
    return None


def remove_partials(directory: Path) -> None:
    """Remove the staging folders of killed saves. Each is renamed first, so that a stale rank 0 cannot publish it."""
    partials = Path(directory).glob("step-*.partial-*") if Path(directory).is_dir() else iter(())
    for path in partials:
        doomed = path if path.name.endswith(".doomed") else path.with_name(f"{path.name}.doomed")
        if doomed != path:
            os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def plain(value: Any) -> bytes:
    """Canonical JSON: equal content gives equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def read_manifest(path: Path) -> tuple[dict[str, Any], str]:
    """The manifest and its problem, or "". Its bytes must equal the canonical JSON of its content.

    Raises `UserError` for an undamaged manifest of another format: such a checkpoint is not ours to judge or replace.
    """
    try:
        raw = (path / "manifest.json").read_bytes()
        manifest = json.loads(raw)
        if not is_of_another_format(manifest):
            return _checked(raw, manifest)
    except OSError as error:
        return {}, f"manifest.json cannot be read: {error.strerror}"
    except (ValueError, KeyError, AttributeError, TypeError):
        return {}, "manifest.json is not a manifest"
    by, read = manifest.get("versions", {}).get("bigmodel"), " and ".join(map(str, ALGORITHMS))
    raise UserError(
        f"{path}: this checkpoint has format {manifest['format']}{f', of bigmodel {by}' if by else ''}; bigmodel "
        f"{__version__} reads formats {read}; start with the version that wrote it, or move it away to go on from an "
        "older checkpoint; nothing was changed"
    )


def _checked(raw: bytes, manifest: dict[str, Any]) -> tuple[dict[str, Any], str]:
    if raw != sealed(manifest, manifest["format"]):
        return {}, "manifest.json has changed since it was written"
    if wrong := [name for name in manifest["files"] if "/" in name or not is_inside(name)]:
        return {}, f"manifest.json names the file {wrong[0]!r}, which is not inside the checkpoint"
    facts = {"bytes", ALGORITHMS[manifest["format"]]}
    if wrong := [name for name, recorded in manifest["files"].items() if set(recorded) != facts]:
        return {}, f"manifest.json has no {ALGORITHMS[manifest['format']]} of {wrong[0]}"
    return manifest, ""


def is_of_another_format(manifest: dict[str, Any]) -> bool:
    """A flipped bit in the number of the format is damage: the checksum still is that of a format of ours."""
    number = manifest["format"]
    return (
        isinstance(number, int)
        and number not in ALGORITHMS
        and not any(
            plain(manifest | {"format": ours}) == sealed(manifest | {"format": ours}, ours) for ours in ALGORITHMS
        )
    )


def is_unreadable_here(path: Path) -> bool:
    """Whether another version of bigmodel wrote this checkpoint, in a format of its own."""
    try:
        return is_of_another_format(json.loads((path / "manifest.json").read_bytes()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def sealed(manifest: dict[str, Any], number: int = FORMAT) -> bytes:
    """The bytes of a manifest of a format, with the checksum of its other content."""
    algorithm = ALGORITHMS[number]
    content = {key: value for key, value in manifest.items() if key != algorithm}
    return plain(content | {algorithm: checksum.of_bytes(plain(content), algorithm)[algorithm]})


def looks_whole(path: Path) -> bool:
    """Whether the manifest is valid and every file has its size. Cheap, for retention; loading checks every byte."""
    manifest, problem = read_manifest(path)
    if problem:
        return False
    return all(
        (path / name).exists() and (path / name).stat().st_size == facts["bytes"]
        for name, facts in manifest["files"].items()
    )


def manifest_of(files: dict[str, Any], world_size: int) -> bytes:
    """files: facts of checksum.py by name."""
    content: dict[str, Any] = {"format": FORMAT, "files": files, "world_size": world_size, "saved_at": time.time()}
    content["versions"] = package_versions() | {"bigmodel": __version__}
    return sealed(content)
