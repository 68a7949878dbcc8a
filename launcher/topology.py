"""Topology: rank numbers, their nodes, and the address at which ranks meet.

A `Topology` comes from a SLURM step, torchrun, mpirun, a host file or settings (`launcher/placement.py`). It gives each
rank's environment: the same variables as torchrun, srun and the deepspeed launcher set, so that the trainer does not
depend on its starter. Pure functions, no I/O.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bigmodel.config.user_error import UserError


@dataclass(frozen=True, slots=True)
class Topology:
    """Ranks on hosts; rank 0 listens at `main_address:main_port`.

    `nodes[r]` is the node of rank r, an index into `hosts`; ranks of a node are usually consecutive, but not always
    (SLURM's cyclic distribution). `switches` has the switch of each host, or is empty if unknown.

    >>> topology = Topology(("a", "b"), (0, 0, 1, 1), "a", 15000)
    >>> topology.local_rank(3), topology.local_size(3), topology.ranks_of(1)
    (1, 2, [2, 3])
    """

    hosts: tuple[str, ...]
    nodes: tuple[int, ...]
    main_address: str
    main_port: int
    switches: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        return len(self.nodes)

    def host(self, rank: int) -> str:
        return self.hosts[self.nodes[rank]]

    def ranks_of(self, node: int) -> list[int]:
        return [rank for rank, home in enumerate(self.nodes) if home == node]

    def local_rank(self, rank: int) -> int:
        """Number of lower ranks on the same node."""
        return self.nodes[:rank].count(self.nodes[rank])

    def local_size(self, rank: int) -> int:
        return self.nodes.count(self.nodes[rank])

    def share_node(self, one: int, other: int) -> bool:
        return self.nodes[one] == self.nodes[other]

    def share_switch(self, one: int, other: int) -> bool:
        """Whether the nodes of both ranks share a known switch; True on one node."""
        if self.share_node(one, other):
            return True
        switch = self.switches[self.nodes[one]] if self.switches else ""
        return bool(switch) and switch == self.switches[self.nodes[other]]


def even_topology(
    hosts: Sequence[str], ranks_per_node: int, main_address: str, main_port: int, switches: Sequence[str] = ()
) -> Topology:
    """The same number of ranks on each host, consecutive on a host: consecutive ranks share the fast links."""
    nodes = tuple(node for node in range(len(hosts)) for _ in range(ranks_per_node))
    return Topology(tuple(hosts), nodes, main_address, main_port, tuple(switches))


def ranks_per_node(ranks: int, nodes: int, devices: int, default: int = 1) -> int:
    """Ranks per node, for a total of `ranks` (0: one per device, or `default` without devices).

    Raises `UserError` if they do not divide over the nodes, or exceed the devices of a node.
    """
    if ranks < 0:
        raise UserError(f"--ranks {ranks}: at least 1 rank is needed; 0 means one per GPU")
    if ranks % nodes:
        low, high = ranks // nodes * nodes, (ranks // nodes + 1) * nodes
        near = f"{low} or {high}" if low else str(high)
        raise UserError(f"{ranks} ranks do not divide over {nodes} nodes; set {near} ranks, or another number of nodes")
    each = ranks // nodes or devices or default
    if devices and each > devices:
        raise UserError(
            f"{each} ranks on a node, but it has {devices} GPU(s); each rank needs its own: set at most "
            f"{devices * nodes} ranks on {nodes} node(s)"
        )
    return each


def rank_environment(topology: Topology, rank: int, cores: int, inherited: Mapping[str, str]) -> dict[str, str]:
    """The variables of one rank, in addition to the inherited ones.

    cores: processors of the node for all its ranks; each rank gets an equal share of threads, because torch would start
    one thread per core in every rank. OMP_NUM_THREADS of the user is kept. LAUNCH_HOSTS lets the trainer name the node
    of a rank that did not start. `bigmodel.launcher.devices` sets the devices.
    """
    assert 0 <= rank < topology.world_size, f"rank {rank} is not in a world of {topology.world_size}"
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": str(topology.world_size),
        "LOCAL_RANK": str(topology.local_rank(rank)),
        "LOCAL_WORLD_SIZE": str(topology.local_size(rank)),
        "NODE_RANK": str(topology.nodes[rank]),
        "MASTER_ADDR": topology.main_address if len(set(topology.nodes)) > 1 else "127.0.0.1",
        "MASTER_PORT": str(topology.main_port),
        "LAUNCH_HOSTS": host_runs(topology),
    }
    if "OMP_NUM_THREADS" not in inherited:
        variables["OMP_NUM_THREADS"] = str(max(1, cores // topology.local_size(rank)))
    return variables


def host_runs(topology: Topology) -> str:
    """The host of each rank, with repetitions counted: "a*8,b*8"."""
    runs: list[tuple[str, int]] = []
    for rank in range(topology.world_size):
        host = topology.host(rank)
        if runs and runs[-1][0] == host:
            runs[-1] = (host, runs[-1][1] + 1)
        else:
            runs.append((host, 1))
    return ",".join(f"{host}*{count}" for host, count in runs)
