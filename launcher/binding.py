"""Binding: the processors of a rank, near its GPU and apart from those of other ranks.

In: the NUMA nodes and GPUs that Linux reports. Out: a set of processors, or None (no binding). `divide` is pure. An
existing binding (srun --cpu-bind, taskset) is kept. "device" gives each rank at least two processors, one to train and
one to read data, else nothing is bound; for "cores" one per rank is enough.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

LEAST = {"device": 2, "cores": 1}  # fewest processors of a rank; with fewer nothing is bound


def divide(
    kind: str,
    local_rank: int,
    local_size: int,
    allowed: Sequence[int],
    node_of_device: Sequence[int],
    processors_of_node: Mapping[int, Sequence[int]],
) -> set[int] | None:
    """The processors of one rank; None: no binding.

    kind "device": the processors of its GPU's NUMA node (`node_of_device[local_rank]`), shared evenly among the ranks
    with GPUs of that NUMA node. "cores": an equal share of all processors, NUMA node by NUMA node.
    """
    if kind == "none":
        return None
    if kind == "device":
        if len(node_of_device) < local_size or min(node_of_device[:local_size], default=-1) < 0:
            return None
        node = node_of_device[local_rank]
        mates = [rank for rank in range(local_size) if node_of_device[rank] == node]
        beside = [c for c in processors_of_node.get(node, ()) if c in allowed]
        return _share(kind, beside, mates.index(local_rank), len(mates))
    ordered = [c for node in sorted(processors_of_node) for c in processors_of_node[node] if c in allowed]
    return _share(kind, ordered or sorted(allowed), local_rank, local_size)


def processors_to_bind(kind: str, local_rank: int, local_size: int, environment: Mapping[str, str]) -> set[int] | None:
    """`divide` for this process on this machine."""
    if not hasattr(os, "sched_getaffinity") or environment.get("SLURM_CPU_BIND_TYPE", "none") not in ("none", "quiet"):
        return None
    allowed = sorted(os.sched_getaffinity(0))
    return divide(kind, local_rank, local_size, allowed, _nodes_of_devices(environment), _processors_of_nodes())


def parse_list(text: str) -> list[int]:
    """Linux's list format: `0-3,8` is [0, 1, 2, 3, 8]."""
    found: list[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        found += range(int(first), int(last or first) + 1)
    return found


def _share(kind: str, processors: Sequence[int], index: int, parts: int) -> set[int] | None:
    if len(processors) < LEAST[kind] * parts:
        return None
    return set(processors[index * len(processors) // parts : (index + 1) * len(processors) // parts])


def _processors_of_nodes() -> dict[int, list[int]]:
    folder = Path("/sys/devices/system/node")
    lists = {int(path.parent.name[4:]): path for path in folder.glob("node[0-9]*/cpulist")}
    return {node: parse_list(path.read_text()) for node, path in lists.items()}


def _nodes_of_devices(environment: Mapping[str, str]) -> list[int]:
    """The NUMA node of each visible NVIDIA GPU, by index; -1: unknown to Linux. Empty without GPUs."""
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*"), key=lambda card: card.name)
    files = [Path("/sys/bus/pci/devices") / card.name / "numa_node" for card in cards]
    nodes = [int(file.read_text()) if file.exists() else -1 for file in files]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return nodes
    chosen = visible.split(",")
    if not all(name.strip().isdecimal() and int(name) < len(nodes) for name in chosen):
        return []  # given by UUID, or none: no binding
    return [nodes[int(name)] for name in chosen]
