"""Whose checkpoint it is: renamed folders, other runs, other formats, folders that are gone."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from bigmodel.config.settings import Settings, UserError
from bigmodel.distributed.world import ALONE
from bigmodel.run_directory import take_over
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.checkpoint.failures import SaveError
from bigmodel.training.checkpoint.folder import plain, sealed
from bigmodel.training.checkpoint.health import RECORD, recorded_divergence
from bigmodel.training.checkpoint.identity import FILE, id_of, settle
from bigmodel.training.checkpoint.remote import upload
from bigmodel.training.checkpoint.saver import Saver
from bigmodel.training.spikes import FILE as LEFT_OUT
from bigmodel.training.spikes import read_rewinds
from tools.torture import Weights


def begin(run: Path, fresh: bool = False) -> str:
    """A start's id."""
    run.mkdir(exist_ok=True)
    found = checkpoint.newest(run / "checkpoints", ALONE)
    return settle(run, found.description if found else None, fresh)


def save(run: Path, *steps: int, by: str = "", generation: str = "", on_failure: str = "stop") -> None:
    settings = Settings.model_validate({"checkpoint": {"keep": 9, "on_failure": on_failure}})
    saver = Saver(run / "checkpoints", settings, ALONE, generation, run=by)
    for step in steps:
        saver.save(Weights(step), {"step": step})


def path_of(run: Path, step: int) -> Path:
    return checkpoint.path_of(run / "checkpoints", step)


def resumed(run: Path) -> int:
    found = checkpoint.newest(run / "checkpoints", ALONE, lambda line: None)
    assert found is not None
    return found.state["step"]


def test_a_renamed_checkpoint_is_refused_with_both_steps(tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    save(run, 300, 400, by=begin(run))
    os.rename(path_of(run, 400), path_of(run, 999))
    for world in (ALONE, None):  # training, and who only reads
        with pytest.raises(
            UserError, match=r"step-00000999: inside is the checkpoint of step 400 of run tiny-\w{8}:.*step-00000400"
        ):
            checkpoint.newest(run / "checkpoints", world)
    assert checkpoint.steps(run / "checkpoints") == [300, 999]
    os.rename(path_of(run, 999), path_of(run, 400))
    assert resumed(run) == 400


def test_a_folder_with_another_form_of_name_is_no_checkpoint_and_costs_none_its_place(tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    save(run, 300, 400, by=begin(run))
    shutil.copytree(path_of(run, 400), run / "checkpoints/step-400")
    shutil.copytree(path_of(run, 400), run / "checkpoints/step-999")
    assert checkpoint.steps(run / "checkpoints") == [300, 400]
    assert resumed(run) == 400
    Saver(run / "checkpoints", Settings.model_validate({"checkpoint": {"keep": 3}}), ALONE, "").save(
        Weights(500), {"step": 500}
    )
    assert checkpoint.steps(run / "checkpoints") == [300, 400, 500]


def test_a_checkpoint_of_another_run_is_refused_with_both_runs(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    save(one, 4, by=begin(one))
    save(other, 8, by=begin(other))
    shutil.copytree(path_of(other, 8), path_of(one, 8))
    with pytest.raises(
        UserError, match=r"step-00000008: this checkpoint is of run other-\w{8}, and \S+one is run one-"
    ):
        resumed(one)
    shutil.move(path_of(one, 8), tmp_path / "aside")
    assert resumed(one) == 4
    shutil.copytree(path_of(other, 8), path_of(one, 8))  # while the run goes on to this step
    with pytest.raises(SaveError, match=r"this checkpoint is of run other-"):
        save(one, 8, by=id_of(one))
    assert json.loads((path_of(one, 8) / "state.json").read_text())["run"] == id_of(other), "it is not replaced"


def test_branches_on_purpose_and_runs_from_before_there_were_ids_are_taken(tmp_path: Path) -> None:
    earlier = tmp_path / "earlier"
    save(earlier, 4)
    assert resumed(earlier) == 4
    run = begin(earlier)
    save(earlier, 8, by=run)
    (path_of(earlier, 8) / "rank-00000.safetensors").unlink()
    assert resumed(earlier) == 4, "beside checkpoints with an id"
    copied = shutil.copytree(path_of(earlier, 4).parent, tmp_path / "branch" / "checkpoints").parent
    save(copied, 12, by=begin(copied))
    assert resumed(copied) == 12
    save(tmp_path / "a", 4, by=begin(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "a" / "checkpoints", tmp_path / "b" / "checkpoints")
    assert begin(tmp_path / "b") == id_of(tmp_path / "b") == id_of(tmp_path / "a"), "its branch"


def test_starting_over_makes_another_run(tmp_path: Path) -> None:
    first = begin(tmp_path)
    save(tmp_path, 4, by=first)
    assert begin(tmp_path) == first
    aside = checkpoint.set_aside(tmp_path / "checkpoints")
    assert aside is not None
    second = begin(tmp_path, fresh=True)
    assert second != first
    shutil.copytree(aside, tmp_path / "checkpoints")
    with pytest.raises(UserError, match=f"is of run {first}, and .* is run {second}"):
        resumed(tmp_path)


@pytest.mark.parametrize("content", ["{}", "null", "[1]"])
def test_a_small_file_of_the_run_that_says_something_else_is_one_message(tmp_path: Path, content: str) -> None:
    reads = {FILE: id_of, RECORD: recorded_divergence, LEFT_OUT: read_rewinds}
    for name, read in reads.items():
        (tmp_path / name).write_text(content)
        if (name, content) == (LEFT_OUT, "{}"):
            continue  # no steps
        with pytest.raises(
            UserError, match=rf"{name}: (cannot be read as JSON: no '\w+' in it; delete it|not a list of)"
        ):
            read(tmp_path)


# --- another format


def rewrite(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    (path / "manifest.json").write_bytes(sealed(manifest))


def make_format_2(path: Path) -> None:
    """As versions until November 2026 wrote it: SHA-256."""
    manifest = json.loads((path / "manifest.json").read_text()) | {"format": 2}
    del manifest["xxh3_128"]
    for name in manifest["files"]:
        content = (path / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["sha256"] = hashlib.sha256(plain(manifest)).hexdigest()
    (path / "manifest.json").write_bytes(plain(manifest))


def test_a_checkpoint_of_format_2_is_verified_by_its_own_algorithm_and_loads(tmp_path: Path) -> None:
    save(tmp_path, 4, 8)
    for step in (4, 8):
        make_format_2(path_of(tmp_path, step))
    found = checkpoint.newest(tmp_path / "checkpoints", ALONE)
    assert found is not None
    weights = Weights(0)
    checkpoint.load(found, weights, Settings(), ALONE)
    assert weights.same_as(Weights(8))
    upload(path_of(tmp_path, 8), f"file://{tmp_path}/store")
    assert checkpoint.newest(tmp_path / "new" / "checkpoints", ALONE, remote=f"file://{tmp_path}/store")
    for name in ("rank-00000.safetensors", "state.json", "manifest.json"):
        content = (path_of(tmp_path, 8) / name).read_bytes()
        (path_of(tmp_path, 8) / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        assert resumed(tmp_path) == 4
        (path_of(tmp_path, 8) / name).write_bytes(content)
    assert resumed(tmp_path) == 8


def test_formats_may_follow_each_other_in_a_run(tmp_path: Path) -> None:
    save(tmp_path, 4, 8)
    make_format_2(path_of(tmp_path, 4))
    settings = Settings.model_validate({"checkpoint": {"keep": 1}})
    Saver(tmp_path / "checkpoints", settings, ALONE).save(Weights(12), {"step": 12})
    assert checkpoint.steps(tmp_path / "checkpoints") == [12]


@pytest.mark.parametrize("number", [4, 1])
def test_a_checkpoint_of_another_format_is_an_error_with_both_and_nothing_is_touched(
    tmp_path: Path, number: int
) -> None:
    save(tmp_path, 4, 8)
    rewrite(path_of(tmp_path, 8), format=number)
    for world in (ALONE, None):
        with pytest.raises(
            UserError, match=rf"step-00000008: this checkpoint has format {number}.* reads formats 2 and 3; "
        ):
            checkpoint.newest(tmp_path / "checkpoints", world)
    rewrite(path_of(tmp_path, 8), format=3)
    rewrite(path_of(tmp_path, 4), format=number)
    save(tmp_path, 12, 16)
    settings = Settings.model_validate({"checkpoint": {"keep": 1}})
    Saver(tmp_path / "checkpoints", settings, ALONE).save(Weights(20), {"step": 20})
    assert checkpoint.steps(tmp_path / "checkpoints") == [4, 20]


def test_of_a_copy_in_a_store_the_store_is_named_as_its_place(tmp_path: Path) -> None:
    """One of another format is not fetched; one of another run is, and would be again."""
    run, remote = tmp_path / "tiny", f"file://{tmp_path}/store"
    save(run, 8, by=begin(run))
    upload(path_of(run, 8), remote)
    other = tmp_path / "other"
    begin(other)
    with pytest.raises(
        UserError, match=rf"move it out of {other}/checkpoints; .* {remote} has a copy, .* remove it, too"
    ):
        checkpoint.newest(other / "checkpoints", ALONE, remote=remote)
    shutil.rmtree(other / "checkpoints")
    rewrite(tmp_path / "store/step-00000008", format=4)
    with pytest.raises(UserError, match=f"^{remote}/step-00000008: this checkpoint has format 4"):
        checkpoint.newest(other / "checkpoints", ALONE, remote=remote)
    assert os.listdir(other / "checkpoints") == []


def test_a_flipped_bit_in_the_number_of_the_format_is_damage(tmp_path: Path) -> None:
    save(tmp_path, 4, 8)
    manifest = path_of(tmp_path, 8) / "manifest.json"
    content = manifest.read_bytes()
    for number in (b"2", b"1", b"7"):  # 3 with one bit flipped
        manifest.write_bytes(content.replace(b'"format": 3', b'"format": ' + number))
        assert resumed(tmp_path) == 4
    make_format_2(path_of(tmp_path, 8))
    content = manifest.read_bytes()
    for number in (b"3", b"0", b"6"):
        manifest.write_bytes(content.replace(b'"format": 2', b'"format": ' + number))
        assert resumed(tmp_path) == 4


# --- gone


def test_a_folder_of_checkpoints_that_was_moved_away_is_made_anew(tmp_path: Path) -> None:
    generation = take_over(tmp_path)
    save(tmp_path, 4, generation=generation)
    shutil.move(tmp_path / "checkpoints", tmp_path / "moved")
    save(tmp_path, 8, generation=generation)
    assert resumed(tmp_path) == 8
    settings = Settings.model_validate({"checkpoint": {"every_steps": 4, "asynchronous": False}})
    saver = Saver(tmp_path / "checkpoints", settings, ALONE, generation)
    saver.begin(Weights(12), {"step": 12})
    shutil.rmtree(tmp_path / "checkpoints")  # while it is written, or before it is published
    saved = saver.finish(must=False)
    assert saved is not None
    assert "checkpoints is gone, moved or deleted meanwhile; the next save makes it anew" in saved.error
    saver.save(Weights(16), {"step": 16})
    assert checkpoint.steps(tmp_path / "checkpoints") == [16]


@pytest.mark.parametrize(("gone", "told"), [(".", r"run.directory = \S+run is gone"), ("incarnation.json", "is gone")])
def test_a_run_directory_that_was_deleted_is_one_message(tmp_path: Path, gone: str, told: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    generation = take_over(run)
    save(run, 4, generation=generation)
    shutil.move(run / gone, tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{told}: it was moved or deleted while the run wrote to it"):
        save(run, 8, generation=generation, on_failure="continue")
    assert not (run / "checkpoints/step-00000008").exists()
