"""`bigmodel plan`: the first line says whether the run fits, exit codes, JSON and picture hold the same numbers."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from bigmodel.__main__ import app
from bigmodel.config.settings import UserError, load_settings
from bigmodel.pictures import MEMORY
from bigmodel.planning.context import context_of
from bigmodel.planning.memory import memory_of
from bigmodel.planning.plan_command import cluster_of, planned_of
from bigmodel.planning.plan_table import found_table
from bigmodel.planning.scaling import Law, Term
from tests.support.tiny_run import write_run
from tools import write_plan_examples

REPOSITORY = Path(__file__).parents[2]
EIGHT_BILLION = str(REPOSITORY / "configs" / "models" / "8b.toml")
CLUSTER = """
nodes = 8
gpus_per_node = 8

[hardware]
gpu = "H100 SXM"
price_per_gpu_hour = 2.5
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("cluster") / "cluster.toml"
    path.write_text(CLUSTER)
    return str(path)


def plan(*arguments: str) -> int:
    """Exit code."""
    return app(["plan", *arguments], standalone_mode=False) or 0


def numbers(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    plan(*arguments, "--json")
    return json.loads(capsys.readouterr().out)


def test_the_first_line_says_that_it_fits_and_the_parts_follow(
    cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "plan.png"
    assert plan(EIGHT_BILLION, "--cluster", cluster, "--png", str(png)) == 0
    printed = capsys.readouterr().out
    first, *lines = printed.splitlines()
    assert first.startswith("fits: ")
    assert first.endswith("GiB (H100 SXM)")
    assert lines[:2] == [
        "8,030,261,248 parameters, vocabulary 128,256",
        "bf16, adamw, 64 ranks, micro-batches of 1 x 8,192 tokens",
    ]
    assert "240,000 steps, the batch ramp counted" in printed
    for title in ("Time", "Saves and failures", "Cost", "Data", "Scaling law"):
        assert f"\n  {title} " in printed, title
    assert "assumed: [hardware] gpu" not in printed
    picture = (255 * imread(png)[..., :3]).astype(int)
    for part in ("weights", "activations", "framework"):
        wanted = [int(MEMORY[part][place : place + 2], 16) for place in (1, 3, 5)]
        assert (np.abs(picture - wanted).max(-1) < 3).sum() > 500, part


def test_what_does_not_fit_is_exit_code_1_with_the_nearest_that_do(
    cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(EIGHT_BILLION, "--cluster", cluster, "--set", "training.activation_checkpointing=none") == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("does not fit: ")
    assert "activation checkpointing selective (52.41)" in first


def test_json_has_the_numbers_of_the_parts(cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = numbers(capsys, EIGHT_BILLION, "--cluster", cluster)
    context = context_of(load_settings(EIGHT_BILLION), cluster_of(Path(cluster), 0), 0)
    assert found["device_bytes"] == sum(memory_of(context).device.values()) == found["memory"]["device_bytes"]
    assert found["fits"] is True
    assert found["run"] | {"ranks": 64, "nodes": 8, "stage": 2, "checkpointing": "selective"} == found["run"]
    assert found["cost"]["money"] == pytest.approx(2.5 * found["cost"]["gpu_hours"])
    assert found["time"]["tokens_per_second"] * found["time"]["step_seconds"] == pytest.approx(
        found["time"]["tokens_per_step"]
    )
    assert {"reliability", "data", "scaling"} <= set(found)
    assert "search" not in found


def test_the_search_finds_settings_that_are_faster(cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = numbers(capsys, EIGHT_BILLION, "--cluster", cluster, "--search")
    best = found["search"][0]
    assert best["device_bytes"] <= found["limit_bytes"]
    assert best["step_seconds"] < found["time"]["step_seconds"]
    own = {name: found["run"][name] for name in ("stage", "checkpointing", "micro_batch", "sharing", "offloads")}
    [same] = [one for one in found["search"] if own.items() <= one.items()]
    assert same["step_seconds"] == found["time"]["step_seconds"]
    assert same["device_bytes"] == found["device_bytes"]


def test_prepared_data_are_read_and_a_run_without_a_cluster_file_is_of_8_gpus(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = write_run(tmp_path, shards)
    manifest = json.loads((shards / "manifest.json").read_text())
    found = numbers(capsys, str(run_file))
    assert found["run"]["ranks"] == 8
    assert found["run"]["vocabulary"] == manifest["vocabulary"]
    assert numbers(capsys, str(run_file), "--ranks", "16")["run"]["nodes"] == 2


def test_the_law_of_a_sweep_predicts_the_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sweep.json"
    law = Law(1.5, (Term("compute", 100.0, 0.1),))
    path.write_text(json.dumps({"law": law.as_table()}))
    scaling = numbers(capsys, EIGHT_BILLION, "--ranks", "64", "--law", str(path))["scaling"]
    assert scaling["predicted_loss_nats"] == law.loss(scaling["parameters"], scaling["tokens"])


def test_bad_input_is_refused_with_the_file_and_a_remedy(cluster: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"/data/tokenizer.*--vocabulary N"):
        plan(str(write_run(tmp_path, tmp_path / "none")), "--set", "prepare.tokenizer=/data/tokenizer")
    with pytest.raises(UserError, match=r"--ranks 8 with --cluster .*: the file says how many"):
        plan(EIGHT_BILLION, "--cluster", cluster, "--ranks", "8")
    bare = tmp_path / "cluster.toml"
    bare.write_text("nodes = 2\n")
    with pytest.raises(UserError, match="gpus_per_node = 0: a plan is about GPUs"):
        plan(EIGHT_BILLION, "--cluster", str(bare))


def test_the_hosts_of_a_cluster_file_are_counted_without_spare_ones(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text('hosts = "n[1-5]"\ngpus_per_node = 4\n[restart]\nspare_nodes = 1\n')
    found = cluster_of(path, 0)
    assert (found.nodes, found.ranks_on_node) == (4, 4)


def test_it_runs_where_torch_cannot_be_imported(cluster: str) -> None:
    """As on a login node, or in a container without it."""
    code = "import sys; sys.modules['torch'] = None; from bigmodel.__main__ import main; main()"
    command = [sys.executable, "-c", code, "plan", EIGHT_BILLION, "--cluster", cluster, "--search"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "settings that fit; days without failures:" in done.stdout


def test_a_reader_that_has_gone_changes_no_exit_code(cluster: str) -> None:
    """As `plan | head -1`: the exit code says whether the run fits."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "bigmodel", "plan", EIGHT_BILLION, "--cluster", cluster]
    for more, code in ([], 0), (["--json"], 0), (["--set", "training.activation_checkpointing=none"], 1):
        done = subprocess.run(
            [*words, *more], cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE, timeout=120, check=False
        )
        assert (done.returncode, done.stderr) == (code, b""), more
    os.close(writer)


def test_the_found_settings_fit_80_columns(cluster: str) -> None:
    """With the largest numbers of a real plan; no heading or value is cut."""
    planned = planned_of(context_of(load_settings(EIGHT_BILLION), cluster_of(Path(cluster), 0)), is_searched=True)
    wide = Console(width=200, file=io.StringIO())
    wide.print(found_table(planned.found, planned.found[0][0], planned.fit.limit))
    lines = wide.file.getvalue().splitlines()
    assert any("selective" in line for line in lines)
    assert max(len(line.rstrip()) for line in lines) <= 80


def test_what_hardly_fits_is_marked(cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(EIGHT_BILLION, "--cluster", cluster, "--search") == 0
    marked = [line for line in capsys.readouterr().out.splitlines() if "*" in line]
    assert any("79.09*" in line for line in marked)
    assert marked[-1] == "* less than 2% of the GPU to spare: try it first, or take the next"


def test_the_times_of_a_toy_have_digits(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(str(write_run(tmp_path, shards)))
    printed = capsys.readouterr().out
    assert "µs" in printed
    assert " 0.0 ms" not in printed
    assert "the batch ramp" not in printed


def test_the_page_shows_what_the_command_prints_today() -> None:
    page = write_plan_examples.PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- output of: bigmodel plan ") == page.count("```text\nfits: ") == 1
    assert page == write_plan_examples.page(page), "run python -m tools.write_plan_examples"
