"""Machines for tests: network namespaces of this machine with their own addresses, joined by a bridge.

Needs root and Debian's `iproute2`; `Sshd` also needs `openssh-server`. Processes in different namespaces share files
and process numbers, but connect only through the bridge, whose links can be slowed down.
"""

import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
SSHD = """
Port {port}
{addresses}
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PidFile none
UsePAM no
PermitRootLogin yes
"""


def missing_namespaces() -> str:
    """The reason why namespaces are not possible here; empty if they are."""
    if shutil.which("ip", path=PATH) is None or shutil.which("tc", path=PATH) is None:
        return "no ip and tc: apt-get install iproute2"
    if os.geteuid():
        return "network namespaces need root"
    name = f"try{os.getpid()}"
    tried = subprocess.run(
        ["ip", "netns", "add", name], env={"PATH": PATH}, capture_output=True, text=True, check=False
    )
    if tried.returncode:
        return f"ip netns add: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], env={"PATH": PATH}, check=True)
    return ""


def missing_ssh() -> str:
    absent = [name for name in ("ssh", "sshd", "ssh-keygen") if shutil.which(name, path=PATH) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install openssh-server openssh-client"
    return "sshd for tests needs root" if os.geteuid() else ""


class Machines:
    """Namespaces with addresses 10.S.0.1, 10.S.0.2 ...; this machine itself has 10.S.0.254."""

    _made = itertools.count()  # in this process: two may be there at once

    def __init__(self, count: int) -> None:
        made = next(self._made)
        self.subnet = 64 + (os.getpid() + 64 * made) % 128
        self._bridge = f"bm{os.getpid()}{'abcdefgh'[made % 8]}"
        self.names = [f"{self._bridge}{number}" for number in range(1, count + 1)]
        self.addresses = [f"10.{self.subnet}.0.{number}" for number in range(1, count + 1)]

    def start(self) -> None:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("address", "add", f"10.{self.subnet}.0.254/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for name, address in zip(self.names, self.addresses, strict=True):
            _ip("netns", "add", name)
            _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", name, "master", self._bridge, "up")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def slow_down(self, number: int, rate: str) -> None:
        """Limit the sending rate of machine `number` (from 0), as "20mbit"."""
        limit = ["rate", rate, "burst", "32kbit", "latency", "50ms"]
        self.call(number, "tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", *limit)

    def cut_off(self, number: int) -> None:
        """Take machine `number` from the network; its processes and files stay."""
        _ip("link", "set", self.names[number], "down")

    def join(self, number: int) -> None:
        _ip("link", "set", self.names[number], "up")

    def inside(self, number: int, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.names[number], *command]

    def call(self, number: int, *command: str) -> None:
        subprocess.run(self.inside(number, *command), env={"PATH": PATH}, check=True)

    def stop(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], env={"PATH": PATH}, check=False)
        subprocess.run(["ip", "link", "delete", self._bridge], env={"PATH": PATH}, check=False)


class Sshd:
    """An sshd with its own key; a client with `options` uses this key."""

    def __init__(self, folder: Path, port: int, addresses: Sequence[str], prefix: Sequence[str] = ()) -> None:
        os.makedirs("/run/sshd", exist_ok=True)
        key = folder / "key"
        if not key.exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        listen = "\n".join(f"ListenAddress {address}" for address in addresses)
        configuration = folder / f"sshd-{addresses[0]}"
        configuration.write_text(SSHD.format(port=port, addresses=listen, folder=folder))
        program = shutil.which("sshd", path=PATH)
        self.process = subprocess.Popen([*prefix, program, "-D", "-e", "-f", str(configuration)], env={"PATH": PATH})
        self.options = ["-i", str(key), "-p", str(port), "-o", "StrictHostKeyChecking=no", "-o", "LogLevel=ERROR"]
        self.options += ["-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=5", "-F", "none"]
        self._wait(addresses[0])

    def _wait(self, address: str) -> None:
        for _ in range(100):
            if (
                subprocess.run(["ssh", *self.options, address, "true"], capture_output=True, check=False).returncode
                == 0
            ):
                return
            time.sleep(0.1)
        raise AssertionError(f"sshd at {address} does not answer")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], env={"PATH": PATH}, check=True)
