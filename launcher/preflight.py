"""Preflight: check every node before a run and list the nodes to exclude.

Runs `bigmodel probe RUN.toml` once per node (srun, ssh or here), at the same time on all, so that the nodes also
measure the links between them. Out: a table, `preflight.json` in the run directory, an exit code and the list of nodes
to exclude. `judge` is pure: findings from reports. This project has not run the parts that need a GPU (ECC, Xid, NCCL's
links).
"""

import json
import os
import secrets
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bigmodel.config.settings import UserError
from bigmodel.launcher.cluster import CheckSettings, Cluster
from bigmodel.launcher.hosts import remote_command
from bigmodel.launcher.local import launch_environment
from bigmodel.launcher.network import gloo_variables
from bigmodel.launcher.placement import find_place
from bigmodel.launcher.slurm import container_options
from bigmodel.launcher.topology import Topology, even_topology
from bigmodel.run_directory import EXIT_FAILED, make_logs, write_atomically, write_json
from bigmodel.sizes import byte_size

TOKEN = "preflight.token"  # bigmodel/inspect/probe.py reads it
TIMEOUT_SECONDS = 240.0
GIGABYTE = 1e9
MATTERS = ("answer", "devices", "health", "versions", "memory", "disk", "clock", "data", "speed", "network")


@dataclass(frozen=True)
class Finding:
    """One result: `host` is "" if a link is bad and it is unknown which of its ends is the cause."""

    host: str
    matter: str
    good: bool
    text: str


def check(directory: Path, cluster: Cluster, runner: "Runner") -> list[Finding]:
    """Probe every node and judge the reports. Writes preflight.json."""
    make_logs(directory)
    token = secrets.token_hex(8)
    write_atomically(directory / TOKEN, token)
    try:
        reports = runner.reports()
    finally:
        (directory / TOKEN).unlink(missing_ok=True)
    findings = judge(runner.hosts, reports, token, cluster.gpus_per_node, cluster.check)
    write_json(
        directory / "preflight.json",
        {"exclude": exclude(findings), "findings": [asdict(f) for f in findings], "reports": reports},
    )
    return findings


def exclude(findings: Sequence[Finding]) -> list[str]:
    """Hosts with a bad finding, in order."""
    return list(dict.fromkeys(finding.host for finding in findings if finding.host and not finding.good))


def exit_code(findings: Sequence[Finding]) -> int:
    return 0 if all(finding.good for finding in findings) else EXIT_FAILED


def print_findings(hosts: Sequence[str], findings: Sequence[Finding]) -> None:
    """Print a row per host, the bad findings, and the hosts to exclude."""
    table = Table(box=None, pad_edge=False)
    for column in ("host", *MATTERS):
        table.add_column(column, no_wrap=True)
    bad = {(f.host, f.matter) for f in findings if not f.good}
    looked = {(f.host, f.matter) for f in findings}
    for host in hosts:
        marks = ["BAD" if (host, m) in bad else "ok" if (host, m) in looked else "-" for m in MATTERS]
        table.add_row(host, *marks)
    console = Console(
        highlight=False, markup=False, emoji=False, soft_wrap=True, width=max(120, shutil.get_terminal_size().columns)
    )
    console.print(table)
    for finding in findings:
        if not finding.good:
            console.print(f"{finding.host or 'link'}: {finding.matter}: {finding.text}", markup=False)
    if exclude(findings):
        console.print(f"exclude: {','.join(exclude(findings))}")


def judge(
    hosts: Sequence[str],
    reports: Mapping[str, Mapping[str, Any]],
    token: str,
    gpus_per_node: int,
    limits: CheckSettings,
) -> list[Finding]:
    """All findings, good and bad; `reports` lacks the nodes that did not answer. Pure."""
    findings = []
    for host in hosts:
        if host not in reports:
            findings.append(Finding(host, "answer", False, "no report: the node is down, or the probe failed there"))
            continue
        findings.append(Finding(host, "answer", True, ""))
        for matter, good, text in _alone(reports[host], token, gpus_per_node, limits):
            absent = matter == "network" and len(reports) < len(
                hosts
            )  # a node that waited for the absent one is not bad
            findings.append(Finding("" if absent else host, matter, good, text))
    findings += _versions(reports)
    findings += _data(reports)
    findings += _speed(reports, limits)
    findings += _links(list(hosts), reports, limits)
    return findings


def _alone(
    report: Mapping[str, Any], token: str, gpus_per_node: int, limits: CheckSettings
) -> Iterator[tuple[str, bool, str]]:
    """Findings from the report of one node: matter, whether it is good, text."""
    devices = len(report["devices"])
    yield "devices", devices >= gpus_per_node, f"{devices} GPUs, gpus_per_node = {gpus_per_node}"
    for gpu in report["gpu_health"]:
        if "xid" in gpu:
            yield "health", False, f"the kernel reports {gpu['xid']}"
            continue
        errors, pending = gpu["ecc.errors.uncorrected.volatile.total"], gpu["retired_pages.pending"]
        good = errors in ("0", "[N/A]") and pending in ("No", "[N/A]")
        yield "health", good, f"uncorrected ECC errors {errors}, pages to retire {pending}"
    room = report["shared_memory_free_bytes"]
    least = limits.free_shared_memory_gigabytes * GIGABYTE
    yield "memory", room >= least, f"{byte_size(room)} free in /dev/shm, {byte_size(least)} needed"
    run = report["run"]
    if "error" in run:
        yield "disk", False, run["error"]
    else:
        room, least = run["free_bytes"], limits.free_disk_gigabytes * GIGABYTE
        yield "disk", room >= least, f"{byte_size(room)} free, {byte_size(least)} needed"
        yield "disk", run["token"] == token, "the run directory is not the same folder as on the other nodes"
    network = report.get("network", {})
    if "error" in network:
        yield "network", False, network["error"]
    elif network:
        skew = network["clock_skew_seconds"]
        yield "clock", abs(skew) <= limits.clock_skew_seconds, f"{skew:+.2f} s against the first node"


def _versions(reports: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """A node whose versions differ from those of most nodes is bad."""
    facts = {host: {"python": r["python"], **r["versions"], **_driver(r)} for host, r in reports.items()}
    for name in dict.fromkeys(name for fact in facts.values() for name in fact):
        values = {host: fact.get(name, "none") for host, fact in facts.items()}
        usual = Counter(values.values()).most_common(1)[0][0]
        for host, value in values.items():
            if value != usual:
                yield Finding(host, "versions", False, f"{name} {value}, most nodes have {usual}")
    yield from (Finding(host, "versions", True, "") for host in facts)


def _driver(report: Mapping[str, Any]) -> dict[str, str]:
    drivers = {gpu["driver_version"] for gpu in report["gpu_health"] if "driver_version" in gpu}
    return {"driver": ", ".join(sorted(drivers))} if drivers else {}


def _data(reports: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    found = {host: json.dumps(report["data"], sort_keys=True) for host, report in reports.items()}
    sound = [text for host, text in found.items() if "error" not in reports[host]["data"]]
    usual = Counter(sound).most_common(1)[0][0] if sound else ""
    for host, text in found.items():
        error = reports[host]["data"].get("error", "")
        yield Finding(
            host, "data", text == usual and not error, error or "its prepared data differ from those of most nodes"
        )


def _speed(reports: Mapping[str, Mapping[str, Any]], limits: CheckSettings) -> Iterator[Finding]:
    speeds = {host: report["matmul_tflops"] for host, report in reports.items()}
    expected = limits.expect.matmul_tflops or (statistics.median(speeds.values()) if speeds else 0)
    for host, speed in speeds.items():
        good = speed >= limits.expect.tolerance * expected
        yield Finding(host, "speed", good, f"matrix product {speed:.3g} TFLOP/s, expected {expected:.3g}")


def _links(hosts: Sequence[str], reports: Mapping[str, Mapping[str, Any]], limits: CheckSettings) -> Iterator[Finding]:
    """A node whose best link is slow is bad; a slow link between two good nodes is a finding without a host.

    Of two nodes, the sender of a slow direction is bad.
    """
    speed = {}  # (from, to) -> bytes per second
    for number, host in enumerate(hosts):
        for peer, (sent, _) in reports.get(host, {}).get("network", {}).get("links", {}).items():
            speed[number, int(peer)] = sent
    if not speed:
        return
    expected = limits.expect.link_gigabytes_per_second * GIGABYTE or statistics.median_high(speed.values())
    least = limits.expect.tolerance * expected
    slow = set()
    for node, host in enumerate(hosts):
        for words, found in (("to", [v for (a, _), v in speed.items() if a == node]),
                             ("from", [v for (_, b), v in speed.items() if b == node])):  # fmt: skip
            if found and max(found) < least and not (len(hosts) == 2 and words == "from"):
                slow.add(node)
                yield Finding(
                    host, "network", False, f"{_rate(max(found))} {words} its best peer, expected {_rate(expected)}"
                )
    for (a, b), value in speed.items():
        if value < least and not {a, b} & slow:
            yield Finding("", "network", False, f"{hosts[a]} to {hosts[b]}: {_rate(value)}, expected {_rate(expected)}")
    least = limits.expect.tolerance * limits.expect.all_reduce_gigabytes_per_second * GIGABYTE
    for node, host in enumerate(hosts):
        reduced = reports.get(host, {}).get("network", {}).get("all_reduce_bytes_per_second")
        if reduced is not None and reduced < least:
            yield Finding(host, "network", False, f"all-reduce {_rate(reduced)}, expected {_rate(least)} at least")
        if reduced is not None and node not in slow:
            yield Finding(host, "network", True, "")


def _rate(bytes_per_second: float) -> str:
    return f"{byte_size(bytes_per_second)}/s"


# ---- running the probe on every node


class Runner:
    """Runs `launch look` on every node at the same time, one process per command."""

    def __init__(self, hosts: Sequence[str], commands: Sequence[Sequence[str]], folder: Path) -> None:
        self.hosts, self._commands, self._folder = list(hosts), commands, folder

    def reports(self) -> dict[str, dict[str, Any]]:
        """Host -> its report. Failed nodes are missing; their last lines go to standard error."""
        running = [
            subprocess.Popen(
                list(command),
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for command in self._commands
        ]
        found: dict[str, dict[str, Any]] = {}
        try:
            for process in running:
                said, _ = process.communicate(timeout=TIMEOUT_SECONDS)
                lines = [line.partition("PROBE ")[2] for line in said.splitlines() if "PROBE " in line]
                reports = [json.loads(line) for line in lines]
                found |= {report.pop("node"): report for report in reports}
                if not lines or process.returncode:
                    print("\n".join(said.splitlines()[-5:]), file=sys.stderr)
        except subprocess.TimeoutExpired:
            print(f"launcher: not all nodes reported within {TIMEOUT_SECONDS:.0f} s", file=sys.stderr)
        finally:
            for process in running:
                process.kill()
                process.wait()
        orders = [report.pop("nodes") for report in found.values()]
        if orders and set(orders[0]) == set(self.hosts):
            self.hosts = orders[0]  # SLURM has its own order of nodes, and links are numbered by it
        return found


def look_words(run_file: Path, cluster_file: Path | None, overrides: Sequence[str]) -> list[str]:
    words = [sys.executable, "-m", "bigmodel", "launch", "look", str(run_file)]
    words += ["--cluster", str(cluster_file)] if cluster_file else []
    return words + [word for override in overrides for word in ("--set", override)]


def on_hosts(
    topology: Topology, cluster: Cluster, targets: Sequence[str], words: Sequence[str], folder: Path
) -> Runner:
    """Over ssh, one process per host; `targets`: the hosts, for ssh."""
    one_each = even_topology(topology.hosts, 1, topology.main_address, topology.main_port)
    world = json.dumps(asdict(one_each))
    commands = [
        remote_command(cluster, target, [*words, "--world", world, "--node", str(node)], folder)
        for node, target in enumerate(targets)
    ]
    return Runner(topology.hosts, commands, folder)


def on_this_machine(words: Sequence[str], folder: Path) -> Runner:
    world = json.dumps(asdict(even_topology([os.uname().nodename], 1, "127.0.0.1", 1)))
    return Runner([os.uname().nodename], [[*words, "--world", world, "--node", "0"]], folder)


def on_slurm(groups: Sequence[Sequence[str]], cluster: Cluster, words: Sequence[str], folder: Path) -> Runner:
    """One srun task per node, all in one step, in the current allocation or in a new one.

    groups: hosts, one list per group of a het job. For a het job the step is several commands joined by colons: srun
    distributes each over the nodes of one group.
    """
    slurm = cluster.slurm
    options = ["--ntasks-per-node=1", "--wait=30"]
    if "SLURM_JOB_ID" in os.environ:
        options += ["--overlap"]
    else:
        given = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos}
        options += [f"--{name}={value}" for name, value in given.items() if value]
        options += [f"--nodelist={','.join(groups[0])}", "--immediate=60", "--job-name=preflight", "--time=10"]
        options += [f"--gpus-per-node={cluster.gpus_per_node}"] if cluster.gpus_per_node else []
    options += container_options(cluster.container, folder)
    python = [cluster.container.python] if cluster.container.image else words[:1]
    command = ["srun"]
    for number, hosts in enumerate(groups):
        command += [":"] if number else []
        command += [f"--het-group={number}"] if len(groups) > 1 else []
        command += [f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", *options, *python, *words[1:]]
    return Runner([host for hosts in groups for host in hosts], [command], folder)


def become_probe(
    run_file: Path, overrides: Sequence[str], cluster: Cluster, topology: Topology | None, node: int
) -> None:
    """On a node: run `bigmodel probe` as rank `node`, with one rank per node; print its report with the node's name."""
    if topology is None:
        topology, node = find_place(os.environ)
    variables = launch_environment(topology, node, cluster.variables())
    variables |= gloo_variables(len(topology.hosts), topology.main_address, {**os.environ, **variables})
    command = [sys.executable, "-m", "bigmodel", "probe", str(run_file), "--line"]
    command += [word for override in overrides for word in ("--set", override)]
    done = subprocess.run(
        command,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("PROBE ")]
    if done.returncode or not lines:
        raise UserError(f"{topology.hosts[node]}: the probe failed: {done.stdout.strip()[-1000:]}")
    report = json.loads(lines[-1].removeprefix("PROBE "))
    report |= {"node": topology.hosts[node], "nodes": list(topology.hosts)}
    print(f"PROBE {json.dumps(report)}", flush=True)
