"""Faults on a real SLURM, 2 ranks on 2 nodes of 3: each run ends by itself and equals the undisturbed one.

A killed rank: tests/launcher/test_slurm.py.
"""

import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bigmodel.launcher.record import Launch, launches
from bigmodel.run_directory import read_json, read_json_lines
from tests.support.launched import (
    LAUNCHER,
    assert_no_orphans,
    assert_same_training,
    ranks_of,
    recording,
    steps,
    train_reference,
    until,
    wait_for_step,
)
from tests.support.netns import Machines, missing_namespaces
from tests.support.slurm import Cluster, missing
from tests.support.tiny_run import write_run

REASON = missing()
pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON), pytest.mark.long]

HERE, SPARE = "nodes = 2\n", "nodes = 2\n[restart]\nspare_nodes = 1\n"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with started(tmp_path_factory, None) as found:
        yield found


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose nodes have networks of their own."""
    machines = Machines(3)
    try:
        machines.start()
        with started(tmp_path_factory, machines) as found:
            yield found
    finally:
        machines.stop()


@contextmanager
def started(tmp_path_factory: pytest.TempPathFactory, machines: Machines | None) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    base = tmp_path_factory.getbasetemp()
    for path in (folder, base, base.parent, base.parent.parent if "PYTEST_XDIST_WORKER" in os.environ else base):
        path.chmod(0o755)  # munged runs as another user
    cluster = Cluster(folder / "cluster", 3, machines=machines)
    cluster.environment |= recording(cluster.environment)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[int, dict]:
    return train_reference(tmp_path_factory.mktemp("reference"), shards)


class Submitted:
    """A run in the queue."""

    def __init__(
        self, cluster: Cluster, folder: Path, shards: Path, machines: str, step_seconds: float = 0.2, *more: str
    ) -> None:
        self.cluster, self.run = cluster, folder / "run"
        file = folder / "cluster.toml"
        file.write_text(machines)
        words = [*LAUNCHER, "slurm", str(write_run(folder, shards)), "--cluster", str(file), *steps(), *more]
        answer = cluster.call(*words, RECORDED_STEP_SECONDS=str(step_seconds))
        self.job = re.search(r"job (\d+)", answer)[1]

    @property
    def output(self) -> str:
        file = self.run / "logs" / f"slurm-{self.job}.out"
        return file.read_text() if file.exists() else ""

    @property
    def history(self) -> list[Launch]:
        return launches(read_json_lines(self.run / "events.jsonl"))

    @property
    def hosts(self) -> list[str]:
        return read_json(self.run / "launch.json")["hosts"]

    def said(self, words: str, seconds: float = 90) -> None:
        until(lambda: words in self.output, lambda: self.output, seconds)

    def ends_like(self, reference: dict[int, dict], seconds: float = 400) -> None:
        assert self.cluster.wait(self.job, seconds) == "COMPLETED", self.output
        assert_same_training(self.run, reference)
        assert_no_orphans(self.run)
        generations = [event for event in read_json_lines(self.run / "events.jsonl") if event["event"] == "start"]
        assert len(generations) == len(self.history)


def test_a_time_limit_s_signal_saves_and_requeues(
    cluster: Cluster, tmp_path: Path, shards: Path, reference: dict[int, dict]
) -> None:
    limits = f"{HERE}[slurm]\ntime_limit = '1'\nsignal_seconds = 30\n"
    run = Submitted(cluster, tmp_path, shards, limits, step_seconds=0.7)
    run.said("stopped; requeued: it resumes from its last checkpoint", 120)
    while run.history[-1].cause != "finished":  # a busy machine needs more than two jobs of a minute
        starts = len(run.history)
        cluster.start_now(run.job)
        until(lambda: len(run.history) > starts and bool(run.history[-1].cause), lambda: run.output, 120)  # noqa: B023
        until(lambda: bool(run.history[-1].decided) or run.history[-1].cause == "finished", lambda: run.output, 60)
    run.ends_like(reference)
    assert {one.cause for one in run.history[:-1]} == {"stopped"}
    assert [one.restart for one in run.history] == list(range(len(run.history)))


def test_a_node_that_dies_with_its_tasks_is_replaced_by_the_spare(
    cluster: Cluster, tmp_path: Path, shards: Path, reference: dict[int, dict]
) -> None:
    run = Submitted(cluster, tmp_path, shards, SPARE)
    wait_for_step(run.run, 9)
    lost = run.hosts[1]
    cluster.kill(lost)
    rank = ranks_of(run.run)[1]
    for process in [*rank.parents(), rank]:
        if process == rank or process.name().startswith("slurmstepd"):
            process.kill()
    try:
        cluster.call("scontrol", "update", f"nodename={lost}", "state=down", "reason=test")
        run.ends_like(reference)
        assert lost not in run.hosts
        assert [one.cause for one in run.history] == ["failed", "finished"]
        assert f"{lost} left out for a spare" in run.output
    finally:
        cluster.start_again(lost)
        cluster.call("scontrol", "update", f"nodename={lost}", "state=resume", check=False)


def test_a_restart_of_the_controller_disturbs_nothing(
    cluster: Cluster, tmp_path: Path, shards: Path, reference: dict[int, dict]
) -> None:
    run = Submitted(cluster, tmp_path, shards, HERE)
    wait_for_step(run.run, 5)
    cluster.kill("slurmctld")
    time.sleep(2)
    ranks_of(run.run)[1].send_signal(signal.SIGKILL)  # the restart in place meets the new controller
    cluster.start_again("slurmctld")
    run.ends_like(reference)
    assert [one.cause for one in run.history] == ["failed", "finished"]


def test_a_drained_node_keeps_its_job(
    cluster: Cluster, tmp_path: Path, shards: Path, reference: dict[int, dict]
) -> None:
    run = Submitted(cluster, tmp_path, shards, HERE)
    wait_for_step(run.run, 5)
    node = run.hosts[1]
    cluster.call("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    try:
        ranks_of(run.run)[1].send_signal(signal.SIGKILL)
        run.ends_like(reference)
        assert [one.cause for one in run.history] == ["failed", "finished"]
    finally:
        cluster.call("scontrol", "update", f"nodename={node}", "state=resume")


def test_a_preempted_job_saves_is_requeued_and_ends(
    cluster: Cluster, tmp_path: Path, shards: Path, reference: dict[int, dict]
) -> None:
    run = Submitted(cluster, tmp_path, shards, HERE)
    wait_for_step(run.run, 5)
    urgent = cluster.call(
        "sbatch", "--parsable", "-p", "urgent", "-N3", "--exclusive", f"--output={tmp_path}/urgent", "--wrap", "sleep 1"
    ).strip()
    assert cluster.wait(urgent, 90) == "COMPLETED"
    cluster.start_now(run.job)
    run.ends_like(reference)
    assert run.history[-1].restart >= 1


@pytest.mark.skipif(bool(missing_namespaces()), reason=missing_namespaces())
@pytest.mark.parametrize(("kind", "node"), [(SPARE, 1), (HERE, 0)], ids=["spare", "rank 0, requeue"])
def test_a_node_that_is_cut_off_is_replaced(
    apart: Cluster, tmp_path: Path, shards: Path, reference: dict[int, dict], kind: str, node: int
) -> None:
    """Its rank lives on until the collective timeout; rank 0 holds the run directory, and the next start waits."""
    run = Submitted(apart, tmp_path, shards, kind, 0.2, "--set", "training.collective_timeout_seconds=60")
    wait_for_step(run.run, 9)
    lost = run.hosts[node]
    number = int(lost[1:]) - 1
    apart.machines.cut_off(number)
    try:
        if kind == HERE:  # SLURM requeues the job when the node does not answer
            until(lambda: "Restarts=1" in apart.call("scontrol", "show", "job", run.job), lambda: run.output, 120)
            apart.start_now(run.job)
        until(lambda: run.history[-1].cause == "finished", lambda: run.output, 240)
    finally:
        apart.machines.join(number)
    # SLURM ends what it left there once the node has answered again.
    until(lambda: "*" not in apart.call("sinfo", "-h", "-n", lost, "-o", "%T"), lambda: run.output, 180)
    run.ends_like(reference)
    assert lost not in run.hosts
    assert len(run.history) == 2


def test_a_requeue_leaves_out_the_nodes_that_were_named_as_bad(cluster: Cluster, tmp_path: Path, shards: Path) -> None:
    """The trainer's event is written by hand; SLURM ends the script while it excludes the node."""
    run_file, run = write_run(tmp_path, shards), tmp_path / "run"
    run.mkdir()
    (tmp_path / "cluster.toml").write_text(HERE)
    named = f"""
import os
from bigmodel.launcher.record import record_launch
from bigmodel.launcher.topology import even_topology
from bigmodel.run_directory import record_event
from pathlib import Path
run = Path({str(run)!r})
restart = int(os.environ.get("SLURM_RESTART_COUNT", 0))
record_launch(run, even_topology(["n1", "n2"], 1, "n1", 1), "slurm", job=os.environ["SLURM_JOB_ID"], restart=restart)
record_event(run, "bad_device", fault="nonfinite", step=3, detail="", ranks=[1], hosts=["n2"])
"""
    (tmp_path / "named.py").write_text(named)
    words = f"{sys.executable} {tmp_path}/named.py; {shlex.join([*LAUNCHER, 'ended', str(run_file)])}"
    script = f"#!/bin/sh\ncd {Path(__file__).parents[2]}\n{words} --cluster {tmp_path}/cluster.toml --code 5\n"
    (tmp_path / "job.sh").write_text(script)
    job = cluster.call(
        "sbatch", "--parsable", "-N2", "-w", "n1,n2", "--requeue", f"--output={tmp_path}/output", f"{tmp_path}/job.sh"
    ).strip()
    try:
        until(
            lambda: "ExcNodeList=n2" in cluster.call("scontrol", "show", "job", job),
            lambda: (tmp_path / "output").read_text() + cluster.call("scontrol", "show", "job", job),
            60,
        )
        (event,) = [one for one in read_json_lines(run / "events.jsonl") if one["event"] == "decided"]
        assert (event["action"], event["excluded"]) == ("requeue", ["n2"])
    finally:
        cluster.call("scancel", job)
