"""The launcher's command line: `bigmodel launch local|slurm|torchrun|ssh|exec RUN.toml`, and status, logs, stop, show.

In: a run file and a cluster file. Out: the exit code of the run. Both files are read here first, so that a mistake in
them costs milliseconds, not the start of every rank. Imports no torch.
"""

if __name__ == "__main__":  # first, because `python3 -m launcher` may be any Python
    from bigmodel.interpreter import require_interpreter

    require_interpreter()

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bigmodel.config.settings import UserError, load_settings
from bigmodel.launcher import drawing, local, preflight, slurm, torchrun, watch
from bigmodel.launcher.binding import processors_to_bind
from bigmodel.launcher.cluster import Cluster, hosts_and_slots, load_cluster
from bigmodel.launcher.devices import given_devices
from bigmodel.launcher.execute import check_address, check_name, describe_rank, execute, node_map, rank_map
from bigmodel.launcher.hostlist import expand_hosts
from bigmodel.launcher.local import trainer_command
from bigmodel.launcher.network import gloo_variables
from bigmodel.launcher.placement import job_groups, port_of
from bigmodel.launcher.record import cut_off_seconds, read_launch, run_directory
from bigmodel.launcher.starts import (
    Command,
    start_here,
    start_on_hosts,
    topology_here,
    topology_on,
    without_spares,
)
from bigmodel.launcher.topology import Topology, even_topology, ranks_per_node
from bigmodel.run_directory import EXIT_USER, make_logs
from bigmodel.sizes import counted_noun
from bigmodel.system_errors import line_of, remedy_for

application = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

RunFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="the run file")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, or its run file")]
ClusterFile = Annotated[
    Path | None, typer.Option("--cluster", metavar="CLUSTER.toml", help="the machines: see configs/clusters/")
]
HostFile = Annotated[Path | None, typer.Option("--hostfile", metavar="FILE", help="lines of the form: host slots=8")]
Ranks = Annotated[int, typer.Option(help="number of ranks; 0: one per GPU, or one per node without GPUs")]
Overrides = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a setting; may be repeated")]
Fresh = Annotated[bool, typer.Option("--fresh", help="move checkpoints aside and start from step 0")]
Restarts = Annotated[
    int | None, typer.Option("--restarts", min=0, metavar="N", help="instead of restart.limit; 0: no restart")
]
NewPlan = Annotated[bool, typer.Option("--new-plan", help="after a change of the data: continue under a new plan")]
PLANNED = "example: the job's allocation and number give the real hosts, MASTER_ADDR and MASTER_PORT"
EACH_RANK = 16  # up to this many ranks a dry run prints every command; above, one command and the map by node
DryRun = Annotated[bool, typer.Option("--dry-run", help="print all commands and run nothing")]


@application.callback()
def launcher() -> None:
    """Start the ranks of a training run anywhere, watch them, and end them together."""


@application.command("local")
def local_command(
    run_file: RunFile,
    ranks: Annotated[int, typer.Option(help="number of ranks; 0: one per GPU, or one without GPUs")] = 0,
    cluster_file: ClusterFile = None,
    restarts: Restarts = None,
    overrides: Overrides = [],  # noqa: B006 - typer reads the default
    fresh: Fresh = False,
    new_plan: NewPlan = False,
    dry_run: DryRun = False,
) -> None:
    """Train on this machine. Ctrl-C saves and stops; the same command resumes."""
    settings, cluster = load_settings(run_file, overrides), load_cluster(cluster_file)
    visible = {**os.environ, **cluster.variables()}.get("CUDA_VISIBLE_DEVICES")
    devices = len(given_devices(os.listdir("/dev"), visible))
    size = ranks_per_node(ranks or cluster.ranks_per_node, 1, devices)
    _require_fit(run_file, overrides, size, size)
    options = _options(fresh, new_plan)
    if dry_run:
        words = [*trainer_command(run_file, overrides), *options]
        _print_ranks(topology_here(cluster, size), words, cluster, here=True)
        return
    command = Command(run_file, cluster_file, overrides, options, restarts)
    raise typer.Exit(start_here(command, cluster, settings, size))


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
    _require_fit(run_file, overrides, cluster.nodes * cluster.ranks_on_node, cluster.ranks_on_node)
    if dry_run:
        print(slurm.render(job))
        print(f"# {PLANNED}:")
        _print_ranks(_planned_topology(cluster), [*trainer_command(run_file, overrides), *options], cluster)
        return
    number = slurm.submit(job)
    print(f"job {number} is queued; see bigmodel launch status|logs|stop {settings.run.directory}")


@application.command("torchrun")
def torchrun_command(
    run_file: RunFile,
    cluster_file: ClusterFile = None,
    hostfile: HostFile = None,
    ranks: Ranks = 0,
    node_rank: Annotated[int, typer.Option(help="run the command of this node here; absent: print all commands")] = -1,
    overrides: Overrides = [],  # noqa: B006
    fresh: Fresh = False,
    new_plan: NewPlan = False,
    dry_run: DryRun = False,
) -> None:
    """Start with torchrun and static rendezvous: prints the command of each node, or runs the one of this node."""
    settings, cluster = load_settings(run_file, overrides), load_cluster(cluster_file)
    topology = _topology_of_hosts(cluster, hostfile, ranks, settings.run.directory)
    if not -1 <= node_rank < len(topology.hosts):
        raise UserError(f"--node-rank {node_rank}: there are {len(topology.hosts)} nodes, counted from 0")
    words = ["exec", *Command(run_file, cluster_file, overrides).words(), *_options(fresh, new_plan)]
    commands = [torchrun.node_command(topology, node, words) for node in range(len(topology.hosts))]
    _require_fit(run_file, overrides, topology.world_size, topology.local_size(0))
    if node_rank >= 0 and not dry_run:
        check_name(topology)
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
    restarts: Restarts = None,
    overrides: Overrides = [],  # noqa: B006
    fresh: Fresh = False,
    new_plan: NewPlan = False,
    dry_run: DryRun = False,
) -> None:
    """Train on the hosts of a host file, over ssh. Ctrl-C saves and stops on all hosts."""
    settings, cluster = load_settings(run_file, overrides), load_cluster(cluster_file)
    directory = settings.run.directory
    targets, slots = hosts_and_slots(cluster, hostfile)
    used = without_spares(cluster, targets)
    each = ranks_per_node(ranks, len(used), slots) if ranks else slots
    topology = topology_on(cluster, used, each, directory)
    options = _options(fresh, new_plan)
    _require_fit(run_file, overrides, topology.world_size, topology.local_size(0))
    if dry_run:
        _print_ranks(topology, [*trainer_command(run_file, overrides), *options], cluster)
        return
    command = Command(run_file, cluster_file, overrides, options, restarts)
    raise typer.Exit(start_on_hosts(command, cluster, settings, targets, each))


@application.command("exec")
def exec_command(
    run_file: RunFile,
    cluster_file: ClusterFile = None,
    overrides: Overrides = [],  # noqa: B006
    fresh: Fresh = False,
    new_plan: NewPlan = False,
    dry_run: DryRun = False,
) -> None:
    """Run as one rank, started by srun, torchrun or mpirun: `srun bigmodel launch exec RUN.toml`."""
    raise typer.Exit(execute(run_file, overrides, _options(fresh, new_plan), cluster_file, dry_run))


@application.command("node", hidden=True)
def node_command(
    run_file: RunFile,
    world: Annotated[str, typer.Option(help="the topology, as JSON")],
    node: Annotated[int, typer.Option(help="number of this node in it")],
    cluster_file: ClusterFile = None,
    overrides: Overrides = [],  # noqa: B006
    fresh: Fresh = False,
    new_plan: NewPlan = False,
) -> None:
    """One node of `ssh`."""
    settings, cluster = load_settings(run_file, overrides), load_cluster(cluster_file)
    topology = _read_world(world)
    command = [*trainer_command(run_file, overrides), *_options(fresh, new_plan)]
    logs = make_logs(settings.run.directory)
    if node == 0:
        check_address(topology)
    variables = cluster.variables()
    variables |= gloo_variables(len(topology.hosts), topology.main_address, {**os.environ, **variables})
    ending = local.run(
        command, topology, logs, node=node, variables=variables, binding=cluster.binding, control_pipe=True
    )
    raise typer.Exit(ending.code)


@application.command("ended")
def ended_command(
    run_file: RunFile,
    code: Annotated[int, typer.Option(help="exit code of srun")],
    preflight: Annotated[bool, typer.Option(help="the check of the nodes failed")] = False,
    in_place: Annotated[bool, typer.Option(help="exit code 75: run srun again in this job")] = False,
    cluster_file: ClusterFile = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Last line of an sbatch script: record why the job ended; requeue it unless the run is complete or was stopped."""
    settings = load_settings(run_file, overrides)
    cluster = load_cluster(cluster_file)
    held = cut_off_seconds(settings) if in_place else 0.0
    raise typer.Exit(slurm.ended(settings.run.directory, cluster, code, preflight, os.environ, held))


@application.command("check")
def check_command(
    run_file: RunFile,
    cluster_file: ClusterFile = None,
    hostfile: HostFile = None,
    overrides: Overrides = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="print the content of preflight.json")] = False,
) -> None:
    """Check devices, memory, disk, clock, data, versions, speed and links of every node; list the nodes to exclude.

    Inside a SLURM job: its nodes, of all groups of a het job. With a host file or `hosts`: those hosts, over ssh, or
    through srun if the cluster file has a partition. With another cluster file: the idle nodes of SLURM. Else: this
    machine. Exit code 1 if a node is bad.
    """
    settings, cluster = load_settings(run_file, overrides), load_cluster(cluster_file)
    directory = settings.run.directory
    words = preflight.look_words(run_file, cluster_file, overrides)
    inside = job_groups(os.environ)
    if inside:
        runner = preflight.on_slurm(inside, cluster, words, Path.cwd())
    elif hostfile or cluster.ssh.hostfile or (cluster.hosts and not cluster.slurm.partition):
        topology = _topology_of_hosts(cluster, hostfile, 0, directory)
        runner = preflight.on_hosts(topology, cluster, hosts_and_slots(cluster, hostfile)[0], words, Path.cwd())
    elif cluster_file:
        asked = expand_hosts(cluster.hosts) if cluster.hosts else slurm.idle_hosts(cluster.slurm.partition)
        runner = preflight.on_slurm([asked], cluster, words, Path.cwd())
    else:
        runner = preflight.on_this_machine(words, Path.cwd())
    findings = preflight.check(directory, cluster, runner)
    if as_json:
        print((directory / "preflight.json").read_text(), end="")
    else:
        preflight.print_findings(runner.hosts, findings)
    raise typer.Exit(preflight.exit_code(findings))


@application.command("look", hidden=True)
def look_command(
    run_file: RunFile,
    world: Annotated[str, typer.Option(help="the nodes, as a topology of one rank each, as JSON")] = "",
    node: Annotated[int, typer.Option(help="number of this node in it")] = 0,
    cluster_file: ClusterFile = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """One node of `check`."""
    preflight.become_probe(run_file, overrides, load_cluster(cluster_file), _read_world(world) if world else None, node)


@application.command("status")
def status_command(run: Run, as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False) -> None:
    """Print state, step, loss, tokens per second, and restarts with their causes."""
    found = watch.status(run_directory(run))
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        watch.print_status(found)


@application.command("logs")
def logs_command(
    run: Run,
    lines: Annotated[int, typer.Option(min=0, help="number of last lines of each rank")] = 20,
    rank: Annotated[list[int], typer.Option(help="only this rank; may be repeated")] = [],  # noqa: B006
    follow: Annotated[bool, typer.Option("--follow", "-f", help="print new lines until Ctrl-C")] = False,
) -> None:
    """Print the output of the ranks, each line with its node and rank."""
    watch.print_logs(run_directory(run), lines, rank, follow)


@application.command("stop")
def stop_command(run: Run, now: Annotated[bool, typer.Option("--now", help="without saving")] = False) -> None:
    """Make a run save and stop, however it was started; its SLURM job is not requeued."""
    print(watch.stop(run_directory(run), now))


@application.command("show")
def show_command(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="a started run; absent: that of --cluster")
    ] = None,
    cluster_file: ClusterFile = None,
    hostfile: HostFile = None,
    ranks: Ranks = 0,
    png: Annotated[Path | None, typer.Option(help="also write a picture to this file")] = None,
) -> None:
    """Draw the topology: the ranks of each node and the nodes of each switch."""
    cluster = load_cluster(cluster_file)
    if run is None and cluster.slurm.partition and not (hostfile or cluster.hosts):
        topology = _planned_topology(cluster)
        print(PLANNED)
    elif run is None:
        topology = replace(_topology_of_hosts(cluster, hostfile, ranks, Path()), main_port=cluster.main_port)
    else:
        launch = read_launch(run_directory(run))
        if not launch.get("hosts"):
            raise UserError(
                f"{run}: its ranks are not known: the launcher has not started it yet; give --cluster instead"
            )
        names, nodes = launch["hosts"], launch["node_of_rank"]
        place = (launch["main_address"], launch["main_port"], tuple(cluster.switches_of(names)))
        topology = Topology(tuple(names), tuple(nodes), *place)
    drawing.print_topology(topology)
    if png:
        drawing.draw_topology(topology, png)
        print(png)


def _planned_topology(cluster: Cluster) -> Topology:
    """The topology of a SLURM job of this cluster file, with invented host names."""
    names = [f"node{number}" for number in range(cluster.nodes)]
    address, port = cluster.main_address or names[0], cluster.main_port or port_of("0")
    return even_topology(names, cluster.ranks_on_node, address, port, cluster.switches_of(names))


def _topology_of_hosts(cluster: Cluster, hostfile: Path | None, ranks: int, directory: Path) -> Topology:
    targets, slots = hosts_and_slots(cluster, hostfile)
    return topology_on(cluster, targets, ranks_per_node(ranks, len(targets), slots) if ranks else slots, directory)


def _options(fresh: bool, new_plan: bool) -> list[str]:
    """Options of the trainer."""
    return [name for name, given in (("--fresh", fresh), ("--new-plan", new_plan)) if given]


def _read_world(text: str) -> Topology:
    """A topology from another launcher's JSON."""
    table = json.loads(text)
    names, nodes, switches = (tuple(table[name]) for name in ("hosts", "nodes", "switches"))
    return Topology(names, nodes, table["main_address"], table["main_port"], switches)


def _require_fit(run_file: Path, overrides: Sequence[str], ranks: int, each: int) -> None:
    """Before a start: raises `UserError` if the run's DeepSpeed JSON, batch size or experts do not fit the ranks,
    `each` of them on a node."""
    words = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "bigmodel", "probe", str(run_file), *words, "--world-size", str(ranks)]
    command += ["--ranks-per-node", str(each)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{counted_noun(ranks, 'rank')}: {done.stderr.strip().removeprefix('bigmodel: ')}")


def _print_ranks(topology: Topology, command: Sequence[str], cluster: Cluster, here: bool = False) -> None:
    """Print the ranks' commands and the rank map. GPUs and processors are known only for this machine."""
    large = topology.world_size > EACH_RANK
    for rank in range(1 if large else topology.world_size):
        if here:
            variables = local.local_environment(topology, rank, cluster.variables())
            place = topology.local_rank(rank), topology.local_size(rank)
            processors = processors_to_bind(cluster.binding, *place, {**os.environ, **variables})
            print(describe_rank(command, variables, processors))
        else:
            print(describe_rank(command, local.launch_environment(topology, rank, cluster.variables())))
    if large:
        print(f"# and {topology.world_size - 1} more; they differ in RANK, LOCAL_RANK, LOCAL_WORLD_SIZE and NODE_RANK")
    if not here:
        print("# CUDA_VISIBLE_DEVICES: all GPUs of the node; a rank uses the one with number LOCAL_RANK")
        print(f"# binding: {cluster.binding}, among the processors of each node")
    print("\n".join(f"# {line}" for line in (node_map if large else rank_map)(topology)))


def main() -> None:
    """Run a command. A `UserError`, and what the system refuses, become a message and exit code 2."""
    try:
        application()
    except UserError as error:
        print(f"launcher: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER)
    except OSError as error:
        if not remedy_for(error):
            raise
        print(f"launcher: {line_of(error)}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER)


if __name__ == "__main__":
    main()
