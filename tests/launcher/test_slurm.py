"""The launcher on a real SLURM: slurmctld and 32 slurmd on this machine, jobs that train, die, requeue and stop."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bigmodel.launcher.hostlist import expand_hosts
from bigmodel.launcher.record import launches
from bigmodel.run_directory import read_json, read_json_lines
from tests.support.launched import (
    LAUNCHER,
    STEPS,
    assert_logged,
    assert_no_orphans,
    assert_same_training,
    ranks_of,
    recording,
    steps,
    steps_of,
    train_reference,
    until,
    wait_for_step,
)
from tests.support.slurm import Cluster, missing
from tests.support.tiny_run import write_run

REASON = missing()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

REPOSITORY = Path(__file__).parents[2]
CLUSTERS = REPOSITORY / "configs" / "clusters"
NODES = 32


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    base = tmp_path_factory.getbasetemp()
    for path in (folder, base, base.parent, base.parent.parent if "PYTEST_XDIST_WORKER" in os.environ else base):
        path.chmod(0o755)  # munged runs as another user
    cluster = Cluster(folder / "cluster", NODES)
    cluster.environment |= recording(cluster.environment)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[int, dict]:
    return train_reference(tmp_path_factory.mktemp("reference"), shards)


def write_cluster(folder: Path, text: str) -> Path:
    file = folder / "cluster.toml"
    file.write_text(text)
    return file


# ---- placement


def test_256_tasks_on_32_nodes_know_their_places(cluster: Cluster, tmp_path: Path, shards: Path) -> None:
    """Every 16th task runs `exec --dry-run`; each prints the map of all, which is held against what SLURM says."""
    run_file = write_run(tmp_path, shards)
    program = tmp_path / "task.sh"
    program.write_text(
        'echo "truth rank $SLURM_PROCID host $SLURMD_NODENAME node $SLURM_NODEID local $SLURM_LOCALID"\n'
        f"[ $((SLURM_PROCID % 16)) = 0 ] && {shlex.join(LAUNCHER)} exec {run_file} --dry-run\nexit 0\n"
    )
    printed = cluster.call("srun", "-N32", "--ntasks-per-node=8", "-l", "sh", str(program))
    lines = [line.partition(": ")[2] for line in printed.splitlines()]
    truth = {line.removeprefix("truth ") for line in lines if line.startswith("truth ")}
    assert len(truth) == 256
    assert {line for line in lines if line.startswith("rank ")} == truth  # rank 0 prints the map of all
    environments = [line for line in lines if line.startswith("NCCL") or "RANK=" in line]
    assert len(environments) == 16
    for line in environments:
        rank = int(re.search(r"\bRANK=(\d+)", line)[1])
        assert f"WORLD_SIZE=256 LOCAL_RANK={rank % 8} LOCAL_WORLD_SIZE=8 NODE_RANK={rank // 8} MASTER_ADDR=n1 " in line
    assert len({re.search(r"MASTER_PORT=(\d+)", line)[1] for line in environments}) == 1
    assert len({re.search(r"LAUNCH_HOSTS='?([^ ']+)", line)[1] for line in environments}) == 1


@pytest.mark.parametrize(
    "options",
    [["-N3", "-n7"], ["-N3", "-n7", "-m", "cyclic"], ["-N2", "-n6", "-m", "plane=2"], ["-n4", "-m", "arbitrary"]],
    ids=["block", "cyclic", "plane", "arbitrary"],
)
def test_every_task_distribution_is_understood(
    cluster: Cluster, tmp_path: Path, shards: Path, options: list[str]
) -> None:
    run_file, hostfile = write_run(tmp_path, shards), tmp_path / "hosts"
    hostfile.write_text("n3\nn1\nn3\nn2\n")
    program = tmp_path / "task.sh"
    program.write_text(
        'echo "truth rank $SLURM_PROCID host $SLURMD_NODENAME node $SLURM_NODEID local $SLURM_LOCALID"\n'
        f"[ $SLURM_PROCID = 0 ] && exec {shlex.join(LAUNCHER)} exec {run_file} --dry-run\nexit 0\n"
    )
    more = {"SLURM_HOSTFILE": str(hostfile)} if "arbitrary" in options else {}
    lines = cluster.call("srun", *options, "sh", str(program), **more).splitlines()
    truth = {line.removeprefix("truth ") for line in lines if line.startswith("truth ")}
    assert len(truth) in (4, 6, 7)
    assert {line for line in lines if line.startswith("rank ")} == truth
    first = next(line.split()[3] for line in truth if line.startswith("rank 0 "))
    assert any(f" MASTER_ADDR={first} " in line for line in lines)
    assert first == "n3" or not more


def test_a_het_job_is_one_world_of_all_its_groups(cluster: Cluster, tmp_path: Path, shards: Path) -> None:
    run_file, output = write_run(tmp_path, shards), tmp_path / "output"
    script = tmp_path / "het.sbatch"
    script.write_text(
        f"#!/bin/bash\n#SBATCH -N1 -n1 --output={output}\n#SBATCH hetjob\n#SBATCH -N2 --ntasks-per-node=2\n"
        f"cd {shlex.quote(str(REPOSITORY))}\nsrun --het-group=0,1 {shlex.join(LAUNCHER)} exec {run_file} --dry-run\n"
    )
    job = cluster.call("sbatch", "--parsable", str(script)).strip()
    assert cluster.wait(job) == "COMPLETED", output.read_text()
    lines = output.read_text().splitlines()
    ranks = [line for line in lines if line.startswith("rank ")]
    homes = [re.fullmatch(r"rank (\d) host (n\d+) node (\d) local (\d)", line).groups() for line in ranks]
    assert [(rank, node, local) for rank, _, node, local in homes] == [
        ("0", "0", "0"), ("1", "1", "0"), ("2", "1", "1"), ("3", "2", "0"), ("4", "2", "1")
    ]  # fmt: skip
    environments = [line for line in lines if "WORLD_SIZE=5" in line]
    assert len(environments) == 5
    assert all(f"MASTER_ADDR={homes[0][1]} " in line for line in environments)


def test_every_group_of_a_het_job_is_checked(cluster: Cluster, tmp_path: Path, shards: Path) -> None:
    run_file, output = write_run(tmp_path, shards), tmp_path / "output"
    script = tmp_path / "het.sbatch"
    script.write_text(
        f"#!/bin/bash\n#SBATCH -N1 -n1 --output={output}\n#SBATCH hetjob\n#SBATCH -N2 --ntasks-per-node=2\n"
        f"scontrol show hostnames $SLURM_JOB_NODELIST_HET_GROUP_0,$SLURM_JOB_NODELIST_HET_GROUP_1\n"
        f"{shlex.join(LAUNCHER)} check {run_file} --json\n"
    )
    job = cluster.call("sbatch", "--parsable", str(script)).strip()
    cluster.wait(job)  # COMPLETED, or FAILED where this busy machine makes a link slow
    hosts, _, answer = output.read_text().partition("{")
    assert len(hosts.split()) == 3
    result = json.loads("{" + answer)
    assert sorted(result["reports"]) == sorted(hosts.split())
    assert all(set(report["network"]["links"]) and report["data"] for report in result["reports"].values())
    assert_no_orphans(tmp_path / "run")


def test_a_het_job_trains(cluster: Cluster, tmp_path: Path, shards: Path, reference: dict[int, dict]) -> None:
    run_file, run, output = write_run(tmp_path, shards), tmp_path / "run", tmp_path / "output"
    script = tmp_path / "het.sbatch"
    script.write_text(
        f"#!/bin/bash\n#SBATCH -N1 -n1 --output={output}\n#SBATCH hetjob\n#SBATCH -N1 -n1 --gpus-per-node=1\n"
        f"srun --het-group=0,1 {shlex.join(LAUNCHER)} exec {run_file} {' '.join(steps())}\n"
    )
    job = cluster.call("sbatch", "--parsable", str(script)).strip()
    assert cluster.wait(job) == "COMPLETED", output.read_text()
    assert_same_training(run, reference)
    assert_no_orphans(run)


def test_node_lists_mean_what_scontrol_says(cluster: Cluster) -> None:
    """Over lists that a generator makes; the grammar's errors are in test_topology.py."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    number = st.integers(0, 30).flatmap(lambda low: st.tuples(st.just(low), st.integers(low, low + 4)))
    ranges = st.tuples(number, st.integers(1, 3), st.booleans()).map(
        lambda v: f"{v[0][0]:0{v[1]}d}-{v[0][1]:0{v[1]}d}" if v[2] else f"{v[0][0]:0{v[1]}d}"
    )
    bracket = st.lists(ranges, min_size=1, max_size=3).map(lambda parts: f"[{','.join(parts)}]")
    name = st.from_regex(r"[a-z][a-z-]{0,4}", fullmatch=True)
    second = st.tuples(name, bracket).map("".join)  # rack[1-2]node[1-4]
    word = st.tuples(name, bracket, second).map("".join) | st.tuples(name, bracket).map("".join) | name
    lists: list[str] = []

    @settings(max_examples=150, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(word, min_size=1, max_size=4))
    def collect(words: list[str]) -> None:
        lists.append(",".join(words))

    collect()
    assert len(set(lists)) > 100
    script = "".join(f"scontrol show hostnames '{text}'; echo --\n" for text in lists)
    answers = cluster.call("sh", "-c", script).split("--\n")
    for text, answer in zip(lists, answers, strict=False):
        assert expand_hosts(text) == answer.split(), text


# ---- training


def test_a_killed_rank_of_a_submitted_run_starts_again_in_its_job_and_the_run_equals_the_local_one(
    cluster: Cluster, tmp_path: Path, shards: Path, reference: dict[int, dict]
) -> None:
    run_file, run = write_run(tmp_path, shards), tmp_path / "run"
    text = "nodes = 2\n[slurm]\npartition = 'train'\ncpus_per_rank = 2\n"
    machines = write_cluster(tmp_path, text)
    submit = [*LAUNCHER, "slurm", str(run_file), "--cluster", str(machines), *steps()]
    job = re.search(r"job (\d+)", cluster.call(*submit))[1]
    again = cluster.run(*submit)
    assert again.returncode == 2
    assert f"job {job} of this run is already queued" in again.stdout
    wait_for_step(run, 5)
    ranks_of(run)[1].send_signal(signal.SIGKILL)
    assert cluster.wait(job) == "COMPLETED", (run / "logs" / f"slurm-{job}.out").read_text()
    history = launches(read_json_lines(run / "events.jsonl"))
    assert [(launch.by, launch.job, launch.restart, launch.cause) for launch in history] == [
        ("slurm", job, 0, "failed"), ("slurm", job, 0, "finished")
    ]  # fmt: skip
    assert [launch.decided for launch in history] == ["restart", "end"]
    assert 5 <= history[0].step < STEPS
    assert_same_training(run, reference)
    launch = read_json(run / "launch.json")
    assert len(launch["hosts"]) == 2
    assert launch["main_address"] == launch["hosts"][0]
    assert_logged(run, launch["hosts"])
    said = "launcher: restart: failed: it resumes from its last checkpoint"
    assert said in (run / "logs" / f"slurm-{job}.out").read_text()
    assert_no_orphans(run)


def adapt(folder: Path, name: str, run_file: Path, nodes: int = 2, ranks: int = 1, more: str = "") -> Path:
    """A script of configs/clusters/ as it stands, but for this machine's interpreter, the run file and the counts."""
    text = (CLUSTERS / name).read_text()
    changes = [
        ("python -m ", f"{shlex.quote(sys.executable)} -m "),
        (" my.toml", f" {run_file} {' '.join(steps())} {more}"),
    ]
    changes += [("--ntasks-per-node=8", f"--ntasks-per-node={ranks}"), ("--nproc-per-node=8", "--nproc-per-node=1")]
    changes += [("--nodes=2", f"--nodes={nodes}"), ("--gpus-per-node=8", "--gpus-per-node=2")]
    for before, after in changes:
        text = text.replace(before, after)
    assert text.count(f"exec {run_file}") == 1
    script = folder / name
    script.write_text(text)
    return script


def test_the_ready_script_of_torchrun_trains(
    cluster: Cluster, tmp_path: Path, shards: Path, reference: dict[int, dict]
) -> None:
    run_file, run, output = write_run(tmp_path, shards), tmp_path / "run", tmp_path / "output"
    submit = ["sbatch", "--parsable", f"--output={output}", str(adapt(tmp_path, "torchrun.sbatch", run_file))]
    job = cluster.call(*submit).strip()
    assert cluster.wait(job) == "COMPLETED", output.read_text()
    assert_same_training(run, reference)
    launch = read_json(run / "launch.json")
    assert (launch["by"], launch["job"], len(launch["hosts"])) == ("torchrun", job, 2)
    [history] = launches(read_json_lines(run / "events.jsonl"))
    assert (history.by, history.cause) == ("torchrun", "finished")  # the trainer's own word: no launcher saw the end
    assert_logged(run, [os.uname().nodename] * 2)
    assert_no_orphans(run)


def test_the_user_s_own_script_goes_on_after_a_time_limit_s_signal_and_a_preemption(
    cluster: Cluster, tmp_path: Path, shards: Path, reference: dict[int, dict]
) -> None:
    """2 nodes of a rank. The signal is sent by hand (a time limit has minutes); scontrol requeue is what preempts."""
    run_file, run, output = write_run(tmp_path, shards), tmp_path / "run", tmp_path / "output"
    submit = ["sbatch", "--parsable", f"--output={output}", str(adapt(tmp_path, "own.sbatch", run_file))]
    job = cluster.call(*submit).strip()
    wait_for_step(run, 5)
    cluster.call("scancel", "--signal=USR1", job)
    until(lambda: "launcher: stopped; requeued" in output.read_text(), output.read_text, 60)
    saved = [max(int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("step-*"))]
    cluster.start_now(job)
    wait_for_step(run, saved[0] + 2)
    cluster.call("scontrol", "requeue", job)
    cluster.start_now(job)
    assert cluster.wait(job) == "COMPLETED", output.read_text()
    assert_same_training(run, reference)
    history = launches(read_json_lines(run / "events.jsonl"))
    assert [(start.by, start.job, start.restart) for start in history] == [("slurm", job, n) for n in range(3)]
    assert [start.cause for start in history][::2] == ["stopped", "finished"]
    assert history[1].cause in ("stopped", "lost")  # what a save costs against KillWait
    resumed = [line["step"] for line in read_json_lines(run / "events.jsonl") if line["event"] == "start"]
    assert resumed[:2] == [0, saved[0]]
    assert resumed[2] >= saved[0] == history[0].step
    assert_logged(run, read_json(run / "launch.json")["hosts"])
    assert_no_orphans(run)


def test_four_nodes_of_two_bound_ranks_train_alike_from_the_user_s_own_script(
    cluster: Cluster, tmp_path: Path, shards: Path, reference: dict[int, dict]
) -> None:
    run_file, run, output = write_run(tmp_path, shards), tmp_path / "run", tmp_path / "output"
    machines = write_cluster(tmp_path, "binding = 'cores'\n")
    script = adapt(tmp_path, "own.sbatch", run_file, nodes=4, ranks=2, more=f"--cluster {machines}")
    job = cluster.call("sbatch", "--parsable", f"--output={output}", str(script)).strip()
    wait_for_step(run, 1)
    bound = {rank: set(process.cpu_affinity()) for rank, process in ranks_of(run).items()}
    assert len(bound) == 8
    for first, second in zip(range(0, 8, 2), range(1, 8, 2), strict=True):
        assert not bound[first] & bound[second] or len(os.sched_getaffinity(0)) < 2
        assert bound[first] | bound[second] <= os.sched_getaffinity(0)
    assert cluster.wait(job) == "COMPLETED", output.read_text()
    assert_same_training(run, reference, exact=False)
    assert len(read_json(run / "world.json")["ranks"]) == 8
    launch = read_json(run / "launch.json")
    assert launch["node_of_rank"] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert_logged(run, [launch["hosts"][node] for node in launch["node_of_rank"]])
    assert_no_orphans(run)


def test_nodes_are_checked_inside_the_job_before_it_starts(cluster: Cluster, tmp_path: Path, shards: Path) -> None:
    run_file, run = write_run(tmp_path, shards), tmp_path / "run"
    limits = "[check]\nbefore_start = true\n[check.expect]\nmatmul_tflops = 1e6\n[requeue]\nlimit = 0\n"
    machines = write_cluster(tmp_path, f"nodes = 2\n{limits}")
    job = re.search(r"job (\d+)", cluster.call(*LAUNCHER, "slurm", str(run_file), "--cluster", str(machines)))[1]
    assert cluster.wait(job) == "FAILED"
    output = (run / "logs" / f"slurm-{job}.out").read_text()
    hosts = read_json(run / "preflight.json")["exclude"]
    assert len(hosts) == 2
    assert f"exclude: {','.join(hosts)}\n" in output
    assert "failed; not requeued: requeue.limit = 0 is reached" in output
    [history] = launches(read_json_lines(run / "events.jsonl"))
    assert (history.cause, history.detail) == ("failed", "preflight")
    assert not (run / "metrics.jsonl").exists()
    network = read_json(run / "preflight.json")["reports"][hosts[0]]["network"]
    assert network["all_reduce_bytes_per_second"] > 0
    assert_no_orphans(run)


def test_status_logs_and_stop_from_the_run_directory(cluster: Cluster, tmp_path: Path, shards: Path) -> None:
    run_file, run = write_run(tmp_path, shards), tmp_path / "run"
    machines = write_cluster(tmp_path, "nodes = 2\n")
    submit = [*LAUNCHER, "slurm", str(run_file), "--cluster", str(machines), *steps(1_000_000)]
    job = re.search(r"job (\d+)", cluster.call(*submit))[1]
    wait_for_step(run, 3)
    status = json.loads(cluster.call(*LAUNCHER, "status", str(run), "--json"))
    assert (status["state"], status["by"], status["job"], status["steps"]) == ("running", "slurm", job, 1_000_000)
    assert status["step"] >= 3
    assert status["loss"] > 0
    assert status["tokens_per_second"] > 0
    assert status["restarts"] == []
    shown = cluster.call(*LAUNCHER, "status", str(run))
    assert f"slurm job {job}" in shown
    assert "running" in shown
    logs = cluster.call(*LAUNCHER, "logs", str(run))
    assert f"[{status['hosts'][0]} rank 0] starting: " in logs
    assert "starting: " in (run / "logs" / f"slurm-{job}.out").read_text()
    second = cluster.run(*LAUNCHER, "local", str(run_file))
    assert second.returncode == 2
    assert f"another run is using it now (slurm, job {job}" in second.stdout
    assert "asked job" in cluster.call(*LAUNCHER, "stop", str(run))
    assert cluster.wait(job) == "FAILED"  # exit code 3: stopped and saved
    assert "ExitCode=3:0" in cluster.call("scontrol", "show", "job", job)
    history = launches(read_json_lines(run / "events.jsonl"))
    assert [(launch.cause, launch.stop_requested) for launch in history] == [("stopped", True)]
    saved = max(int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("step-*"))
    assert saved == max(steps_of(run))
    status = json.loads(cluster.call(*LAUNCHER, "status", str(run), "--json"))
    assert status["state"] == "stopped"
    assert_no_orphans(run)


# ---- what cannot work is said before anything starts


@pytest.mark.parametrize(
    ("machines", "message"),
    [
        ("[slurm]\npartition = 'trian'", "slurm.partition = 'trian': no such partition; did you mean 'train'?"),
        ("nodes = 99", "nodes = 99: partition 'train' has only 32 nodes"),
        ("[slurm]\ntime_limit = 'soon'", "sbatch refused"),
        ("ranks_per_node = 4\ngpus_per_node = 2", "ranks_per_node = 4 exceeds gpus_per_node = 2"),
        ("[slurm]\nparttion = 'train'", "slurm.parttion: unknown setting; did you mean 'partition'?"),
        ("environment = { NCCL_IB_HCAS = 'x' }", "NCCL_IB_HCAS: unknown variable; did you mean NCCL_IB_HCA?"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(
    cluster: Cluster, tmp_path: Path, shards: Path, machines: str, message: str
) -> None:
    run_file = write_run(tmp_path, shards)
    answer = cluster.run(*LAUNCHER, "slurm", str(run_file), "--cluster", str(write_cluster(tmp_path, machines)))
    assert answer.returncode == 2, answer.stdout
    assert message in answer.stdout
    assert "Traceback" not in answer.stdout
    assert not (tmp_path / "run" / "launch.json").exists()
    assert str(tmp_path) not in cluster.call("squeue", "-h", "-o", "%o")


def test_a_rank_whose_address_nobody_knows_says_so(cluster: Cluster, tmp_path: Path, shards: Path) -> None:
    """Outside of the cluster's own /etc/hosts n1 has no address: never a silent localhost."""
    run_file = write_run(tmp_path, shards)
    place = {
        "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_JOB_ID": "12",
    }  # fmt: skip
    answer = subprocess.run(
        [*LAUNCHER, "exec", str(run_file)], env={**os.environ, **place}, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 2
    assert "rank 0 runs on n1, a name without an address here; set main_address" in answer.stderr
