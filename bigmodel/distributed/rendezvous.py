"""Rendezvous: all ranks meet at rank 0's store, or the error names the absent ranks and their nodes.

In: rank, world size and address of rank 0. Out: torch's key-value store for `init_process_group`. torch's own
rendezvous only counts connections, so it cannot name an absent rank.
"""

import json
import os
import time
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

MARGIN_SECONDS = 30.0  # other ranks wait this much longer than rank 0, for its list of absent ranks


def meet(place: Mapping[str, str], timeout_seconds: float) -> dist.Store:
    """Wait for every rank. Raises `RuntimeError` with the ranks and nodes that did not come in time."""
    rank, size = int(place["RANK"]), int(place["WORLD_SIZE"])
    agent_listens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # then torchrun's agent has the port
    server = dist.TCPStore(
        place["MASTER_ADDR"],
        int(place["MASTER_PORT"]),
        is_master=rank == 0 and not agent_listens,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_seconds),
    )
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
