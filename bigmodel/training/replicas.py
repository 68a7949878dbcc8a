"""Replicas: whether ranks still hold the same bits where they must.

In: the engine, whose ranks hold weights alike (ZeRO 0: with moments and averages; ZeRO 1 and 2: the weights of the
forward pass, until the next update gathers them; ZeRO 3: those not partitioned; at any stage frozen weights below 3).
Experts that ranks share are left out: each rank holds others.
Out: a `Restart` on every rank if they differ, with the ranks, hosts and tensors in events.jsonl; exit code 5. The next
start goes on from the newest checkpoint, which was compared before it was saved.

The hash is the sum of a tensor's 64-bit words, modulo 2^64: one changed word always changes it, so every flipped bit
is found. Costs one pass over the memory, 6 ms for 25 million fp32 weights on one CPU core, and one all-reduce of an
integer per rank, every `training.replica_check_every_steps` steps.

Which rank is wrong:
- the majority is right;
- under ZeRO 1 and 2 each weight has one master: gathering them again restores the wrong copies, and only those;
- frozen weights never change: who differs from its own first hash is wrong; loads and biases of experts do change;
- otherwise, with two replicas, both are named.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bigmodel.distributed.world import World
from bigmodel.run_directory import EXIT_DEVICE, Restart, record_event
from bigmodel.sizes import counted_noun
from bigmodel.training.zero.engine import Engine

WORD_BYTES = 8
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SHOWN_TENSORS = 5
MASK = (1 << 64) - 1


class Replicas:
    """Call `check` in each step before the update, and `require` before a save; both are collective."""

    def __init__(self, engine: Engine, world: World, every_steps: int, directory: Path) -> None:
        """every_steps 0: off."""
        self._engine, self._world, self._directory = engine, world, directory
        self._every_steps = every_steps if world.size > 1 else 0
        self._agreed = 0  # the last step at which all were alike
        self._first: dict[str, int] = {}  # hashes of what never changes

    def check(self, done: int) -> None:
        """Compare the weights that step `done` used, if it is its turn. Raises `Restart`."""
        if self._every_steps and done % self._every_steps == 0:
            self.require(done)

    def require(self, done: int, whole_state: bool = False) -> None:
        """Raises `Restart` on every rank if the ranks differ."""
        if not self._every_steps:
            return
        hashes = self._hashes(whole_state)
        if not hashes:  # ZeRO 3 partitions everything
            return
        self._first = self._first or self._unchanging(hashes)
        if len(set(self._world.gather_integers(combined(list(hashes.values()))))) > 1:
            self._end(done, hashes)
        self._agreed = done

    def _hashes(self, whole_state: bool = False) -> dict[str, int]:
        named = dict(self._engine.alike(whole_state))
        sums = [hash_of(tensor).to(self._world.device) for tensor in named.values()]
        return dict(zip(named, torch.stack(sums).tolist() if sums else [], strict=True))

    def _unchanging(self, hashes: dict[str, int]) -> dict[str, int]:
        changing = {*self._engine.trained(), *self._engine.buffers}
        return {name: one for name, one in hashes.items() if name not in changing and " of " not in name}

    def _end(self, done: int, hashes: dict[str, int]) -> None:
        world = self._world
        told = world.gather_objects((os.uname().nodename, list(hashes.values())))
        tables = [table for _, table in told]
        changed = any(self._first[name] != hashes[name] for name in self._first)
        self._engine.publish()
        restored = any(after != hashes[name] for name, after in self._hashes().items())
        ranks, sure = suspects(tables, world.gather_integers(int(changed or restored)))
        tensors = [name for name, *column in zip(hashes, *tables, strict=True) if len(set(column)) > 1]
        detail = describe(done, ranks, [told[rank][0] for rank in ranks], sure, tensors)
        if world.rank == 0:
            record_event(
                self._directory,
                "bad_device",
                fault="replica",
                step=done,
                agreed_step=self._agreed,
                ranks=ranks,
                hosts=sorted({told[rank][0] for rank in ranks}) if sure else [],
                tensors=tensors[:SHOWN_TENSORS],
                detail=detail,
            )
        raise Restart(
            f"step {done}: {detail}; the same command goes on from the newest checkpoint, in which all ranks agreed"
            + ("" if sure else "; if it comes back, run `bigmodel launch check` on these hosts"),
            EXIT_DEVICE,
        )


def hash_of(tensor: Tensor) -> Tensor:
    """The sum of the 64-bit words of a tensor's memory, modulo 2^64: an integer of no dimension.

    Elements before and after the whole words are added as integers of their own size."""
    flat = tensor.detach().contiguous().view(-1)
    integers, each = flat.view(INTEGERS[flat.element_size()]), WORD_BYTES // flat.element_size()
    head = min(-integers.storage_offset() % each, integers.numel())
    words = (integers.numel() - head) // each
    body = integers[head : head + words * each]
    rest = torch.cat([integers[:head], integers[head + words * each :]])
    return (body.view(torch.int64).sum() if words else 0) + rest.sum(dtype=torch.int64)


def combined(hashes: Sequence[int]) -> int:
    """One signed 64-bit integer of many; a change of one hash always changes it."""
    total = sum((2 * place + 1) * one for place, one in enumerate(hashes)) & MASK
    return total - (1 << 64) if total >> 63 else total


def suspects(tables: Sequence[Sequence[int]], changed: Sequence[int]) -> tuple[list[int], bool]:
    """The ranks whose hashes are wrong, and whether that is sure. tables: the hashes of each rank. changed: whether a
    rank differs from its own earlier or restored bits.

    Example: three ranks with [1, 5], [1, 7] and [1, 5]: rank 1, sure. Two ranks with [1] and [2]: both, not sure.
    """
    found = [rank for rank, differs in enumerate(changed) if differs]
    if found and len(found) < len(tables):
        return found, True
    votes = Counter(map(tuple, tables)).most_common()
    if votes[0][1] * 2 > len(tables):
        return [rank for rank, table in enumerate(tables) if tuple(table) != votes[0][0]], True
    return list(range(len(tables))), False


def describe(step: int, ranks: Sequence[int], hosts: Sequence[str], sure: bool, tensors: Sequence[str]) -> str:
    """Which ranks hold other bits, in words."""
    named = [f"rank {rank} on {host}" for rank, host in zip(ranks, hosts, strict=True)]
    more = f" and {counted_noun(len(tensors) - 1, 'other tensor')}" if len(tensors) > 1 else ""
    if sure:
        return f"{', '.join(named)} holds other bits than the other ranks in {tensors[0]}{more}: bad memory or device"
    return f"{' or '.join(named)} holds wrong bits in {tensors[0]}{more}, and nothing tells which: bad memory or device"
