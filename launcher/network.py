"""Ports, names and network interfaces of this machine, from the kernel."""

import fcntl
import random
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

SIOCGIFADDR = 0x8915  # linux/sockios.h
PORTS_GIVEN = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST_PORT, TRIES = 20_000, 100


def free_port() -> int:
    """A TCP port that is free on this machine now; another server may take it before its use.

    Below the range from which the kernel gives ports to outgoing connections, so that none of those takes it.
    """
    candidates = range(FIRST_PORT, int(PORTS_GIVEN.read_text().split()[0]))
    for port in random.SystemRandom().sample(candidates, k=min(TRIES, len(candidates))):
        if port_is_free(port):
            return port
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def port_is_free(port: int) -> bool:
    """Whether a server can listen at the port, on all addresses of this machine."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore connections that are closing
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True


def resolves(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False


def gloo_variables(num_nodes: int, main_address: str, environment: Mapping[str, str]) -> dict[str, str]:
    """GLOO_SOCKET_IFNAME for a rank of a run on several nodes, unless it is set already or gloo finds it itself."""
    if num_nodes < 2 or "GLOO_SOCKET_IFNAME" in environment:
        return {}
    interface = interface_towards(main_address)
    return {"GLOO_SOCKET_IFNAME": interface} if interface else {}


def interface_towards(host: str) -> str:
    """The network interface for gloo, or "" if gloo finds it itself.

    Gloo listens at the address of this machine's own name. On Debian and Ubuntu that is a loopback address, which ranks
    on other machines cannot reach.
    """
    try:
        if not socket.gethostbyname(socket.gethostname()).startswith("127."):
            return ""
    except OSError:
        pass  # the name has no address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing; the kernel picks the route
        except OSError:
            return ""
        address = probe.getsockname()[0]
        if address.startswith("127."):
            return ""
        return next((name for _, name in socket.if_nameindex() if _address(probe, name) == address), "")


def _address(probe: socket.socket, interface: str) -> str:
    try:
        answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()))
    except OSError:
        return ""  # no address
    return socket.inet_ntoa(answer[20:24])
