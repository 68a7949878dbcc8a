"""Rendezvous: all ranks meet at rank 0's store, or it is said which of them, on which node, did not come.

Takes where this process stands, gives torch's key-value store for `init_process_group`. torch's own way waits for a
number of connections and, when one is missing, cannot say whose.
"""

import json
import os
import time
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

MARGIN_SECONDS = 30.0  # that other ranks wait for rank 0's verdict after its time is up


def meet(place: Mapping[str, str], timeout_seconds: float) -> dist.Store:
    """Wait for every rank. Raises `RuntimeError` naming those that did not come in time, with their nodes."""
    rank, size = int(place["RANK"]), int(place["WORLD_SIZE"])
    agent_listens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun holds the port then
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
    """The rank with its host, where the launcher said so (LAUNCH_HOSTS, "a*8,b*8"), or with its node's number."""
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
    """Ranks that are not here when the time is up."""
    deadline = time.monotonic() + timeout_seconds
    absent = list(range(size))
    while True:
        absent = [rank for rank in absent if not store.check([f"here/{rank}"])]
        if not absent or time.monotonic() > deadline:
            return absent
        time.sleep(0.02)
