"""Topology: which process gets which number, and how they find each other.

Takes how many nodes and ranks there are and where rank 0 listens, gives each rank's environment: the variables
that torchrun, srun and the deepspeed launcher set too, so the trainer cannot tell who started it. Pure functions,
no I/O; imports nothing of the project.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Topology:
    """`nodes` machines with `ranks_per_node` processes each; rank 0 listens at `main_address:main_port`."""

    nodes: int
    ranks_per_node: int
    main_address: str
    main_port: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


def rank_environment(topology: Topology, rank: int, cores: int, inherited: Mapping[str, str]) -> dict[str, str]:
    """The variables to set for one rank, on top of those it inherits.

    Ranks count through a node before they go on to the next, so that neighbours share the fast links. `cores` is
    what the node offers to all its ranks; each gets an equal share of threads, unless the user set OMP_NUM_THREADS:
    torch would otherwise start one thread per core in every rank. Device visibility is left alone: every rank sees
    all devices of its node and picks one by LOCAL_RANK.
    """
    assert 0 <= rank < topology.world_size, f"rank {rank} is not in a world of {topology.world_size}"
    node, local_rank = divmod(rank, topology.ranks_per_node)
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": str(topology.world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(topology.ranks_per_node),
        "NODE_RANK": str(node),
        "MASTER_ADDR": topology.main_address,
        "MASTER_PORT": str(topology.main_port),
    }
    if "OMP_NUM_THREADS" not in inherited:
        variables["OMP_NUM_THREADS"] = str(max(1, cores // topology.ranks_per_node))
    return variables


def count_devices(device_files: list[str], visible: str | None) -> int:
    """GPUs this node offers: its NVIDIA device files, or what CUDA_VISIBLE_DEVICES (`visible`) leaves of them."""
    cards = [name for name in device_files if name.removeprefix("nvidia").isdigit()]
    if visible is None:
        return len(cards)
    chosen = [name for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    return min(len(cards), len(chosen))
