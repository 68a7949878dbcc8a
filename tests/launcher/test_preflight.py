"""Preflight without a cluster: what is judged good and bad, who measures with whom, what is cleaned up.

That a slow link is named on real links is in test_hosts.py; health of GPUs is judged here from made-up reports only.
"""

import copy
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bigmodel.inspect.probe import STALE_SECONDS, network, probe, remove_stale_shared_memory, rounds
from bigmodel.launcher.cluster import CheckSettings, Expectations
from bigmodel.launcher.preflight import Runner, exclude, judge
from tests.support.launched import LAUNCHER
from tests.support.tiny_run import write_run

HOSTS = ["n1", "n2", "n3"]
FAST, SLOW = 5e9, 1e8


def reports(links: dict[tuple[int, int], float] | None = None) -> dict[str, dict[str, Any]]:
    """Three sound nodes. `links` maps (from, to) to bytes per second where it is not FAST."""
    speed = {(a, b): (links or {}).get((a, b), FAST) for a in range(3) for b in range(3) if a != b}
    gpu = {
        "driver_version": "570.1", "ecc.errors.uncorrected.volatile.total": "0", "retired_pages.pending": "No",
        "temperature.gpu": "40",
    }  # fmt: skip
    return {
        host: copy.deepcopy(
            {
                "python": "3.11.2",
                "devices": [{}] * 8,
                "gpu_health": [dict(gpu) for _ in range(8)],
                "versions": {"torch": "2.13.0"},
                "shared_memory_free_bytes": 10e9,
                "run": {"free_bytes": 10e9, "free_files": 5, "token": "t"},
                "data": {"fingerprint": "abc"},
                "matmul_tflops": 700.0,
                "network": {
                    "clock_skew_seconds": 0.01,
                    "links": {str(b): [speed[a, b], speed[b, a]] for b in range(3) if b != a},
                    "all_reduce_bytes_per_second": 4e9,
                },
            }
        )
        for a, host in enumerate(HOSTS)
    }


def bad(found: dict[str, dict[str, Any]], limits: CheckSettings | None = None) -> list[tuple[str, str, str]]:
    findings = judge(HOSTS, found, "t", 8, limits or CheckSettings())
    assert exclude(findings) == sorted({f.host for f in findings if f.host and not f.good})
    return [(f.host, f.matter, f.text) for f in findings if not f.good]


def test_sound_nodes_are_good_in_every_matter() -> None:
    assert bad(reports()) == []
    findings = judge(HOSTS, reports(), "t", 8, CheckSettings())
    matters = {"answer", "devices", "health", "versions", "memory", "disk", "clock", "data", "speed", "network"}
    assert all({f.matter for f in findings if f.host == host} == matters for host in HOSTS)


@pytest.mark.parametrize(
    ("path", "value", "matter", "words"),
    [
        (["devices"], [{}] * 7, "devices", "7 GPUs, gpus_per_node = 8"),
        (["gpu_health", 3, "ecc.errors.uncorrected.volatile.total"], "2", "health", "uncorrected ECC errors 2"),
        (["gpu_health", 0, "retired_pages.pending"], "Yes", "health", "pages to retire Yes"),
        (["gpu_health", 7], {"xid": "NVRM: Xid 79"}, "health", "the kernel reports NVRM: Xid 79"),
        (["gpu_health", 0, "driver_version"], "560.0", "versions", "driver 560.0, 570.1, most nodes have 570.1"),
        (["versions", "torch"], "2.11.0", "versions", "torch 2.11.0, most nodes have 2.13.0"),
        (["python"], "3.12.1", "versions", "python 3.12.1"),
        (["shared_memory_free_bytes"], 1e8, "memory", "100 MB free in /dev/shm, 500 MB needed"),
        (["run", "free_bytes"], 1e8, "disk", "100 MB free, 1 GB needed"),
        (["run", "token"], "", "disk", "the run directory is not the same folder as on the other nodes"),
        (["run"], {"error": "/runs: Read-only file system"}, "disk", "Read-only file system"),
        (["data"], {"fingerprint": "old"}, "data", "its prepared data differ from those of most nodes"),
        (["data"], {"error": "manifest.json: no such file"}, "data", "no such file"),
        (["matmul_tflops"], 300.0, "speed", "matrix product 300 TFLOP/s, expected 700"),
        (["network", "clock_skew_seconds"], -7.0, "clock", "-7.00 s against the first node"),
    ],
)
def test_each_fault_names_its_node(path: list[Any], value: object, matter: str, words: str) -> None:
    found = reports()
    place: Any = found["n2"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    [(host, said, text)] = bad(found)
    assert (host, said) == ("n2", matter)
    assert words in text


def test_a_node_without_a_report_is_named() -> None:
    found = reports()
    del found["n3"]
    for host in ("n1", "n2"):  # they waited for it
        found[host]["network"] = {"error": "rank 2 on n3 did not come"}
    assert [(host, matter) for host, matter, _ in bad(found)] == [("", "network")] * 2 + [("n3", "answer")]
    assert exclude(judge(HOSTS, found, "t", 8, CheckSettings())) == ["n3"]


@pytest.mark.parametrize("sends", [True, False])
def test_a_slow_node_is_told_from_its_peers(sends: bool) -> None:
    links = {(1, 0): SLOW, (1, 2): SLOW} if sends else {(0, 1): SLOW, (2, 1): SLOW}
    [(host, matter, text)] = bad(reports(links))
    assert (host, matter) == ("n2", "network")
    assert text == f"100 MB/s {'to' if sends else 'from'} its best peer, expected 5 GB/s"


def test_a_slow_link_between_good_nodes_is_nobody_s_fault() -> None:
    assert bad(reports({(0, 2): SLOW})) == [("", "network", "n1 to n3: 100 MB/s, expected 5 GB/s")]


def test_expectations_find_what_is_slow_everywhere() -> None:
    limits = CheckSettings(
        expect=Expectations(matmul_tflops=2000, link_gigabytes_per_second=40, all_reduce_gigabytes_per_second=100)
    )
    assert {(host, matter) for host, matter, _ in bad(reports(), limits)} == {
        (host, matter) for host in HOSTS for matter in ("speed", "network")
    }


@pytest.mark.parametrize("size", [2, 3, 4, 7, 16])
def test_every_pair_measures_once_and_no_two_at_the_same_node(size: int) -> None:
    met = []
    for partners in rounds(size):
        assert all(partners[other] == one for one, other in partners.items())
        met += [(one, other) for one, other in partners.items() if one < other]
    assert sorted(met) == [(one, other) for one in range(size) for other in range(one + 1, size)]


def test_many_nodes_measure_a_hypercube_of_links() -> None:
    found = rounds(100)
    assert len(found) == 7
    assert all(partners[other] == one for partners in found for one, other in partners.items())
    assert min(sum(node in partners for partners in found) for node in range(100)) >= 4


def test_only_what_dead_ranks_left_is_removed(tmp_path: Path) -> None:
    old = STALE_SECONDS + 60
    for name in ("nccl-aBc123", "000000_locals", "torch_12_34_0", "nccl-young", "someone_else", "nccl-open"):
        file = tmp_path / name
        file.write_text("x")
        if name != "nccl-young":
            about = file.stat()
            os.utime(file, (about.st_atime - old, about.st_mtime - old))
    with open(tmp_path / "nccl-open"):
        removed = remove_stale_shared_memory(tmp_path)
    assert removed == ["000000_locals", "nccl-aBc123", "torch_12_34_0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nccl-open", "nccl-young", "someone_else"]


def test_a_probe_without_a_run_file_says_what_the_machine_has() -> None:
    found = probe()
    assert found["memory_bytes"] > 1e8
    assert found["versions"]["torch"] != "not installed"
    assert found["devices"] == found["gpu_health"] == []
    assert "network" not in found


def test_a_node_that_never_comes_is_named_by_those_that_did(monkeypatch: pytest.MonkeyPatch) -> None:
    from bigmodel.launcher.network import free_port

    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in {**place, "LAUNCH_HOSTS": "n1*1,n7*1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("bigmodel.inspect.probe.MEET_SECONDS", 0.5)
    assert network() == {"error": "rank 1 on n7 did not come"}


def test_reports_are_told_by_name_whatever_order_the_nodes_have(tmp_path: Path) -> None:
    """SLURM counts n1, n2, n10 where we asked for n10, n2, n1."""
    nodes = ["n1", "n2", "n10"]
    answers = [f"PROBE {json.dumps({'node': name, 'nodes': nodes, 'speed': name})}" for name in ("n10", "n1")]
    runner = Runner(["n10", "n2", "n1"], [["printf", r"%s\n", "a word", *answers]], tmp_path)
    assert runner.reports() == {"n10": {"speed": "n10"}, "n1": {"speed": "n1"}}
    assert runner.hosts == nodes


def test_this_machine_is_checked_with_the_run_s_own_needs(tmp_path: Path, shards: Path) -> None:
    run_file = write_run(tmp_path, shards)
    cluster = tmp_path / "cluster.toml"
    cluster.write_text("[check]\nbefore_start = true\nfree_disk_gigabytes = 1e9\n")

    def launch(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([*LAUNCHER, *words], capture_output=True, text=True, timeout=120, check=False)

    answer = launch("check", str(run_file), "--json")
    assert answer.returncode == 0, answer.stderr
    result = json.loads(answer.stdout)
    assert result["exclude"] == []
    here = os.uname().nodename
    assert result["reports"][here]["data"]["fingerprint"]
    assert result["reports"][here]["matmul_tflops"] > 0
    refused = launch("local", str(run_file), "--cluster", str(cluster))
    assert refused.returncode == 2
    assert "nothing was started: check.before_start found bad nodes" in refused.stderr
    assert f"exclude: {here}" in refused.stdout
    assert not (tmp_path / "run" / "events.jsonl").exists()
