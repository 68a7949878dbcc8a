"""training.attention_kernel = "fastest": the fastest exact implementation measured, equal on all ranks; else triton."""

import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bigmodel.config.settings import Settings, UserError, to_toml_table
from bigmodel.distributed.world import end_world, start_world
from bigmodel.kernels.attention import KERNELS
from bigmodel.run_directory import read_json, record_start
from bigmodel.training.attention_kernel import choose, resolve_attention_kernel, shapes_of
from bigmodel.training.attention_measurements import (
    Shape,
    add_measured,
    fastest,
    machine_of,
    measurements_file,
    read_measured,
)
from tests.support.ranks import command, run_ranks
from tests.support.tiny_run import write_run

FULL = Shape(32, 8, 128, "bfloat16", None, 0, 16_384)
SLIDING = FULL._replace(left=1_023)
MACHINE = {"device": "H", "torch": "2.13.0", "triton": "3.7.1", "flash-attn": "2.8.1", "kernels": "c0ffee"}
NOT_INSTALLED = {"not_run": "the package flash-attn is not installed"}


def took(seconds: float) -> dict[str, float]:
    """A third of it forward."""
    return {"forward_seconds": seconds / 3, "backward_seconds": seconds * 2 / 3}


def measured_by(file: Path, shape: Shape, results: dict) -> None:
    for name, result in {**dict.fromkeys(KERNELS, NOT_INSTALLED), **results}.items():
        add_measured(file, MACHINE, shape, name, result)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert measurements_file() == tmp_path / "cache/bigmodel/attention.json"
    return measurements_file()


def test_the_cache_folder_of_the_user_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert measurements_file() == Path("/home/me/.cache/bigmodel/attention.json")


# The choice.


def test_the_least_time_forward_and_backward_over_all_layers_wins(file: Path) -> None:
    measured_by(file, FULL, {"triton": took(0.004), "torch-varlen": took(0.001)})
    measured_by(file, SLIDING, {"triton": took(0.001), "torch-varlen": took(0.002)})
    assert fastest({FULL: 1, SLIDING: 2}, file, MACHINE)[0] == "torch-varlen"  # 5 ms against 6
    name, reason = fastest({FULL: 1, SLIDING: 4}, file, MACHINE)  # 8 ms against 9
    assert (name, reason) == ("triton", "measured, attention of a micro-batch: triton 8.00 ms, torch-varlen 9.00 ms")


@pytest.mark.parametrize(
    "result", [took(0.001) | {"wrong": "dq: error 3.00e-01, bound 2.00e-02"}, NOT_INSTALLED], ids=["wrong", "absent"]
)
def test_what_is_wrong_or_did_not_run_is_never_chosen(file: Path, result: dict) -> None:
    measured_by(file, FULL, {"triton": took(0.004), "hopper": result})
    assert fastest({FULL: 1}, file, MACHINE)[0] == "triton"
    measured_by(file, FULL, {"triton": took(0.004), "hopper": took(0.001)})
    assert fastest({FULL: 1}, file, MACHINE)[0] == "hopper"


def test_right_at_one_shape_and_wrong_at_another_is_wrong(file: Path) -> None:
    measured_by(file, FULL, {"triton": took(0.004), "hopper": took(0.001)})
    measured_by(file, SLIDING, {"triton": took(0.004), "hopper": took(0.001) | {"wrong": "out: error"}})
    assert fastest({FULL: 5, SLIDING: 1}, file, MACHINE)[0] == "triton"


def test_where_all_are_wrong_ours_computes(file: Path) -> None:
    measured_by(file, FULL, {"triton": took(0.004) | {"wrong": "out: error"}})
    name, reason = fastest({FULL: 1}, file, MACHINE)
    assert name == "triton"
    assert "no implementation is exact on H" in reason


@pytest.mark.parametrize("fact", [*MACHINE, *Shape.__annotations__])
def test_another_device_version_or_shape_has_no_measurement(file: Path, fact: str) -> None:
    measured_by(file, FULL, {"triton": took(0.004), "hopper": took(0.001)})
    machine, shape = dict(MACHINE), FULL
    if fact in machine:
        machine[fact] = "other"
    else:
        shape = shape._replace(**{fact: 7})
    name, reason = fastest({shape: 1}, file, machine)
    assert name == "triton"
    assert (
        f"{file} has no measurement for {machine['device']}, these versions and {shape}; run python -m tools." in reason
    )


def test_an_unfinished_measurement_chooses_nothing(file: Path) -> None:
    add_measured(file, MACHINE, FULL, "triton", took(0.004))
    add_measured(file, MACHINE, FULL, "hopper", took(0.001))
    name, reason = fastest({FULL: 1}, file, MACHINE)
    assert name == "triton"
    assert "has a part of the measurements for H" in reason


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"measurements": 3}',
        '{"measurements": [{"of": {}, "kernels": {"triton": 1}}]}',
        '{"measurements": [{"of": {}, "kernels": {"triton": {"forward_seconds": "1", "backward_seconds": 1.0}}}]}',
        '{"measurements": [{"of": {}, "kernels": {"triton": {"forward_seconds": NaN, "backward_seconds": 1.0}}}]}',
    ],
)
def test_a_damaged_file_is_named_and_ours_computes(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(content)
    name, reason = fastest({FULL: 1}, file, MACHINE)
    assert name == "triton"
    assert reason.startswith(f"{file}: ")
    assert reason.endswith("; delete it and run python -m tools.tune_attention")
    with pytest.raises(UserError, match="delete it and run"):
        add_measured(file, MACHINE, FULL, "triton", took(0.001))
    assert file.read_text() == content


def test_runs_at_the_same_time_lose_no_result(file: Path) -> None:
    shapes = [FULL._replace(tokens=tokens) for tokens in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda shape: add_measured(file, MACHINE, shape, "triton", took(shape.tokens + 1.0)), shapes))
    assert [read_measured(file, MACHINE, shape)["triton"] for shape in shapes] == [took(n + 1.0) for n in range(24)]
    add_measured(file, MACHINE, shapes[3], "triton", None)
    assert (read_measured(file, MACHINE, shapes[3]), len(read_measured(file, MACHINE, shapes[4]))) == ({}, 1)


# The shapes of a run.

WIDE = {"hidden_size": 512, "num_heads": 8, "num_kv_heads": 2, "num_layers": 6}
FASTEST = {"data": {"sequence_length": 512, "max_document_length": 512}, "training": {"attention_kernel": "fastest"}}


@pytest.mark.parametrize(
    ("model", "training", "shapes"),
    [
        ({}, {}, {Shape(8, 2, 64, "bfloat16", None, 0, 1_024): 6}),
        ({"num_mtp_modules": 1}, {"precision": "fp16"}, {Shape(8, 2, 64, "float16", None, 0, 1_024): 7}),
        (
            {"sliding_window": 100, "full_attention_every": 3},
            {},
            {Shape(8, 2, 64, "bfloat16", None, 0, 1_024): 2, Shape(8, 2, 64, "bfloat16", 99, 0, 1_024): 4},
        ),
        ({}, {"sequence_parallel_ranks": 4}, {Shape(2, 1, 64, "bfloat16", None, 0, 1_024): 6}),
    ],
    ids=["causal", "MTP in fp16", "windows", "Ulysses"],
)
def test_the_shapes_are_those_of_a_rank_of_the_run(model: dict, training: dict, shapes: dict) -> None:
    table = {**FASTEST, "model": WIDE | model, "training": {"attention_kernel": "fastest"} | training}
    assert shapes_of(Settings.model_validate(table), 2) == Counter(shapes)


def test_an_encoder_sees_both_ways() -> None:
    model = Settings.model_validate({**FASTEST, "model": WIDE | {"sliding_window": 100}}).model
    settings = Settings.model_validate(FASTEST).model_copy(
        update={"model": model.model_copy(update={"kind": "encoder"})}
    )
    assert shapes_of(settings, 1) == Counter({Shape(8, 2, 64, "bfloat16", 50, 50, 512): 6})


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"model": {"attention_softcap": 30.0}}, "the others do not cover model.attention_softcap"),
        ({"model": {"attention_dropout": 0.1}}, "model.attention_dropout"),
        ({"model": {"position_embedding": "relative_bias"}}, "relative_bias"),
        ({"optimizer": {"qk_clip": 100}}, "optimizer.qk_clip"),
        ({"training": {"precision": "fp32"}}, "fp32"),
    ],
)
def test_what_the_others_do_not_cover_takes_ours_without_an_error(table: dict, reason: str) -> None:
    table = table | {"training": table.get("training", {}) | {"attention_kernel": "fastest"}}
    name, said = choose(Settings.model_validate(table), 1, MACHINE)
    assert name == "triton"
    assert reason in said


# On ranks, and in the run directory.


def choose_on_a_rank(caches: list[str], devices: list[str], out: Path) -> None:
    """Each rank with a cache and a device of its own."""
    world = start_world()
    os.environ["XDG_CACHE_HOME"] = caches[world.rank]
    settings = Settings.model_validate({**FASTEST, "model": WIDE})
    settings, line = resolve_attention_kernel(settings, 2, world, MACHINE | {"device": devices[world.rank]})
    Path(f"{out}.{world.rank}").write_text(json.dumps([settings.training.attention_kernel, line]))
    end_world()


@pytest.mark.parametrize(
    ("devices", "name", "said"),
    [
        (["H", "H"], "hopper", 'fastest": hopper; measured, attention of a micro-batch: hopper 6.00 ms, triton 24.00'),
        (["H", "B"], "triton", 'fastest": triton; rank 1 on node 0 has another device or other versions than rank 0'),
    ],
    ids=["one device", "two devices"],
)
def test_all_ranks_take_the_choice_of_the_first(tmp_path: Path, devices: list[str], name: str, said: str) -> None:
    caches = [str(tmp_path / folder) for folder in ("mine", "other")]
    shape = Shape(8, 2, 64, "bfloat16", None, 0, 1_024)
    measured_by(Path(caches[0], "bigmodel/attention.json"), shape, {"triton": took(0.004), "hopper": took(0.001)})
    measured_by(Path(caches[1], "bigmodel/attention.json"), shape, {"triton": took(0.001), "hopper": took(0.004)})
    run_ranks(2, choose_on_a_rank, caches, devices, tmp_path / "said")
    first, second = (json.loads(Path(f"{tmp_path}/said.{rank}").read_text()) for rank in range(2))
    assert first == second
    assert first[0] == name
    assert said in first[1]


def test_a_start_with_another_choice_is_seen(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    settings = Settings.model_validate(FASTEST)
    changed = []
    for name in ("triton", "hopper"):
        training = settings.training.model_copy(update={"attention_kernel": name})
        table = to_toml_table(settings.model_copy(update={"training": training}))
        changed = record_start(tmp_path, table, {}, tmp_path)
    assert changed == [("training.attention_kernel", "triton", "hopper")]


def test_a_run_says_and_records_what_fastest_is(tmp_path: Path, shards: Path) -> None:
    options = ["--set", "training.steps=2", "--set", "training.attention_kernel=fastest"]
    run_ranks(1, command, ["train", str(write_run(tmp_path, shards)), *options], tmp_path / "printed")
    line = 'training.attention_kernel = "fastest": triton; on a CPU all are the same'
    assert line in Path(f"{tmp_path}/printed.0").read_text()
    assert read_json(tmp_path / "run/settings.json")["training"]["attention_kernel"] == "triton"
    events = [json.loads(event) for event in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "attention_kernel"]
    assert (event["chosen"], event["detail"]) == ("triton", line)


def test_a_machine_is_told_apart_by_versions_and_by_our_sources() -> None:
    machine = machine_of(torch.device("cpu"))
    assert machine.keys() == MACHINE.keys()
    assert machine["torch"] == torch.__version__
    assert len(machine["kernels"]) == 16
