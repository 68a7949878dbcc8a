"""Network: ports, names and interfaces of this machine, asked of the kernel."""

import fcntl
import socket
import struct

SIOCGIFADDR = 0x8915  # linux/sockios.h


def free_port() -> int:
    """A TCP port that was free on this machine a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def port_is_free(port: int) -> bool:
    """Whether a server could listen at the port, on all addresses of this machine."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that are closing do not count
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


def interface_towards(host: str) -> str:
    """The interface through which gloo should be reached by others, or "" if it finds it by itself.

    Gloo listens where this machine's own name points; on Debian and Ubuntu that is a loopback address, and ranks on
    other machines then wait for it in vain.
    """
    try:
        if not socket.gethostbyname(socket.gethostname()).startswith("127."):
            return ""
    except OSError:
        pass  # no address at all
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
        return ""  # it has none
    return socket.inet_ntoa(answer[20:24])
