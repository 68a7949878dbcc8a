"""The ways to start a run without a scheduler, on real parts: ssh to real sshd, torchrun between network namespaces."""

import contextlib
import getpass
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bigmodel.launcher.network import free_port
from bigmodel.launcher.record import launches
from bigmodel.run_directory import read_json, read_json_lines
from tests.support.launched import (
    LAUNCHER,
    assert_logged,
    assert_no_orphans,
    assert_same_training,
    left_of,
    ranks_of,
    recording,
    steps,
    steps_of,
    train_reference,
    wait_for_step,
)
from tests.support.netns import Machines, Sshd, missing_namespaces, missing_ssh
from tests.support.tiny_run import write_run

REPOSITORY = Path(__file__).parents[2]
NO_SSH, NO_NAMESPACES = missing_ssh(), missing_namespaces()
needs_ssh = pytest.mark.skipif(bool(NO_SSH), reason=NO_SSH)
needs_namespaces = pytest.mark.skipif(bool(NO_NAMESPACES), reason=NO_NAMESPACES)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[int, dict[str, Any]]:
    return train_reference(tmp_path_factory.mktemp("reference"), shards)


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """One sshd that answers as two hosts: 127.0.0.1 and 127.0.0.2. Nobody answers at 127.0.0.3."""
    server = Sshd(tmp_path_factory.mktemp("ssh"), free_port(), ["127.0.0.1", "127.0.0.2"])
    yield server
    server.stop()


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    machines = Machines(3)
    try:
        machines.start()
        yield machines
    finally:
        machines.stop()


@pytest.fixture(autouse=True)
def _clean_up(tmp_path: Path) -> Iterator[None]:
    """A test that fails must not leave processes to the ones after it."""
    yield
    for line in left_of(tmp_path / "run"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(line.partition(":")[0]), signal.SIGKILL)


def write_files(folder: Path, hosts: list[str], options: list[str], more: str = "") -> Path:
    """A host file and a cluster file that names it."""
    (folder / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))
    cluster = folder / "cluster.toml"
    cluster.write_text(
        f"main_port = {free_port()}\n{more}\n[ssh]\nhostfile = 'hosts'\noptions = {json.dumps(options)}\n"
    )
    return cluster


def launch(*words: str, prefix: list[str] | None = None) -> "subprocess.Popen[str]":
    return start_process([*(prefix or []), *LAUNCHER, *words])


def start_process(command: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command,
        env={**os.environ, **recording(dict(os.environ))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def output_of(process: "subprocess.Popen[str]", code: int) -> str:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == code, output
    return output


# ---- ssh


@needs_ssh
def test_a_run_over_ssh_saves_survives_kill_dash_nine_and_equals_the_local_run(
    sshd: Sshd, tmp_path: Path, shards: Path, reference: dict[int, dict[str, Any]]
) -> None:
    """Interrupted once, its launcher killed once with -9, it retraces the undisturbed run on two nodes."""
    run_file, run = write_run(tmp_path, shards), tmp_path / "run"
    me = getpass.getuser()  # ssh wants it; rank 0's address and the names of logs are without it
    cluster = write_files(tmp_path, [f"{me}@127.0.0.1", f"{me}@127.0.0.2"], sshd.options)
    words = ["ssh", str(run_file), "--cluster", str(cluster)]

    process = launch(*words, *steps())
    wait_for_step(run, 3)
    assert len(ranks_of(run)) == 2
    process.send_signal(signal.SIGINT)
    output = output_of(process, 3)
    assert "SIGINT: asked 2 node(s) to save and stop" in output
    assert "stopped at step" in output
    stopped = max(steps_of(run))
    assert_no_orphans(run)

    process = launch(*words, *steps())
    wait_for_step(run, stopped + 3)
    process.kill()
    process.communicate()
    assert_no_orphans(run)

    output = output_of(launch(*words, *steps()), 0)
    assert "resuming at step" in output
    assert_same_training(run, reference)
    history = launches(read_json_lines(run / "events.jsonl"))
    assert [start.by for start in history] == ["ssh"] * 3
    assert [start.cause for start in history][::2] == ["stopped", "finished"]
    assert history[1].cause in ("lost", "stopped")  # its ranks may have saved while they were being ended
    assert read_json(run / "launch.json")["hosts"] == ["127.0.0.1", "127.0.0.2"]
    assert_logged(run, ["127.0.0.1", "127.0.0.2"])
    assert_no_orphans(run)


@needs_ssh
@pytest.mark.long
def test_a_spare_takes_the_place_of_a_host_that_is_gone(
    sshd: Sshd, tmp_path: Path, shards: Path, reference: dict[int, dict[str, Any]]
) -> None:
    """127.0.0.4 has an sshd of its own, which dies with its connections; 127.0.0.2 is the spare."""
    run_file, run = write_run(tmp_path, shards), tmp_path / "run"
    own = Sshd(Path(sshd.options[1]).parent, int(sshd.options[3]), ["127.0.0.4"])
    hosts = ["127.0.0.1", "127.0.0.4", "127.0.0.2"]
    cluster = write_files(tmp_path, hosts, sshd.options, "[restart]\nspare_nodes = 1\n")
    process = launch("ssh", str(run_file), "--cluster", str(cluster), *steps())
    try:
        wait_for_step(run, 9)
        assert sorted(ranks_of(run)) == [0, 1]
        for one in [*psutil.Process(own.process.pid).children(recursive=True), own.process]:
            one.kill()
        output = output_of(process, 0)
    finally:
        process.kill()
        own.stop()
    assert "node 127.0.0.4 lost its connection; the other nodes were ended" in output
    assert "launcher: restart: failed: it resumes from its last checkpoint; 127.0.0.4 left out for a spare" in output
    assert read_json(run / "launch.json")["hosts"] == ["127.0.0.1", "127.0.0.2"]
    assert_same_training(run, reference)
    assert_no_orphans(run)


@needs_ssh
@needs_namespaces
@pytest.mark.long
def test_a_spare_takes_the_place_of_the_host_of_rank_0_that_was_cut_off(
    machines: Machines, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, shards: Path, reference: dict
) -> None:
    """The rank there lives on, and holds the run directory until its collective timeout; nobody else writes there."""
    run_file, run = write_run(tmp_path, shards), tmp_path / "run"
    folder, port = tmp_path_factory.mktemp("sshds"), free_port()
    servers = [Sshd(folder, port, [one], machines.inside(number)) for number, one in enumerate(machines.addresses)]
    first, second, spare = machines.addresses
    cluster = write_files(tmp_path, machines.addresses, servers[0].options, "[restart]\nspare_nodes = 1\n")
    limit = ["--set", "training.collective_timeout_seconds=40"]
    process = launch("ssh", str(run_file), "--cluster", str(cluster), *steps(), *limit)
    try:
        wait_for_step(run, 9)
        machines.cut_off(0)
        output = output_of(process, 0)
        machines.join(0)
        assert_no_orphans(run)
    finally:
        process.kill()
        for server in servers:
            server.stop()
    assert f"{first} left out for a spare" in output
    assert read_json(run / "launch.json")["hosts"] == [spare, second]
    assert_same_training(run, reference)
    history = launches(read_json_lines(run / "events.jsonl"))
    assert [(one.cause, one.decided) for one in history] == [("failed", "restart"), ("finished", "end")]


@needs_ssh
def test_a_host_that_does_not_answer_is_named_before_anything_starts(sshd: Sshd, tmp_path: Path, shards: Path) -> None:
    run_file, run = write_run(tmp_path, shards), tmp_path / "run"
    cluster = write_files(tmp_path, ["127.0.0.1", "127.0.0.3"], sshd.options)
    output = output_of(launch("ssh", str(run_file), "--cluster", str(cluster)), 2)
    assert "nothing was started: 127.0.0.3: " in output
    assert "Connection refused" in output
    assert "127.0.0.1: " not in output
    assert not (run / "events.jsonl").exists()
    assert left_of(run) == []


@needs_ssh
def test_an_address_of_rank_0_that_a_host_does_not_know_is_named_before_anything_starts(
    sshd: Sshd, tmp_path: Path, shards: Path
) -> None:
    run_file, run = write_run(tmp_path, shards), tmp_path / "run"
    cluster = write_files(tmp_path, ["127.0.0.1", "127.0.0.2"], sshd.options)
    cluster.write_text("main_address = 'nowhere.invalid'\n" + cluster.read_text())
    output = output_of(launch("ssh", str(run_file), "--cluster", str(cluster)), 2)
    assert output.splitlines()[-1] == (
        "bigmodel: nothing was started: rank 0 runs on nowhere.invalid, a name without an address on 127.0.0.1, "
        "127.0.0.2; set main_address in the cluster file to an address that all hosts can reach"
    )
    assert not (run / "events.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "3"], "3 ranks do not divide over 2 nodes; set 2 or 4 ranks"),
        (["--ranks", "4"], "2 ranks on a node, but it has 1 GPU(s)"),
        (["--set", "training.stepz=1"], "training.stepz: unknown setting"),
    ],
)
def test_a_world_that_cannot_be_is_refused(tmp_path: Path, shards: Path, words: list[str], message: str) -> None:
    run_file = write_run(tmp_path, shards)
    cluster = write_files(tmp_path, ["a", "b"], [])
    for way in ("ssh", "torchrun"):
        output = output_of(launch(way, str(run_file), "--cluster", str(cluster), *words), 2)
        assert message in output
        assert "Traceback" not in output


def test_a_dry_run_prints_every_rank_and_starts_nothing(tmp_path: Path, shards: Path) -> None:
    run_file = write_run(tmp_path, shards)
    cluster = write_files(tmp_path, ["a", "b"], [], "environment = { NCCL_DEBUG = 'WARN' }")
    output = output_of(launch("ssh", str(run_file), "--cluster", str(cluster), "--dry-run"), 0)
    assert [line.split(" ")[0] for line in output.splitlines()][:2] == ["NCCL_DEBUG=WARN"] * 2
    assert "RANK=1 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 NODE_RANK=1 MASTER_ADDR=a" in output
    assert "# CUDA_VISIBLE_DEVICES: all GPUs of the node" in output
    assert "# binding: device, among the processors of each node" in output
    assert "# rank 1 host b node 1 local 0" in output
    assert not (tmp_path / "run").exists()


# ---- torchrun


def test_torchrun_s_command_is_printed_for_each_node(tmp_path: Path, shards: Path) -> None:
    run_file = write_run(tmp_path, shards)
    cluster = write_files(tmp_path, ["a", "b"], [])
    first, second = [output_of(launch("torchrun", str(run_file), "--cluster", str(cluster)), 0) for _ in range(2)]
    assert first == second  # as each node's administrator will see it
    lines = first.splitlines()
    assert (lines[0], lines[2]) == ("# on a:", "# on b:")
    for node, line in enumerate(lines[1::2]):
        assert line.startswith(f"{shlex.quote(sys.executable)} -m torch.distributed.run --nnodes=2 --node-rank={node} ")
        assert "--nproc-per-node=1 --master-addr=a --master-port=" in line
        assert line.endswith(f"--rdzv-backend=static --module bigmodel launch exec {run_file} --cluster {cluster}")
    wrong = output_of(launch("torchrun", str(run_file), "--cluster", str(cluster), "--node-rank", "2"), 2)
    assert "--node-rank 2: there are 2 nodes, counted from 0" in wrong
    cluster.write_text("main_address = 'nowhere.invalid'\n" + cluster.read_text())
    lost = output_of(launch("torchrun", str(run_file), "--cluster", str(cluster), "--node-rank", "1"), 2)
    assert lost.startswith("bigmodel: rank 0 runs on nowhere.invalid, a name without an address here; set main_address")


@needs_namespaces
def test_torchrun_between_machines_with_addresses_of_their_own(
    machines: Machines, tmp_path: Path, shards: Path, reference: dict[int, dict[str, Any]]
) -> None:
    """This machine's name is a loopback address, as on Debian: gloo finds the right interface all the same.

    torchrun of node 1 is killed with -9, which by itself would leave its rank running; then the run goes on.
    """
    run_file, run = write_run(tmp_path, shards), tmp_path / "run"
    cluster = write_files(tmp_path, machines.addresses[:2], [])
    words = ["torchrun", str(run_file), "--cluster", str(cluster), *steps()]

    nodes = [launch(*words, "--node-rank", str(node), prefix=machines.inside(node)) for node in range(2)]
    wait_for_step(run, 5)
    assert {rank.environ()["MASTER_ADDR"] for rank in ranks_of(run).values()} == {machines.addresses[0]}
    nodes[1].kill()
    for node in nodes:
        node.communicate(timeout=120)
    assert nodes[0].returncode != 0
    assert_no_orphans(run)
    script = tmp_path / "torchrun.sh"  # the ready one, adapted: it does the same
    text = (REPOSITORY / "configs" / "clusters" / "torchrun.sh").read_text()
    changes = [("python -m", f"{shlex.quote(sys.executable)} -m"), ("--nproc-per-node=8", "--nproc-per-node=1")]
    changes += [("=worker-1", f"={machines.addresses[0]}"), ("exec my.toml", f"exec {run_file} {' '.join(steps())}")]
    for before, after in changes:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    script.write_text(text)
    again = [machines.inside(node, "bash", str(script), str(node)) for node in range(2)]
    printed = [output_of(node, 0) for node in [start_process(command) for command in again]]
    assert "resuming at step" in printed[0]
    assert_same_training(run, reference)
    launch_record = read_json(run / "launch.json")
    assert (launch_record["by"], launch_record["main_address"]) == ("torchrun", machines.addresses[0])
    assert_logged(run, [os.uname().nodename] * 2)
    assert_no_orphans(run)


@needs_namespaces
def test_gloo_gets_the_interface_that_leads_to_the_main_address(machines: Machines) -> None:
    program = (
        "import sys; from bigmodel.launcher.network import *; print(*map(interface_towards, sys.argv[1:]), sep=',')"
    )
    addresses = [machines.addresses[0], machines.addresses[2], "127.0.0.1", "192.0.2.1"]
    command = machines.inside(0, sys.executable, "-c", program, *addresses)
    assert output_of(start_process(command), 0) == "eth0,eth0,,\n"  # itself, another, loopback, no route


# ---- preflight


@needs_ssh
@needs_namespaces
def test_preflight_names_the_machine_behind_a_slow_link(
    machines: Machines, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, shards: Path
) -> None:
    """Three machines, one of which sends at 40 Mbit/s and has another version of the data."""
    run_file, run = write_run(tmp_path, shards), tmp_path / "run"
    folder, port = tmp_path_factory.mktemp("sshds"), free_port()
    servers = [
        Sshd(folder, port, [address], machines.inside(number)) for number, address in enumerate(machines.addresses)
    ]
    machines.slow_down(2, "40mbit")
    any_speed = "[check.expect]\nmatmul_tflops = 1e-4\n"  # links are what counts here; other tests may be running
    cluster = write_files(tmp_path, machines.addresses, servers[0].options, any_speed)
    try:
        output = output_of(launch("check", str(run_file), "--cluster", str(cluster)), 1)
    finally:
        for server in servers:
            server.stop()
    first, second, slow = machines.addresses
    assert f"exclude: {slow}\n" in output
    assert f"{slow}: network: " in output
    assert "to its best peer, expected" in output
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.startswith("10.")}
    assert rows[first] == rows[second] == ["ok", "ok", "-", "ok", "ok", "ok", "ok", "ok", "ok", "ok"]
    result = read_json(run / "preflight.json")
    assert result["exclude"] == [slow]
    links = result["reports"][first]["network"]["links"]
    assert set(links) == {"1", "2"}
    assert links["2"][1] < 8e6 < links["2"][0]  # bytes per second from and to the slow machine
    assert abs(result["reports"][slow]["network"]["clock_skew_seconds"]) < 1
    assert not (run / "preflight.token").exists()
