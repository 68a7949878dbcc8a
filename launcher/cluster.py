"""Cluster files: the machines of a run, as frozen, typed settings in TOML.

In: a path, or None for the defaults. Out: a `Cluster`. An unknown key or variable is an error with a suggestion.
`configs/clusters/` has complete examples.
"""

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from bigmodel.config.hardware_settings import HardwareSettings
from bigmodel.config.sections import SET, UNSET, setting
from bigmodel.config.settings import Section, UserError, explain
from bigmodel.launcher.fabric import complain_of_unknown, fabric_environment, profiles
from bigmodel.launcher.hostlist import expand_hosts


class SlurmSettings(Section):
    """Options of the sbatch script; empty: the cluster's default."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    reservation: str = ""
    constraint: str = ""
    exclude: str = Field("", description="excluded nodes, in SLURM's format: n[3,7]")
    time_limit: str = Field("", description="in SLURM's format: 2-00:00:00 is two days")
    gpu_option: Literal["gpus-per-node", "gres"] = Field("gpus-per-node", description="option that requests GPUs")
    cpus_per_rank: int = Field(0, ge=0, description="processors of each rank; 0: SLURM's default")
    memory: str = Field("", description="memory of a node, for example 500G; 0: all of it")
    exclusive: bool = Field(False, description="request whole nodes")
    signal_seconds: int = Field(
        120, ge=0, description="seconds between SIGTERM (the run saves) and the time limit; 0: no signal"
    )
    modules: list[str] = Field([], description="environment modules to load")
    setup: list[str] = Field([], description="shell lines that run once, on the first node, before the ranks")
    options: list[str] = Field([], description="further #SBATCH options, for example --mail-type=END")
    srun_options: list[str] = Field([], description="further options of srun, for example --mpi=none")


class ContainerSettings(Section):
    """The image in which Pyxis/enroot runs the ranks."""

    image: str = Field("", description="for example nvcr.io#nvidia/pytorch:25.01-py3 or /images/train.sqsh")
    mounts: list[str] = setting([], only_with={"image": SET}, description="for example /data:/data:ro")
    python: str = setting("python3", only_with={"image": SET}, description="interpreter inside the image")
    workdir: str = setting(
        "", only_with={"image": SET}, description="folder of this project inside the image; empty: as outside"
    )


class RequeueSettings(Section):
    """Requeueing of SLURM jobs that ended before the last step."""

    limit: int = Field(10, ge=0, description="most requeues of a job; 0: none")
    no_progress_limit: int = setting(
        2,
        only_with={"limit": SET},
        ge=0,
        description="most failures in a row without a new step; after more the job is not requeued",
    )


class RestartSettings(Section):
    """Restarts of the ranks in place, on the same hosts, before any requeue."""

    limit: int = Field(2, ge=0, description="most restarts in a row that bring no new step; 0: no restart")
    spare_nodes: int = setting(
        0,
        only_with={"limit": SET},
        ge=0,
        description="nodes that take the place of bad ones: of ssh the last hosts of the list, of SLURM allocated in "
        "addition",
    )
    standby: bool = setting(
        True,
        only_with={"limit": SET},
        description="`launch local` keeps a process per rank with its imports done, for a restart in a quarter of the "
        "time; 0.35 GB of memory each",
    )


class SshSettings(Section):
    command: list[str] = Field(
        ["ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=5"],  # 3 without an answer: the host is gone
        min_length=1,
        description="the remote shell; called with options, host, command line",
    )
    options: list[str] = Field([], description='further options, for example ["-p", "2222"]')
    hostfile: Path | None = Field(None, description="host file in DeepSpeed's format, a line per node: host slots=8")


class Expectations(Section):
    """Expected speeds of the preflight check; 0: the median of the nodes."""

    matmul_tflops: float = Field(0, ge=0, description="matrix product of one device, in bf16 (fp32 on a CPU)")
    link_gigabytes_per_second: float = Field(0, ge=0, description="between two nodes, one way")
    all_reduce_gigabytes_per_second: float = Field(0, ge=0, description="bytes reduced per second; 0: not checked")
    tolerance: float = Field(0.5, gt=0, lt=1, description="a node below this share of the expected speed is excluded")


class CheckSettings(Section):
    before_start: bool = Field(False, description="run `bigmodel launch check` on the nodes before each start")
    free_disk_gigabytes: float = Field(1, ge=0, description="least free space for the run directory")
    free_shared_memory_gigabytes: float = Field(0.5, ge=0, description="least free space in /dev/shm")
    clock_skew_seconds: float = Field(2, gt=0, description="largest difference of the nodes' clocks")
    expect: Expectations = Expectations()


class Cluster(Section):
    nodes: int = Field(1, ge=1)
    gpus_per_node: int = Field(0, ge=0)
    ranks_per_node: int = Field(0, ge=0, description="0: one per GPU, or one without GPUs")
    hosts: str = setting(
        "",
        only_with={"ssh.hostfile": UNSET},
        why="the host file names them",
        description="hosts for ssh and torchrun, without a host file: n[1-4], or addresses separated by commas",
    )
    switches: dict[str, str] = Field(
        {}, description="hosts of each switch: { rack1 = 'n[1-4]' }; for pictures and messages"
    )
    main_address: str = Field("", description="address of rank 0; empty: its host name")
    main_port: int = Field(
        0, ge=0, le=65535, description="port of rank 0; 0: derived from the job's number or the run directory"
    )
    interface: str = Field("", description="network interface for gloo and NCCL's bootstrap, for example ib0")
    fabric: str = Field("", description="infiniband, roce, efa, ethernet, or your own TOML file")
    binding: Literal["device", "cores", "none"] = Field(
        "device", description="processors of a rank: near its GPU, an equal share of all, or any"
    )
    environment: dict[str, str] = Field({}, description="further variables; they override those of the fabric")
    slurm: SlurmSettings = SlurmSettings()
    container: ContainerSettings = ContainerSettings()
    requeue: RequeueSettings = RequeueSettings()
    restart: RestartSettings = RestartSettings()
    ssh: SshSettings = SshSettings()
    check: CheckSettings = CheckSettings()
    hardware: HardwareSettings = HardwareSettings()

    @model_validator(mode="after")
    def _makes_sense(self) -> "Cluster":
        if self.gpus_per_node and self.ranks_per_node > self.gpus_per_node:
            raise ValueError(
                f"ranks_per_node = {self.ranks_per_node} exceeds gpus_per_node = {self.gpus_per_node}; each rank needs "
                "its own GPU"
            )
        complaint = complain_of_unknown(self.environment)
        if complaint:
            raise ValueError(f"environment: {complaint}")
        return self

    @property
    def ranks_on_node(self) -> int:
        return self.ranks_per_node or self.gpus_per_node or 1

    def variables(self) -> dict[str, str]:
        """Variables of the fabric, the interface and `environment`; later ones override earlier ones."""
        found = fabric_environment(self.fabric) if self.fabric else {}
        if self.interface:
            found |= {"NCCL_SOCKET_IFNAME": self.interface, "GLOO_SOCKET_IFNAME": self.interface}
        return found | self.environment

    def switches_of(self, hosts: list[str]) -> list[str]:
        """The switch of each host, "" if it is in none; an empty list without `switches`."""
        homes = {host: switch for switch, text in self.switches.items() for host in expand_hosts(text)}
        return [homes.get(host, "") for host in hosts] if homes else []


def load_cluster(path: Path | None) -> Cluster:
    """Read a cluster file; None: the defaults. Raises `UserError` with file, key and remedy."""
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
    cluster.variables()  # raises for an unknown fabric now, not on the nodes
    return cluster


def _resolve(section: Any, name: str, folder: Path) -> None:
    """Make a path absolute; it is relative to the cluster file."""
    if isinstance(section, dict) and isinstance(section.get(name), str) and section[name]:
        section[name] = str((folder / section[name]).resolve())


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> slots, from a file with lines like `worker-1 slots=4` or `user@worker-1`; # begins a comment.

    Raises `UserError`.
    """
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
        host = host_of(words[0])
        if not host or words[0][0] in "-@":  # - begins an option of ssh
            raise UserError(f"{path}:{number}: {words[0]!r} is no host name")
        if host in map(host_of, found):
            raise UserError(f"{path}:{number}: {host} is listed twice; give it one line with all its slots")
        found[words[0]] = int(slots or 1)
    if not found:
        raise UserError(f"{path}: lists no host; a line is `host slots=8`")
    return found


def hosts_and_slots(cluster: Cluster, hostfile: Path | None = None) -> tuple[list[str], int]:
    """Hosts (`host` or `user@host`) in order, and the number of ranks on each: from the host file or from `hosts`.

    Raises `UserError` without hosts, or for unequal numbers of slots.
    """
    file = hostfile or cluster.ssh.hostfile
    if file:
        slots = read_hostfile(file)
        if len(set(slots.values())) > 1:
            odd = ", ".join(f"{host} {count}" for host, count in slots.items())
            raise UserError(
                f"{file}: slots differ between hosts ({odd}); every node needs the same number of ranks: give all "
                "hosts equal slots"
            )
        return list(slots), next(iter(slots.values()))
    if not cluster.hosts:
        raise UserError("no hosts: give --hostfile FILE, or set hosts or ssh.hostfile in the cluster file")
    hosts = expand_hosts(cluster.hosts)
    names = list(map(host_of, hosts))
    repeated = next((name for name in names if names.count(name) > 1), "")
    if repeated:
        raise UserError(f"hosts = {cluster.hosts!r}: {repeated} is listed twice; set ranks_per_node instead")
    return hosts, cluster.ranks_on_node


def host_of(target: str) -> str:
    """The host's name without the user: `user@host` is for ssh alone."""
    return target.rpartition("@")[2]


def near(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """A suggestion to append to a message, or the known names."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {found[0]!r}?" if found else f"known: {', '.join(known)}"
