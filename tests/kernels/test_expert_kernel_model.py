"""The ceilings of the kernels of experts: their counts by hand, at shapes small enough for it."""

import pytest

from tools.expert_kernel_model import LAYERS, Gpu, Layer, Tile, loads, moves, product, weight_gradient

ON = Gpu(sms=2, capability=90, peak_flops=1e6, bytes_per_second=1e3)
TILE = Tile(rows=4, columns=8, step=2)


def test_a_part_filled_tile_costs_a_whole_one_and_an_expert_without_rows_nothing() -> None:
    count = product([5, 0, 1], inner=6, outer=8, tile=TILE, on=ON)
    assert count.useful_flops == 2 * 6 * 6 * 8
    assert count.computed_flops == 3 * (2 * 4 * 8 * 6)  # two tiles of expert 0, one of expert 2
    assert count.memory_bytes == 2 * (6 * (6 + 8) + 2 * 6 * 8)  # rows in and out, two matrices
    assert count.tile_bytes == 3 * 2 * (4 + 8) * 6
    assert count.tensor_seconds == pytest.approx(2 * (2 * 4 * 8 * 6) / 0.5e6)  # 3 programs on 2 SMs: 2 rounds
    assert count.memory_seconds == pytest.approx(count.memory_bytes / 1e3)


def test_a_gradient_fills_up_steps_of_rows_and_waits_for_its_longest_program() -> None:
    count = weight_gradient([5, 0, 1], inner=8, outer=4, tile=TILE, on=ON)
    assert count.useful_flops == 2 * 6 * 8 * 4
    assert count.computed_flops == 2 * 4 * 8 * (6 + 2)
    assert count.memory_bytes == 2 * (6 * (8 + 4) + 3 * 8 * 4)  # expert 1 writes zeros
    assert count.tensor_seconds == pytest.approx(2 * 4 * 8 * 6 / 0.5e6)  # that of expert 0, more than the mean


@pytest.mark.parametrize("kind", ["equal", "drawn", "uneven"])
def test_a_load_has_every_row_once(kind: str) -> None:
    assert sum(loads(kind, 1_003, 8)) == 1_003


def test_loads_are_equal_alike_by_chance_or_up_to_twice_the_mean() -> None:
    assert loads("equal", 64, 4) == [16, 16, 16, 16]
    assert loads("uneven", 64, 4) == [4, 12, 20, 28]
    assert len(set(loads("drawn", 6_400, 64))) > 10


def test_rows_that_move_are_read_and_written_once() -> None:
    moved = moves(Layer(hidden=16, width=1, experts=4, choices=2), tokens=3)
    assert moved["permute"] == (0, 2 * 16 * (3 + 6) + 8 * 6)
    assert moved["unpermute backward"][1] == 2 * 16 * (3 + 6 + 6) + 16 * 6
    assert LAYERS["Mixtral 8x7B"].experts == 8
