"""Ranks that are not the same program on the same data do not train together, and who is missing or odd is named."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest

from bigmodel.distributed.consistency import disagreement
from bigmodel.distributed.rendezvous import name_rank
from bigmodel.run_directory import read_json
from tests.support.ranks import command, finish, run_ranks, start_ranks
from tests.support.tiny_corpus import prepared
from tests.support.tiny_run import write_run

IDENTITY = {
    "host": "vm",
    "device": "cuda",
    "commit": "c0ffee",
    "source code": "5ac1",
    "settings": "5e77",
    "data": "da7a",
    "versions": {"python": "3.11.2", "torch": "2.13.0", "NCCL": "2.27"},
}


def identities(size: int = 4) -> list[dict[str, Any]]:
    return [{**copy.deepcopy(IDENTITY), "device_id": f"H100 GPU-{rank}"} for rank in range(size)]


@pytest.fixture
def two_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCH_HOSTS", "n1*2,n2*2")


def test_ranks_that_agree_may_train() -> None:
    assert disagreement(identities()) == ""


@pytest.mark.parametrize("matter", ["commit", "source code", "settings", "data", "device"])
@pytest.mark.usefixtures("two_hosts")
def test_each_matter_names_the_odd_ranks_and_their_node(matter: str) -> None:
    found = identities()
    found[3][matter] = "odd"
    said = disagreement(found)
    assert f"nodes differ in {matter}: {IDENTITY[matter]} on most ranks, but odd for rank 3 on n2; " in said


@pytest.mark.usefixtures("two_hosts")
def test_another_version_or_a_missing_library_is_named() -> None:
    found = identities()
    found[2]["versions"]["torch"] = "2.11.0"
    assert "the version of torch: 2.13.0 on most ranks, but 2.11.0 for rank 2 on n2" in disagreement(found)
    found = identities()
    del found[0]["versions"]["NCCL"]
    assert "the version of NCCL" in disagreement(found)


@pytest.mark.usefixtures("two_hosts")
def test_two_ranks_on_one_device_are_named() -> None:
    found = identities()
    found[1]["device_id"] = found[0]["device_id"]
    assert disagreement(found) == "rank 0 on n1 and rank 1 on n1 use one device, H100 GPU-0; start one rank per GPU"


def test_a_rank_is_named_by_what_is_known(two_hosts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name_rank(2) == "rank 2 on n2"
    monkeypatch.delenv("LAUNCH_HOSTS")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert name_rank(5) == "rank 5 on node 2"


# ---- with real ranks


def train_in_folder(run_file: str, folders: list[str], output: Path) -> int:
    """Every rank in a folder of its own, where the same relative path has other data: as a stale copy on a node."""
    os.environ["LAUNCH_HOSTS"] = "n1*1,n7*1"
    os.chdir(folders[int(os.environ["RANK"])])
    return command(["train", run_file, "--set", "data.directory=data"], output)


def train_with_other_settings(run_file: str, output: Path) -> int:
    os.environ["LAUNCH_HOSTS"] = "n1*1,n7*1"
    more = ["--set", "training.z_loss=0.1"] if os.environ["RANK"] == "1" else []
    return command(["train", run_file, *more], output)


def train_without(run_file: str, output: Path) -> int:
    """Rank 1 never comes."""
    if os.environ["RANK"] == "1":
        return 0
    os.environ["LAUNCH_HOSTS"] = "n1*1,n7*1"
    return command(["train", run_file, "--set", "training.collective_timeout_seconds=1"], output)


def test_a_node_with_stale_data_stops_the_run_before_a_step(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "stale").mkdir()
    stale = prepared(tmp_path / "stale", shard_tokens=1200)
    assert stale.name == shards.name == "data"
    folders = [str(shards.parent), str(stale.parent)]
    ranks = start_ranks(2, train_in_folder, str(write_run(tmp_path, shards)), folders, tmp_path / "printed")
    assert finish(ranks) == [2, 2]
    assert_refused(tmp_path, "data")


def test_a_rank_with_other_settings_stops_the_run_before_a_step(tmp_path: Path, shards: Path) -> None:
    ranks = start_ranks(2, train_with_other_settings, str(write_run(tmp_path, shards)), tmp_path / "printed")
    assert finish(ranks) == [2, 2]
    assert_refused(tmp_path, "settings")


def assert_refused(folder: Path, matter: str) -> None:
    for rank in range(2):
        printed = Path(f"{folder}/printed.{rank}").read_text()
        assert f"nodes differ in {matter}: " in printed
        assert "on most ranks, but " in printed
        assert "for rank 1 on n7; " in printed
        assert "Traceback" not in printed
    assert not (folder / "run" / "metrics.jsonl").exists()


def test_a_rank_that_never_came_is_named_with_its_node(tmp_path: Path, shards: Path) -> None:
    run_file = write_run(tmp_path, shards)
    ranks = start_ranks(2, train_without, str(run_file), tmp_path / "printed", ranks_per_node=1)
    assert finish(ranks)[1] == 0
    assert "did not meet all of its 2 processes" in (text := Path(f"{tmp_path}/printed.0").read_text())
    assert "rank 1 on n7 did not come" in text


def test_what_all_share_is_left_in_the_run_directory(tmp_path: Path, shards: Path) -> None:
    run_file = write_run(tmp_path, shards)
    run_ranks(2, command, ["train", str(run_file), "--set", "training.steps=2"], tmp_path / "printed")
    world = read_json(tmp_path / "run" / "world.json")
    assert [rank["device"] for rank in world["ranks"]] == ["cpu", "cpu"]
    assert world["shared"]["versions"]["torch"]
    assert len(world["shared"]["source code"]) == 16
