"""What the launcher writes, without a cluster: sbatch scripts, environments, the record of a run, the requeue policy.

Containers (Pyxis/enroot), EFA and InfiniBand are rendering only: nothing here or elsewhere has run on them.
"""

import fcntl
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bigmodel.config.settings import UserError
from bigmodel.launcher.cluster import Cluster, RequeueSettings, load_cluster
from bigmodel.launcher.local import launch_environment
from bigmodel.launcher.record import Launch, launches, process_start, record_end, record_launch, take_start
from bigmodel.launcher.slurm import Decision, Job, decide, ended, render
from bigmodel.launcher.topology import even_topology
from bigmodel.launcher.watch import print_status, status, stop
from bigmodel.run_directory import claim, make_logs, read_json_lines, record_event
from tests.support.launched import LAUNCHER

CLUSTERS = Path(__file__).parents[2] / "configs" / "clusters"
NOBODY = 65534

INFINIBAND = """\
#!/bin/bash
# Written by `bigmodel launch slurm`. `sbatch` of this file submits the run again.
#SBATCH --job-name=my
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --partition=train
#SBATCH --account=research
#SBATCH --time=2-00:00:00
#SBATCH --output=/runs/my/logs/slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
#SBATCH --exclusive
#SBATCH --requeue

cd '/home/me/big model' || exit 1
module load cuda/12.8

# Check the nodes first.
if ! /venv/bin/python -m bigmodel launch check my.toml --cluster c.toml --set training.steps=5; then
    /venv/bin/python -m bigmodel launch ended my.toml --cluster c.toml --set training.steps=5 --code 1 --preflight
    exit
fi

# One task per rank; if one fails, srun ends the others. `ended` records why, and restarts them here, or
# requeues the job, as set in the cluster file.
options=--fresh
while :; do
    srun --kill-on-bad-exit=1 --cpus-per-task=12 --container-image=/images/bigmodel.sqsh --no-container-mount-home \
--container-mounts=/data:/data:ro,/runs:/runs '--container-workdir=/home/me/big model' \\
        python3 -m bigmodel launch exec my.toml --cluster c.toml --set training.steps=5 $options
    /venv/bin/python -m bigmodel launch ended my.toml --cluster c.toml --set training.steps=5 --code $? --in-place
    code=$?
    [ $code = 75 ] || exit $code
    options=''
done
"""

EFA = """\
#!/bin/bash
# Written by `bigmodel launch slurm`. `sbatch` of this file submits the run again.
#SBATCH --job-name=my
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --partition=p5
#SBATCH --output=/runs/my/logs/slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --comment=bigmodel

cd '/home/me/big model' || exit 1

# One task per rank; if one fails, srun ends the others. `ended` records why, and restarts them here, or
# requeues the job, as set in the cluster file.
options=--fresh
while :; do
    srun --kill-on-bad-exit=1 --container-image=docker://bigmodel:latest --no-container-mount-home \
--container-mounts=/fsx:/fsx --container-workdir=/fsx/bigmodel \\
        python3 -m bigmodel launch exec my.toml --cluster c.toml --set training.steps=5 $options
    /venv/bin/python -m bigmodel launch ended my.toml --cluster c.toml --set training.steps=5 --code $? --in-place
    code=$?
    [ $code = 75 ] || exit $code
    options=''
done
"""


@pytest.mark.parametrize(("name", "script"), [("slurm-infiniband", INFINIBAND), ("aws-efa", EFA)])
def test_the_sbatch_script_is_this_text(name: str, script: str) -> None:
    cluster = load_cluster(CLUSTERS / f"{name}.toml")
    workdir, overrides = Path("/home/me/big model"), ["training.steps=5"]
    job = Job(
        Path("my.toml"), Path("/runs/my"), workdir, cluster, Path("c.toml"), overrides, ["--fresh"], "/venv/bin/python"
    )
    assert render(job) == script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_defaults_render_to_the_least(tmp_path: Path) -> None:
    cluster = Cluster.model_validate(
        {
            "requeue": {"limit": 0},
            "restart": {"limit": 0},
            "slurm": {"signal_seconds": 0, "setup": ["ulimit -l unlimited"]},
        }
    )
    script = render(Job(Path("my.toml"), tmp_path, tmp_path, cluster, None, python="python3"))
    options = [line.split("--")[1].split("=")[0] for line in script.splitlines() if line.startswith("#SBATCH")]
    assert options == ["job-name", "nodes", "ntasks-per-node", "output", "open-mode", "no-requeue"]
    assert "\nulimit -l unlimited\n" in script
    assert "srun --kill-on-bad-exit=1 \\\n    python3 -m bigmodel launch exec my.toml\n" in script


def test_a_script_with_spares_keeps_its_allocation_and_leaves_bad_nodes_out(tmp_path: Path) -> None:
    cluster = Cluster.model_validate({"nodes": 4, "ranks_per_node": 2, "restart": {"spare_nodes": 1}})
    script = render(Job(Path("my.toml"), tmp_path, tmp_path, cluster, None, python="python3"))
    assert "#SBATCH --nodes=5\n" in script
    assert "#SBATCH --no-kill\n" in script
    words = "srun --kill-on-bad-exit=1 --nodes=4 --ntasks=8 ${excluded:+--exclude=$excluded}"
    assert f"    excluded=$(cat {tmp_path}/launch.excluded 2>/dev/null)\n    {words} \\\n" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_the_environment_of_a_rank_is_the_fabric_s_and_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
    topology = even_topology(["n1", "n2"], 8, "n1", 15001)
    place = {
        "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "NODE_RANK": "1",
        "MASTER_ADDR": "n1", "MASTER_PORT": "15001", "LAUNCH_HOSTS": "n1*8,n2*8",
    }  # fmt: skip
    efa = load_cluster(CLUSTERS / "aws-efa.toml").variables()
    assert launch_environment(topology, 9, efa) == {
        "FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1", "FI_EFA_SET_CUDA_SYNC_MEMOPS": "0",
        "NCCL_NET": "AWS Libfabric", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "FI_EFA_FORK_SAFE": "1", **place,
    }  # fmt: skip
    infiniband = load_cluster(CLUSTERS / "slurm-infiniband.toml").variables()
    assert launch_environment(topology, 9, infiniband) == {
        "NCCL_NET": "IB", "NCCL_IB_HCA": "mlx5", "NCCL_IB_TIMEOUT": "22", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "ib0", **place,
    }  # fmt: skip


# ---- exec, with what srun would have set

STEP = {
    "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_JOB_ID": "12", "MASTER_ADDR": "127.0.0.1",
}  # fmt: skip


def execute(folder: Path, *words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    run_file = folder / "run.toml"
    run_file.write_text(f"[run]\ndirectory = '{folder / 'run'}'\n")
    command, variables = [*LAUNCHER, "exec", str(run_file), *words], {**os.environ, **STEP, **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)


def test_checkpoints_are_set_aside_once_not_at_every_requeue(tmp_path: Path) -> None:
    first = execute(tmp_path, "--fresh", "--dry-run").stdout.splitlines()[0]
    again = execute(tmp_path, "--fresh", "--dry-run", SLURM_RESTART_COUNT="1").stdout.splitlines()[0]
    assert first.endswith(f"train {tmp_path}/run.toml --fresh")
    assert again.endswith(f"train {tmp_path}/run.toml")


def test_a_dry_run_shows_the_processors_of_a_rank(tmp_path: Path) -> None:
    (tmp_path / "cluster.toml").write_text("binding = 'cores'")
    step = {"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    words = ["--cluster", str(tmp_path / "cluster.toml"), "--dry-run"]
    first = execute(tmp_path, *words, **step).stdout.splitlines()[0]
    processors = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    assert f" taskset -c {processors} {shlex.quote(sys.executable)} -m bigmodel train " in first


def test_a_requeued_job_still_asks_for_its_new_plan(tmp_path: Path) -> None:
    """It may have been killed before the first checkpoint of the new plan; later, asking again changes nothing."""
    for environment in ({"SLURM_RESTART_COUNT": "1"}, {"TORCHELASTIC_RESTART_COUNT": "1"}):
        again = execute(tmp_path, "--new-plan", "--dry-run", **environment).stdout.splitlines()[0]
        assert again.endswith(f"train {tmp_path}/run.toml --new-plan")


def test_a_port_in_use_is_named_before_the_start(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        answer = execute(tmp_path, MASTER_PORT=str(port))
        (tmp_path / "cluster.toml").write_text(f"main_port = {port}\n")
        local = [*LAUNCHER, "local", str(tmp_path / "run.toml"), "--cluster", str(tmp_path / "cluster.toml")]
        other = subprocess.run(local, capture_output=True, text=True, timeout=60, check=False)
    for said in (answer, other):
        assert said.returncode == 2
        assert f"port {port} of 127.0.0.1 is in use" in said.stderr
        assert "set main_port in the cluster file, or MASTER_PORT, to a free port" in said.stderr
    assert not (tmp_path / "run" / "launch.json").exists()


def test_an_address_that_nobody_knows_is_named_before_the_start(tmp_path: Path) -> None:
    answer = execute(tmp_path, MASTER_ADDR="no-such-host.invalid")
    assert answer.returncode == 2
    assert "rank 0 runs on no-such-host.invalid, a name without an address here; set main_address" in answer.stderr
    assert not (tmp_path / "run" / "launch.json").exists()


def test_of_two_starts_at_once_the_second_leaves_no_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    take_start(run)  # its ranks have not come to the run's own lock yet
    record_launch(run, even_topology(["a"], 1, "a", 1), "local", launcher=True)
    before = (run / "events.jsonl").read_bytes(), (run / "launch.json").read_bytes()
    answer = execute(tmp_path)
    assert answer.returncode == 2
    assert f"run.directory = {run}: another run is using it now (local, rank 0 on" in answer.stderr
    assert ((run / "events.jsonl").read_bytes(), (run / "launch.json").read_bytes()) == before
    assert ended(run, Cluster(requeue=RequeueSettings(limit=0)), 2, False, {"SLURM_JOB_ID": "31"}) == 2
    assert [event["event"] for event in read_json_lines(run / "events.jsonl")] == ["launch", "start_refused"]
    assert [one.by for one in launches(read_json_lines(run / "events.jsonl"))] == ["local"]


def test_a_start_without_the_launcher_and_one_by_it_refuse_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_logs(tmp_path / "a")
    take_start(tmp_path / "a")  # its ranks still import
    with pytest.raises(UserError, match="another run is using it now"):
        claim(tmp_path / "a")
    monkeypatch.setenv("LAUNCH_HOSTS", "here*1")
    claim(tmp_path / "a")  # one of its ranks
    monkeypatch.delenv("LAUNCH_HOSTS")
    claim(tmp_path / "b")
    with pytest.raises(UserError, match="another run is using it now"):
        take_start(tmp_path / "b")


def as_nobody(action: Callable[[], object]) -> str:
    """What the action returns or raises in a process of another user."""
    here, there = os.pipe()
    if not (child := os.fork()):
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            answer = str(action())
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(there, answer.encode())
        os._exit(0)
    os.close(there)
    with open(here) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_sees_the_status_of_a_run_and_can_neither_stop_it_nor_start_there() -> None:
    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        run.chmod(0o755)
        make_logs(run)
        take_start(run)
        record_launch(run, even_topology(["a"], 1, "a", 1), "local", launcher=True)
        claim_of_rank = open(run / "lock", "a")  # noqa: SIM115
        fcntl.flock(claim_of_rank, fcntl.LOCK_EX)
        assert status(run)["state"] == "running"
        before = (run / "events.jsonl").read_bytes()
        assert as_nobody(lambda: status(run)["state"]) == "running"
        assert f"process {os.getpid()} is another user's, who alone can stop it" in as_nobody(lambda: stop(run, False))
        assert as_nobody(lambda: take_start(run)).startswith(f"UserError: run.directory = {run}: another run is using")
        claim_of_rank.close()
        denied = f"UserError: run.directory = {run}: cannot be written: Permission denied; choose another"
        assert as_nobody(lambda: take_start(run)) == denied
        assert as_nobody(lambda: claim(run)) == denied
        assert (run / "events.jsonl").read_bytes() == before


def test_a_run_directory_in_use_is_refused_by_rank_zero(tmp_path: Path) -> None:
    claim(tmp_path / "run")
    answer = execute(tmp_path)
    assert answer.returncode == 2
    assert f"run.directory = {tmp_path / 'run'}: another run is using it now" in answer.stderr


# ---- the record


def test_starts_and_their_causes_are_read_from_the_events() -> None:
    start = {"event": "launch", "time": 1.0, "by": "slurm", "job": "7", "restart": 0}
    events = [
        {"event": "start", "time": 0.5, "step": 0},  # by another launcher, before
        start,
        {"event": "start", "time": 1.5, "step": 0},
        {"event": "launch_ended", "cause": "failed", "code": 137, "detail": "rank 1", "step": 6},
        {**start, "restart": 1},
        {"event": "stopped", "step": 9},
        {"event": "launch_ended", "cause": "failed", "code": 143, "detail": "", "step": 9},  # srun's race
        {**start, "restart": 2},
        {**start, "restart": 3, "reached": 17},
        {"event": "stop_requested"},
        {"event": "finished", "step": 20},
        {**start, "restart": 4},
    ]
    found = launches(events)
    assert [(one.restart, one.cause, one.step) for one in found] == [
        (0, "lost", 0), (0, "failed", 6), (1, "stopped", 9), (2, "lost", 17), (3, "finished", 20), (4, "", 0)
    ]  # fmt: skip
    assert [one.by for one in found] == ["", *["slurm"] * 5]
    assert found[1].detail == "rank 1"
    assert [one.stop_requested for one in found] == [False, False, False, False, True, False]


def test_a_watchdog_s_word_for_a_hang_is_kept(tmp_path: Path) -> None:
    """It says no more than the cause; the launcher's own word comes after it."""
    record_event(tmp_path, "launch", by="slurm", job="31", restart=0, world_size=2, hosts=["a"])
    record_event(tmp_path, "launch_ended", cause="hang")
    cluster = Cluster(requeue=RequeueSettings(limit=0))
    assert ended(tmp_path, cluster, 137, False, {"SLURM_JOB_ID": "31"}) == 1
    (found,) = launches(read_json_lines(tmp_path / "events.jsonl"))
    assert (found.cause, found.detail) == ("hang", "srun ended with 137")


def test_the_trainers_word_for_a_bad_device_is_kept(tmp_path: Path) -> None:
    """srun ends with the code of any rank; the rank and host come from the trainer."""
    record_event(tmp_path, "launch", by="slurm", job="31", restart=0, world_size=2, hosts=["a"])
    record_event(tmp_path, "bad_device", step=7, detail="rank 1 on a holds other bits", ranks=[1], hosts=["a"])
    assert ended(tmp_path, Cluster(requeue=RequeueSettings(limit=0)), 143, False, {"SLURM_JOB_ID": "31"}) == 5
    (found,) = launches(read_json_lines(tmp_path / "events.jsonl"))
    assert (found.cause, found.detail, found.step) == ("bad_device", "rank 1 on a holds other bits", 7)


def history(*ends: tuple[str, int], stop: bool = False) -> list[Launch]:
    return [Launch(0, "slurm", "7", n, cause, "", step, stop) for n, (cause, step) in enumerate(ends)]


@pytest.mark.parametrize(
    ("ends", "code", "requeue", "reason"),
    [
        ([("finished", 20)], 143, False, "the run is complete"),
        ([("stopped", 9)], 3, True, "it resumes from its last checkpoint"),  # a time limit, or a preemption
        ([("user_error", 0)], 2, False, "see the error message"),
        ([("", 0)], 2, False, "see the error message"),
        ([("failed", 5)], 1, True, "it resumes"),
        ([("failed", 5), ("failed", 5), ("failed", 4)], 1, True, "it resumes"),
        (
            [("failed", 5), ("failed", 5), ("failed", 4), ("failed", 5)],
            1,
            False,
            "more than requeue.no_progress_limit = 2",
        ),
        ([("failed", 5), ("failed", 5), ("failed", 4), ("failed", 6)], 1, True, "it resumes"),
        (
            [("failed", 0), ("lost", 0), ("failed", 0)],
            1,
            False,
            "requeue.no_progress_limit = 2 failures in a row at step 0",
        ),
        ([("hang", 5)], 1, True, "it resumes"),
        ([("failed", 5), *[("hang", 5)] * 3], 1, False, "more than requeue.no_progress_limit = 2"),
        ([("stopped", 5)] * 4, 3, True, "it resumes"),
        ([("stopped", 5)] * 6, 3, False, "requeue.limit = 5 is reached"),
    ],
)
def test_the_requeue_policy(ends: list[tuple[str, int]], code: int, requeue: bool, reason: str) -> None:
    decision = decide(history(*ends), code, RequeueSettings(limit=5, no_progress_limit=2))
    assert decision.requeue == requeue
    assert reason in decision.reason


def test_a_run_that_was_told_to_stop_is_not_requeued() -> None:
    decision = decide(history(("stopped", 5), stop=True), 3, RequeueSettings())
    assert decision == Decision("stopped", False, "a stop was requested")


@pytest.mark.parametrize(("code", "ended_with"), [(2, 2), (0, 1), (137, 1)])
def test_a_job_that_never_came_to_rank_zero_is_recorded_too(tmp_path: Path, code: int, ended_with: int) -> None:
    """Without SLURM's programs at hand: the policy here says never to requeue."""
    cluster = Cluster(requeue=RequeueSettings(limit=0))
    assert ended(tmp_path, cluster, code, False, {"SLURM_JOB_ID": "31", "SLURM_RESTART_COUNT": "2"}) == ended_with
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e.get("job"), e.get("restart"), e.get("cause")) for e in events] == [
        ("launch", "31", 2, None),
        ("launch_ended", None, None, "user_error" if code == 2 else "failed"),
        ("decided", None, None, None),
    ]
    assert events[-1]["action"] == "end"


def test_the_end_of_a_job_is_told_inside_of_it_only(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="SLURM_JOB_ID is not set"):
        ended(tmp_path / "run", Cluster(), 1, False, {})
    assert not (tmp_path / "run").exists()


# ---- status and stop of what runs here


def test_the_status_of_a_run_follows_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    topology = even_topology(["a", "b"], 1, "a", 1)
    record_launch(tmp_path, topology, "ssh", launcher=True)
    assert status(tmp_path)["state"] == "starting"  # this process lives, and holds no lock yet
    record = json.loads((tmp_path / "launch.json").read_text())
    assert record["pid_started"] == process_start(os.getpid()) > 0
    (tmp_path / "launch.json").write_text(json.dumps({**record, "pid_started": 1}))
    assert status(tmp_path)["state"] == "lost"  # another process has its number now
    record_end(tmp_path, "failed", 1, "node b lost its connection")
    record_launch(tmp_path, topology, "ssh", launcher=True)
    line = {"kind": "step", "step": 7, "loss": 2.5, "positions": 800, "step_seconds": 0.5, "time": time.time()}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n{torn")
    found = status(tmp_path)
    assert (found["step"], found["loss"], found["tokens_per_second"]) == (7, 2.5, 1600)
    assert [(r["after"], r["detail"], r["step"]) for r in found["restarts"]] == [
        ("failed", "node b lost its connection", 0)
    ]
    record_launch(tmp_path, topology, "ssh", launcher=True)  # after kill -9 of the launcher
    assert [(r["after"], r["step"]) for r in status(tmp_path)["restarts"]] == [("failed", 0), ("lost", 7)]
    record_event(tmp_path, "rank_hangs", rank=0, host="a", how="hangs", phase="", step=6)
    record_event(tmp_path, "rank_goes_on", rank=0, host="a")
    record_event(tmp_path, "rank_hangs", rank=1, host="b", how="was stopped (SIGSTOP)", phase="forward", step=8)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({**line, "slow_rank": [1, 0.35]}) + "\n")
    assert (status(tmp_path)["hanging_ranks"], status(tmp_path)["slow_rank"]) == ([], None)  # it does not run
    claim(tmp_path)
    found = status(tmp_path)
    assert [(one["rank"], one["phase"]) for one in found["hanging_ranks"]] == [(1, "forward")]
    print_status(found)
    shown = capsys.readouterr().out
    assert re.search(r"slow +rank 1 on b works 35% longer than the others +\n", shown)
    assert re.search(r"hangs +rank 1 on b was stopped \(SIGSTOP\) in forward of step 8, 0 s ago +\n", shown)
    record_event(tmp_path, "finished", step=7)
    assert status(tmp_path)["state"] == "ending"


def test_the_status_of_a_start_without_the_launcher_has_the_world_of_the_trainer(tmp_path: Path) -> None:
    record_event(tmp_path, "start", step=0, world_size=3)
    assert (status(tmp_path)["hosts"], status(tmp_path)["ranks"]) == ([], 0)
    (tmp_path / "world.json").write_text(json.dumps({"ranks": [{"host": "a"}, {"host": "a"}, {"host": "b"}]}))
    assert (status(tmp_path)["hosts"], status(tmp_path)["ranks"]) == (["a", "b"], 3)
    record_event(tmp_path, "finished", step=7)
    record_launch(tmp_path, even_topology(["c"], 1, "c", 1), "local", launcher=True)
    assert (status(tmp_path)["hosts"], status(tmp_path)["ranks"]) == (["c"], 1)


def call(*words: str, code: int) -> str:
    done = subprocess.run(
        [*LAUNCHER, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stdout
    assert "Traceback" not in done.stdout
    return done.stdout


def test_what_cannot_be_stopped_or_shown_is_said(tmp_path: Path) -> None:
    assert "not a run directory" in call("status", str(tmp_path), code=2)
    assert "neither a run directory nor a run file" in call("status", str(tmp_path / "none"), code=2)
    record_launch(tmp_path, even_topology(["a"], 1, "a", 1), "local", launcher=True)
    assert "no run is using it now" in call("stop", str(tmp_path), code=2)
    claim(tmp_path)  # this process is the run now
    record = json.loads((tmp_path / "launch.json").read_text())
    for change, message in (
        ({"host": "elsewhere"}, "was started on elsewhere; run this there"),
        ({"pid_started": 1}, "the run is starting; try again in a moment"),
        ({"job": "5"}, "belongs to job 5, which squeue does not list here"),
    ):
        (tmp_path / "launch.json").write_text(json.dumps({**record, **change}))
        assert message in call("stop", str(tmp_path), code=2)
    assert "stop_requested" not in (tmp_path / "events.jsonl").read_text()


def test_logs_are_merged_with_their_nodes_and_ranks(tmp_path: Path) -> None:
    record_launch(tmp_path, even_topology(["a", "b"], 1, "a", 1), "slurm")
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "slurm-7.out").write_text("step 1\n")  # rank 0's lines again, and SLURM's
    assert f"no rank has started; see {logs}/slurm-7.out" in call("logs", str(tmp_path), code=0)
    (logs / "a-rank-0.log").write_text("step 1\rstep 2\nend\n")
    (logs / "n-1-rank-10.log").write_text("ten\n")
    (logs / "n-1-rank-2.log").write_text("two\nlast line without its end")
    shown = call("logs", str(tmp_path), code=0).splitlines()
    assert shown == [
        "[a rank 0] step 1", "[a rank 0] step 2", "[a rank 0] end", "[n-1 rank 2] two", "[n-1 rank 10] ten"
    ]  # fmt: skip
    assert call("logs", str(tmp_path), "--rank", "10", "--lines", "1", code=0) == "[n-1 rank 10] ten\n"
    follow = subprocess.Popen([*LAUNCHER, "logs", str(tmp_path), "--follow"], stdout=subprocess.PIPE, text=True)
    assert [follow.stdout.readline() for _ in range(5)][-1] == "[n-1 rank 10] ten\n"
    with open(logs / "n-1-rank-2.log", "a") as file:
        file.write("!\n")
    assert follow.stdout.readline() == "[n-1 rank 2] last line without its end!\n"
    follow.send_signal(2)
    assert follow.wait(10) == 0
