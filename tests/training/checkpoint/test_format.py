"""Checkpoints: exact at any stage and world size, visible only when whole, never loaded damaged."""

import errno
import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from bigmodel.config.model_settings import DRAWN
from bigmodel.config.settings import Settings, UserError
from bigmodel.distributed.world import ALONE, start_world
from bigmodel.training.checkpoint import format as checkpoint
from bigmodel.training.checkpoint import saver as saving
from bigmodel.training.checkpoint.folder import sealed
from tests.support.engine_worker import launch, settings_table
from tests.support.ranks import finish, run_ranks, start_ranks
from tools.torture import SHAPES, Weights

# --- real engines, real ranks

BITWISE = [(stage, precision) for stage in (1, 3) for precision in ("fp32", "bf16")]
ELSEWHERE = [
    (2, 3, "fp32"),
    (2, 0, "fp32"),
    (2, 2, "bf16"),
    (1, 1, "fp32"),
    (1, 3, "fp32"),
    (3, 3, "fp32"),
    (3, 1, "bf16"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """First processes: 10 steps straight; 4 steps and a checkpoint. New processes: resumed, here and elsewhere."""
    folder = tmp_path_factory.mktemp("runs")
    jobs: dict[str, dict[str, Any]] = {}
    for stage, precision in BITWISE:
        name, persistence = f"zero{stage} {precision}", 100 if precision == "bf16" else 0
        table = settings_table(folder, stage, precision, 2, persistence=persistence)
        jobs[f"straight {name}"] = {"settings": table, "steps": 10}
        saving = {"checkpoints": str(folder / name), "save_at": 4}
        jobs[f"saved {name}"] = {"settings": table, "steps": 4, **saving}
    first = dict(zip(jobs, launch(list(jobs.values()), 2, folder), strict=True))
    again = {
        f"resumed {name}": jobs[f"straight {name}"] | {"resume": True, "checkpoints": str(folder / name)}
        for name in (f"zero{stage} {precision}" for stage, precision in BITWISE)
    }
    results = first | dict(zip(again, launch(list(again.values()), 2, folder), strict=True))
    for world_size in (1, 2, 3):
        moved = {}
        for size, stage, precision in ELSEWHERE:
            if size == world_size:
                source = "zero1 fp32" if stage != 1 else "zero3 fp32"
                table = settings_table(folder, stage, precision, 1)
                where = {"resume": True, "checkpoints": str(folder / source), "source": source}
                moved[f"moved {size} {stage} {precision}"] = {"settings": table, "steps": 6, **where}
        outcome = launch(list(moved.values()), world_size, folder)
        results |= {name: moved[name] | one for name, one in zip(moved, outcome, strict=True)}
    return results


@pytest.mark.parametrize(("stage", "precision"), BITWISE)
def test_a_resumed_run_retraces_the_uninterrupted_one_bitwise(runs, stage: int, precision: str) -> None:
    name = f"zero{stage} {precision}"
    straight, saved, resumed = runs[f"straight {name}"], runs[f"saved {name}"], runs[f"resumed {name}"]
    assert resumed["first"] == 4
    assert len(straight["losses"]) == 10
    assert resumed["loaded_state"] == {"step": 4, "cursor": {"at": 4}}
    assert saved["losses"] + resumed["losses"] == straight["losses"]
    assert saved["norms"] + resumed["norms"] == straight["norms"]
    assert resumed["digest"] == straight["digest"]
    assert resumed["updates"] == 10


@pytest.mark.parametrize(("world_size", "stage", "precision"), ELSEWHERE)
def test_a_checkpoint_moves_to_any_stage_and_world_size_exactly(
    runs, world_size: int, stage: int, precision: str
) -> None:
    moved = runs[f"moved {world_size} {stage} {precision}"]
    assert moved["loaded"] == runs[f"saved {moved['source']}"]["saved"]
    tolerance = 1e-5 if precision == "fp32" else 1e-2
    assert moved["losses"] == pytest.approx(runs[f"straight {moved['source']}"]["losses"][4:6], rel=tolerance)


# --- real files, stub weights

SETTINGS = Settings.model_validate({"checkpoint": {"keep": 2}})


def save(folder: Path, step: int, world: Any = ALONE) -> saving.Saved:
    return saving.save(folder, Weights(step, world=world), {"step": step, "cursor": {}}, SETTINGS, world)


def load(folder: Path, step: int) -> None:
    """The newest good checkpoint is that of `step`, to the last bit."""
    found = checkpoint.newest(folder)
    assert found is not None
    assert found.state["step"] == step
    weights = Weights(0)
    checkpoint.load(found, weights, SETTINGS, ALONE)
    assert weights.same_as(Weights(step))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save_as_rank(folder: Path, step: int, fault: str) -> None:
    os.environ[saving.FAULT_VARIABLE] = fault
    save(folder, step, start_world(timeout_seconds=20))


@pytest.mark.parametrize("point", ["rank-1-half", "before-rename"])  # the rest: tests/system/test_torture.py
def test_a_kill_inside_the_save_leaves_the_previous_checkpoint(tmp_path: Path, point: str) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 4)
    codes = finish(start_ranks(2, save_as_rank, folder, 8, f"{point}@8"), 30)
    assert -signal.SIGKILL in codes
    assert any(".partial-" in name for name in names(folder)), "the kill came after the save had begun"
    load(folder, 4)
    assert checkpoint.newest(folder, ALONE) is not None
    assert names(folder) == ["step-00000004"], "a run that owns the folder clears partial ones away"
    save(folder, 8)
    load(folder, 8)


def test_a_kill_after_the_rename_leaves_the_new_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 4)
    codes = finish(start_ranks(2, save_as_rank, folder, 8, "after-rename@8"), 30)
    assert codes[0] == -signal.SIGKILL
    load(folder, 8)


def save_with_little_room(folder: Path, step: int) -> None:
    """Rank 1 hits a real file size limit while writing; both ranks must get the same error."""
    world = start_world(timeout_seconds=20)
    if world.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))
    try:
        save(folder, step, world)
    except UserError as error:
        if world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (folder.parent / f"error-{world.rank}").write_text(str(error))


def test_a_full_disk_on_one_rank_is_the_same_error_on_all_and_touches_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 4)
    run_ranks(2, save_with_little_room, folder, 8)
    texts = [(tmp_path / f"error-{rank}").read_text() for rank in (0, 1)]
    assert texts[0] == texts[1]
    for part in ("rank 1 could not write", "rank-00001.safetensors", str(folder), "bytes and has", "checkpoint.keep"):
        assert part in texts[0]
    assert names(folder) == ["step-00000004"]
    load(folder, 4)


@pytest.mark.parametrize(("code", "parts"), [(errno.ENOSPC, ["needs", "free"]), (errno.EIO, ["repair"])])
def test_a_write_that_fails_names_the_file_and_the_remedy(
    tmp_path: Path, monkeypatch, code: int, parts: list[str]
) -> None:
    save(tmp_path, 4)

    def fail(_descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(saving.os, "fsync", fail)
    with pytest.raises(UserError, match=r"rank-00000\.safetensors") as caught:
        save(tmp_path, 8)
    assert all(part in str(caught.value) for part in [os.strerror(code), "untouched", *parts])
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000004"]


def test_the_room_that_a_failed_save_tells_is_what_there_is_without_it(tmp_path: Path, monkeypatch) -> None:
    asked: list[list[str]] = []
    real = shutil.disk_usage

    def disk_usage(path: Path) -> Any:
        asked.append(names(tmp_path))
        return real(path)

    def fail(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(saving.shutil, "disk_usage", disk_usage)
    monkeypatch.setattr(saving.os, "fsync", fail)
    with pytest.raises(UserError, match="free"):
        save(tmp_path, 4)
    assert asked == [[]]


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.directory: cannot make"):
        save(tmp_path / "file" / "checkpoints", 4)


def damage_everywhere() -> list[tuple[str, str]]:
    files = ["rank-00000.safetensors", "rank-00001.safetensors", "state.json", "manifest.json"]
    return [(file, kind) for file in files for kind in ("flip", "truncate", "remove")]


@pytest.fixture(scope="module")
def two_good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 4 and 8, written by two ranks."""
    folder = tmp_path_factory.mktemp("good") / "checkpoints"
    for step in (4, 8):
        run_ranks(2, save_as_rank, folder, step, "none")
    return folder


@pytest.mark.parametrize(("file", "kind"), damage_everywhere())
def test_damage_is_named_and_the_older_good_one_is_used(two_good: Path, tmp_path: Path, file: str, kind: str) -> None:
    folder = tmp_path / "checkpoints"
    for place in range(12 if kind == "flip" else 1):
        shutil.copytree(two_good, folder, dirs_exist_ok=True)
        spoil(folder / "step-00000008" / file, kind, place)
        told: list[str] = []
        found = checkpoint.newest(folder, report=told.append)
        assert found is not None
        assert found.state["step"] == 4
        assert str(folder / "step-00000008") in told[0]
        assert file in told[0]
        assert "step-00000004" in told[1]
    load(folder, 4)


def spoil(path: Path, kind: str, place: int) -> None:
    content = bytearray(path.read_bytes())
    if kind == "remove":
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(content[:-1])
    else:
        content[place * (len(content) - 1) // 11] ^= 1 << (place % 8)
        path.write_bytes(content)


def test_a_file_that_the_manifest_does_not_name_is_not_read(two_good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(two_good, tmp_path / "checkpoints")
    stray = folder / "step-00000008" / "rank-00002.safetensors"
    shutil.copy(folder / "step-00000004" / "rank-00000.safetensors", stray)
    load(folder, 8)
    found = checkpoint.newest(folder)
    assert found is not None
    assert torch.equal(checkpoint.read_weights(found)["odd"], Weights(8).state["odd"]["weight"])


def test_a_checksum_of_another_kind_is_damage(two_good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(two_good, tmp_path / "checkpoints")
    manifest = json.loads((folder / "step-00000008/manifest.json").read_bytes())
    manifest["files"]["rank-00000.safetensors"] = {"bytes": 8, "crc": "0"}
    (folder / "step-00000008/manifest.json").write_bytes(sealed(manifest))
    told: list[str] = []
    found = checkpoint.newest(folder, report=told.append)
    assert found is not None
    assert found.state["step"] == 4
    assert "manifest.json has no xxh3_128 of rank-00000.safetensors" in told[0]


def test_where_no_checkpoint_is_good_the_run_does_not_start_over(two_good: Path, tmp_path: Path) -> None:
    shutil.copytree(two_good, tmp_path / "checkpoints")
    for step in (4, 8):
        (tmp_path / f"checkpoints/step-{step:08d}/rank-00000.safetensors").write_bytes(b"")
    for world, remedy in ((None, "copy$"), (ALONE, "--fresh")):  # a reader; the run that owns them
        with pytest.raises(UserError, match=rf"none of 2 checkpoints is whole.*rank-00000.*{remedy}"):
            checkpoint.newest(tmp_path / "checkpoints", world, report=lambda text: None)


def test_no_checkpoint_at_all_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "checkpoints") is None
    (tmp_path / "checkpoints/step-00000004.partial-0a1b").mkdir(parents=True)
    assert checkpoint.newest(tmp_path / "checkpoints") is None


def test_looking_on_leaves_a_partial_folder_of_the_running_save(tmp_path: Path) -> None:
    save(tmp_path, 4)
    (tmp_path / "step-00000008.partial-0a1b").mkdir()
    assert checkpoint.newest(tmp_path) is not None
    assert "step-00000008.partial-0a1b" in names(tmp_path)
    assert checkpoint.newest(tmp_path, ALONE) is not None
    assert names(tmp_path) == ["step-00000004"]


def test_the_newest_are_kept_and_what_looks_broken_does_not_count(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000004", "step-00000006"]
    (tmp_path / "step-00000006/manifest.json").unlink()
    save(tmp_path, 8)
    assert names(tmp_path) == ["step-00000004", "step-00000006", "step-00000008"]


def test_a_damaged_later_checkpoint_neither_counts_nor_blocks_its_step(tmp_path: Path) -> None:
    for step in (4, 8):
        save(tmp_path, step)
    spoil(tmp_path / "step-00000008/rank-00000.safetensors", "flip", 5)
    save(tmp_path, 6)
    assert names(tmp_path) == ["step-00000004", "step-00000006", "step-00000008"]
    save(tmp_path, 8)
    load(tmp_path, 8)


def test_a_good_checkpoint_of_the_same_step_is_left_alone(tmp_path: Path) -> None:
    first = save(tmp_path, 4)
    written = (first.path / "manifest.json").stat().st_mtime_ns
    again = save(tmp_path, 4)
    assert again.bytes == first.bytes == sum(file.stat().st_size for file in first.path.iterdir())
    assert (first.path / "manifest.json").stat().st_mtime_ns == written


def test_another_model_is_refused_by_name_and_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 4)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    weights = Weights(9)
    with pytest.raises(UserError, match=r"model\.num_layers = 3, but checkpoint .* was made with 12"):
        checkpoint.load(found, weights, Settings.model_validate({"model": {"num_layers": 3}}), ALONE)
    wider = Weights(9, SHAPES | {"embedding.weight": (41, 8)})
    with pytest.raises(UserError, match=r"embedding\.weight is \(41, 8\) in this model and \(40, 8\) in checkpoint"):
        checkpoint.load(found, wider, SETTINGS, ALONE)
    fewer = Weights(9, {"norm.weight": (8,)})
    with pytest.raises(UserError, match=r"block\.weight is absent in this model"):
        checkpoint.load(found, fewer, SETTINGS, ALONE)
    assert weights.same_as(Weights(9))
    checkpoint.load(found, weights, Settings.model_validate({"model": dict.fromkeys(DRAWN, 0.5)}), ALONE)
    assert weights.same_as(Weights(4))


def test_of_experts_only_the_strengths_of_the_balance_may_change(tmp_path: Path) -> None:
    def settings_of(**experts: Any) -> Settings:
        return Settings.model_validate({"model": {"experts": {"count": 4} | experts}})

    saving.save(tmp_path, Weights(4), {"step": 4, "cursor": {}}, settings_of(), ALONE)
    found, weights = checkpoint.newest(tmp_path), Weights(9)
    assert found is not None
    for other, words in (
        (settings_of(per_token=3), r"per_token = 3, but checkpoint .* was made with 2"),
        (settings_of(balance="bias"), r"balance = bias, but checkpoint .* was made with loss"),
        (SETTINGS, r"model\.experts = None, but checkpoint .* was made with \{"),
    ):
        with pytest.raises(UserError, match=words):
            checkpoint.load(found, weights, other, ALONE)
    checkpoint.load(found, weights, settings_of(balance_weight=0.5, router_z_weight=0.1), ALONE)
    assert weights.same_as(Weights(4))


def test_a_setting_younger_than_the_checkpoint_had_its_default_then(tmp_path: Path) -> None:
    save(tmp_path, 4)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    del found.description["model"]["logit_softcap"]
    weights = Weights(9)
    checkpoint.load(found, weights, SETTINGS, ALONE)
    assert weights.same_as(Weights(4))
    with pytest.raises(UserError, match=r"model\.logit_softcap = 30\.0, but checkpoint .* was made with 0\.0"):
        checkpoint.load(found, weights, Settings.model_validate({"model": {"logit_softcap": 30}}), ALONE)


def test_a_setting_that_had_no_effect_then_may_be_left_out_now(tmp_path: Path) -> None:
    """Earlier versions accepted it; now it is refused in the run file."""
    save(tmp_path, 4)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    found.description["model"] |= {"relative_buckets": 16, "source_attention": "mixed"}
    weights = Weights(9)
    checkpoint.load(found, weights, SETTINGS, ALONE)
    assert weights.same_as(Weights(4))
    found.description["model"] |= {"rope_theta": 5e5}
    with pytest.raises(UserError, match=r"model\.rope_theta = 10000\.0, but checkpoint .* was made with 500000\.0"):
        checkpoint.load(found, weights, SETTINGS, ALONE)


def test_the_format_is_plain_and_by_parameter_name(two_good: Path) -> None:
    path = two_good / "step-00000008"
    assert names(path) == ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors", "state.json"]
    found = checkpoint.newest(two_good)
    assert found is not None
    weights = checkpoint.read_weights(found)
    assert set(weights) == set(SHAPES)
    assert torch.equal(weights["odd"], Weights(8).state["odd"]["weight"])
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["world_size"] == 2
    assert manifest["files"]["state.json"]["bytes"] == (path / "state.json").stat().st_size


def test_starting_fresh_sets_the_old_ones_aside(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert checkpoint.set_aside(folder) is None
    for number in (1, 2):
        save(folder, 4)
        assert checkpoint.set_aside(folder) == tmp_path / f"checkpoints-set-aside-{number}"
        assert checkpoint.newest(folder) is None
    load(tmp_path / "checkpoints-set-aside-2", 4)
