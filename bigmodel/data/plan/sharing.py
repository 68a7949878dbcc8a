"""Sharing: which rank computes which packs of a step, and in which micro-batch.

In: a step's packs in canonical order, a rank's place in the world. Out: the packs of each rank and micro-batch.
Nodes take contiguous shares of the step, so a node reads only the shards of its own lanes. Within a node, packs are
dealt so that attention work (the sum over documents of length squared) is even over the micro-batches that run at the
same time. Example: 2 ranks of one node, one pack per micro-batch, work 9, 1, 4, 8: rank 0 computes packs 0 and 1, rank
1 packs 3 and 2; in the first round 9 runs beside 8, in the second 1 beside 4.

Guarantees: a pure function, the same on every rank; each pack of a step has exactly one slot; every rank has the same
number of micro-batches of the same size, filled up with padding. A pack's number in the step, its bytes and its dropout
seeds do not depend on the rank. Costs a microsecond a pack and slot.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from bigmodel.data.plan.planned import PackTable

Slots = list[list[list[int]]]  # [rank in the node][micro-batch] -> indices into the node's packs, ascending


@dataclass(frozen=True, slots=True)
class Place:
    """One rank among `world_size`; a node is `node_size` consecutive ranks."""

    rank: int
    world_size: int
    node_size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, f"rank {self.rank} is not one of {self.world_size} ranks"
        assert self.world_size % self.node_size == 0, f"{self.world_size} ranks do not make nodes of {self.node_size}"

    @classmethod
    def of_rank(cls, rank: int, world_size: int, ranks_per_node: int, sharing: int) -> "Place":
        """The place of a rank when `sharing` consecutive ranks get the same packs and so count as one. If they do not
        lie within one machine, each such group is a node."""
        whole = ranks_per_node % sharing == 0
        return cls(rank // sharing, world_size // sharing, ranks_per_node // sharing if whole else 1)

    @property
    def node(self) -> int:
        return self.rank // self.node_size

    @property
    def num_nodes(self) -> int:
        return self.world_size // self.node_size

    @property
    def rank_in_node(self) -> int:
        return self.rank % self.node_size

    def share(self, global_batch_size: int) -> range:
        """The pack numbers of this rank's node: contiguous; nodes differ by one pack at most."""
        first, end = (global_batch_size * node // self.num_nodes for node in (self.node, self.node + 1))
        return range(first, end)

    def lanes(self, num_lanes: int) -> range:
        """The lanes of the node's packs, for any number of packs per step."""
        return range(num_lanes * self.node // self.num_nodes, -(-num_lanes * (self.node + 1) // self.num_nodes))


def attention_work(packs: PackTable) -> list[int]:
    """Attention cost of each pack, up to a constant factor: the sum over documents of length squared.

    With two sides: source x source, target x target and target x source.
    """
    tokens, sources = packs.num_tokens(), packs.source_positions()
    work: list[int] = packs.by_pack(tokens**2 + sources * (sources + tokens)).tolist()
    return work


def deal_contiguously(num_packs: int, num_ranks: int, num_rounds: int, size: int) -> Slots:
    """Packs in canonical order: rank 0's micro-batches, then rank 1's, and so on; ceil(packs / ranks) per rank."""
    each = -(-num_packs // num_ranks)
    assert each <= num_rounds * size, f"{num_packs} packs over {num_ranks} ranks, {num_rounds} times {size}"
    shares = [range(min(rank * each, num_packs), min((rank + 1) * each, num_packs)) for rank in range(num_ranks)]
    return [[list(share[first : first + size]) for first in range(0, num_rounds * size, size)] for share in shares]


def deal_evenly(work: Sequence[int], num_ranks: int, num_rounds: int, size: int) -> Slots:
    """Deal packs of this `work` to num_ranks * num_rounds micro-batches of at most `size` packs.

    Heaviest pack first, each to the micro-batch with the least work that has room. Then micro-batches of similar work
    run in the same round; in each round the heaviest goes to the rank with the least work so far.
    """
    assert len(work) <= num_ranks * num_rounds * size, f"{len(work)} packs for {num_ranks} x {num_rounds} x {size}"
    slots: list[list[int]] = [[] for _ in range(num_ranks * num_rounds)]
    loads = [0] * len(slots)
    lightest = [(0, number) for number in range(len(slots))]
    for pack in sorted(range(len(work)), key=lambda pack: (-work[pack], pack)):
        load, number = heapq.heappop(lightest)
        slots[number].append(pack)
        loads[number] = load + work[pack]
        if len(slots[number]) < size:
            heapq.heappush(lightest, (loads[number], number))
    heaviest_first = sorted(range(len(slots)), key=lambda number: -loads[number])
    ranks: Slots = [[] for _ in range(num_ranks)]
    totals = [0] * num_ranks
    for first in range(0, len(slots), num_ranks):
        least_first = sorted(range(num_ranks), key=totals.__getitem__)
        for rank, number in zip(least_first, heaviest_first[first : first + num_ranks], strict=True):
            ranks[rank].append(sorted(slots[number]))
            totals[rank] += loads[number]
    return ranks


def imbalance(work: Sequence[int], slots: Slots) -> float:
    """Attention time over that of perfectly even work, when ranks wait for each other every round.

    1 is perfect; 1 where there is no work.
    """
    rounds = zip(*([_sum(work, slot) for slot in rank] for rank in slots), strict=True)
    return sum(max(loads) for loads in rounds) * len(slots) / (sum(work) or 1) if any(work) else 1.0


def _sum(work: Sequence[int], slot: Sequence[int]) -> int:
    return sum(work[pack] for pack in slot)
