"""A finished run that is started again: what one process answers before it imports torch, and when ranks begin."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigmodel.config.settings import Settings, load_settings
from bigmodel.finished_run import finished
from bigmodel.run_directory import read_json, read_json_lines, record_event, write_json
from tests.support.ranks import command, run_ranks
from tests.support.tiny_run import write_run

STEPS = 2


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """Of a run that finished, on one rank."""
    folder = tmp_path_factory.mktemp("finished")
    data = shutil.copytree(shards, folder / "prepared")
    file = write_run(folder, data)
    file.write_text(file.read_text().replace("steps = 10", f"steps = {STEPS}"))
    run_ranks(1, command, ["train", str(file)], folder / "printed")
    return file


@pytest.fixture
def settings(run_file: Path, tmp_path: Path) -> Any:
    """Of the run; afterwards its folder is as before."""
    shutil.copytree(run_file.parent, tmp_path / "kept", symlinks=True)
    yield load_settings(run_file)
    shutil.rmtree(run_file.parent)
    shutil.copytree(tmp_path / "kept", run_file.parent, symlinks=True)


def checkpoint_of(settings: Settings) -> Path:
    return settings.run.directory / "checkpoints" / f"step-{STEPS:08d}"


def truncate(settings: Settings) -> None:
    path = checkpoint_of(settings) / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def change_data(settings: Settings) -> None:
    manifest = settings.data.directory / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")


def change_deepspeed(settings: Settings) -> None:
    assert settings.training.deepspeed
    changed = read_json(settings.training.deepspeed) | {"gradient_clipping": 0.5}
    write_json(settings.training.deepspeed, changed)


def record(kind: str, **details: Any) -> Callable[[Settings], None]:
    return lambda settings: record_event(settings.run.directory, kind, **details)


BEGIN: dict[str, Callable[[Settings], Any]] = {
    "a start followed": record("start", step=STEPS, world_size=1),
    "a launch follows": record("launch", by="local", restart=0),
    "started over": record("fresh", step=0),
    "stopped": record("stopped", step=STEPS),
    "finished at another step": record("finished", step=STEPS + 1),
    "no checkpoint": lambda settings: shutil.rmtree(checkpoint_of(settings)),
    "a truncated checkpoint": truncate,
    "a newer checkpoint": lambda settings: shutil.copytree(
        checkpoint_of(settings), settings.run.directory / "checkpoints" / "step-00000009"
    ),
    "other data": change_data,
    "no data": lambda settings: shutil.rmtree(settings.data.directory),
    "another DeepSpeed JSON": change_deepspeed,
    "no events": lambda settings: (settings.run.directory / "events.jsonl").unlink(),
    "damaged settings": lambda settings: (settings.run.directory / "settings.json").write_text("{"),
}


@pytest.mark.parametrize("change", BEGIN.values(), ids=BEGIN.keys())
def test_ranks_begin_where_anything_is_left_to_do(settings: Settings, change: Callable[[Settings], Any]) -> None:
    assert finished(settings, 1)
    change(settings)
    assert finished(settings, 1) == ""


def test_what_a_launcher_records_after_the_end_is_no_start(settings: Settings) -> None:
    record_event(settings.run.directory, "launch_ended", cause="finished", code=0)
    record_event(settings.run.directory, "decided", action="end", reason="the run is complete")
    assert finished(settings, 1)


@pytest.mark.parametrize(
    "override",
    ["training.steps=3", "evaluation.at_end=true", "checkpoint.remote=memory://x", "optimizer.learning_rate=0.02"],
)
def test_other_settings_begin(run_file: Path, override: str) -> None:
    assert finished(load_settings(run_file, [override]), 1) == ""


def test_another_number_of_ranks_begins_and_a_run_that_is_not_there(run_file: Path, tmp_path: Path) -> None:
    assert finished(load_settings(run_file), 2) == ""
    assert finished(load_settings(run_file, [f"run.directory={tmp_path / 'none'}"]), 1) == ""


def test_without_the_summary_that_the_end_writes_it_is_written_again(settings: Settings) -> None:
    directory = settings.run.directory
    evaluation = settings.evaluation.model_copy(update={"at_end": True})
    settings = settings.model_copy(update={"evaluation": evaluation})
    table = read_json(directory / "settings.json")
    write_json(directory / "settings.json", table | {"evaluation": table["evaluation"] | {"at_end": True}})
    assert finished(settings, 1) == ""
    write_json(directory / "summary.json", {})
    assert finished(settings, 1)


@pytest.mark.parametrize("starter", [["bigmodel", "train"], ["launcher", "local"]], ids=["train", "launch local"])
def test_the_command_says_so_without_torch_and_changes_no_file(run_file: Path, starter: list[str]) -> None:
    directory = run_file.parent / "run"
    program, *words = [*starter, str(run_file)]
    code = (
        "import sys, runpy\n"
        f"sys.argv = {[program, *words]!r}\n"
        "try:\n"
        f"    runpy.run_module({program!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "assert not {'torch', 'deepspeed', 'streaming'} & set(sys.modules)\n"
    )
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.suffix != ".log"}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout == (
        f"bigmodel: {directory}: the run is finished, at step 2 of 2, with these settings and data: see bigmodel "
        f"report {directory}; to go on, raise training.steps; to start over, --fresh\n"
    )
    after = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.suffix != ".log"}
    assert after == before


def test_one_of_several_ranks_never_decides_alone(settings: Settings, run_file: Path) -> None:
    """Also a single rank of a launcher: its launcher has looked before."""
    run_ranks(1, command, ["train", str(run_file)], run_file.parent / "again")
    assert f"resuming at step {STEPS}" in (run_file.parent / "again.0").read_text()
    events = [event["event"] for event in read_json_lines(settings.run.directory / "events.jsonl")]
    assert events == ["start", "finished", "start", "finished"]


def test_an_end_before_the_evaluation_is_made_up_for(settings: Settings) -> None:
    """The last start died between its last save and its end."""
    path = settings.run.directory / "events.jsonl"
    lines = path.read_text().splitlines()
    assert json.loads(lines[-1])["event"] == "finished"
    path.write_text("\n".join(lines[:-1]) + "\n")
    assert finished(settings, 1) == ""
    assert checkpoint_of(settings).is_dir()
