"""The launcher's command line: `python -m launcher local|slurm|torchrun|ssh|exec RUN.toml`, and what looks after a run.

Takes a run file and a cluster file, gives the exit code of the run. Both are read here first, so that a mistake in them
costs milliseconds, not the start of every rank. Imports no torch.
"""

import json
import os
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bigmodel.config import UserError, load_settings
from bigmodel.rundir import EXIT_USER, record_event
from launcher import hosts, local, slurm, torchrun
from launcher.cluster import Cluster, hosts_and_slots, load_cluster
from launcher.execute import describe_rank, execute, rank_map
from launcher.local import trainer_command
from launcher.network import free_port
from launcher.placement import port_of
from launcher.record import make_logs, record_end, record_launch, refuse_second_run, run_directory
from launcher.topology import Topology, count_devices, even_topology, ranks_per_node

application = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

RunFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="the run file")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, or its run file")]
ClusterFile = Annotated[
    Path | None, typer.Option("--cluster", metavar="CLUSTER.toml", help="the machines: see configs/clusters/")
]
HostFile = Annotated[Path | None, typer.Option("--hostfile", metavar="FILE", help="lines of the form: host slots=8")]
Ranks = Annotated[int, typer.Option(help="processes in all; 0: one per GPU, or one per node where there is none")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a setting; may be repeated")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="set checkpoints aside and start from step 0")]
NewPlan = Annotated[bool, typer.Option("--new-plan", help="data changed: go on in a fresh order of it")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print everything that would run, and run nothing")]


@application.callback()
def launcher() -> None:
    """Start the ranks of a training run anywhere, look after them, and end them together."""


@application.command("local")
def local_command(
    run_file: RunFile,
    ranks: Annotated[int, typer.Option(help="processes; 0: one per GPU, or one where there is none")] = 0,
    cluster_file: ClusterFile = None,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default
    fresh: Fresh = False,
    new_plan: NewPlan = False,
    dry_run: DryRun = False,
) -> None:
    """Train on this machine. Ctrl-C saves and stops; the same command goes on from there."""
    settings, cluster = load_settings(run_file, overrides), load_cluster(cluster_file)
    devices = count_devices(os.listdir("/dev"), os.environ.get("CUDA_VISIBLE_DEVICES"))
    size = ranks_per_node(ranks or cluster.ranks_per_node, 1, devices)
    topology = even_topology([os.uname().nodename], size, "127.0.0.1", cluster.main_port or free_port())
    command = [*trainer_command(run_file, overrides), *_options(fresh, new_plan)]
    if dry_run:
        _print_ranks(topology, command, cluster)
        return
    directory = settings.run.directory
    logs = make_logs(directory)
    refuse_second_run(directory)
    record_launch(directory, topology, "local", launcher=True)
    ending = local.run(command, topology, logs, variables=cluster.variables(), binding=cluster.binding)
    record_end(directory, ending.cause, ending.code, ending.detail)
    raise typer.Exit(ending.code)


@application.command("slurm")
def slurm_command(
    run_file: RunFile,
    cluster_file: ClusterFile = None,
    overrides: Overrides = [],  # noqa: B006
    fresh: Fresh = False,
    new_plan: NewPlan = False,
    dry_run: DryRun = False,
) -> None:
    """Submit the run to SLURM: one task per rank. Prints the job's number."""
    settings, cluster = load_settings(run_file, overrides), load_cluster(cluster_file)
    directory = settings.run.directory.absolute()
    options = _options(fresh, new_plan)
    job = slurm.Job(run_file, directory, Path.cwd(), cluster, cluster_file, overrides, options)
    if dry_run:
        print(slurm.render(job))
        names = [f"node{number}" for number in range(cluster.nodes)]
        address, port = cluster.main_address or names[0], cluster.main_port or port_of("0")
        topology = even_topology(names, cluster.ranks_on_node, address, port, cluster.switches_of(names))
        print("# Hosts, MASTER_ADDR and MASTER_PORT follow from the allocation and the job's number; as an example:")
        _print_ranks(topology, [*trainer_command(run_file, overrides), *options], cluster)
        return
    number = slurm.submit(job)
    print(f"job {number} is in the queue; see python -m launcher status|logs|stop {settings.run.directory}")


@application.command("torchrun")
def torchrun_command(
    run_file: RunFile,
    cluster_file: ClusterFile = None,
    hostfile: HostFile = None,
    ranks: Ranks = 0,
    node_rank: Annotated[int, typer.Option(help="run that node's command here; absent: print all of them")] = -1,
    overrides: Overrides = [],  # noqa: B006
    fresh: Fresh = False,
    new_plan: NewPlan = False,
    dry_run: DryRun = False,
) -> None:
    """Start with torchrun, static rendezvous: prints the command of each node, or runs this node's."""
    settings, cluster = load_settings(run_file, overrides), load_cluster(cluster_file)
    topology = _topology_of_hosts(cluster, hostfile, ranks, settings.run.directory)
    if not -1 <= node_rank < len(topology.hosts):
        raise UserError(f"--node-rank {node_rank}: there are {len(topology.hosts)} nodes, counted from 0")
    words = ["exec", *_words(run_file, cluster_file, overrides), *_options(fresh, new_plan)]
    commands = [torchrun.node_command(topology, node, words) for node in range(len(topology.hosts))]
    if node_rank >= 0 and not dry_run:
        torchrun.become(commands[node_rank])
    for host, command in zip(topology.hosts, commands, strict=True):
        print(f"# on {host}:\n{describe_rank(command, {})}")
    if dry_run:
        _print_ranks(topology, trainer_command(run_file, overrides), cluster)


@application.command("ssh")
def ssh_command(
    run_file: RunFile,
    cluster_file: ClusterFile = None,
    hostfile: HostFile = None,
    ranks: Ranks = 0,
    overrides: Overrides = [],  # noqa: B006
    fresh: Fresh = False,
    new_plan: NewPlan = False,
    dry_run: DryRun = False,
) -> None:
    """Train on the hosts of a host file, over ssh. Ctrl-C saves and stops everywhere."""
    settings, cluster = load_settings(run_file, overrides), load_cluster(cluster_file)
    topology = _topology_of_hosts(cluster, hostfile, ranks, settings.run.directory)
    options = _options(fresh, new_plan)
    if dry_run:
        _print_ranks(topology, [*trainer_command(run_file, overrides), *options], cluster)
        return
    directory = settings.run.directory
    make_logs(directory)
    refuse_second_run(directory)
    hosts.reach(cluster, topology.hosts, Path.cwd())
    if cluster.check.before_start:
        from launcher import preflight

        preflight.require(run_file, overrides, cluster, topology)
    words = [sys.executable, "-m", "launcher", "node", *_words(run_file, cluster_file, overrides), *options]
    record_launch(directory, topology, "ssh", launcher=True)
    ending = hosts.run_on_hosts(cluster, words, topology, Path.cwd())
    record_end(directory, ending.cause, ending.code, ending.detail)
    raise typer.Exit(ending.code)


@application.command("exec")
def exec_command(
    run_file: RunFile,
    cluster_file: ClusterFile = None,
    overrides: Overrides = [],  # noqa: B006
    fresh: Fresh = False,
    new_plan: NewPlan = False,
    dry_run: DryRun = False,
) -> None:
    """Be one rank, started by srun, torchrun or mpirun: `srun python -m launcher exec RUN.toml`."""
    raise typer.Exit(execute(run_file, overrides, _options(fresh, new_plan), cluster_file, dry_run))


@application.command("node", hidden=True)
def node_command(
    run_file: RunFile,
    world: Annotated[str, typer.Option(help="the topology, as JSON")],
    node: Annotated[int, typer.Option(help="which of its nodes this is")],
    cluster_file: ClusterFile = None,
    overrides: Overrides = [],  # noqa: B006
    fresh: Fresh = False,
    new_plan: NewPlan = False,
) -> None:
    """One node of `ssh`."""
    settings, cluster = load_settings(run_file, overrides), load_cluster(cluster_file)
    topology = Topology(**{name: _frozen(value) for name, value in json.loads(world).items()})
    devices = count_devices(os.listdir("/dev"), os.environ.get("CUDA_VISIBLE_DEVICES"))
    each = len(topology.ranks_of(node))
    ranks_per_node(each, 1, devices)
    command = [*trainer_command(run_file, overrides), *_options(fresh, new_plan)]
    logs = make_logs(settings.run.directory)
    ending = local.run(
        command, topology, logs, node=node, variables=cluster.variables(), binding=cluster.binding, leash=True
    )
    raise typer.Exit(ending.code)


@application.command("ended", hidden=True)
def ended_command(
    run_file: RunFile,
    code: Annotated[int, typer.Option(help="what srun ended with")],
    preflight: Annotated[bool, typer.Option(help="it was the check of the nodes that failed")] = False,
    cluster_file: ClusterFile = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """The last line of an sbatch script: record why the job ended, and requeue it if the cluster file says so."""
    settings = load_settings(run_file, overrides)
    raise typer.Exit(
        slurm.ended(settings.run.directory, load_cluster(cluster_file), code, preflight, os.environ)
    )


def _topology_of_hosts(cluster: Cluster, hostfile: Path | None, ranks: int, directory: Path) -> Topology:
    """Every node computes the same: without a job's number the port follows from the run directory's name."""
    names, slots = hosts_and_slots(cluster, hostfile)
    each = ranks_per_node(ranks, len(names), slots) if ranks else slots
    port = cluster.main_port or port_of(str(zlib.crc32(str(directory).encode())))
    return even_topology(names, each, cluster.main_address or names[0], port, cluster.switches_of(names))


def _words(run_file: Path, cluster_file: Path | None, overrides: Sequence[str]) -> list[str]:
    """A command's arguments, for another process."""
    words = [str(run_file), *(["--cluster", str(cluster_file)] if cluster_file else [])]
    return words + [word for override in overrides for word in ("--set", override)]


def _options(fresh: bool, new_plan: bool) -> list[str]:
    """The trainer's own options, passed on."""
    return [name for name, given in (("--fresh", fresh), ("--new-plan", new_plan)) if given]


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _print_ranks(topology: Topology, command: Sequence[str], cluster: Cluster) -> None:
    for rank in range(topology.world_size):
        print(describe_rank(command, local.launch_environment(topology, rank, cluster.variables())))
    print("\n".join(f"# {line}" for line in rank_map(topology)))


def main() -> None:
    """Run a command; a `UserError` becomes one message and exit code 2."""
    try:
        application()
    except UserError as error:
        print(f"launcher: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER)


if __name__ == "__main__":
    main()
