"""`launch local` and `launch ssh`: from the check of the machines over every restart to the last end.

In: settings and the words of the command line. Out: the exit code of the run. Each start has its own topology: a free
port, and the hosts that are left. Handles signals, so call it from the main thread.
"""

import os
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bigmodel.config.settings import Settings, UserError
from bigmodel.finished_run import finished
from bigmodel.launcher import hosts, local, preflight
from bigmodel.launcher.cluster import Cluster, host_of
from bigmodel.launcher.execute import check_address
from bigmodel.launcher.network import free_port
from bigmodel.launcher.placement import port_of
from bigmodel.launcher.record import cut_off_seconds, record_launch, take_start
from bigmodel.launcher.restart import supervise
from bigmodel.launcher.standby import Standbys
from bigmodel.launcher.topology import Topology, even_topology
from bigmodel.run_directory import EXIT_DONE, make_logs


@dataclass(frozen=True)
class Command:
    """What is started: the parts of the command line that `launch local` and `launch ssh` share."""

    run_file: Path
    cluster_file: Path | None
    overrides: Sequence[str]
    options: Sequence[str] = ()  # of the trainer
    restarts: int | None = None  # instead of restart.limit

    def words(self) -> list[str]:
        """Run file, cluster file and overrides as arguments of another process."""
        words = [str(self.run_file), *(["--cluster", str(self.cluster_file)] if self.cluster_file else [])]
        return words + [word for override in self.overrides for word in ("--set", override)]

    def look(self) -> list[str]:
        return preflight.look_words(self.run_file, self.cluster_file, list(self.overrides))

    def limit(self, cluster: Cluster) -> int:
        return cluster.restart.limit if self.restarts is None else self.restarts

    def options_of(self, first: bool) -> list[str]:
        """Of a start: checkpoints are moved aside once."""
        return [option for option in self.options if first or option != "--fresh"]


def topology_here(cluster: Cluster, size: int) -> Topology:
    return even_topology([os.uname().nodename], size, "127.0.0.1", cluster.main_port or free_port())


def start_here(command: Command, cluster: Cluster, settings: Settings, size: int) -> int:
    """Train with `size` ranks on this machine."""
    directory = settings.run.directory
    if not command.options and (line := finished(settings, size)):
        print(f"bigmodel: {line}")
        return EXIT_DONE
    logs = make_logs(directory)
    take_start(directory)
    check_address(topology_here(cluster, size))
    if cluster.check.before_start:
        _require_good_nodes(preflight.on_this_machine(command.look(), Path.cwd()), directory, cluster)
    trainer = local.trainer_command(command.run_file, command.overrides)
    limit = command.limit(cluster)
    standbys = Standbys() if limit and cluster.restart.standby else None

    def start(names: Sequence[str], first: bool, signals: list[int]) -> local.Ending:
        topology, words = topology_here(cluster, size), [*trainer, *command.options_of(first)]
        record_launch(directory, topology, "local", launcher=True)
        variables, binding = cluster.variables(), cluster.binding
        return local.run(
            words, topology, logs, variables=variables, binding=binding, signals=signals, standbys=standbys
        )

    try:
        return supervise(directory, limit, [os.uname().nodename], 1, start, cut_off_seconds(settings))
    finally:
        if standbys:
            standbys.close()


def topology_on(cluster: Cluster, targets: Sequence[str], each: int, directory: Path) -> Topology:
    """`each` ranks on every host. The same on every node: the port is derived from the run directory's name, because
    there is no job number."""
    names = list(map(host_of, targets))
    port = cluster.main_port or port_of(str(zlib.crc32(str(directory).encode())))
    return even_topology(names, each, cluster.main_address or names[0], port, cluster.switches_of(names))


def without_spares(cluster: Cluster, targets: Sequence[str]) -> list[str]:
    """The hosts of the first start. Raises `UserError` if all are spares."""
    number = len(targets) - cluster.restart.spare_nodes
    if number < 1:
        raise UserError(
            f"restart.spare_nodes = {cluster.restart.spare_nodes}: there are {len(targets)} hosts; lower it"
        )
    return list(targets[:number])


def start_on_hosts(command: Command, cluster: Cluster, settings: Settings, targets: Sequence[str], each: int) -> int:
    """Train with `each` ranks on the hosts over ssh; the last ones are spares."""
    directory = settings.run.directory
    make_logs(directory)
    take_start(directory)
    used = without_spares(cluster, targets)
    first_topology = topology_on(cluster, used, each, directory)
    hosts.reach(cluster, used, first_topology.main_address, Path.cwd())
    if cluster.check.before_start:
        runner = preflight.on_hosts(first_topology, cluster, used, command.look(), Path.cwd())
        _require_good_nodes(runner, directory, cluster)
    target_of = {host_of(target): target for target in targets}
    node = [sys.executable, "-m", "bigmodel", "launch", "node", *command.words()]

    def start(names: Sequence[str], first: bool, signals: list[int]) -> local.Ending:
        topology = topology_on(cluster, names, each, directory)
        if names[0] != first_topology.hosts[0]:  # main_address is that of another host
            topology = replace(topology, main_address=names[0])
        record_launch(directory, topology, "ssh", launcher=True)
        words, called = [*node, *command.options_of(first)], [target_of[name] for name in names]
        return hosts.run_on_hosts(cluster, called, words, topology, Path.cwd(), signals=signals)

    def silent(names: Sequence[str]) -> list[str]:
        return list(map(host_of, hosts.silent_hosts(cluster, [target_of[name] for name in names], Path.cwd())))

    limit, held = command.limit(cluster), cut_off_seconds(settings)
    return supervise(directory, limit, list(target_of), len(used), start, held, silent)


def _require_good_nodes(runner: preflight.Runner, directory: Path, cluster: Cluster) -> None:
    findings = preflight.check(directory, cluster, runner)
    if preflight.exit_code(findings):
        preflight.print_findings(runner.hosts, findings)
        raise UserError("nothing was started: check.before_start found bad nodes; exclude or repair them")
