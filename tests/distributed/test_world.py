"""The world: what the environment means, and what ranks tell one another."""

import ast
import math
import os
import time
from pathlib import Path

import pytest
import torch

from bigmodel.config.settings import UserError
from bigmodel.config.user_error import MachineError
from bigmodel.distributed import world as distributed
from bigmodel.distributed.world import NodeSums, end_world, read_environment, start_world
from tests.support.ranks import run_ranks

GIVEN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}


def test_without_an_environment_the_process_is_alone_on_a_free_port() -> None:
    place = read_environment({"MASTER_ADDR": "elsewhere"})
    port = place.pop("MASTER_PORT")
    assert place == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
    }
    assert 1024 <= int(port) <= 65535


@pytest.mark.parametrize(
    ("more", "expected"),
    [({"LOCAL_WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, "4"), ({"LOCAL_SIZE": "2"}, "2"), ({}, "8")],
)
def test_the_local_world_size_is_derived_where_a_launcher_leaves_it_out(more: dict[str, str], expected: str) -> None:
    assert read_environment(GIVEN | more)["LOCAL_WORLD_SIZE"] == expected


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_half_set_environment_names_what_is_missing(name: str) -> None:
    with pytest.raises(UserError, match=rf"RANK=3.*but {name} is not.*launcher"):
        read_environment({key: value for key, value in GIVEN.items() if key != name})


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"RANK": "8"}, "RANK=8 in the environment must be below WORLD_SIZE=8"),
        ({"LOCAL_RANK": "2", "LOCAL_SIZE": "2"}, "LOCAL_RANK=2 .* below LOCAL_WORLD_SIZE=2"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http in the environment must be a whole number"),
    ],
)
def test_numbers_that_cannot_be_are_named(wrong: dict[str, str], text: str) -> None:
    with pytest.raises(UserError, match=text):
        read_environment(GIVEN | wrong)


def test_a_missing_peer_is_a_clear_error_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    port = read_environment({})["MASTER_PORT"]
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(
        MachineError, match=rf"rank 0 did not meet all of its 2 processes at 127\.0\.0\.1:{port} within 2 s"
    ):
        start_world(timeout_seconds=2)
    end_world()


@pytest.mark.parametrize(
    ("host", "complaint"),
    [
        ("127.0.0.1", "rank 1 did not meet all of its 2 processes at .*: nobody listens there .Connection refused."),
        ("nowhere.invalid", "MASTER_ADDR=nowhere.invalid: this name of rank 0 has no address on .*; set main_address"),
    ],
)
def test_a_rank_waits_for_rank_0_without_warnings_of_torch(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], host: str, complaint: str
) -> None:
    port = read_environment({})["MASTER_PORT"]
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": port}
    for name, value in {**place, "MASTER_ADDR": host}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=complaint):
        start_world(timeout_seconds=0.2)
    said = capfd.readouterr().err
    assert "c10d" not in said
    assert ("MASTER_ADDR=nowhere.invalid has no address on" in said) == (host == "nowhere.invalid")


def listening() -> list[str]:
    """Addresses on which this process listens, from the kernel's tables: hexadecimal."""
    mine = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists() or link.is_symlink()}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine]


def exchange(folder: Path) -> None:
    world = start_world(timeout_seconds=30)
    assert set(listening()) == {"0100007F"}, "127.0.0.1 alone: the store on rank 0, gloo on both"
    assert world.broadcast_object(f"from {world.rank}") == "from 0"
    assert world.gather_objects(world.rank * 10) == [0, 10]
    assert world.sum_([2.0**50 + world.rank, 0.5]) == [2.0**51 + 1, 1.0], "in fp64"
    assert world.any_true(world.rank == 1)
    assert not world.any_true(False)
    assert world.on_rank_zero(lambda: world.rank) == 0
    with pytest.raises(UserError, match="only rank 0 ran this"):
        world.on_rank_zero(lambda: (_ for _ in ()).throw(UserError("only rank 0 ran this")))
    world.barrier()
    (folder / f"done-{world.rank}").touch()
    end_world()


def test_ranks_agree_and_share_errors(tmp_path: Path) -> None:
    run_ranks(2, exchange, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done-0", "done-1"]


def add_up_awkward_numbers(folder: Path) -> None:
    """Four gloo ranks: each value on each rank and at each place of the vector."""
    world = start_world(timeout_seconds=30)
    for bad in (math.nan, math.inf, -math.inf):
        for rank in range(4):
            for place in range(5):
                mine = [bad if rank == world.rank and at == place else 1.0 for at in range(5)]
                found = world.sum_(mine)
                assert [math.isfinite(value) for value in found] == [at != place for at in range(5)]
    assert math.isnan(world.sum_([math.inf if world.rank == 1 else -math.inf if world.rank == 3 else 0.0])[0])
    for rank in range(4):
        assert world.any_true(world.rank == rank)
    parts = [2.0**53 - 3, 1.0, 1.0, 1.0]  # counts: exact below 2^53, in any order
    for shift in range(4):
        assert world.sum_([parts[(world.rank + shift) % 4]] * 7) == [2.0**53] * 7
    values = [math.sin(100.0 * world.rank + place) * 10.0 ** (place % 9) for place in range(999)]
    sums, told = world.sum_(values), world.gather_objects(values)
    assert world.gather_objects(sums) == [sums] * 4, "equal on all ranks, to the last bit"
    for total, column in zip(sums, zip(*told, strict=True), strict=True):
        assert abs(total - math.fsum(column)) <= 4 * 2.0**-53 * sum(map(abs, column))
    (folder / f"done-{world.rank}").touch()
    end_world()


def test_no_sum_rests_on_the_order_of_ranks_and_none_loses_a_number_that_is_not_finite(tmp_path: Path) -> None:
    """gloo adds in an order that depends on the place in the vector, and its MAX may lose a NaN."""
    run_ranks(4, add_up_awkward_numbers, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


ARITHMETIC = {  # every reduction of ours; all others only move bytes
    "bigmodel/distributed/world.py": [
        "all_reduce",  # World.sum_, fp64
        "all_reduce",  # World.largest: fp32, each on one rank and 0 on the others: exact
        "all_reduce",  # World.gather_integers: int64, each on one rank and 0 on the others: exact
    ],
    "bigmodel/training/zero/engine.py": [
        "all_reduce",  # bits as int32, each on one rank and 0 on the others: exact
        "all_reduce",  # Adafactor's sums of squares, fp32: equal on all ranks, equal to rounding at another world size
    ],
    "bigmodel/inspect/probe.py": ["all_reduce"] * 3,  # a barrier, and measured zeros
}


def test_every_reduction_of_ours_is_a_sum_whose_order_is_accounted_for() -> None:
    root = Path(distributed.__file__).parents[2]
    found: dict[str, list[str]] = {}
    for path in sorted((root / "bigmodel").rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for call in (node for node in nodes if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            if name.startswith(("dist.all_reduce", "dist.reduce")):
                plain = len(call.args) == 1 and not any(keyword.arg == "op" for keyword in call.keywords)
                assert plain, f"{path}: {ast.unparse(call)} is no plain sum"
                found.setdefault(path.relative_to(root).as_posix(), []).append(name.removeprefix("dist."))
    assert found == ARITHMETIC


def add_up_over_nodes(folder: Path) -> None:
    """Three nodes of two ranks; node 2 fails at step 4, and node 0 never comes to step 3."""
    world = start_world(timeout_seconds=30)
    assert world.ranks_per_node() == 2
    node, ranks_in_node = divmod(world.rank, 2)
    sums = NodeSums(world, node, 3, speaks=ranks_in_node == 0)
    never = lambda: False  # noqa: E731
    for step in (0, 1, 2):
        assert sums.add_up(step, [step, 10**node], never) == [3 * step, 111]
    if node == 2:
        sums.fail(4, "a shard is damaged")
    world.barrier()
    if node > 0:
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="step 3: not all 3 nodes"):
            sums.add_up(3, [1, 1], lambda: time.monotonic() > began + 0.5)
    if node == 0:
        with pytest.raises(UserError, match="a shard is damaged"):
            sums.add_up(4, [1, 1], never)
    world.barrier()
    (folder / f"done-{world.rank}").touch()
    end_world()


def test_nodes_add_up_without_waiting_for_ever(tmp_path: Path) -> None:
    run_ranks(6, add_up_over_nodes, tmp_path, ranks_per_node=2)
    assert len(list(tmp_path.iterdir())) == 6


def count_ranks_per_node(folder: Path) -> None:
    os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) // 2)  # dealt round, not in blocks
    world = start_world(timeout_seconds=30)
    assert world.ranks_per_node() == 1
    (folder / f"done-{world.rank}").touch()
    end_world()


def test_ranks_that_are_not_consecutive_are_nodes_of_their_own(tmp_path: Path) -> None:
    run_ranks(4, count_ranks_per_node, tmp_path, ranks_per_node=2)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(8, 3, 3), (1, 3, 0), (2, 2, None)])
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_it_sees(
    monkeypatch: pytest.MonkeyPatch, visible: int, local_rank: int, index: int | None
) -> None:
    """No GPU here: torch's answers about them are given by hand."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    if index is None:
        with pytest.raises(UserError, match="LOCAL_RANK=2, but this process can use only 2"):
            distributed.claim_device(local_rank)
    else:
        assert distributed.claim_device(local_rank) == torch.device("cuda", index)
        assert current == [index]
