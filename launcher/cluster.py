"""Cluster files: what a run needs to know of the machines it runs on, as frozen, typed settings in TOML.

Takes a path, gives a `Cluster`; a run without a cluster file gets the defaults. An unknown key or variable is an error
with a suggestion. `configs/clusters/` has complete ones.
"""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from bigmodel.config.sections import SET, UNSET, setting
from bigmodel.config.settings import Section, UserError, explain
from bigmodel.launcher.fabric import complain_of_unknown, fabric_environment, profiles
from bigmodel.launcher.hostlist import expand_hosts


class SlurmSettings(Section):
    """What goes into the sbatch script; empty: the cluster's own default."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    reservation: str = ""
    constraint: str = ""
    exclude: str = Field("", description="nodes not to use, in SLURM's form: n[3,7]")
    time_limit: str = Field("", description="SLURM's form: 2-00:00:00 is two days")
    gpu_option: Literal["gpus-per-node", "gres"] = Field("gpus-per-node", description="how GPUs are asked for")
    cpus_per_rank: int = Field(0, ge=0, description="processors of each rank; 0: SLURM's default")
    memory: str = Field("", description="of a node, as 500G; 0 is all of it")
    exclusive: bool = Field(False, description="whole nodes")
    signal_seconds: int = Field(120, ge=0, description="SIGTERM so long before the time limit, to save; 0: none")
    modules: list[str] = Field([], description="environment modules to load")
    setup: list[str] = Field([], description="shell lines that run once, on the first node, before the ranks")
    options: list[str] = Field([], description="more #SBATCH options, as --mail-type=END")
    srun_options: list[str] = Field([], description="more options of srun, as --mpi=none")


class ContainerSettings(Section):
    """An image that Pyxis/enroot runs the ranks in."""

    image: str = Field("", description="as nvcr.io#nvidia/pytorch:25.01-py3 or /images/train.sqsh")
    mounts: list[str] = setting([], only_with={"image": SET}, description="as /data:/data:ro")
    python: str = setting("python3", only_with={"image": SET}, description="the interpreter inside")
    workdir: str = setting(
        "", only_with={"image": SET}, description="folder of this project inside; empty: the same as outside"
    )


class RequeueSettings(Section):
    """Whether a SLURM job that ended before the last step goes into the queue again."""

    limit: int = Field(10, ge=0, description="requeue at most so often; 0: never")
    no_progress_limit: int = setting(
        2, only_with={"limit": SET}, ge=0, description="... and after so many failures in a row without a new step, not"
    )


class SshSettings(Section):
    command: list[str] = Field(
        ["ssh", "-o", "BatchMode=yes"], min_length=1, description="the remote shell; gets options, host, command line"
    )
    options: list[str] = Field([], description='its options, as ["-p", "2222"]')
    hostfile: Path | None = Field(None, description="DeepSpeed's form, a line per node: host slots=8")


class Expectations(Section):
    """What preflight compares with; 0: the median of the nodes instead."""

    matmul_tflops: float = Field(0, ge=0, description="of one device, in bf16 (fp32 on a CPU)")
    link_gigabytes_per_second: float = Field(0, ge=0, description="between two nodes, one way")
    all_reduce_gigabytes_per_second: float = Field(0, ge=0, description="bytes reduced per second")
    tolerance: float = Field(0.5, gt=0, lt=1, description="a node below this share of what is expected is excluded")


class CheckSettings(Section):
    before_start: bool = Field(False, description="run `launcher check` on the nodes before each start")
    free_disk_gigabytes: float = Field(1, ge=0, description="least room for the run directory")
    free_shared_memory_gigabytes: float = Field(0.5, ge=0, description="least room in /dev/shm")
    clock_skew_seconds: float = Field(2, gt=0, description="largest difference of the clocks")
    expect: Expectations = Expectations()


class Cluster(Section):
    nodes: int = Field(1, ge=1)
    gpus_per_node: int = Field(0, ge=0)
    ranks_per_node: int = Field(0, ge=0, description="0: one per GPU, or one where there is none")
    hosts: str = setting(
        "",
        only_with={"ssh.hostfile": UNSET},
        why="the host file names them",
        description="for ssh and torchrun, without a host file: n[1-4], or addresses with commas",
    )
    switches: dict[str, str] = Field(
        {}, description="hosts of each switch: { rack1 = 'n[1-4]' }; for drawing and naming"
    )
    main_address: str = Field("", description="of rank 0; empty: its host name")
    main_port: int = Field(0, ge=0, le=65535, description="0: derived from the job's number")
    interface: str = Field("", description="network interface for gloo and NCCL's start, as ib0")
    fabric: str = Field("", description="infiniband, roce, efa, ethernet, or a TOML file of your own")
    binding: Literal["device", "cores", "none"] = Field(
        "device", description="processors of a rank: those near its GPU, an equal share of all, or any"
    )
    environment: dict[str, str] = Field({}, description="more variables; they come after those of the fabric")
    slurm: SlurmSettings = SlurmSettings()
    container: ContainerSettings = ContainerSettings()
    requeue: RequeueSettings = RequeueSettings()
    ssh: SshSettings = SshSettings()
    check: CheckSettings = CheckSettings()

    @model_validator(mode="after")
    def _makes_sense(self) -> "Cluster":
        if self.gpus_per_node and self.ranks_per_node > self.gpus_per_node:
            raise ValueError(
                f"ranks_per_node = {self.ranks_per_node} exceeds gpus_per_node = {self.gpus_per_node}; a rank needs a "
                "GPU of its own"
            )
        complaint = complain_of_unknown(self.environment)
        if complaint:
            raise ValueError(f"environment: {complaint}")
        return self

    @property
    def ranks_on_node(self) -> int:
        return self.ranks_per_node or self.gpus_per_node or 1

    def variables(self) -> dict[str, str]:
        """What the fabric, the interface and `environment` set, the last winning."""
        found = fabric_environment(self.fabric) if self.fabric else {}
        if self.interface:
            found |= {"NCCL_SOCKET_IFNAME": self.interface, "GLOO_SOCKET_IFNAME": self.interface}
        return found | self.environment

    def switches_of(self, hosts: list[str]) -> list[str]:
        """The switch of each host, "" where none is named; empty if `switches` is."""
        homes = {host: switch for switch, text in self.switches.items() for host in expand_hosts(text)}
        return [homes.get(host, "") for host in hosts] if homes else []


def load_cluster(path: Path | None) -> Cluster:
    """Read a cluster file; without one, the defaults. Raises `UserError` naming the file, the key and the remedy."""
    if path is None:
        return Cluster()
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such cluster file; configs/clusters/ has examples") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: cannot be read as TOML: {error}") from None
    _resolve(table.get("ssh"), "hostfile", path.parent)
    if table.get("fabric") not in profiles():
        _resolve(table, "fabric", path.parent)
    try:
        cluster = Cluster.model_validate(table)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, Cluster)}") from None
    cluster.variables()  # an unknown fabric is an error now, not on the nodes
    return cluster


def _resolve(section: Any, name: str, folder: Path) -> None:
    """A path in a cluster file is relative to it."""
    if isinstance(section, dict) and isinstance(section.get(name), str) and section[name]:
        section[name] = str((folder / section[name]).resolve())


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> slots, of a file with lines such as `worker-1 slots=4`; # begins a comment. Raises `UserError`."""
    found: dict[str, int] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a host file: {error}") from None
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 else ""
        if len(words) > 2 or (len(words) == 2 and not (words[1].startswith("slots=") and slots.isdecimal())):
            raise UserError(f"{path}:{number}: {line.strip()!r} is not of the form `host slots=8`")
        if slots and int(slots) == 0:
            raise UserError(f"{path}:{number}: {words[0]} has no slots; leave its line out")
        if words[0].startswith("-"):  # ssh would take it for an option
            raise UserError(f"{path}:{number}: {words[0]!r} is no host name")
        if words[0] in found:
            raise UserError(f"{path}:{number}: {words[0]} is listed twice; give it one line with all its slots")
        found[words[0]] = int(slots or 1)
    if not found:
        raise UserError(f"{path}: lists no host; a line is `host slots=8`")
    return found


def hosts_and_slots(cluster: Cluster, hostfile: Path | None = None) -> tuple[list[str], int]:
    """Hosts in their order and ranks on each: of the host file, of `hosts`, or this machine alone.

    Raises `UserError` if nothing names hosts, or nodes have unequal numbers of slots.
    """
    file = hostfile or cluster.ssh.hostfile
    if file:
        slots = read_hostfile(file)
        if len(set(slots.values())) > 1:
            odd = ", ".join(f"{host} {count}" for host, count in slots.items())
            raise UserError(
                f"{file}: slots differ between hosts ({odd}): ranks would not divide evenly over the nodes; give all "
                "as many"
            )
        return list(slots), next(iter(slots.values()))
    if not cluster.hosts:
        raise UserError("no hosts: give --hostfile FILE, or set hosts or ssh.hostfile in the cluster file")
    hosts = expand_hosts(cluster.hosts)
    repeated = next((host for host in hosts if hosts.count(host) > 1), "")
    if repeated:
        raise UserError(f"hosts = {cluster.hosts!r}: {repeated} is listed twice; set ranks_per_node instead")
    return hosts, cluster.ranks_on_node


def near(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """A suggestion to append to a complaint, or what is known."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {found[0]!r}?" if found else f"known: {', '.join(known)}"
