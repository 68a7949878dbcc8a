"""The hash of what ranks hold alike, and who is wrong where hashes differ."""

import pytest
import torch

from bigmodel.training.replicas import combined, hash_of, suspects


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
