"""Rendezvous: all ranks meet at rank 0's store, or the error names the absent ranks and their nodes.

In: rank, world size and address of rank 0. Out: torch's key-value store for `init_process_group`. torch's own
rendezvous only counts connections, so it cannot name an absent rank.
"""

import ipaddress
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from bigmodel.config.user_error import UserError

NAME_SECONDS = 20.0  # longest wait for the address of a name: a name service may be late or overloaded
MARGIN_SECONDS = 30.0  # other ranks wait this much longer than rank 0, for its list of absent ranks


def meet(place: Mapping[str, str], timeout_seconds: float) -> dist.Store:
    """Wait for every rank.

    Raises `RuntimeError` with the ranks and nodes that did not come in time, `UserError` if this machine has no address
    for MASTER_ADDR.
    """
    rank, size = int(place["RANK"]), int(place["WORLD_SIZE"])
    agent_listens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # then torchrun's agent has the port
    host, port, listens = place["MASTER_ADDR"], int(place["MASTER_PORT"]), rank == 0 and not agent_listens
    _wait_for_address(host, port, timeout_seconds)
    if not listens:
        _wait_for_server(host, port, timeout_seconds)
    server = open_store(host, port, listens, timeout_seconds)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"bigmodel/{attempt}", server)
    store.set(f"here/{rank}", "")
    if rank == 0:
        absent = _wait_for_all(store, size, timeout_seconds)
        store.set("absent", json.dumps(absent))
    else:
        store.wait(["absent"], timedelta(seconds=timeout_seconds + MARGIN_SECONDS))
        absent = json.loads(store.get("absent"))
    if absent:
        raise RuntimeError(f"{', '.join(map(name_rank, absent[:8]))}{' and more' * (len(absent) > 8)} did not come")
    return store


def open_store(host: str, port: int, listens: bool, timeout_seconds: float) -> dist.TCPStore:
    """torch's key-value store: its server (listens; port 0: any free one) or a client.

    At a loopback address the server listens on loopback alone; torch's own socket would be open to the network.
    Raises `RuntimeError` if the port is in use.
    """
    timeout = timedelta(seconds=timeout_seconds)
    if not listens or not is_loopback(host):
        return dist.TCPStore(host, port, is_master=listens, wait_for_workers=False, timeout=timeout)
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise RuntimeError(f"rank 0 cannot listen there ({error.strerror})") from None
    port = listener.getsockname()[1]
    return dist.TCPStore(
        host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener.detach()
    )


def is_loopback(host: str) -> bool:
    """Whether all addresses of a name are reached from this machine alone."""
    try:
        found = socket.getaddrinfo(host, None)
    except socket.gaierror:
        return False
    return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in found)


def _wait_for_address(host: str, port: int, timeout_seconds: float) -> None:
    deadline = time.monotonic() + min(NAME_SECONDS, timeout_seconds)
    said = False
    while True:
        try:
            socket.getaddrinfo(host, port)
            return
        except socket.gaierror as error:
            here, reason = os.uname().nodename, error.strerror
        if time.monotonic() > deadline:
            raise UserError(
                f"MASTER_ADDR={host}: this name of rank 0 has no address on {here} ({reason}); set main_address in the "
                "cluster file, or MASTER_ADDR, to an address that all nodes can reach"
            )
        if not said:
            print(f"bigmodel: MASTER_ADDR={host} has no address on {here}; asking again", file=sys.stderr, flush=True)
        said = True
        time.sleep(0.5)


def _wait_for_server(host: str, port: int, timeout_seconds: float) -> None:
    """Wait until rank 0 listens. torch waits too, but with warnings and C++ frames, and for several timeouts."""
    deadline, pause = time.monotonic() + timeout_seconds, 0.02
    while True:
        try:
            socket.create_connection((host, port), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"nobody listens there ({error.strerror or error})") from None
        time.sleep(pause)
        pause = min(1.0, 1.5 * pause)


def name_rank(rank: int) -> str:
    """The rank with its host, or with its node's number if the launcher set no LAUNCH_HOSTS.

    Example: with LAUNCH_HOSTS = "a*8,b*8", rank 9 is "rank 9 on b".
    """
    hosts = [
        host
        for run in os.environ.get("LAUNCH_HOSTS", "").split(",")
        if run
        for host in [run.rpartition("*")[0]] * int(run.rpartition("*")[2])
    ]
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if rank < len(hosts):
        return f"rank {rank} on {hosts[rank]}"
    return f"rank {rank} on node {rank // local_size}" if local_size else f"rank {rank}"


def _wait_for_all(store: dist.Store, size: int, timeout_seconds: float) -> list[int]:
    """The ranks that are absent after the timeout."""
    deadline = time.monotonic() + timeout_seconds
    absent = list(range(size))
    while True:
        absent = [rank for rank in absent if not store.check([f"here/{rank}"])]
        if not absent or time.monotonic() > deadline:
            return absent
        time.sleep(0.02)
