"""`launch exec`, each rank under srun, torchrun or mpirun: find its number, set its environment, become the trainer.

In: a run file and the environment from srun, torchrun or mpirun. Every rank logs to `logs/HOST-rank-N.log` in the run
directory; rank 0 also prints as before (`bigmodel.rank_log`). The process started by srun or torchrun becomes the
trainer (execve), so that signals and exit codes are the trainer's own. Imports no torch.
"""

import ctypes
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bigmodel.config.settings import UserError, load_settings
from bigmodel.launcher.binding import processors_to_bind
from bigmodel.launcher.cluster import Cluster, load_cluster
from bigmodel.launcher.devices import device_variables
from bigmodel.launcher.local import launch_environment, trainer_command
from bigmodel.launcher.network import gloo_variables, port_is_free, resolves
from bigmodel.launcher.placement import find_place, job_of, started_by
from bigmodel.launcher.record import cut_off_seconds, record_launch, take_start, wait_until_free
from bigmodel.launcher.standby import PR_SET_PDEATHSIG
from bigmodel.launcher.topology import Topology
from bigmodel.rank_log import ARRANGED, open_outputs, redirect, terminal_variables
from bigmodel.run_directory import log_name, make_logs


def execute(
    run_file: Path, overrides: list[str], options: Sequence[str], cluster_file: Path | None, dry_run: bool
) -> int:
    """Become this rank's trainer; returns only after a dry run. Raises `UserError` before anything has started."""
    settings, cluster = load_settings(run_file, overrides), load_cluster(cluster_file)
    topology, rank = find_place(preset(os.environ, cluster))
    restart = int(os.environ.get("SLURM_RESTART_COUNT") or os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)
    again = [option for option in options if option != "--fresh" or not restart]  # checkpoints are moved aside once
    command = [*trainer_command(run_file, overrides), *again]
    variables = launch_environment(topology, rank, cluster.variables())
    local_size = topology.local_size(rank)
    variables |= device_variables(os.listdir("/dev"), local_size, os.uname().nodename, {**os.environ, **variables})
    processors = processors_to_bind(cluster.binding, topology.local_rank(rank), local_size, {**os.environ, **variables})
    if dry_run:
        print(describe_rank(command, variables, processors))
        if rank == 0:
            print("\n".join(rank_map(topology)))
        return 0
    by = started_by(os.environ)
    directory = settings.run.directory
    logs = make_logs(directory)
    if rank == 0:
        if by != "torchrun":  # torchrun itself listens at the port
            check_address(topology)
        if restart:
            wait_until_free(directory, cut_off_seconds(settings))
        take_start(directory, becomes_rank=True)
        record_launch(directory, topology, by, job=job_of(os.environ), restart=restart)
        variables |= terminal_variables(os.environ)
    host = topology.host(rank) if by == "slurm" else os.uname().nodename
    _write_to(logs / log_name(host, rank), shown=rank == 0)
    variables |= gloo_variables(len(topology.hosts), topology.main_address, {**os.environ, **variables})
    if processors:
        os.sched_setaffinity(0, processors)
    if by == "torchrun":
        _die_with_parent()
    os.execvpe(command[0], command, {**os.environ, **variables, **ARRANGED})


def preset(environment: Mapping[str, str], cluster: Cluster) -> dict[str, str]:
    """The environment with the cluster file's address and port; they override those of srun or mpirun."""
    given = {"MASTER_ADDR": cluster.main_address, "MASTER_PORT": str(cluster.main_port or "")}
    if "TORCHELASTIC_RUN_ID" in environment:
        given = {}  # torchrun already listens at its own
    return {**environment, **{name: value for name, value in given.items() if value}}


def describe_rank(command: Sequence[str], variables: Mapping[str, str], processors: set[int] | None = None) -> str:
    """A shell line: variables, binding to processors, command."""
    words = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    words += ["taskset", "-c", ",".join(map(str, sorted(processors)))] if processors else []
    return " ".join([*words, shlex.join(command)])


def rank_map(topology: Topology) -> list[str]:
    """A line per rank: number, host, node and local rank."""
    return [
        f"rank {rank} host {topology.host(rank)} node {topology.nodes[rank]} local {topology.local_rank(rank)}"
        for rank in range(topology.world_size)
    ]


def node_map(topology: Topology) -> list[str]:
    """A line per node: number, host and ranks."""
    ranks: dict[int, list[int]] = {}
    for rank, node in enumerate(topology.nodes):
        ranks.setdefault(node, []).append(rank)
    return [f"node {node} host {topology.hosts[node]} ranks {_runs(found)}" for node, found in sorted(ranks.items())]


def _runs(numbers: Sequence[int]) -> str:
    """Numbers as ranges: 0-3,8."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in parts)


def check_address(topology: Topology) -> None:
    """On the machine of rank 0, before its start: raises `UserError` if its address or port cannot be used."""
    check_name(topology)
    if not port_is_free(topology.main_port):
        raise UserError(
            f"port {topology.main_port} of {topology.main_address} is in use (by default it is derived from the job's "
            "number or the run directory's name); set main_port in the cluster file, or MASTER_PORT, to a free port"
        )


def check_name(topology: Topology) -> None:
    """On any machine, before a start: raises `UserError` if it does not know rank 0's address."""
    if not resolves(topology.main_address):
        raise UserError(
            f"rank 0 runs on {topology.main_address}, a name without an address here; set main_address in the cluster "
            "file, or MASTER_ADDR, to an address that all nodes can reach"
        )


def _write_to(log: Path, shown: bool) -> None:
    sys.stdout.flush()
    redirect(open_outputs(log, shown)[:2])


def _die_with_parent() -> None:
    """Let Linux kill this process when torchrun dies, kill -9 included; torchrun would leave its ranks running."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == 1:
            sys.exit(1)
