"""Consistency check: all ranks run the same program on the same data with the same settings, or no rank runs.

In: the world right after its start. Out: `world.json` in the run directory, or an error. Reason: a node with an older
checkout, another torch or a stale copy of the shards would train silently wrong.
Collective. Cost: one gather and some milliseconds of hashing.
"""

import hashlib
import json
import os
import platform
import subprocess
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bigmodel.config.settings import Settings, UserError, to_toml_table
from bigmodel.data.store.shards import ShardStore
from bigmodel.distributed.rendezvous import name_rank
from bigmodel.distributed.world import World
from bigmodel.run_directory import package_versions, write_json

PACKAGE = Path(__file__).parents[1]
REMEDIES = {
    "commit": "bring every node to the same commit",
    "source code": "bring every node to the same files",
    "settings": "start every rank with the same run file and --set",
    "data": "give every node the same prepared data: see bigmodel verify",
    "device": "start all ranks on the same kind of device: see CUDA_VISIBLE_DEVICES",
}


def check_consistency(world: World, settings: Settings) -> None:
    """Raises `UserError` on every rank if any two ranks differ; it names the ranks and nodes that differ from most."""
    identities = world.gather_objects(identify(world, settings))
    complaint = disagreement(identities)
    if complaint:
        raise UserError(complaint)
    if world.rank == 0:
        ranks = [{name: identity[name] for name in ("host", "device", "device_id")} for identity in identities]
        shared = {name: identities[0][name] for name in (*REMEDIES, "versions") if name != "device"}
        write_json(settings.run.directory / "world.json", {"ranks": ranks, "shared": shared})


def identify(world: World, settings: Settings) -> dict[str, Any]:
    """Host, device, source code, settings, data and versions of this rank, as plain values."""
    cuda = world.device.type == "cuda"
    properties = torch.cuda.get_device_properties(world.device) if cuda else None
    return {
        "host": os.uname().nodename,
        "device": world.device.type,
        "device_id": f"{properties.name} {getattr(properties, 'uuid', world.local_rank)}" if properties else "",
        "commit": _commit(),
        "source code": _hash_sources(),
        "settings": _digest(json.dumps(to_toml_table(settings), sort_keys=True).encode()),
        "data": _data(settings),
        "versions": {"python": platform.python_version(), **package_versions(), **_nccl(cuda)},
    }


def disagreement(identities: Sequence[dict[str, Any]]) -> str:
    """The error message for the first property in which ranks differ; empty if all are equal.

    Pure, except that names of ranks come from the environment.
    """
    for matter, remedy in REMEDIES.items():
        found = [identity[matter] for identity in identities]
        if len(set(found)) > 1:
            return _tell(matter, found, remedy)
    for library in dict.fromkeys(name for identity in identities for name in identity["versions"]):
        found = [identity["versions"].get(library, "not installed") for identity in identities]
        if len(set(found)) > 1:
            return _tell(f"the version of {library}", found, "give every node the same environment")
    shared = [name for name, count in Counter(i["device_id"] for i in identities).items() if name and count > 1]
    if shared:
        ranks = [name_rank(rank) for rank, identity in enumerate(identities) if identity["device_id"] == shared[0]]
        return f"{' and '.join(ranks)} use one device, {shared[0]}; start one rank per GPU"
    return ""


def _tell(matter: str, found: Sequence[str], remedy: str) -> str:
    usual = Counter(found).most_common(1)[0][0]
    odd: dict[str, list[int]] = defaultdict(list)
    for rank, value in enumerate(found):
        if value != usual:
            odd[value].append(rank)
    parts = [f"{value or 'none'} for {_names(ranks)}" for value, ranks in odd.items()]
    return f"nodes differ in {matter}: {usual or 'none'} on most ranks, but {'; '.join(parts)}; {remedy}"


def _names(ranks: Sequence[int]) -> str:
    return ", ".join(map(name_rank, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")


def _data(settings: Settings) -> str:
    """The fingerprint of the data, or why it cannot be read, so that a node that lacks the data is named."""
    try:
        return ShardStore(settings.data.directory, "train", settings.data.remote).fingerprint[:16]
    except UserError as error:
        return f"unreadable ({error})"


def _commit() -> str:
    try:
        command = ["git", "-C", str(PACKAGE), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()[:12]
    except (OSError, subprocess.SubprocessError):
        return ""  # an installed package or a container; the hash of the sources covers these


def _hash_sources() -> str:
    """Hash of all modules. `os.walk` follows `kernels` and `launcher`, in a checkout symlinks inside the package."""
    digest = hashlib.sha256()
    folders = os.walk(PACKAGE, followlinks=True)
    for path in sorted(Path(folder, name) for folder, _, names in folders for name in names if name.endswith(".py")):
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _nccl(cuda: bool) -> dict[str, str]:
    return {"NCCL": ".".join(map(str, torch.cuda.nccl.version()))} if cuda else {}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
