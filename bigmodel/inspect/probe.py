"""Probe: measured facts about this node as plain values, for the launcher, which imports no torch.

In: a run file or none. Out: a dict for JSON. With RANK and WORLD_SIZE in the environment (one process per node) it
also joins the other nodes and measures clocks and links. Verdicts are made by `bigmodel launch check`.
Costs one or two seconds to import torch and about two seconds to measure.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from bigmodel.config.settings import Settings, UserError
from bigmodel.run_directory import package_versions

STALE_SECONDS = 60.0  # a process may be about to open younger files in shared memory
STALE_NAMES = re.compile(r"nccl-.+|torch_\d+_\d+_\d+|\d{6}_(?:barrier|locals|cache_filelock|shard_.+|next_epoch)")
MEASURE_SECONDS = 0.3
FIRST_BYTES, MOST_BYTES = 1 << 20, 1 << 28
MEET_SECONDS = 60.0
ALL_PAIRS = 16  # nodes; above that only a hypercube of links is measured
TOKEN = "preflight.token"


def probe(settings: Settings | None = None) -> dict[str, Any]:
    """Host, processors, memory (bytes), devices and versions; with settings also data and run directory."""
    import torch

    found: dict[str, Any] = {
        "host": os.uname().nodename,
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "shared_memory_free_bytes": shutil.disk_usage("/dev/shm").free,
        "devices": [_device(torch.cuda.get_device_properties(index)) for index in range(torch.cuda.device_count())],
        "gpu_health": gpu_health(),
        "versions": package_versions(),
    }
    if settings is None:
        return found
    found["stale_shared_memory_removed"] = remove_stale_shared_memory(Path("/dev/shm"))
    found["run"], found["data"] = _run_directory(settings), _data(settings)
    found["matmul_tflops"] = matmul_tflops()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        found["network"] = network()
    return found


def gpu_health() -> list[dict[str, str]]:
    """Output of nvidia-smi per GPU and the kernel's Xid messages; empty without GPUs."""
    names = ["driver_version", "ecc.errors.uncorrected.volatile.total", "retired_pages.pending", "temperature.gpu"]
    table = _ask("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits")
    rows = [dict(zip(names, map(str.strip, line.split(",")), strict=False)) for line in table.splitlines()]
    xids = [line for line in _ask("dmesg").splitlines() if "NVRM: Xid" in line][-5:] if rows else []
    return [*rows, *({"xid": line} for line in xids)]


def remove_stale_shared_memory(folder: Path) -> list[str]:
    """Remove files of dead ranks of this user from shared memory: they take space and break the next start.

    Removes only names of NCCL, torch and streaming that no process has open and that are at least a minute old.
    """
    oldest = time.time() - STALE_SECONDS
    candidates = [path for path in folder.iterdir() if STALE_NAMES.fullmatch(path.name)]
    in_use = _open_files() if candidates else set()
    removed = []
    for path in candidates:
        with suppress(OSError):
            about = path.stat()
            if about.st_uid == os.getuid() and about.st_mtime < oldest and str(path) not in in_use:
                path.unlink()
                removed.append(path.name)
    return sorted(removed)


def matmul_tflops() -> float:
    """Speed of a matrix product on the slowest device, 10^12 operations per second: bf16 on a GPU, fp32 on a CPU."""
    import torch

    return min(map(_matmul_tflops, [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]))


def _matmul_tflops(device: str) -> float:
    import torch

    cuda = device != "cpu"
    size = 8192 if cuda else 512
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    best = float("inf")
    deadline = time.perf_counter() + MEASURE_SECONDS
    while time.perf_counter() < deadline or best == float("inf"):
        start = time.perf_counter()
        a @ a
        if cuda:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def network() -> dict[str, Any]:
    """Join the other nodes and measure: seconds by which a clock is ahead of node 0's, and bytes per second.

    `links[node]` is [to, from] that node: by NCCL from the memory of the first GPU, by gloo without GPUs.
    If the nodes cannot connect, the result has an entry "error".
    """
    import torch
    import torch.distributed as dist

    from bigmodel.distributed.rendezvous import meet

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store = meet(os.environ, MEET_SECONDS)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=MEET_SECONDS)
        )
        skew = _clock_skew(rank, size)
        links = {}
        for partners in rounds(size):
            peer = partners.get(rank)
            if peer is not None:
                links[str(peer)] = _exchange(rank, peer)
            dist.all_reduce(torch.zeros(1))  # a barrier between rounds
        reduced = _all_reduce_speed()
        dist.destroy_process_group()
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0]}
    return {"clock_skew_seconds": skew, "links": links, "all_reduce_bytes_per_second": reduced}


def rounds(size: int) -> list[dict[int, int]]:
    """Pairs of nodes that measure, round by round; pairs of a round are disjoint, so links do not disturb each other.

    Up to 16 nodes: all pairs (circle method of tournaments). Above: the edges of a hypercube.

    >>> rounds(3)
    [{1: 2, 2: 1}, {0: 2, 2: 0}, {0: 1, 1: 0}]
    """
    if size > ALL_PAIRS:
        bits = [1 << bit for bit in range((size - 1).bit_length())]
        return [{node: node ^ bit for node in range(size) if node ^ bit < size} for bit in bits]
    seats = size + size % 2  # with an odd number, one node pauses each round
    found = []
    for turn in range(seats - 1):
        ring = [(turn + place) % (seats - 1) for place in range(seats - 1)]
        pairs = [(seats - 1, ring[0]), *((ring[place], ring[-place]) for place in range(1, seats // 2))]
        real = [pair for pair in pairs if max(pair) < size]
        found.append(dict(sorted((a, b) for pair in real for a, b in (pair, pair[::-1]))))
    return found


def _exchange(rank: int, peer: int) -> list[float]:
    """Bytes per second to and from a peer, one direction after the other; both nodes call it."""
    import torch
    import torch.distributed as dist

    first = rank < peer
    directions = []
    for sending in (first, not first):
        seconds = _transfer(sending, peer, FIRST_BYTES)
        fits = int(FIRST_BYTES * MEASURE_SECONDS / max(seconds, 1e-6))
        count = torch.tensor([min(MOST_BYTES, max(FIRST_BYTES, fits))])
        dist.send(count, peer) if sending else dist.recv(count, peer)
        size = int(count)
        directions.append((sending, size / _transfer(sending, peer, size)))
    return [speed for sending, speed in sorted(directions, reverse=True)]


def _transfer(sending: bool, peer: int, size: int) -> float:
    """Seconds until the receiver has confirmed all bytes."""
    import torch
    import torch.distributed as dist

    device = "cuda" if torch.cuda.is_available() else "cpu"
    data, done = torch.empty(size, dtype=torch.uint8, device=device), torch.zeros(1, device=device)
    start = time.perf_counter()
    if sending:
        dist.send(data, peer)
        dist.recv(done, peer)
    else:
        dist.recv(data, peer)
        dist.send(done, peer)
    done.item()  # wait for the device
    return time.perf_counter() - start


def _all_reduce_speed() -> float:
    import torch
    import torch.distributed as dist

    data = torch.ones(FIRST_BYTES // 4, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(data)  # the first one opens connections
    start = time.perf_counter()
    for _ in range(4):
        dist.all_reduce(data)
    data[0].item()
    return 4 * FIRST_BYTES / (time.perf_counter() - start)


def _clock_skew(rank: int, size: int) -> float:
    """Seconds by which this clock is ahead of node 0's, from the fastest of several round trips (Cristian 1989)."""
    import torch
    import torch.distributed as dist

    best = (float("inf"), 0.0)
    for node in range(1, size):
        for _ in range(5):
            stamp = torch.zeros(1, dtype=torch.float64)
            if rank == node:
                asked = time.time()
                dist.send(stamp, 0)
                dist.recv(stamp, 0)
                now = time.time()
                best = min(best, (now - asked, (asked + now) / 2 - float(stamp)))
            elif rank == 0:
                dist.recv(stamp, node)
                stamp[0] = time.time()
                dist.send(stamp, node)
    return best[1]


def _run_directory(settings: Settings) -> dict[str, Any]:
    """Whether it is writable, its free space, and the launcher's token, which all nodes must see."""
    directory = settings.run.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        trial = directory / f".probe.{os.uname().nodename}.{os.getpid()}"
        trial.write_text("")
        trial.unlink()
        token = directory / TOKEN
        usage = os.statvfs(directory)
        return {
            "free_bytes": usage.f_bavail * usage.f_frsize,
            "free_files": usage.f_favail,
            "token": token.read_text() if token.exists() else "",
        }
    except OSError as error:
        return {"error": f"{directory}: {error.strerror}"}


def _data(settings: Settings) -> dict[str, Any]:
    """Fingerprint of the prepared data on this node."""
    from bigmodel.data.store.manifest import Manifest

    if settings.data.remote:
        return {"remote": settings.data.remote}
    try:
        Manifest.read(settings.data.directory)
        content = (settings.data.directory / "manifest.json").read_bytes()
    except (UserError, OSError) as error:
        return {"error": str(error)}
    return {"fingerprint": hashlib.sha256(content).hexdigest()[:16]}


def _device(properties: Any) -> dict[str, Any]:
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
    }


def _ask(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _open_files() -> set[str]:
    """Files that any process has mapped or open, as far as we may read its tables."""
    found: set[str] = set()
    looks: list[Callable[[Path], None]] = [
        lambda process: found.update(re.findall(r"(/dev/shm/\S+)", (process / "maps").read_text())),
        lambda process: found.update(os.readlink(link) for link in (process / "fd").iterdir()),
    ]
    for process in Path("/proc").glob("[0-9]*"):
        for look in looks:
            with suppress(OSError):
                look(process)
    return found
