"""Placement: rank numbers and topology of a process started by srun, torchrun or mpirun.

In: their environment variables. Out: the `Topology` and this process's rank. Guarantees: the main address is never
silently localhost, and the computed topology agrees with the variables of this rank; else it is an error. Needs no
scontrol. Costs at most one small read (SLURM_HOSTFILE).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bigmodel.config.settings import UserError
from bigmodel.launcher.hostlist import expand_counts, expand_hosts
from bigmodel.launcher.topology import Topology, even_topology

FIRST_PORT, NUM_PORTS = 15_000, 16_000  # below the ports that Linux hands out to clients (32768 and up)

# For each MPI: rank, ranks, rank on the node, ranks on the node.
MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def find_place(environment: Mapping[str, str]) -> tuple[Topology, int]:
    """The topology and the rank of this process.

    Variables in order of precedence: RANK (torchrun), MPI's, SLURM's. mpirun inside a job starts one SLURM task per
    node, and all ranks of the node inherit that task's SLURM variables.
    Raises `UserError` if variables are missing or contradict each other.
    """
    by = started_by(environment)
    if by in ("torchrun", "environment"):
        return _from_torchrun(environment)
    if by == "mpi":
        return _from_mpi(environment, next(names for names in MPI_VARIABLES if names[0] in environment))
    if by == "slurm":
        return _from_slurm(environment)
    raise UserError(
        "exec: none of RANK, SLURM_PROCID (inside srun) or an MPI's rank is in the environment; start it once per "
        "rank: srun bigmodel launch exec RUN.toml, or torchrun ... -m bigmodel launch exec RUN.toml; "
        "or, on one machine: bigmodel launch local RUN.toml"
    )


def started_by(environment: Mapping[str, str]) -> str:
    """The starter of this process: "torchrun", "environment" (RANK is set otherwise), "mpi", "slurm", or "" (none)."""
    if "RANK" in environment:
        return "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "environment"
    in_step = "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment
    for rank, _, local_rank, _ in MPI_VARIABLES:
        if rank in environment and (local_rank in environment or not in_step):  # srun --mpi=pmi2 sets PMI_RANK alone
            return "mpi"
    return "slurm" if in_step else ""


def job_of(environment: Mapping[str, str]) -> str:
    """The number of this process's SLURM job, or ""; for a het job the leader's."""
    return environment.get("SLURM_HET_JOB_ID") or environment.get("SLURM_JOB_ID", "")


def job_groups(environment: Mapping[str, str]) -> list[list[str]]:
    """The hosts of this process's SLURM job: one list, or a list per group of a het job; empty without a job."""
    names = [f"SLURM_JOB_NODELIST_HET_GROUP_{number}" for number in range(int(environment.get("SLURM_HET_SIZE", "0")))]
    return [expand_hosts(environment[name]) for name in names or ["SLURM_JOB_NODELIST"] if environment.get(name)]


def port_of(job: str, step: str = "0") -> int:
    """A port, the same on every rank; consecutive jobs and the steps of one job get different ports."""
    digits = int("".join(character for character in job if character.isdigit()) or "0")
    return FIRST_PORT + (8 * digits + int(step if step.isdigit() else 0) % 8) % NUM_PORTS


def distribute(kind: str, counts: Sequence[int], plane: int = 1) -> tuple[int, ...]:
    """The node of each rank, for `counts` ranks per node: SLURM's block, cyclic and plane task distributions.

    >>> distribute("block", [2, 1]), distribute("cyclic", [2, 1]), distribute("plane", [3, 2], plane=2)
    ((0, 0, 1), (0, 1, 0), (0, 0, 1, 1, 0))
    """
    if kind == "block":
        return tuple(node for node, count in enumerate(counts) for _ in range(count))
    left, nodes = list(counts), []
    while any(left):
        for node in range(len(left)):
            taken = min(left[node], plane)
            nodes += [node] * taken
            left[node] -= taken
    return tuple(nodes)


def _from_slurm(environment: Mapping[str, str]) -> tuple[Topology, int]:
    hosts = expand_hosts(environment["SLURM_STEP_NODELIST"])
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    counts = expand_counts(tasks) if tasks else []
    if len(counts) != len(hosts):
        raise UserError(
            f"SLURM_STEP_NODELIST={environment['SLURM_STEP_NODELIST']} has {len(hosts)} nodes, but "
            f"SLURM_STEP_TASKS_PER_NODE={tasks} has {len(counts)}; start it with srun, which sets both"
        )
    kind = (environment.get("SLURM_DISTRIBUTION") or "block").lower().split(":")[0].split(",")[0]
    if "SLURM_HET_SIZE" in environment:  # each group has its own distribution, and a task may get that of another group
        kind = "block"
    rank = _number(environment, "SLURM_PROCID", sum(counts) - 1)
    if kind == "arbitrary":
        nodes = _arbitrary(environment, hosts, sum(counts))
    else:
        plane = _number({"SLURM_DIST_PLANESIZE": "1", **environment}, "SLURM_DIST_PLANESIZE") if kind == "plane" else 1
        nodes = distribute(kind if kind in ("cyclic", "plane") else "block", counts, plane)
    address = environment.get("MASTER_ADDR") or hosts[nodes[0]]
    port = _port(environment, environment.get("SLURM_STEP_ID", "0"))
    topology = Topology(tuple(hosts), nodes, address, port, _switches(environment, hosts))
    _agree_with_slurm(topology, rank, environment, kind)
    return topology, rank


def _arbitrary(environment: Mapping[str, str], hosts: Sequence[str], tasks: int) -> tuple[int, ...]:
    """One host per line of SLURM_HOSTFILE, in the order of ranks."""
    file = environment.get("SLURM_HOSTFILE", "")
    try:
        lines = expand_hosts(",".join(Path(file).read_text().split()))[:tasks]
        return tuple(hosts.index(line) for line in lines)
    except (OSError, ValueError) as error:
        raise UserError(
            f"SLURM_HOSTFILE={file}: the task distribution is arbitrary, and the file with the host of each rank "
            f"cannot be read on this node: {error}; use block, cyclic or plane, or mount the file"
        ) from None


def _switches(environment: Mapping[str, str], hosts: Sequence[str]) -> tuple[str, ...]:
    """The switch of this node; SLURM gives a task no others (SLURM_TOPOLOGY_ADDR, with topology/tree)."""
    path = environment.get("SLURM_TOPOLOGY_ADDR", "").split(".")
    name = environment.get("SLURMD_NODENAME", "")
    if len(path) < 2 or name not in hosts:
        return ()
    return tuple(path[-2] if host == name else "" for host in hosts)


def _agree_with_slurm(topology: Topology, rank: int, environment: Mapping[str, str], kind: str) -> None:
    computed = {"SLURM_NTASKS": str(topology.world_size)}
    computed["SLURM_NODEID"] = str(topology.nodes[rank])
    computed["SLURM_LOCALID"] = str(topology.local_rank(rank))
    computed["SLURMD_NODENAME"] = topology.host(rank)
    for name, value in computed.items():
        if environment.get(name, value) != value:
            raise UserError(
                f"SLURM sets {name}={environment[name]} for rank {rank}, but its node list "
                f"{environment['SLURM_STEP_NODELIST']} and the task distribution {kind!r} give {value!r}; "
                "use srun --distribution=block"
            )


def _from_torchrun(environment: Mapping[str, str]) -> tuple[Topology, int]:
    """The topology from RANK and the other variables of torchrun; the names of other nodes stay unknown."""
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        raise UserError(
            f"RANK={environment['RANK']} is set in the environment, but {', '.join(missing)} is not; unset RANK, or "
            "set all of them"
        )
    return _regular(environment, needed[:4])


def _from_mpi(environment: Mapping[str, str], names: Sequence[str]) -> tuple[Topology, int]:
    missing = [name for name in names if name not in environment]
    if missing:
        raise UserError(f"{names[0]} is set in the environment, but {', '.join(missing)} is not; set all of them")
    size, local_size = _number(environment, names[1]), _number(environment, names[3])
    if size > local_size and not environment.get("MASTER_ADDR"):
        raise UserError(
            f"{names[1]}={size} ranks on several machines, and MASTER_ADDR is not set; set it to the address of the "
            "machine of rank 0: mpirun -x MASTER_ADDR=HOST ..."
        )
    return _regular({"MASTER_ADDR": "127.0.0.1", **environment}, names)


def _regular(environment: Mapping[str, str], names: Sequence[str]) -> tuple[Topology, int]:
    """A topology from counts alone: the same number of ranks on every node, consecutive on a node.

    names: the variables of rank, ranks, rank on the node, ranks on the node.
    """
    size, local_size = _number(environment, names[1]), _number(environment, names[3])
    rank, local_rank = _number(environment, names[0], size - 1), _number(environment, names[2], local_size - 1)
    if local_size == 0 or size % local_size or rank % local_size != local_rank:
        raise UserError(
            f"rank {rank} of {size} is number {local_rank} of {local_size} on its node: ranks must be consecutive on a "
            "node, and every node needs the same number of ranks"
        )
    hosts = [f"node{node}" for node in range(size // local_size)]
    return even_topology(hosts, local_size, environment["MASTER_ADDR"], _port(environment)), rank


def _port(environment: Mapping[str, str], step: str = "0") -> int:
    if not environment.get("MASTER_PORT"):
        return port_of(job_of(environment), step)
    return _number(environment, "MASTER_PORT", 65535)


def _number(environment: Mapping[str, str], name: str, most: int | None = None) -> int:
    """A whole number from the environment, at most `most`. Raises `UserError` for anything else."""
    text = environment[name]
    if not text.isdecimal() or (most is not None and int(text) > most):
        limit = "" if most is None else f" from 0 to {most}"
        raise UserError(f"{name}={text} in the environment must be a whole number{limit}; correct or unset it")
    return int(text)
