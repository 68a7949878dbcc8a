"""A run over ssh on machines without a scheduler, started from one of them or from another machine.

In: hosts (a host file in DeepSpeed's format, or a list). Starts `launch node` on each, which runs that node's ranks as
`launch local` does. Guarantees: hosts that do not answer are named before anything starts; no rank outlives the
launcher: standard input of each ssh is a control pipe (see `bigmodel.launcher.local`), and the kernel closes it when
the launcher dies. The project, its environment and the run directory must have the same paths on all hosts. Costs one
ssh connection per host.

Not pdsh: it does not forward standard input, so there would be no control pipe, the only way for a rank on another
machine to learn of a kill -9 of the launcher.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from bigmodel.config.settings import UserError
from bigmodel.launcher.cluster import Cluster
from bigmodel.launcher.local import GRACE_SECONDS, POLL_SECONDS, SAVE_SECONDS, Ending, collect_signals
from bigmodel.launcher.topology import Topology
from bigmodel.run_directory import AGAIN, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USER

ANSWER_SECONDS = 20.0  # longest wait for a host's first answer
KNOWS = "import socket, sys; socket.getaddrinfo(sys.argv[1], None)"  # whether a machine has an address for a name
PASSED_ON = ("PYTHONPATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TZ", "LANG")
SSH_FAILED = 255  # exit code of ssh itself: the connection failed, not the program


@dataclass
class Node:
    host: str
    process: subprocess.Popen[bytes]
    ended: int | None = None

    def order(self, word: str) -> None:
        """Send an order through the control pipe."""
        with suppress(BrokenPipeError, ValueError):
            assert self.process.stdin is not None
            self.process.stdin.write(word.encode() + b"\n")
            self.process.stdin.flush()


def remote_command(cluster: Cluster, target: str, words: Sequence[str], folder: Path) -> list[str]:
    """The command that runs `words` on a host (`host` or `user@host`), in a folder there."""
    variables = [f"{name}={os.environ[name]}" for name in PASSED_ON if name in os.environ]
    line = f"cd {shlex.quote(str(folder))} && exec {shlex.join(['env', *variables, *words])}"
    return [*cluster.ssh.command, *cluster.ssh.options, target, line]


def reach(cluster: Cluster, targets: Sequence[str], main_address: str, folder: Path) -> None:
    """Check that every host answers, has this interpreter and folder, and knows rank 0's address.

    Raises `UserError` with the hosts that do not.
    """
    silent = silent_hosts(cluster, targets, folder)
    if silent:
        raise UserError(f"nothing was started: {'; '.join(silent.values())}\nexclude or repair them")
    lost = _complaints(cluster, targets, [sys.executable, "-c", KNOWS, main_address], "", folder)
    if lost:
        raise UserError(
            f"nothing was started: rank 0 runs on {main_address}, a name without an address on {', '.join(lost)}; set "
            "main_address in the cluster file to an address that all hosts can reach"
        )


def silent_hosts(cluster: Cluster, targets: Sequence[str], folder: Path) -> dict[str, str]:
    """Target -> complaint, of the hosts that do not answer or have no such interpreter."""
    return _complaints(cluster, targets, ["test", "-x", sys.executable], f"no {sys.executable} there", folder)


def _complaints(
    cluster: Cluster, targets: Sequence[str], test: Sequence[str], meaning: str, folder: Path
) -> dict[str, str]:
    """Target -> complaint, of the hosts where the test fails; `meaning`: of a failure without a word."""
    asked = {
        target: subprocess.Popen(
            remote_command(cluster, target, test, folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for target in targets
    }
    deadline = time.monotonic() + ANSWER_SECONDS
    complaints = {}
    for target, process in asked.items():
        try:
            said, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            reason = said.strip() or meaning
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            reason = f"no answer in {ANSWER_SECONDS:.0f} s"
        if process.returncode:
            complaints[target] = f"{target}: {reason}"
    return complaints


def run_on_hosts(
    cluster: Cluster,
    targets: Sequence[str],
    words: Sequence[str],
    topology: Topology,
    folder: Path,
    grace_seconds: float = GRACE_SECONDS,
    save_seconds: float = SAVE_SECONDS,
    signals: list[int] | None = None,
) -> Ending:
    """Run `launch node RUN.toml ...` (`words`) on every host until all have ended; `targets`: the hosts, for ssh.

    This terminal shows rank 0's output and the messages of every node's launcher. `signals` gets stop signals.
    """
    nodes: list[Node] = []
    signals = [] if signals is None else signals
    world = json.dumps(asdict(topology))
    with collect_signals(signals):
        try:
            for number, (host, target) in enumerate(zip(topology.hosts, targets, strict=True)):
                command = [*words, "--world", world, "--node", str(number)]
                process = subprocess.Popen(
                    remote_command(cluster, target, command, folder), stdin=subprocess.PIPE, start_new_session=True
                )
                nodes.append(Node(host, process))
            return _supervise(nodes, signals, grace_seconds, save_seconds)
        finally:
            _cut(nodes)


def _supervise(nodes: list[Node], signals: list[int], grace_seconds: float, save_seconds: float) -> Ending:
    culprit: Node | None = None
    deadline, handled = float("inf"), 0
    while any(node.ended is None for node in nodes):
        running = [node for node in nodes if node.ended is None]
        for node in running:
            node.ended = node.process.poll()
            if node.ended not in (None, EXIT_DONE, EXIT_STOPPED) and culprit is None:
                culprit = node
                deadline = min(deadline, time.monotonic() + 2 * grace_seconds)
                _order(nodes, "end")
        while handled < len(signals):
            handled += 1
            if handled == 1:
                _say(f"\n{signal.Signals(signals[0]).name}: asked {len(running)} node(s) to save and stop")
                deadline = min(deadline, time.monotonic() + save_seconds + grace_seconds)
            _order(nodes, "stop")  # the second one kills, as on one machine
        if time.monotonic() > deadline:
            _cut(nodes)
        time.sleep(POLL_SECONDS)
    return _verdict(nodes, culprit)


def _verdict(nodes: list[Node], culprit: Node | None) -> Ending:
    if culprit is None:
        code = max(node.ended or 0 for node in nodes)
        return Ending(code, "finished" if code == EXIT_DONE else "stopped")
    if culprit.ended == EXIT_USER:
        return Ending(EXIT_USER, "user_error", f"node {culprit.host}")
    if culprit.ended in AGAIN:
        return Ending(culprit.ended, AGAIN[culprit.ended], f"node {culprit.host}")
    how = "lost its connection" if culprit.ended == SSH_FAILED else f"ended with exit code {culprit.ended}"
    _say(f"node {culprit.host} {how}; the other nodes were ended")
    return Ending(EXIT_FAILED, "failed", f"node {culprit.host} {how}")


def _order(nodes: Sequence[Node], word: str) -> None:
    for node in nodes:
        if node.ended is None:
            node.order(word)


def _cut(nodes: Sequence[Node]) -> None:
    """Close every control pipe, wait until the nodes have ended their ranks, then kill connections that remain."""
    for node in nodes:
        with suppress(BrokenPipeError):
            assert node.process.stdin is not None
            node.process.stdin.close()
    for node in nodes:
        try:
            node.ended = node.process.wait(2 * GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            node.process.kill()
            node.ended = node.process.wait()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
