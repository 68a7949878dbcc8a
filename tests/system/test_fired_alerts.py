"""Each alert is fired by a real fault in a real run, arrives through a real Alertmanager with the right rank or node,
and is resolved when the fault is over.

Four ranks on two simulated nodes; the run directory is a small file system of its own. The rules are those of
configs/prometheus/rules.yml with all their times divided (tests/support/alert_rules.py). One run serves all faults but
restarts, which have the same run again.
"""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

from bigmodel.run_directory import read_json, read_json_lines
from tests.metrics.test_endpoint import exporters
from tests.metrics.test_recorder import until
from tests.support.alert_rules import write_shortened
from tests.support.faulty import Fault, train
from tests.support.prometheus import ALERTMANAGER, PROMETHEUS, Alertmanager, Prometheus
from tests.support.ranks import kill, start_ranks
from tests.support.tiny_run import write_run

DIVISORS = {
    "BigmodelTargetDown": 120,  # for 1 s
    "BigmodelRunGone": 100,  # for 3 s, forgotten after 36 s
    "BigmodelStalled": 120,  # 2.5 s, for 0.5 s
    "BigmodelRankHangs": 60,
    "BigmodelRankDown": 60,
    "BigmodelRestartLoop": 90,  # in 40 s
    "BigmodelGoodputLow": 240,  # over 15 s, for 7.5 s
    "BigmodelStraggler": 100,  # over 3 s, for 3 s
    "BigmodelWaitsForData": 40,  # in 15 s, for 15 s
    "BigmodelLossNotFinite": 120,  # in 5 s
    "BigmodelLossSpikes": 360,  # in 5 s
    "BigmodelCheckpointOld": 1000,  # 10.8 s
    "BigmodelCheckpointFailed": 720,  # in 5 s
    "BigmodelDiskFull": 240,  # in 60 s, from 15 s, for 2.5 s
}
MEGABYTE = 1 << 20


class Fleet:
    """The run, its ranks, and those who watch them."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        self.run_file = write_run(folder, shards)
        text = self.run_file.read_text().replace("every_steps = 4", "every_steps = 50\non_failure = 'continue'")
        self.run_file.write_text(text.replace("steps = 10\n", "steps = 100000\nhang_seconds = 0\n"))
        write_shortened(folder / "rules.yml", DIVISORS)
        self.alertmanager = Alertmanager(folder)
        self.prometheus = Prometheus(folder, folder / "rules.yml", "250ms", self.alertmanager.port)
        self.ranks: list[BaseProcess] = []

    def start(self, world_size: int = 4) -> None:
        """Start, and wait for the addresses."""
        kill(self.ranks)
        arguments = ["train", str(self.run_file)]
        told = {"spoilt_in": "spoilt", "loud_in": "loud", "slow_in": "slow"}
        fault = Fault(**{kind: self.folder / name for kind, name in told.items()})
        self.ranks = start_ranks(world_size, train, fault, arguments, self.folder / "out", ranks_per_node=2)
        until(lambda: len(self.nodes()) == (world_size + 1) // 2, f"the addresses: {self.printed()}", 120)

    def nodes(self) -> list[Path]:
        return sorted(self.folder.glob("run.node-*.prometheus.json"))

    def printed(self) -> str:
        return "\n".join(path.read_text() for path in self.folder.glob("out.*"))

    def lines(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in read_json_lines(self.run / "metrics.jsonl") if line["kind"] == kind]

    def send(self, number: int, *ranks: int) -> None:
        for rank in ranks:
            os.kill(self.ranks[rank].pid or 0, number)

    def exporter(self, node: int) -> psutil.Process:
        ((target,),) = (read_json(self.nodes()[node]),)
        (pid,) = exporters(target["targets"][0])
        return psutil.Process(pid)

    def fires(self, alert: str, seconds: float = 120, **labels: str) -> None:
        self._told("firing", alert, labels, seconds)
        assert all(
            told.annotations["summary"].startswith("run: ")
            and told.annotations["runbook_url"] == f"docs/alerts.md#{alert.lower()}"
            for told in self.alertmanager.told
            if told.labels["alertname"] == alert
        )

    def is_resolved(self, alert: str, seconds: float = 240, **labels: str) -> None:
        self._told("resolved", alert, labels, seconds)

    def _told(self, status: str, alert: str, labels: dict[str, str], seconds: float) -> None:
        """Wait for the last message about this alert, with these labels, to be of this status."""
        wanted = {"alertname": alert, "run": "run", **labels}.items()

        def last() -> str:
            found = [told.status for told in self.alertmanager.told if wanted <= told.labels.items()]
            return found[-1] if found else "nothing"

        until(lambda: last() == status, f"{alert} {labels} to be {status}: {last()}, {self.alertmanager.told}", seconds)

    def stop(self) -> None:
        kill(self.ranks)
        self.prometheus.stop()
        self.alertmanager.stop()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Iterator[Fleet]:
    if not PROMETHEUS or not ALERTMANAGER:
        pytest.skip("no prometheus and prometheus-alertmanager (Debian's packages): no alert was fired")
    folder = tmp_path_factory.mktemp("fleet")
    (folder / "run").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder / "run")]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no disk to fill, a file system cannot be mounted: {mounted.stderr.strip()}")
    fleet = Fleet(folder, shards)
    try:
        yield fleet
    finally:
        fleet.stop()
        subprocess.run(["umount", "--lazy", str(folder / "run")], check=True)


@contextmanager
def slowed(fleet: Fleet, rank: int) -> Iterator[None]:
    """The rank stands still for three quarters of the time."""
    over = threading.Event()

    def slow() -> None:
        while not over.is_set():
            fleet.send(signal.SIGSTOP, rank)
            time.sleep(0.15)
            fleet.send(signal.SIGCONT, rank)
            time.sleep(0.05)

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.timeout(900)
def test_alerts_fire_by_real_faults_and_name_rank_and_node(fleet: Fleet) -> None:
    host = socket.gethostname()
    fleet.start()

    until(
        lambda: len(fleet.prometheus.ask("bigmodel_rank_step > 5")) == 4,
        f"the ranks in Prometheus: {fleet.printed()}",
        120,
    )

    bad_step = fleet.lines("step")[-1]["step"] + 10
    (fleet.folder / "spoilt").write_text(f"{bad_step}")
    fleet.fires("BigmodelLossNotFinite")
    assert [line["step"] for line in fleet.lines("step") if line["skipped"]] == [bad_step]
    fleet.is_resolved("BigmodelLossNotFinite")

    first = max(40, fleet.lines("step")[-1]["step"] + 10)  # 32 steps say what is usual
    loud = [first + 2 * number for number in range(5)]
    (fleet.folder / "loud").write_text(" ".join(map(str, loud)))
    fleet.fires("BigmodelLossSpikes", signal="gradient_norm")
    fleet.is_resolved("BigmodelLossSpikes", signal="gradient_norm")

    with slowed(fleet, 3):
        fleet.fires("BigmodelStraggler", rank="3", node="1", host=host)
        slow = {alert["rank"] for alert in fleet.prometheus.alerts() if alert["alertname"] == "BigmodelStraggler"}
        assert slow == {"3"}

    fleet.send(signal.SIGSTOP, 1)
    fleet.fires("BigmodelRankHangs", rank="1", node="0", host=host)
    fleet.fires("BigmodelStalled")
    hanging = {told.labels["rank"] for told in fleet.alertmanager.told if told.labels["alertname"].endswith("Hangs")}
    fleet.send(signal.SIGCONT, 1)
    assert hanging <= {"1", "3"}  # 3 was slowed down by stops
    fleet.is_resolved("BigmodelRankHangs", rank="1")
    fleet.is_resolved("BigmodelStalled")
    fleet.is_resolved("BigmodelStraggler", rank="3")

    exporter = fleet.exporter(1)
    exporter.suspend()
    fleet.fires("BigmodelTargetDown", node="1", host=host)
    exporter.resume()
    fleet.is_resolved("BigmodelTargetDown", node="1")
    assert not [told for told in fleet.alertmanager.told if told.labels.get("node") == "0" and "Target" in str(told)]
    fleet.fires("BigmodelGoodputLow")  # the seconds that the stopped rank cost

    for number in range(8):
        with open(fleet.run / f"filler-{number}", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, 6 * MEGABYTE)
        time.sleep(0.25)
    fleet.fires("BigmodelDiskFull", node="0", host=host)
    with open(fleet.run / "filler", "wb") as file:
        file.write(bytes(0))
        room = os.statvfs(fleet.run)
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize)
    fleet.fires("BigmodelCheckpointFailed", reason="disk_full")
    fleet.fires("BigmodelCheckpointOld")
    for path in fleet.run.glob("filler*"):
        path.unlink()
    fleet.is_resolved("BigmodelCheckpointOld")
    fleet.is_resolved("BigmodelDiskFull", node="0")
    fleet.is_resolved("BigmodelCheckpointFailed", reason="disk_full")
    fleet.is_resolved("BigmodelGoodputLow")

    fleet.send(signal.SIGSTOP, 0, 1, 3)  # else they see the death of their peer and end as well
    fleet.send(signal.SIGKILL, 2)
    fleet.fires("BigmodelRankDown", rank="2", node="1", host=host)
    kill(fleet.ranks)
    fleet.is_resolved("BigmodelRankDown", rank="2")
    fleet.fires("BigmodelRunGone")
    fleet.start()
    fleet.is_resolved("BigmodelRunGone")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_whose_reading_is_slow_is_told(fleet: Fleet) -> None:
    fleet.start(2)
    until(lambda: len(fleet.prometheus.ask("bigmodel_rank_step > 5")) == 2, f"steps: {fleet.printed()}", 120)
    (fleet.folder / "slow").touch()
    fleet.fires("BigmodelWaitsForData")
    (fleet.folder / "slow").unlink()
    fleet.is_resolved("BigmodelWaitsForData")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_that_restarts_again_and_again_is_told(fleet: Fleet) -> None:
    fleet.start(1)
    for _ in range(4):
        until(lambda: fleet.prometheus.ask("bigmodel_rank_up == 1"), fleet.printed(), 60)
        kill(fleet.ranks)
        until(lambda: not fleet.nodes(), "the exporter to end")
        fleet.start(1)
    fleet.fires("BigmodelRestartLoop")
    fleet.is_resolved("BigmodelRestartLoop", 90)
