"""tools.ablate as users start it: two variants and two seeds, killed on the way, on this machine and under SLURM."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from bigmodel.run_directory import read_json, read_json_lines
from tests.support.launched import left_of, until
from tests.support.slurm import Cluster, missing
from tests.support.tiny_run import write_run

ROOT = Path(__file__).parents[2]
ABLATE = [sys.executable, "-m", "tools.ablate"]
STEPS = 60
FILE = """
set = ["training.steps=60", "evaluation.at_end=true", "evaluation.every_steps=20", "metrics.norms_every_steps=0"]
baseline = "some dropout"

[variants."no | dropout"]
set = ["model.dropout=0"]
before = [["bash", "-c", "test -f {data}/manifest.json && echo seen >> {out}/before.txt"]]
note = "for the test"

[variants."fails"]
set = ["optimizer.learning_rate=0.02"]
before = [["python", "-c", "raise SystemExit('no luck today')"]]

[variants."needs what fails"]
commands = [["python", "-c", "raise SystemExit('{run:fails}')"]]
result = "{out}/result.json"

[variants."of a command"]
commands = [["python", "-c", '''
import json, pathlib
lines = pathlib.Path("{run:some dropout}/metrics.jsonl").read_text().splitlines()
last = [json.loads(line) for line in lines if '"evaluation"' in line][-1]
pathlib.Path("{out}/found.json").write_text(json.dumps({"a": {"b": last["nats_per_token"] + 0.5}}))
''']]
result = "{out}/found.json"
key = "a.b"

[variants."of a text"]
commands = [["bash", "-c", "echo 'the loss is 3.25 now' > {out}/found.txt"]]
result = "{out}/found.txt"
pattern = "is ([0-9.]+)"
"""
DONE = ["no-dropout-*", "some-dropout-*", "of-a-command-*"]


def ablate(*words: str, **more: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "COLUMNS": "200", **more}
    return subprocess.run([*ABLATE, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def launches(run: Path) -> int:
    return [line["event"] for line in read_json_lines(run / "events.jsonl")].count("launch")


def killed_at(step: int, run: Path, words: list[str]) -> None:
    """Start the tool, and kill it and its launcher as soon as the run has this step."""
    tool = subprocess.Popen([*ABLATE, *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)

    def reached() -> bool:
        assert tool.poll() is None
        return any(line.get("step", 0) >= step for line in read_json_lines(run / "metrics.jsonl"))

    until(reached, lambda: f"{run}: no step {step}", 200)
    launcher = psutil.Process(tool.pid).children()[0]
    tool.kill()
    tool.wait()
    os.kill(launcher.pid, signal.SIGKILL)
    until(lambda: not left_of(run), lambda: "\n".join(left_of(run)), 40)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> list[str]:
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "variants.toml").write_text(FILE)
    run_file = write_run(folder, shards)
    options = ["--variants", str(folder / "variants.toml"), "--seeds", "1,2", "--out", str(folder / "out")]
    return [str(run_file), *options]


@pytest.fixture(scope="module")
def out(words: list[str]) -> Path:
    return Path(words[-1])


@pytest.fixture(scope="module")
def killed(words: list[str], out: Path) -> "subprocess.CompletedProcess[str]":
    """The baseline: killed at its step 10; then the same command goes on."""
    checked = ablate(*words, "--dry-run")
    assert checked.returncode == 0, checked.stderr
    baseline = Path(re.findall(r'some dropout, seed 1: .*run\.directory="([^"]+)"', checked.stdout)[0])
    assert baseline.parent.parent == out / "runs"
    assert not out.exists()
    words = [*words, "--only", "some dropout"]
    killed_at(10, baseline, words)
    return ablate(*words)


@pytest.fixture(scope="module")
def done(words: list[str], killed: object) -> "subprocess.CompletedProcess[str]":
    return ablate(*words)


def runs_of(out: Path, pattern: str) -> list[Path]:
    return sorted(path for path in (out / "runs").glob(f"{pattern}/seed-?"))


def test_a_killed_ablation_goes_on(killed, out: Path) -> None:
    assert killed.returncode == 0, killed.stdout + killed.stderr
    resumed, other = runs_of(out, "some-dropout-*")
    starts = [line["step"] for line in read_json_lines(resumed / "events.jsonl") if line["event"] == "start"]
    assert len(starts) == 2
    assert 8 <= starts[1] < STEPS
    assert launches(resumed) == 2
    assert launches(other) == 1


def test_variants_that_fail_are_named_and_the_others_go_on(done, out: Path) -> None:
    assert done.returncode == 1, done.stdout + done.stderr
    for pattern in DONE:
        found = [path.name for path in sorted((out / "runs").glob(f"{pattern}/*.result.json"))]
        assert found == ["seed-1.result.json", "seed-2.result.json"]
    assert [path.read_text() for path in out.glob("runs/no-dropout-*/*/before.txt")] == ["seen\n", "seen\n"]
    assert "failed: fails, seed 1: `python -c` ended with 1: no luck today (" in done.stdout
    assert "failed: needs what fails, seed 2: needs fails, seed 2, which failed" in done.stdout


def test_the_table_has_means_spreads_and_paired_differences(done, out: Path) -> None:
    losses = {
        pattern: np.array([last_loss(run) for run in runs_of(out, pattern)])
        for pattern in ("some-dropout-*", "no-dropout-*")
    }
    some, none = losses.values()
    lines = (out / "table.md").read_text().splitlines()
    cells = {line.split(" | ")[0].strip("| "): [cell.strip("| ") for cell in line.split(" | ")] for line in lines[2:]}
    assert cells["some dropout"][1] == f"{some.mean():.4f} ± {some.std(ddof=1):.4f}"
    assert cells["some dropout"][2] == ""
    assert cells["no \\| dropout"][1] == f"{none.mean():.4f} ± {none.std(ddof=1):.4f}"
    assert cells["no \\| dropout"][2].startswith(f"{(none - some).mean():+.4f} [")
    assert cells["no \\| dropout"][-1] == "for the test"
    assert cells["of a command"][2].startswith("+0.5000 [+0.5000, +0.5000]")
    assert cells["of a text"][1] == "3.2500 ± 0.0000"
    assert cells["fails"][-2] == "none finished"
    assert "no | dropout" in done.stdout
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_tokens_per_cpu_second_are_those_of_the_steps_that_were_watched(done, out: Path) -> None:
    for run in runs_of(out, "*-dropout-*"):
        found = read_json(run.with_name(f"{run.name}.result.json"))
        lines = [line for line in read_json_lines(run / "metrics.jsonl") if line["kind"] == "step"]
        assert found["steps"] == STEPS
        assert found["tokens"] == sum(line["positions"] for line in lines)
        assert 0 < found["cpu_seconds"] < 60
        assert found["tokens_per_cpu_second"] < found["tokens"] / found["cpu_seconds"] + 1


def last_loss(run: Path) -> float:
    return [line for line in read_json_lines(run / "metrics.jsonl") if line["kind"] == "evaluation"][-1][
        "nats_per_token"
    ]


def test_what_is_finished_does_not_run_again(done, words: list[str], out: Path) -> None:
    before = {path: launches(path) for pattern in DONE for path in runs_of(out, pattern)}
    again = ablate(*words, "--only", "some dropout", "--only", "no | dropout")
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path: launches(path) for path in before} == before
    assert sum(before.values()) == 5


def test_other_settings_are_refused_in_the_same_folder(done, words: list[str]) -> None:
    other = ablate(*words, "--set", "optimizer.weight_decay=0.3")
    assert other.returncode == 2
    assert "some dropout, seed 1: was begun with other settings: optimizer.weight_decay 0.1 -> 0.3; " in other.stderr
    assert "choose another --out, or delete" in other.stderr


REASON = missing()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    for path in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        path.chmod(0o755)  # munged runs as another user
    cluster = Cluster(tmp_path / "cluster", nodes=2, gpus=0)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.mark.long
@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_an_array_of_slurm_does_the_same(cluster: Cluster, tmp_path: Path, shards: Path) -> None:
    run_file = write_run(tmp_path, shards)
    words = [str(run_file), "--vary", "model.dropout=0", "--seeds", "1,2", "--out", str(tmp_path / "out")]
    words += ["--set", "evaluation.at_end=true"]
    shown = cluster.call(*ABLATE, *words, "--slurm", "--dry-run", "--sbatch", "--partition=train")
    assert "#SBATCH --array=0-3\n" in shown
    assert "#SBATCH --partition=train\n" in shown
    printed = cluster.call(*ABLATE, *words, "--slurm")
    number = printed.split()[1].rstrip(":")
    until(lambda: not cluster.call("squeue", "-h", "-j", number, check=False).strip(), lambda: printed, 300)
    logs = {path.name: path.read_text() for path in (tmp_path / "out" / "slurm").glob("*.out")}
    assert len(logs) == 4, logs
    assert len(list((tmp_path / "out" / "runs").glob("*/seed-?.result.json"))) == 4, json.dumps(logs)
    assert "| 2 |" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "curves.png").exists()
    assert "every run is finished" in cluster.call(*ABLATE, *words, "--slurm")
