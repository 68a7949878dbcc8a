"""Saving: the interval, retention, the fence, the copy in a store, and a run that goes on after a failed save."""

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bigmodel.config.settings import Settings, UserError
from bigmodel.distributed.world import ALONE
from bigmodel.metrics.phases import Phases
from bigmodel.planning.save_interval import best_interval_seconds
from bigmodel.run_directory import refuse_to_start_over, take_over
from bigmodel.training.checkpoint import folder, interval
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.checkpoint import remote as copies
from bigmodel.training.checkpoint import saver as saving
from bigmodel.training.checkpoint.saver import Saved, SaveError, Saver, Waiting
from tests.support.s3 import delete, faulty_server, get, put, s3_server
from tools.torture import Weights


def settings(**values: Any) -> Settings:
    return Settings.model_validate({"checkpoint": values})


def saver_of(run: Path, restart_generation: str = "", **values: Any) -> Saver:
    return Saver(run / "checkpoints", settings(**values), ALONE, restart_generation)


def kept(run: Path) -> list[int]:
    return checkpoint.steps(run / "checkpoints")


def loaded(run: Path, remote: str = "") -> int:
    """The step of the newest good checkpoint, which gives back the very tensors that were saved."""
    found = checkpoint.newest(run / "checkpoints", ALONE, remote=remote)
    assert found is not None
    weights = Weights(0)
    checkpoint.load(found, weights, settings(), ALONE)
    assert weights.same_as(Weights(found.state["step"]))
    return found.state["step"]


# --- when


def test_the_interval_is_daly_s() -> None:
    """C = 60 s, M = 8 h: Young gives sqrt(2 * 60 * 28,800) = 1,859.03 s; Daly's next terms add 19.97 and subtract C."""
    assert best_interval_seconds(60, 28_800) == pytest.approx(
        1859.03 * (1 + 0.032275 / 3 + 0.0010417 / 9) - 60, rel=1e-4
    )
    assert best_interval_seconds(100, 40) == 40
    assert best_interval_seconds(0.0, 3600) == 0.0


def test_the_interval_loses_less_than_any_other() -> None:
    """Lost per second of work, to first order: cost / interval + (interval / 2 + cost) / mean time between failures."""

    def lost(interval: float) -> float:
        return 60 / interval + (interval / 2 + 60) / 28_800

    best = best_interval_seconds(60, 28_800)
    assert lost(best) < lost(best * 0.7)
    assert lost(best) < lost(best * 1.4)


def test_a_fixed_interval_is_kept_and_a_measured_one_follows_the_cost(tmp_path: Path, monkeypatch) -> None:
    fixed = saver_of(tmp_path / "fixed", every_steps=4)
    assert [step for step in range(1, 13) if fixed.due(step)] == [4, 8, 12]
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    measured = saver_of(tmp_path / "measured", every_steps=4, hours_between_failures=1.0)
    monkeypatch.setattr(interval, "best_interval_seconds", lambda cost, mean: 70.0 if mean == 3600 else 0.0)
    for step in (1, 4):
        clock[0] = step * 10.0
        assert measured.due(step) == (step == 4)
    measured.save(Weights(4), {"step": 4})
    assert [step for step in range(5, 16) if measured.due(step)] == [11, 12, 13, 14, 15]


def test_a_measured_interval_counts_the_steps_of_this_start_and_waits_for_the_save_in_flight(
    tmp_path: Path, monkeypatch
) -> None:
    """Resumed at step 1,000 at 10 seconds a step; 70 seconds are 7 steps. Each save takes until the step after next."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(interval, "best_interval_seconds", lambda cost, mean: 70.0)
    saver, begun = saver_of(tmp_path, every_steps=4, hours_between_failures=1.0), []
    for step in range(1001, 1025):
        clock[0] += 10.0
        due = saver.due(step)
        if due or (begun and step == begun[-1] + 2):
            saver.finish()
        if due:
            saver.begin(Weights(step), {"step": step})
            begun.append(step)
    saver.finish()
    assert begun == [1004, 1011, 1018]


# --- meanwhile


def test_training_goes_on_while_a_save_is_written(tmp_path: Path, monkeypatch) -> None:
    real, go_on = saving.write_share, threading.Event()
    monkeypatch.setattr(saving, "write_share", lambda *arguments: (go_on.wait(10), real(*arguments))[1])
    saver, weights = saver_of(tmp_path), Weights(4)
    saver.begin(weights, {"step": 4})
    for state in weights.state.values():  # the next steps
        for tensor in state.values():
            tensor.zero_()
    assert not saver.written
    assert kept(tmp_path) == []
    with pytest.raises(AssertionError, match="one save at a time"):
        saver.begin(weights, {"step": 8})
    go_on.set()
    saved = saver.finish()
    assert saved is not None
    assert (saved.step, saver.finish()) == (4, None)
    assert loaded(tmp_path) == 4


def test_a_failed_save_stops_the_run_or_lets_it_go_on(tmp_path: Path, monkeypatch) -> None:
    saver = saver_of(tmp_path, on_failure="continue")
    saver.save(Weights(4), {"step": 4})
    with monkeypatch.context() as patch:
        patch.setattr(saving.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        saver.begin(Weights(8), {"step": 8})
        saved = saver.finish(must=False)
        assert saved is not None
        assert "rank 0 could not write" in saved.error
        assert (saved.step, saved.reason) == (8, "io_error")
        saver.begin(Weights(8), {"step": 8})
        with pytest.raises(UserError, match="Input/output error"):  # the last save of a run
            saver.finish(must=True)
        stopping = saver_of(tmp_path, on_failure="stop")
        stopping.begin(Weights(8), {"step": 8})
        with pytest.raises(UserError, match="older checkpoints are untouched"):
            stopping.finish(must=False)
        patch.setattr(saving.Path, "mkdir", lambda *arguments, **named: (_ for _ in ()).throw(OSError(30, "Read-only")))
        saver.begin(Weights(8), {"step": 8})
        assert saver.written
        saved = saver.finish(must=False)
        assert saved is not None
        assert "cannot make" in saved.error
        assert saved.reason == "permission"
        with pytest.raises(UserError, match="cannot make"):
            stopping.begin(Weights(8), {"step": 8})
        saver.begin(Weights(8), {"step": 8})
        with pytest.raises(UserError, match="cannot make"):
            saver.finish(must=True)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000004"]
    saver.save(Weights(12), {"step": 12})
    assert loaded(tmp_path) == 12


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(disk: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", disk], check=True)


def content_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("moment", ["before", "before its share is written", "after its share is written"])
def test_a_disk_that_turns_read_only_costs_the_save_in_flight_alone(disk: Path, monkeypatch, moment: str) -> None:
    saver, real, go_on = saver_of(disk, on_failure="continue"), saving.write_share, threading.Event()
    saver.save(Weights(4), {"step": 4})
    before = content_of(disk / "checkpoints/step-00000004")
    monkeypatch.setattr(saving, "write_share", lambda *arguments: (go_on.wait(10), real(*arguments))[1])
    if moment == "before":
        remount(disk, "ro")
    if moment == "after its share is written":
        go_on.set()
    saver.begin(Weights(8), {"step": 8})
    while moment == "after its share is written" and not saver.written:
        time.sleep(0.01)
    if moment != "before":
        remount(disk, "ro")
    go_on.set()
    saved = saver.finish(must=False)
    assert saved is not None
    assert "Read-only file system" in saved.error
    assert content_of(disk / "checkpoints/step-00000004") == before
    remount(disk, "rw")
    assert loaded(disk) == 4
    saver.save(Weights(12), {"step": 12})
    assert loaded(disk) == 12
    assert kept(disk) == [4, 12]


def spoil_writes(monkeypatch: pytest.MonkeyPatch, place: int = 2000) -> None:
    """From now on, a byte of a rank's file is another on the disk than was written."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".safetensors"):
            os.pwrite(descriptor, b"\x7f\x7e", place)

    monkeypatch.setattr(saving.os, "fsync", fsync)


@pytest.mark.parametrize("place", [0, 2000, -1], ids=["in the header", "in a tensor", "after the end"])
def test_a_file_that_reads_back_wrong_is_not_published(tmp_path: Path, monkeypatch, place: int) -> None:
    saver_of(tmp_path).save(Weights(2), {"step": 2})
    (file,) = (tmp_path / "checkpoints/step-00000002").glob("*.safetensors")
    spoil_writes(monkeypatch, place if place >= 0 else file.stat().st_size)
    spoil_writes(monkeypatch)
    with pytest.raises(UserError, match="the bytes read back differ from the bytes written"):
        saver_of(tmp_path).save(Weights(4), {"step": 4})
    assert kept(tmp_path) == [2]


# --- step by step


def stepped(saver: Saver, step: int, written_votes: float = 0.0, ending: bool = False) -> list[Saved | Waiting]:
    """What `Saver.step` gives; its error, if it raises one, as the last."""
    news: list[Any] = []
    try:
        news.extend(saver.step(Weights(step), step, written_votes, ending, lambda: {"step": step}))
    except SaveError as error:
        news.append(error)
    return news


def words_of(news: list[Any]) -> list[str]:
    return [f"{type(one).__name__} {one.step}" for one in news]


def wait_until_written(saver: Saver) -> None:
    deadline = time.monotonic() + 10
    while not saver.written:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_save_is_published_once_all_ranks_say_that_theirs_is_written(tmp_path: Path) -> None:
    saver = saver_of(tmp_path, every_steps=4)
    assert stepped(saver, 3) == []
    assert stepped(saver, 4) == []
    wait_until_written(saver)
    assert stepped(saver, 5, written_votes=0.0) == []
    assert kept(tmp_path) == [], "this rank's vote is not there"
    assert words_of(stepped(saver, 6, written_votes=1.0)) == ["Saved 4"]
    assert kept(tmp_path) == [4]
    assert stepped(saver, 7) == []


def test_the_save_in_flight_is_published_before_the_next_begins_and_the_last_one_is_waited_for(tmp_path: Path) -> None:
    saver = saver_of(tmp_path, every_steps=4)
    assert stepped(saver, 4) == []
    assert words_of(stepped(saver, 8)) == ["Saved 4"]
    assert words_of(stepped(saver, 10, ending=True)) == ["Saved 8", "Waiting 10", "Saved 10"]
    assert kept(tmp_path) == [8, 10]  # checkpoint.keep = 2


def test_the_state_is_made_only_where_a_save_begins(tmp_path: Path) -> None:
    saver, made = saver_of(tmp_path, every_steps=4), []

    def state() -> dict[str, Any]:
        made.append(step)
        return {"step": step}

    for step in range(1, 10):
        list(saver.step(Weights(step), step, 0.0, step == 9, state))
    assert made == [4, 8, 9]


def test_a_save_in_the_foreground_is_waited_for_where_it_is_due(tmp_path: Path) -> None:
    saver = saver_of(tmp_path, every_steps=4, asynchronous=False)
    assert [words_of(stepped(saver, step)) for step in (3, 4, 5)] == [[], ["Waiting 4", "Saved 4"], []]
    assert kept(tmp_path) == [4]


def test_a_failed_save_is_a_result_also_where_it_ends_the_run(tmp_path: Path, monkeypatch) -> None:
    spoil_writes(monkeypatch)
    goes_on, stops = (
        saver_of(tmp_path / on_failure, every_steps=4, asynchronous=False, on_failure=on_failure)
        for on_failure in ("continue", "stop")
    )
    waiting, saved = stepped(goes_on, 4)
    assert (waiting, saved.reason, saved.ends_run) == (Waiting(4), "io_error", False)
    waiting, saved, raised = stepped(stops, 4)
    assert (waiting, saved.step, saved.reason, saved.ends_run) == (Waiting(4), 4, "io_error", True)
    assert str(raised) == saved.error
    waiting, saved, raised = stepped(goes_on, 5, ending=True)  # of the last save on_failure does not decide
    assert (saved.step, saved.ends_run, str(raised)) == (5, True, saved.error)
    monkeypatch.setattr(
        saving.Path, "mkdir", lambda *arguments, **named: (_ for _ in ()).throw(OSError(30, "Read-only"))
    )
    waiting, saved, raised = stepped(stops, 8)
    assert (saved.step, saved.reason, saved.ends_run, str(raised)) == (8, "permission", True, saved.error)


def test_a_step_counts_its_saves_as_checkpoint_and_nothing_where_nothing_is_saved(tmp_path: Path) -> None:
    phases = Phases(ALONE.device)
    saver = Saver(tmp_path / "checkpoints", settings(every_steps=4), ALONE, phases=phases)
    stepped(saver, 3)
    assert dict(phases.take()) == {}
    stepped(saver, 4)
    assert phases.take()["checkpoint"] > 0
    stepped(saver, 5, ending=True)
    assert kept(tmp_path) == [4, 5]


# --- what stays


def test_permanent_and_young_ones_stay_beside_the_newest(tmp_path: Path) -> None:
    saver = saver_of(tmp_path / "steps", keep=2, keep_every_steps=6)
    for step in (2, 4, 6, 8, 10, 12, 14):
        saver.save(Weights(step), {"step": step})
    assert kept(tmp_path / "steps") == [6, 10, 12, 14]
    saver = saver_of(tmp_path / "hours", keep=1, keep_hours=1.0)
    for step in (2, 4):
        saver.save(Weights(step), {"step": step})
    assert kept(tmp_path / "hours") == [2, 4]
    age(tmp_path / "hours", 2, hours=2)
    saver.save(Weights(6), {"step": 6})
    assert kept(tmp_path / "hours") == [4, 6]


def age(run: Path, step: int, hours: float) -> None:
    """As if the checkpoint had been saved earlier."""
    path = checkpoint.path_of(run / "checkpoints", step) / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_bytes(folder.sealed(manifest | {"saved_at": manifest["saved_at"] - hours * 3600}))


def test_keeping_one_never_removes_the_only_good_one(tmp_path: Path, monkeypatch) -> None:
    saver = saver_of(tmp_path, keep=1, on_failure="continue")
    saver.save(Weights(4), {"step": 4})
    spoil_writes(monkeypatch)
    saver.begin(Weights(8), {"step": 8})
    assert saver.finish(must=False).error
    assert kept(tmp_path) == [4]
    monkeypatch.undo()
    saver.save(Weights(8), {"step": 8})
    assert kept(tmp_path) == [8]


# --- who may


@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_a_start_that_was_replaced_publishes_nothing_and_ends(tmp_path: Path, on_failure: str) -> None:
    stale = saver_of(tmp_path, take_over(tmp_path), on_failure=on_failure)
    stale.save(Weights(4), {"step": 4})
    stale.begin(Weights(8), {"step": 8})  # then its machine is cut off, and another start takes over
    fresh = saver_of(tmp_path, take_over(tmp_path))
    assert loaded(tmp_path) == 4
    with pytest.raises(UserError, match=r"not saved|has taken this run over"):
        stale.finish()
    with pytest.raises(UserError, match="has taken this run over; this one cannot save any more"):
        stale.begin(Weights(8), {"step": 8})
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000004"]
    fresh.save(Weights(6), {"step": 6})
    assert loaded(tmp_path) == 6


def test_a_start_replaced_between_its_look_and_its_rename_publishes_nothing(tmp_path: Path, monkeypatch) -> None:
    """The new start renames partial folders before it reads what there is: the rename of the stale one fails."""
    stale = saver_of(tmp_path, take_over(tmp_path))
    stale.save(Weights(4), {"step": 4})
    real = saving.require_restart_generation

    def look_then_be_replaced(directory: Path, token: str) -> None:
        real(directory, token)
        if (found := list((tmp_path / "checkpoints").glob("*.partial-*"))) and (found[0] / "manifest.json").exists():
            take_over(tmp_path)
            checkpoint.newest(tmp_path / "checkpoints", ALONE)

    monkeypatch.setattr(saving, "require_restart_generation", look_then_be_replaced)
    with pytest.raises(UserError, match="checkpoint not saved"):
        stale.save(Weights(8), {"step": 8})
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000004"]


def test_a_partial_folder_loses_its_name_before_its_files(tmp_path: Path, monkeypatch) -> None:
    """Or a stale rank 0 could publish it half removed."""
    (tmp_path / "step-00000004.partial-0a1b").mkdir()
    removed: list[Path] = []
    monkeypatch.setattr(folder.shutil, "rmtree", lambda path, **named: removed.append(path))
    folder.remove_partials(tmp_path)
    assert removed == [tmp_path / "step-00000004.partial-0a1b.doomed"]
    assert removed[0].is_dir()


def test_lost_checkpoints_are_not_a_new_run(tmp_path: Path) -> None:
    refuse_to_start_over(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 9}\n{"kind": "checkpoint", "step": 8}\n')
    with pytest.raises(UserError, match=r"saved a checkpoint at step 8, but there is none now.*--fresh"):
        refuse_to_start_over(tmp_path)


# --- a copy elsewhere


def test_a_checkpoint_that_names_a_file_outside_is_neither_fetched_nor_read(tmp_path: Path) -> None:
    """The manifest's own checksum is right: whoever writes a manifest can compute it."""
    here, store = tmp_path / "here", tmp_path / "store"
    saver = saver_of(here)
    saver.save(Weights(4), {"step": 4})
    saver.close()
    path = checkpoint.path_of(here / "checkpoints", 4)
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["files"]["../../../outside.safetensors"] = manifest["files"]["state.json"]
    (path / "manifest.json").write_bytes(folder.sealed(manifest))
    shutil.copytree(here / "checkpoints", store)
    shutil.copy(path / "state.json", tmp_path / "outside.safetensors")
    for run, remote in ((here, ""), (tmp_path / "elsewhere", f"file://{store}")):
        with pytest.raises(UserError, match=r"names the file '../../../outside.safetensors', which is not inside the"):
            checkpoint.newest(run / "checkpoints", ALONE, remote=remote)
    assert [path.name for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()] == []


def test_an_upload_follows_links_inside_a_checkpoint_and_none_that_leads_outside(tmp_path: Path) -> None:
    saver = saver_of(tmp_path / "here")
    saver.save(Weights(4), {"step": 4})
    saver.close()
    path = checkpoint.path_of(tmp_path / "here/checkpoints", 4)
    (path / "copy.json").symlink_to("state.json")
    copies.upload(path, f"file://{tmp_path}/store")
    copied = tmp_path / "store" / path.name / "copy.json"
    assert copied.read_bytes() == (path / "state.json").read_bytes()
    (tmp_path / "secret").write_text("mine")
    (path / "copy.json").unlink()
    (path / "copy.json").symlink_to(tmp_path / "secret")
    with pytest.raises(
        UserError, match=r"copy.json: leads outside \S+step-00000004, through a symbolic link to \S+secret"
    ):
        copies.upload(path, f"file://{tmp_path}/again")
    assert not (tmp_path / "again").exists()


def test_a_run_resumes_where_only_the_copy_in_a_store_is_left(tmp_path: Path) -> None:
    with s3_server() as bucket:
        remote = f"{bucket}/run"
        saver = saver_of(tmp_path / "here", remote=remote, keep=1)
        for step in (4, 8):
            saver.save(Weights(step), {"step": step})
            saver.close()
        assert kept(tmp_path / "here") == [8]
        assert loaded(tmp_path / "elsewhere", remote) == 8
        assert kept(tmp_path / "elsewhere") == [8]

        damaged = checkpoint.path_of(tmp_path / "here/checkpoints", 8) / "rank-00000.safetensors"
        damaged.write_bytes(b"")
        assert loaded(tmp_path / "here", remote) == 8, "a damaged one is fetched anew"

        delete(f"{remote}/step-00000008/manifest.json")  # as if the upload had been cut off
        assert loaded(tmp_path / "third", remote) == 4
        put(f"{remote}/step-00000004/rank-00000.safetensors", b"other bytes")
        with pytest.raises(UserError, match=r"none of 1 checkpoint is whole.*safetensors has 11 bytes instead of"):
            checkpoint.newest(tmp_path / "fourth/checkpoints", ALONE, remote=remote)
        assert list((tmp_path / "fourth/checkpoints").iterdir()) == []
        with pytest.raises(UserError, match=r"--fresh: checkpoint\.remote = .* has the checkpoint of step 4"):
            checkpoint.set_aside(tmp_path / "here/checkpoints", remote)


def flip(url: str) -> None:
    content = bytearray(get(url))
    content[len(content) // 2] ^= 1
    put(url, bytes(content))


DAMAGE: dict[str, tuple[Callable[[str], None], str]] = {
    "a flipped bit": (lambda folder: flip(f"{folder}/rank-00000.safetensors"), "has other content than was written"),
    "a flipped bit of the manifest": (lambda folder: flip(f"{folder}/manifest.json"), "manifest"),
    "a cut part": (lambda folder: put(url := f"{folder}/rank-00000.safetensors", get(url)[:-7]), "bytes instead of"),
    "a lost part": (lambda folder: delete(f"{folder}/state.json"), "state.json is not there"),
}


def test_a_damaged_copy_is_passed_over_for_the_newest_good_one_here_or_there(tmp_path: Path, capsys) -> None:
    with s3_server() as bucket:
        for number, (damage, words) in enumerate(DAMAGE.values()):
            run, remote = tmp_path / f"run-{number}", f"{bucket}/run-{number}"
            saver = saver_of(run, remote=remote)
            for step in (4, 8):
                saver.save(Weights(step), {"step": step})
                saver.close()
            damage(f"{remote}/step-00000008")
            assert loaded(tmp_path / f"elsewhere-{number}", remote) == 4, "from the store"
            told = capsys.readouterr().err
            assert f"is damaged: in {remote}: " in told
            assert words in told
            assert "using the older checkpoint" in told
            assert kept(tmp_path / f"elsewhere-{number}") == [4]
            (checkpoint.path_of(run / "checkpoints", 8) / "state.json").write_bytes(b"")
            assert loaded(run, remote) == 4, "from here"
            told = capsys.readouterr().err
            assert "is damaged: state.json has 0 bytes instead of" in told
            assert f"; in {remote}: " in told
            assert loaded(run) == 4
            assert kept(run) == [4, 8], "the damaged one here stays as it was"


def test_a_store_that_does_not_answer_is_no_damage(tmp_path: Path) -> None:
    """Else a short outage would throw away what was trained since the checkpoint before."""
    with s3_server() as bucket:
        saver = saver_of(tmp_path / "run", remote=f"{bucket}/run")
        saver.save(Weights(4), {"step": 4}), saver.close()
        with (
            faulty_server(0, failures=10**6, of="state.json"),
            pytest.raises(UserError, match=r"run/step-00000004: cannot be"),
        ):
            checkpoint.newest(tmp_path / "elsewhere/checkpoints", ALONE, remote=f"{bucket}/run")
        assert loaded(tmp_path / "elsewhere", f"{bucket}/run") == 4


def test_the_manifest_goes_last_into_the_store(tmp_path: Path, monkeypatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr(saving.store, "put", lambda path, location: sent.append(location))
    saver = saver_of(tmp_path, remote="s3://bucket/run")
    saver.save(Weights(4), {"step": 4})
    saver.close()
    names = ["rank-00000.safetensors", "state.json", "manifest.json"]
    assert sent == [f"s3://bucket/run/step-00000004/{name}" for name in names]


def test_the_last_checkpoint_is_copied_though_it_came_while_another_one_was(tmp_path: Path, monkeypatch) -> None:
    sent: list[str] = []
    go_on = threading.Event()
    monkeypatch.setattr(saving.store, "upload", lambda path, url: (go_on.wait(10), sent.append(path.name)))
    saver = saver_of(tmp_path, remote="s3://bucket/run")
    for step in (4, 8, 12):
        saver.save(Weights(step), {"step": step})
    go_on.set()
    saver.close()
    assert sent == ["step-00000004", "step-00000012"]


def test_a_store_that_refuses_leaves_the_local_checkpoint(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(saving.store, "ATTEMPTS", 1)
    monkeypatch.setattr(saving.store.files, "write", lambda *arguments: (_ for _ in ()).throw(UserError("refused")))
    saver = saver_of(tmp_path, remote="s3://nowhere/run")
    saver.save(Weights(4), {"step": 4})
    saver.close()
    assert "not uploaded to checkpoint.remote: refused" in caplog.text
    assert loaded(tmp_path) == 4
