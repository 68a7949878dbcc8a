"""The page of a node: where it is published, and the exporter's life among ranks that die. Real processes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from bigmodel.config.settings import MetricsSettings, UserError
from bigmodel.launcher.network import free_port
from bigmodel.metrics.rank_record import RankRecord, folder_of, folders_of, read_record
from bigmodel.metrics.recorder import Metrics, Seat, new_start
from bigmodel.run_directory import read_json
from tests.metrics.test_recorder import page, record_all, samples, until

REPOSITORY = Path(__file__).parents[2]


def test_the_address_is_published_while_the_run_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    run = tmp_path / "tiny"
    run.mkdir()
    with Metrics(run, seat=Seat(rank=4, world_size=8, node=1, local_rank=0, local_size=4)):
        assert not (run / "metrics_endpoint").exists()  # that is node 0's
        ((target,),) = (read_json(tmp_path / "tiny.node-1.prometheus.json"),)
        labels = {"job": "bigmodel", "run": "tiny", "node": "1", "host": socket.gethostname(), "ranks": "4-7"}
        assert target["labels"] == {**labels, "slurm_job_id": "77"}
    with Metrics(run, start="leaves-nothing") as metrics:
        assert (run / "metrics_endpoint").read_text() == metrics.endpoint + "\n"
        ((target,),) = (read_json(tmp_path / "tiny.node-0.prometheus.json"),)
        assert target["targets"] == [metrics.endpoint]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["tiny", "tiny/metrics.jsonl"]
    assert not folders_of(run, node=0)
    with pytest.raises(urllib.error.URLError, match="refused"):
        page(metrics.endpoint)


def test_a_port_that_nobody_chose_is_the_same_at_every_start_where_it_is_free(tmp_path: Path) -> None:
    for name in ("run", "other"):
        (tmp_path / name).mkdir()
    with Metrics(tmp_path / "run") as metrics:
        first = metrics.endpoint
    with Metrics(tmp_path / "run") as metrics:
        assert metrics.endpoint == first
    with Metrics(tmp_path / "other") as metrics:
        assert metrics.endpoint != first
    with socket.socket() as taker:
        taker.bind(("127.0.0.1", int(first.rpartition(":")[2])))
        taker.listen()
        with Metrics(tmp_path / "run") as metrics:
            assert metrics.endpoint != first
            assert samples(metrics.endpoint)


def test_a_taken_port_is_named_with_the_remedy_and_nothing_is_lost(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        record_all(metrics)
    before = (tmp_path / "metrics.jsonl").read_text()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        RankRecord(folder_of(tmp_path, 0, "alone"), 1).write({})  # another rank of the node was quicker
        with pytest.raises(UserError, match=rf"metrics.port = {port}.*in use.*--set metrics.port=0"):
            Metrics(tmp_path, MetricsSettings(port=port))
        with Metrics(tmp_path, MetricsSettings(port=port), seat=Seat(1, 2, node=1)) as elsewhere:
            assert elsewhere.endpoint != f"127.0.0.1:{port}"  # several nodes on one machine: the next free one
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert not folders_of(tmp_path, node=0) + folders_of(tmp_path, node=1)
    with pytest.raises(UserError, match=r"metrics.host = 'no-such-host.invalid'"):
        Metrics(tmp_path, MetricsSettings(host="no-such-host.invalid"))


def test_an_endpoint_on_every_address_is_advertised_by_host_name(tmp_path: Path) -> None:
    with Metrics(tmp_path, MetricsSettings(host="0.0.0.0")) as metrics:
        assert metrics.endpoint.rpartition(":")[0] == socket.gethostname()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{metrics.endpoint.rpartition(':')[2]}/", timeout=30)


# ---- the exporter's life: real processes that die ---------------------------------------------------------------

RANK = """
import sys, time
from pathlib import Path
from bigmodel.config.settings import MetricsSettings
from bigmodel.metrics.recorder import Metrics, Seat
directory, rank, port, word = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
metrics = Metrics(directory, MetricsSettings(port=port), seat=Seat(rank, 2, 0, rank, 2), start=word)
print(metrics.endpoint, flush=True)
while True:
    metrics.record_checkpoint(1, written_bytes=0, seconds=0.0)
    time.sleep(0.05)
"""


def start_rank(directory: Path, rank: int, port: int = 0, word: str = "word") -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, str(directory), str(rank), str(port), word],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # as the launcher does, which ends a rank with all of its process group
    )
    assert process.stdout
    process.endpoint = process.stdout.readline().strip()  # type: ignore[attr-defined]
    return process


def exporters(endpoint: str) -> list[int]:
    port = int(endpoint.rpartition(":")[2])
    return [
        process.pid
        for process in psutil.process_iter(["cmdline", "status", "uids"])
        if "bigmodel.metrics.exporter" in (process.info["cmdline"] or ())
        and process.info["status"] != psutil.STATUS_ZOMBIE
        if process.info["uids"].real == os.getuid()  # others' connections may not be looked at
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    ]


@pytest.mark.parametrize("first", [0, 1])
def test_the_page_outlives_any_rank_and_nothing_outlives_the_last(tmp_path: Path, first: int) -> None:
    run = tmp_path / "run"
    run.mkdir()
    ranks = [start_rank(run, rank) for rank in (0, 1)]
    endpoint = ranks[0].endpoint
    try:
        until(lambda: samples(endpoint).get("rank_up|1") == 1, "both ranks on the page")
        os.killpg(ranks[first].pid, signal.SIGKILL)
        ranks[first].wait()
        found = samples(endpoint)
        assert (found[f"rank_up|{first}"], found[f"rank_up|{1 - first}"]) == (0, 1)
        assert found["steps_total"] == 0  # what rank 0 said last stays
        time.sleep(0.6)  # more than two of the exporter's looks
        dead, living = (f"rank_heartbeat_timestamp_seconds|{rank}" for rank in (first, 1 - first))
        until(lambda: samples(endpoint)[living] > found[living], "a heartbeat of the living rank")
        assert samples(endpoint)[dead] == found[dead]
        assert len(exporters(endpoint)) == 1
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    until(lambda: not exporters(endpoint), "the exporter to end")
    assert not list(tmp_path.rglob("*.prometheus.json")) + list(tmp_path.rglob("metrics_endpoint"))
    assert not folders_of(run, node=0)


def test_a_restart_takes_a_fixed_port_over_and_an_ended_exporter_is_started_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    port = free_port()
    killed = start_rank(run, 0, port, "one")
    until(lambda: samples(killed.endpoint), "the page")
    (stuck,) = exporters(killed.endpoint)
    os.kill(stuck, signal.SIGSTOP)  # it keeps the port for as long as it is let
    killed.kill()
    killed.wait()
    again = start_rank(run, 0, port, "two")
    try:
        assert psutil.pid_exists(stuck) is False or psutil.Process(stuck).status() == psutil.STATUS_ZOMBIE
        assert again.endpoint == f"127.0.0.1:{port}"
        assert samples(again.endpoint)["restarts_total|died"] == 1
        (exporter,) = exporters(again.endpoint)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # as SLURM sends to all of a job: ranks save
            os.kill(exporter, number)
        time.sleep(0.6)  # two rounds of its loop
        assert exporters(again.endpoint) == [exporter]
        os.kill(exporter, signal.SIGKILL)
        assert samples(again.endpoint)["restarts_total|died"] == 1  # asked while there is none: answered by the next
        assert exporters(again.endpoint) != [exporter]
        assert again.poll() is None
    finally:
        again.kill()
        again.wait()
        with contextlib.suppress(ProcessLookupError):
            os.kill(stuck, signal.SIGKILL)
    until(lambda: not exporters(again.endpoint), "the exporter to end")


def test_what_a_step_left_that_was_killed_with_its_exporter_goes_with_the_next_start(tmp_path: Path) -> None:
    """As SLURM does where it kills a step by its cgroup: nobody is left to withdraw the address."""
    run = tmp_path / "run"
    run.mkdir()
    published = [run / "metrics_endpoint", tmp_path / "run.node-0.prometheus.json"]
    killed = start_rank(run, 0, word="one")
    until(lambda: samples(killed.endpoint), "the page")
    step = [killed.pid, *exporters(killed.endpoint)]
    assert len(step) == 2
    for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, so that neither sees the other's end
        for process in step:
            os.kill(process, number)
    killed.wait()
    assert all(path.exists() for path in published)
    (folder,) = folders_of(run, node=0)
    new_start(run)  # before the next start has its own address
    assert not any(path.exists() for path in published)
    again = start_rank(run, 0, word="two")
    try:
        assert not folder.exists()
        assert read_json(published[1])[0]["targets"] == [again.endpoint]
        assert samples(again.endpoint)["restarts_total|died"] == 1
    finally:
        again.kill()
        again.wait()
    until(lambda: not exporters(again.endpoint), "the exporter to end")
    assert not any(path.exists() for path in published)


def test_a_record_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "rank-3"
    assert read_record(path) is None
    record = RankRecord(tmp_path, 3)
    record.write({"samples": {"a": [[["x"], 1]]}})
    read = read_record(path)
    assert read is not None
    assert (read["rank"], read["pid"], read["samples"]) == (3, os.getpid(), {"a": [[["x"], 1]]})
    record.write({"samples": {}})  # shorter: what is left behind it is not read
    assert (read_record(path) or {})["samples"] == {}
    whole = path.read_bytes()
    for place in range(8, len(whole) // 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert read_record(path) is None
    path.write_bytes(whole[:5])
    assert read_record(path) is None


def test_a_start_withdraws_what_killed_exporters_left_also_of_nodes_it_has_no_more(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    left = [run / "metrics_endpoint", *(tmp_path / f"run.node-{node}.prometheus.json" for node in (0, 7))]
    others = [tmp_path / "run2.node-0.prometheus.json", tmp_path / "run.toml"]
    for path in (*left, *others):
        path.write_text("127.0.0.1:1")
    assert new_start(run) != new_start(run)
    assert [path.exists() for path in left] == [False] * 3
    assert all(path.exists() for path in others)
