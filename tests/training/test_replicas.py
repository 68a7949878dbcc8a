"""The hash of what ranks hold alike, and who is wrong where hashes differ."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bigmodel.run_directory import Restart
from bigmodel.training.replicas import Replicas, combined, hash_of, suspects


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
@pytest.mark.parametrize(("first", "numel"), [(0, 16), (1, 11), (3, 4), (5, 1)])
def test_every_flipped_bit_changes_the_hash(dtype: torch.dtype, first: int, numel: int) -> None:
    """Also of elements beside the 64-bit words, wherever a tensor begins in its memory."""
    memory = torch.randn(80, generator=torch.Generator().manual_seed(1)).to(dtype)
    tensor = memory[first : first + numel]
    before, raw = int(hash_of(tensor)), memory.view(torch.uint8)
    size = tensor.element_size()
    for place in range(first * size, (first + numel) * size):
        for bit in range(8) if dtype != torch.bool else (0,):
            raw[place] ^= 1 << bit
            assert int(hash_of(tensor)) != before, (place, bit)
            raw[place] ^= 1 << bit
    assert int(hash_of(tensor)) == before


def test_a_change_in_one_tensor_changes_the_combined_hash() -> None:
    hashes = [3, -5, 1 << 62, -(1 << 63)]
    assert combined(hashes) != combined([3, -5, 1 << 62, -(1 << 63) + 1])
    assert combined(hashes) != combined([-5, 3, 1 << 62, -(1 << 63)])
    assert -(1 << 63) <= combined(hashes) < 1 << 63


@pytest.mark.parametrize(
    ("tables", "changed", "ranks", "sure"),
    [
        ([[1, 5], [1, 7], [1, 5]], [0, 0, 0], [1], True),
        ([[1], [2]], [0, 0], [0, 1], False),
        ([[1], [2]], [1, 0], [0], True),  # rank 0's own bits changed
        ([[1], [2], [3], [3]], [0, 0, 0, 0], [0, 1, 2, 3], False),  # no majority
        ([[1], [2], [3], [3], [3]], [0, 0, 0, 0, 0], [0, 1], True),
        ([[1], [2], [1]], [1, 1, 1], [1], True),  # what all ranks see of themselves tells nothing
    ],
)
def test_the_wrong_rank_follows_from_what_changed_or_from_the_majority(tables, changed, ranks, sure) -> None:
    assert suspects(tables, changed) == (ranks, sure)


class OfTwo:
    """The engine and the world of rank 0 of two. Rank 1 has other bits in the weight, and saw its own ones restored."""

    size, rank, device = 2, 0, torch.device("cpu")

    def __init__(self) -> None:
        self.weight, self.buffers, self.differs = torch.ones(4), {"load": torch.zeros(4)}, False

    def alike(self, whole_state: bool = False) -> list[tuple[str, Tensor]]:
        return [("weight", self.weight), *self.buffers.items()]

    def trained(self) -> list[str]:
        return ["weight"]

    def publish(self) -> None:
        """Rank 0's weight is right."""

    def gather_integers(self, mine: int) -> list[int]:
        return [mine, mine if not self.differs else mine + 1 if abs(mine) > 1 else 1]

    def gather_objects(self, mine: Any) -> list[Any]:
        host, (weight, load) = mine
        return [mine, (host, [weight + 1, load])]


def test_loads_of_experts_that_moved_do_not_hide_the_wrong_rank(tmp_path: Path) -> None:
    ranks: Any = OfTwo()
    replicas = Replicas(ranks, ranks, 1, tmp_path)
    replicas.check(1)
    ranks.buffers["load"].fill_(0.5)
    replicas.check(2)
    ranks.differs = True
    with pytest.raises(Restart, match=r"rank 1 on .* holds other bits than the other ranks in weight: bad memory"):
        replicas.check(3)
