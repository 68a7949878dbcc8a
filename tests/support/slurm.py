"""A real SLURM cluster for tests: slurmctld and several slurmd on this machine, as this user, in a folder.

Needs Debian's `slurmctld slurmd slurm-client munge`, and root; no systemd, no cgroups. Every node pretends to have 16
processors and up to 8 GPUs (character devices of any Linux). Nodes are named n1, n2 ... and resolve to their own
addresses in 127.0.1.0/24 through an /etc/hosts that only the cluster's processes see.
"""

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.support.netns import Machines

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare", "munged", "runuser")
DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "kmsg")
ENVIRONMENT = {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}

CONFIGURATION = r"""
ClusterName=tests{port}
SlurmctldHost={host}({controller})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge/socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MailProg=/bin/true
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,requeue_delay=0
SchedulerType=sched/backfill
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldTimeout=30
SlurmdTimeout=30
KillWait=5
InactiveLimit=0
MinJobAge=600
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr={addresses} Port=[{first}-{last}] \
 CPUs=16 Boards=1 SocketsPerBoard=2 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=train Nodes=n[1-{nodes}] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=n[1-{nodes}] MaxTime=INFINITE State=UP PriorityTier=10
"""


def missing() -> str:
    """The reason why a cluster is not possible here; empty if it is."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=ENVIRONMENT["PATH"]) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge"
    if os.geteuid():
        return "a SLURM cluster for tests needs root: its nodes get names of their own"
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True, check=False)
    return f"unshare --mount: {tried.stderr.strip()}" if tried.returncode else ""


class Cluster:
    """Running nodes n1 to nN. Every command goes through `call`, with the environment of this cluster."""

    def __init__(self, folder: Path, nodes: int, gpus: int = 8, machines: Machines | None = None) -> None:
        """machines: namespaces for the nodes, so that one can be cut off; else all share this machine's network."""
        self.folder, self.nodes, self.machines = folder, nodes, machines
        first = _free_ports(nodes + 1)
        host = socket.gethostname().partition(".")[0]
        for name in ("state", "munge"):
            (folder / name).mkdir(parents=True)
        self._hosts = folder / "hosts"
        known = machines.addresses[:nodes] if machines else [f"127.0.1.{number}" for number in range(1, nodes + 1)]
        names = "".join(f"{address} n{number}\n" for number, address in enumerate(known, 1))
        self._hosts.write_text(Path("/etc/hosts").read_text() + names)
        files = ",".join(f"/dev/{name}" for name in DEVICES[:gpus])
        self.configuration = folder / "slurm.conf"
        self.configuration.write_text(
            CONFIGURATION.format(
                folder=folder,
                host=host,
                nodes=nodes,
                gpus=gpus,
                port=first,
                first=first + 1,
                last=first + nodes,
                controller=f"10.{machines.subnet}.0.254" if machines else "127.0.0.1",
                addresses=",".join(known) if machines else "127.0.0.1",
            )
        )
        (folder / "gres.conf").write_text(f"NodeName=n[1-{nodes}] Name=gpu Count={gpus} File={files}\n" if gpus else "")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nConstrainCores=no\nConstrainDevices=no\n")
        self.environment = {**os.environ, **ENVIRONMENT, "SLURM_CONF": str(self.configuration)}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._named: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        self._start_munge()
        self._start("slurmctld", "-D")
        for number in range(1, self.nodes + 1):
            self._start("slurmd", "-D", "-N", f"n{number}")
        deadline = time.monotonic() + 60
        while self.call("sinfo", "-h", "-p", "train", "-t", "idle", "-o", "%D", check=False).strip() != str(self.nodes):
            assert time.monotonic() < deadline, (self.folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.1)

    def stop(self) -> None:
        for words in (["--signal=KILL", "--full"], []):  # a failed test may have left a job: all its processes end
            self.call("scancel", *words, "-u", "root", check=False)
        deadline = time.monotonic() + 20
        while self.call("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def call(self, *command: str, check: bool = True, **more: str) -> str:
        """Output of a command on the login node, both streams together."""
        done = self.run(*command, **more)
        assert not check or done.returncode == 0, done.stdout
        return done.stdout

    def run(self, *command: str, **more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self._inside(command),
            env={**self.environment, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
            check=False,
        )

    def wait(self, job: str, seconds: float = 200) -> str:
        """Wait for the final state of a job and return it."""
        deadline = time.monotonic() + seconds
        while True:
            text = self.call("scontrol", "show", "job", job, check=False)
            state = text.partition("JobState=")[2].split(" ")[0]
            if state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
                return state
            assert time.monotonic() < deadline, text
            time.sleep(0.2)

    def start_now(self, job: str) -> None:
        """Start a requeued job without SLURM's wait of two minutes."""
        while "JobState=PENDING" not in self.call("scontrol", "show", "job", job):
            time.sleep(0.1)
        time.sleep(
            2.0
        )  # credentials are revoked with a resolution of 1 s: one from the second of the requeue could not start
        self.call("scontrol", "update", f"job={job}", "StartTime=now")

    def kill(self, name: str) -> None:
        """kill -9 of slurmctld, or of a node's slurmd (n1 ...); tasks of the node go on."""
        self._named[name].kill()
        self._named[name].wait()

    def start_again(self, name: str) -> None:
        """Start a killed daemon."""
        self._start(*(("slurmctld", "-D") if name == "slurmctld" else ("slurmd", "-D", "-N", name)))

    def _inside(self, command: Sequence[str]) -> list[str]:
        node = command[3] if command[0] == "slurmd" else ""
        place = self.machines.inside(int(node[1:]) - 1) if node and self.machines else []
        return [
            *place,
            "unshare",
            "--mount",
            "sh",
            "-c",
            f'mount --bind {self._hosts} /etc/hosts && exec "$@"',
            "sh",
            *command,
        ]

    def _start(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "ab") as output:
            daemon = subprocess.Popen(
                self._inside([*command, "-f", str(self.configuration)]),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._daemons.append(daemon)
        self._named[command[-1] if command[0] == "slurmd" else command[0]] = daemon

    def _start_munge(self) -> None:
        """Start a munged for this cluster: key, socket and log in its folder, which only its user may write."""
        home = self.folder / "munge"
        (home / "key").write_bytes(os.urandom(1024))
        account = pwd.getpwnam("munge")
        for path in (home, home / "key"):
            os.chown(path, account.pw_uid, account.pw_gid)
        os.chmod(home / "key", 0o400)
        command = ["munged", "--foreground", "--force", f"--socket={home}/socket", f"--key-file={home}/key"]
        command += [f"--log-file={home}/log", f"--pid-file={home}/pid", f"--seed-file={home}/seed"]
        self._daemons.append(
            subprocess.Popen(
                ["runuser", "-u", "munge", "--", *command], env=self.environment, stderr=subprocess.DEVNULL
            )
        )


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring free ports, below the kernel's range of ephemeral ports."""
    for first in range(21000 + os.getpid() % 5000, 32000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for number, listener in enumerate(sockets):
                listener.bind(("127.0.0.1", first + number))
            return first
        except OSError:
            continue
        finally:
            for listener in sockets:
                listener.close()
    raise AssertionError("no free ports")
