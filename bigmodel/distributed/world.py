"""The world: the rank of this process, and the small collectives outside of the engine.

In: the variables that launchers set (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), or none of them: then
this process is alone. Out: a `World`. Guarantees: the device is set before torch.distributed starts; every wait has a
time limit; sums are in fp64 and equal on all ranks. Every method of `World` is collective.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bigmodel.config.settings import UserError
from bigmodel.config.user_error import MachineError
from bigmodel.distributed.rendezvous import is_loopback, meet, open_store

STEPS_KEPT = 64  # of NodeSums: more than one rank's data thread can be ahead of another rank's
TIMEOUT_SECONDS = 600.0  # default, and limit of NodeSums

Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """This process among `size`; `local_rank` among the `local_size` of its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    def broadcast_object(self, value: Value) -> Value:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather_objects(self, value: Value) -> list[Value]:
        """Every rank's value, in the order of ranks, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def of_nodes(self, value: Value, num_nodes: int, speaks: bool) -> list[Value]:
        """Each node's value, on every rank. speaks: whether this rank is the first of its node."""
        if num_nodes == 1:
            return [value]
        told: list[Any] = self.gather_objects(value if speaks else None)
        return told[:: self.size // num_nodes]

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        self.sum_([0.0])

    def sum_(self, values: Sequence[float]) -> list[float]:
        """Each number added up over the ranks in fp64."""
        total = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def largest(self, values: Tensor) -> Tensor:
        """Of each fp32 number the largest over the ranks; NaN if one is, which gloo's own maximum loses."""
        of_ranks = torch.zeros(self.size, *values.shape, dtype=torch.float32, device=self.device)
        of_ranks[self.rank] = values
        dist.all_reduce(of_ranks)  # each place is one rank's number and zeros
        return of_ranks.amax(0)

    def gather_integers(self, value: int) -> list[int]:
        """Every rank's 64-bit integer, in the order of ranks."""
        values = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        values[self.rank] = value
        dist.all_reduce(values)
        return values.tolist()

    def any_true(self, flag: bool) -> bool:
        """Whether the flag is true on any rank."""
        return self.sum_([float(flag)])[0] > 0

    def on_rank_zero(self, action: Callable[[], Value]) -> Value:
        """Run `action` on rank 0 only; every rank returns its result or raises its exception."""
        result: tuple[Any, Exception | None] = (None, None)
        if self.rank == 0:
            try:
                result = (action(), None)
            except Exception as error:  # a process boundary: rank 0 must not leave the others waiting
                result = (None, error)
        value, raised = self.broadcast_object(result)
        if raised is not None:
            raise raised
        return value

    def ranks_per_node(self) -> int:
        """Ranks per machine, if they are consecutive and equally many on all machines; else 1."""
        places = self.gather_objects((self.local_rank, self.local_size))
        size = self.local_size
        regular = self.size % size == 0 and places == [(rank % size, size) for rank in range(self.size)]
        return size if regular else 1


class NodeSums:
    """Sums of small numbers over the nodes, for a thread that works ahead; no rank waits for another rank's loop.

    Each node writes its numbers into torch's key-value store on rank 0 and reads the others' numbers. Not a collective:
    a pending collective cannot be cancelled, so its process could not end.
    """

    def __init__(self, world: World, node: int, num_nodes: int, speaks: bool) -> None:
        """Collective. `speaks`: whether this rank writes its node's numbers; true on one rank per node."""
        host = os.environ["MASTER_ADDR"]
        server = open_store(host, 0, True, TIMEOUT_SECONDS) if world.rank == 0 else None
        port = world.broadcast_object(server.port if server else 0)
        self._store = server or open_store(host, port, False, TIMEOUT_SECONDS)
        self._node, self._num_nodes, self._speaks = node, num_nodes, speaks

    def add_up(self, step: int, values: Sequence[int], abandoned: Callable[[], bool]) -> list[int]:
        """The sum of each number over the nodes. Waits for slower nodes, until `abandoned()`.

        Raises `UserError` with the reason if a node has failed, `TimeoutError` if a node is silent.
        """
        if self._speaks:
            self._store.set(f"{step}/{self._node}", json.dumps(list(values)))
            self._store.delete_key(f"{step - STEPS_KEPT}/{self._node}")
        keys = [f"{step}/{node}" for node in range(self._num_nodes)]
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not self._are_there(keys):
            if self._store.check(["failure"]):
                failed, reason = json.loads(self._store.get("failure"))
                if failed <= step:
                    raise UserError(reason)
            if abandoned() or time.monotonic() > deadline:
                raise TimeoutError(
                    f"step {step}: not all {self._num_nodes} nodes planned it in {TIMEOUT_SECONDS:.0f} s"
                )
        return [sum(column) for column in zip(*map(json.loads, self._store.multi_get(keys)), strict=True)]

    def fail(self, step: int, reason: str) -> None:
        """Tell the other nodes that this node cannot compute the numbers of a step."""
        with contextlib.suppress(RuntimeError):  # rank 0 may be gone already
            self._store.set("failure", json.dumps([step, reason]))

    def _are_there(self, keys: list[str]) -> bool:
        try:
            self._store.wait(keys, timedelta(seconds=1.0))
        except dist.DistStoreError:
            return False
        return True


class _Alone(World):
    """A world of one process without a process group, for reading a run from outside."""

    def broadcast_object(self, value: Value) -> Value:
        return value

    def gather_objects(self, value: Value) -> list[Value]:
        return [value]

    def sum_(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def largest(self, values: Tensor) -> Tensor:
        return values.float()


ALONE = _Alone(0, 1, 0, 1, torch.device("cpu"))


def start_world(timeout_seconds: float = TIMEOUT_SECONDS) -> World:
    """Join the other processes, if any; sets the device and the default process group.

    Raises `UserError` for an incomplete environment, a GPU that does not exist and a name without an address,
    `MachineError` if ranks do not come in time.
    """
    place = read_environment(os.environ)
    os.environ.update(place)
    rank, size, local_rank, local_size = (
        int(place[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    device = claim_device(local_rank)
    if is_loopback(place["MASTER_ADDR"]) and os.path.exists("/sys/class/net/lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo's own choice is the address of the host's name
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=meet(place, timeout_seconds),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:
        address = f"{place['MASTER_ADDR']}:{place['MASTER_PORT']}"
        raise MachineError(  # a machine that died since the last start is more common than a wrong address
            f"rank {rank} did not meet all of its {size} processes at {address} within {timeout_seconds:.0f} s: "
            f"{str(error).splitlines()[0]}; check that every rank was started with this same address, and that "
            "MASTER_PORT is free on rank 0 and open between the machines"
        ) from error
    return World(rank, size, local_rank, local_size, device)


def limit_collectives(seconds: float) -> None:
    """Set the time limit of all process groups. DeepSpeed's groups have torch's default, half an hour on gloo.

    torch has no public function for it; `_set_pg_timeout` is private but documented.
    """
    if dist.is_initialized():
        for group in dist.distributed_c10d._world.pg_map:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def end_world() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def read_environment(environment: MutableMapping[str, str]) -> dict[str, str]:
    """The complete set of rank variables. Pure, except that it chooses a free port.

    With neither RANK nor WORLD_SIZE this process is alone, on a port of its own. mosaicml-streaming reads
    LOCAL_WORLD_SIZE, which the deepspeed launcher does not set: it is then LOCAL_SIZE, or else WORLD_SIZE.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        return {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        given = ", ".join(f"{name}={environment[name]}" for name in needed if environment.get(name))
        raise UserError(
            f"{given} is set in the environment, but {', '.join(missing)} is not; start with a launcher "
            "(bigmodel launch, torchrun, deepspeed), which sets all of them, or unset them to run one process"
        )
    place = {name: environment[name] for name in needed}
    place["LOCAL_WORLD_SIZE"] = (
        environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or place["WORLD_SIZE"]
    )
    _check_numbers(place)
    return place


def _check_numbers(place: dict[str, str]) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if not place[name].isdecimal():
            raise UserError(f"{name}={place[name]} in the environment must be a whole number")
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if int(place[rank]) >= int(place[size]):
            raise UserError(f"{rank}={place[rank]} in the environment must be below {size}={place[size]}")


def claim_device(local_rank: int) -> torch.device:
    """The GPU of this local rank, made current; the CPU if there is no GPU.

    A single visible GPU belongs to this rank, as under SLURM's --gpus-per-task. The consistency check finds two ranks
    on one device.
    """
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        return torch.device("cpu")
    if torch.cuda.device_count() == 1:
        local_rank = 0
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK={local_rank}, but this process can use only {torch.cuda.device_count()} GPU(s); "
            "start fewer processes per machine, or check CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
