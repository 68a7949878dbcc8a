"""The launcher's commands: what they refuse before anything starts, what a dry run prints, and stopping a run."""

import os
import resource
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from bigmodel.launcher.execute import node_map
from bigmodel.launcher.record import launches
from bigmodel.launcher.topology import Topology
from bigmodel.run_directory import read_json_lines
from tests.support.launched import LAUNCHER as COMMAND
from tests.support.launched import left_of, steps, wait_for_step
from tests.support.tiny_run import write_run

REPOSITORY = Path(__file__).parents[2]
CLUSTERS = REPOSITORY / "configs" / "clusters"


def launch_command(*arguments: str, **options: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "launcher", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)


def write_run_file(folder: Path, extra: str = "") -> Path:
    file = folder / "run file.toml"
    file.write_text(f"[run]\ndirectory = '{folder / 'run'}'\n{extra}")
    return file


def test_a_dry_run_prints_a_line_per_rank_that_a_shell_could_run(tmp_path: Path) -> None:
    file = write_run_file(tmp_path)
    answer = launch_command("local", str(file), "--ranks", "2", "--set", "training.steps=120", "--dry-run")
    assert answer.returncode == 0, answer.stderr
    *commands, first, second = answer.stdout.splitlines()
    here = os.uname().nodename
    assert (first, second) == (f"# rank 0 host {here} node 0 local 0", f"# rank 1 host {here} node 0 local 1")
    lines = [shlex.split(line) for line in commands]
    assert [line[0] for line in lines] == ["RANK=0", "RANK=1"]
    expected = [sys.executable, "-m", "bigmodel", "train", str(file), "--set", "training.steps=120"]
    assert all(line[-len(expected) :] == expected for line in lines)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("extra", "arguments", "message"),
    [
        ("[training]\nstepz = 5", [], "training.stepz: unknown setting; did you mean 'steps'?"),
        ("", ["--ranks", "-1"], "--ranks -1: at least 1 rank is needed"),
        ("", ["--set", "training.steps=0"], "training.steps = 0"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    tmp_path: Path, extra: str, arguments: list[str], message: str
) -> None:
    file = write_run_file(tmp_path, extra)
    answer = launch_command("local", str(file), *arguments)
    assert answer.returncode == 2
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr
    assert list(tmp_path.iterdir()) == [file]


def test_a_world_that_the_deepspeed_json_excludes_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"gradient_accumulation_steps": 2}')
    file = write_run_file(tmp_path, "[training]\nglobal_batch_size = 8\ndeepspeed = 'ds.json'\n")
    answer = launch_command("local", str(file), "--ranks", "3")
    assert answer.returncode == 2
    assert answer.stderr.startswith("launcher: 3 ranks: ")
    assert "gradient_accumulation_steps" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "run").exists()


def test_nodes_too_small_for_ranks_that_share_experts_are_refused_before_anything_starts(tmp_path: Path) -> None:
    file = write_run_file(tmp_path, "[model.experts]\ncount = 4\n[training]\nexpert_parallel_ranks = 4\n")
    (tmp_path / "cluster.toml").write_text("nodes = 2\nranks_per_node = 2\n[slurm]\npartition = 'p'\n")
    answer = launch_command("slurm", str(file), "--cluster", str(tmp_path / "cluster.toml"), "--dry-run")
    assert answer.returncode == 2
    assert answer.stderr.startswith("launcher: 4 ranks: training.expert_parallel_ranks = 4 with 2 ranks on a node")


def test_a_vocabulary_that_tensor_parallel_ranks_cannot_divide_is_refused_before_anything_starts(
    tmp_path: Path, shards: Path
) -> None:
    shared = ["--set", "training.tensor_parallel_ranks=2", "--set", "model.vocabulary_multiple=100001"]
    answer = launch_command("local", str(write_run(tmp_path, shards)), "--ranks", "2", *shared)
    assert answer.returncode == 2
    assert answer.stderr.startswith("launcher: 2 ranks: training.tensor_parallel_ranks = 2 does not divide the 100001")
    assert not (tmp_path / "run").exists()


def test_a_run_is_stopped_from_its_directory_and_refuses_a_second_one(tmp_path: Path, shards: Path) -> None:
    run_file, run = write_run(tmp_path, shards), tmp_path / "run"
    command = [*COMMAND, "local", str(run_file), *steps(1_000_000)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_step(run, 3)
    second = launch_command("local", str(run_file))
    assert second.returncode == 2
    assert f"another run is using it now (local, rank 0 on {os.uname().nodename}); stop it" in second.stderr
    assert "state       running" in launch_command("status", str(run)).stdout
    stopped = launch_command("stop", str(run_file))
    assert f"asked process {first.pid} on {os.uname().nodename} to save and stop" in stopped.stdout
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 3
    assert "stopped at step" in output
    [history] = launches(read_json_lines(run / "events.jsonl"))
    assert (history.by, history.cause, history.stop_requested) == ("local", "stopped", True)
    assert left_of(run) == []


def test_a_run_that_torchrun_started_is_stopped_from_its_directory_too(tmp_path: Path, shards: Path) -> None:
    run_file, run = write_run(tmp_path, shards), tmp_path / "run"
    words = ["--standalone", "--nproc-per-node", "2", "-m", "bigmodel", "train", str(run_file), *steps(1_000_000)]
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        wait_for_step(run, 3)
        stopped = launch_command("stop", str(run))
        assert "to save and stop" in stopped.stdout, stopped.stderr
        output, _ = process.communicate(timeout=120)
    assert "stopped at step" in output
    assert [*read_json_lines(run / "metrics.jsonl")][-1]["ending"] == "stopped"


def test_a_run_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    file = write_run_file(tmp_path)
    (tmp_path / "run").write_text("a file where the folder should be")
    answer = launch_command("local", str(file))
    assert answer.returncode == 2
    assert f"run.directory = {tmp_path / 'run'}: cannot make" in answer.stderr


@pytest.mark.parametrize("module", ["launcher", "bigmodel launch"])
def test_a_full_disk_is_told_by_the_launcher_too(tmp_path: Path, module: str) -> None:
    file = write_run_file(tmp_path)
    words = [sys.executable, "-m", *module.split(), "local", str(file), "--ranks", "1"]
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (0, 0))
    answer = subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY, preexec_fn=full, check=False)
    assert answer.returncode == 2
    assert f"{tmp_path}/run/launch.json: File too large; free some space, or raise the quota" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_dry_run_refuses_what_the_start_would(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"gradient_accumulation_steps": 2}')
    file = write_run_file(tmp_path, "[training]\nglobal_batch_size = 8\ndeepspeed = 'ds.json'\n")
    (tmp_path / "cluster.toml").write_text("nodes = 3\nranks_per_node = 1\n[slurm]\npartition = 'p'\n")
    for words in (
        ["local", str(file), "--ranks", "3"],
        ["slurm", str(file), "--cluster", str(tmp_path / "cluster.toml")],
    ):
        answer = launch_command(*words, "--dry-run")
        assert answer.returncode == 2, answer.stdout
        assert answer.stderr.startswith("launcher: 3 ranks: ")
        assert "gradient_accumulation_steps" in answer.stderr
        assert answer.stdout == ""


def test_a_dry_run_of_128_ranks_prints_one_command_and_a_line_per_node(tmp_path: Path) -> None:
    file = write_run_file(tmp_path, "[training]\nglobal_batch_size = 128\n")
    answer = launch_command("slurm", str(file), "--cluster", str(CLUSTERS / "slurm-infiniband.toml"), "--dry-run")
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert sum(" WORLD_SIZE=128 " in f" {line} " for line in lines) == 1
    assert [line for line in lines if line.startswith("# node ")] == [
        f"# node {node} host node{node} ranks {8 * node}-{8 * node + 7}" for node in range(16)
    ]


def test_a_slurm_cluster_is_drawn_before_it_has_names() -> None:
    answer = launch_command("show", "--cluster", str(CLUSTERS / "slurm-infiniband.toml"))
    assert answer.returncode == 0, answer.stderr
    assert "128 ranks on 16 nodes" in answer.stdout
    assert "example: the job's allocation" in answer.stdout
    assert "node15 120-127" in answer.stdout


def test_ranks_are_told_in_runs() -> None:
    assert node_map(Topology(("a", "b"), (0, 0, 1, 0, 1), "a", 1)) == [
        "node 0 host a ranks 0-1,3", "node 1 host b ranks 2,4",
    ]  # fmt: skip


def test_the_launcher_never_imports_torch() -> None:
    code = "import sys, bigmodel.launcher.__main__; print({'torch', 'deepspeed', 'streaming'} & set(sys.modules))"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )
    assert answer.stdout.strip() == "set()"
