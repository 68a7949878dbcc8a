"""The run files for real sizes are sound: published shapes, right arithmetic, a cluster that they fit."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bigmodel.config.settings import Settings, positions_before
from bigmodel.data.objectives.examples import Examples
from bigmodel.planning.context import Context
from bigmodel.planning.memory import memory_of
from bigmodel.planning.parameters import parameters_of
from bigmodel.planning.plan_command import planned_of
from bigmodel.planning.step_demand import ramp_of
from tests.support.tiny_run import write_run
from tools.write_arithmetic import arithmetic, cluster_of, context_of_file, pages, run_files, with_arithmetic

REPOSITORY = Path(__file__).parents[2]
# Parameters, of Llama, T5 and ModernBERT those of the published weights; tokens of a step; tokens in billions.
SIZES = {
    "125m": (123_587_328, 2**19, 2.5),
    "350m": (359_842_816, 2**19, 7.2),
    "760m": (756_819_456, 2**19, 15.2),
    "1.3b": (1_336_248_320, 2**20, 26.7),
    "3b": (3_212_749_824, 2**21, 1006.6),
    "8b": (8_030_261_248, 2**22, 964.7),
    "13b": (13_015_864_320, 2**22, 2000.7),
    "70b": (70_553_706_496, 2**22, 1400.9),
    "t5-60m": (60_506_624, 64 * (16_384 + 3840), 42.4),
    "t5-250m": (247_577_856, 64 * (16_384 + 3840), 1294.3),
    "t5-780m": (783_150_080, 64 * (16_384 + 3840), 1294.3),
    "t5-3b": (2_849_757_184, 64 * (16_384 + 3840), 1294.3),
    "t5-11b": (11_135_332_352, 64 * (16_384 + 3840), 1294.3),
    "encoder-150m": (149_014_272, 288 * 16_384, 1719.9),
}
TOY = {
    "data.mix": "{}",
    "data.max_epochs": "{}",
    "data.lanes": "2",
    "data.max_document_length": "64",
    "data.sequence_length": "128",
    "model.num_layers": "3",
    "model.hidden_size": "64",
    "model.num_heads": "4",
    "model.intermediate_size": "96",
    "training.steps": "2",
    "training.global_batch_size": "4",
    "training.batch_ramp": "[]",
    "training.deepspeed": "none.json",
    "evaluation.every_steps": "2",
    "evaluation.sequences": "2",
    "evaluation.at_end": "false",
}


@pytest.fixture(scope="module")
def contexts() -> dict[str, Context]:
    return {path.stem: context_of_file(path) for path in run_files()}


def test_there_is_a_file_for_each_size(contexts: dict[str, Context]) -> None:
    assert contexts.keys() == SIZES.keys()


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_tokens_are_those_of_the_size(contexts: dict[str, Context], name: str) -> None:
    settings, (numel, in_step, billions) = contexts[name].settings, SIZES[name]
    assert sum(one.numel for one in parameters_of(settings, contexts[name].vocabulary)) == numel
    steps, sides = settings.training.steps, settings.data.sequence_length + settings.data.source_sequence_length
    packs = [positions_before(step, settings) // settings.data.sequence_length for step in (steps - 1, steps)]
    assert (packs[1] - packs[0]) * sides == in_step
    assert packs[1] * sides == pytest.approx(billions * 1e9, abs=0.05e9)


@pytest.mark.parametrize("name", SIZES)
def test_the_arithmetic_in_the_comments_is_right(contexts: dict[str, Context], name: str) -> None:
    text = (REPOSITORY / "configs/models" / f"{name}.toml").read_text()
    assert text == with_arithmetic(text, arithmetic(contexts[name])), "run `python -m tools.write_arithmetic`"


def test_the_tables_of_the_pages_are_current() -> None:
    for path, text in pages().items():
        assert path.read_text() == text, "run `python -m tools.write_arithmetic`"


@pytest.mark.parametrize("name", SIZES)
def test_it_fits_the_gpus_of_its_cluster_and_keeps_all_of_them_busy(contexts: dict[str, Context], name: str) -> None:
    context = contexts[name]
    cluster, training = context.cluster, context.settings.training
    gpu, _, gpus = cluster_of((REPOSITORY / "configs/models" / f"{name}.toml").read_text()).stem.partition("-")
    assert cluster.hardware.gpu.startswith(gpu.upper())
    assert context.ranks == int(gpus) == cluster.nodes * cluster.gpus_per_node
    planned = planned_of(context, None)
    assert planned.fit.fits
    assert not memory_of(context).host
    assert 0.01 < planned.step.run_seconds / 86400 < 90, "days"
    assert planned.parts["data"].numbers["read_tokens"] >= positions_before(training.steps, context.settings)
    assert all(packs % context.ranks == 0 for _, packs in ramp_of(training))


@pytest.mark.parametrize("name", [name for name in SIZES if name.startswith("t5")])
def test_a_text_of_t5_has_512_source_tokens(contexts: dict[str, Context], name: str) -> None:
    examples = Examples(contexts[name].settings.data, 0)
    assert examples.longest.tolist() == [568]
    assert examples.measure(np.array([0]), np.array([568]), np.array([1]))[0, 1:].tolist() == [115, 115, 512]


@pytest.mark.parametrize("name", ["8b", "encoder-150m", "125m"])
def test_the_plan_counts_a_batch_ramp_as_the_run_does(contexts: dict[str, Context], name: str) -> None:
    settings = contexts[name].settings
    pairs = ramp_of(settings.training)
    assert sum(steps for steps, _ in pairs) == settings.training.steps
    tokens = sum(steps * packs for steps, packs in pairs) * settings.data.sequence_length
    assert tokens == positions_before(settings.training.steps, settings)


@pytest.mark.parametrize("name", SIZES)
def test_it_repeats_no_default(name: str) -> None:
    table = tomllib.loads((REPOSITORY / "configs/models" / f"{name}.toml").read_text())
    defaults = Settings().model_dump(mode="json")
    assert "sources" in table["prepare"]
    repeated = [
        f"{section}.{key}"
        for section in table
        for key, value in table[section].items()
        if defaults[section][key] == value
    ]
    assert repeated == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("t5-780m", {"data.source_sequence_length": "512"}),
        ("encoder-150m", {"model.min_vocabulary": "0", "model.sliding_window": "16"}),
        ("8b", {"model.num_kv_heads": "2"}),
    ],
)
def test_it_trains_at_a_toy_s_size(tmp_path: Path, shards: Path, name: str, more: dict[str, str]) -> None:
    """With everything of the file but its sizes; sizes of a toy, on a CPU."""
    write_run(tmp_path, shards, name="none")
    overrides = (
        TOY
        | more
        | {
            "run.directory": str(tmp_path / "run"),
            "data.directory": str(shards),
            "training.deepspeed": str(tmp_path / "none-deepspeed.json"),
            "training.precision": "fp32",
        }
    )
    run_file = REPOSITORY / "configs/models" / f"{name}.toml"
    schedule = tomllib.loads(run_file.read_text())["schedule"]
    short = {"warmup_steps": "1", "decay_steps": "1", "warmup_tokens": "256", "decay_tokens": "256"}
    overrides |= {f"schedule.{key}": value for key, value in short.items() if key in schedule}
    words = [word for item in overrides.items() for word in ("--set", "=".join(item))]
    environment: dict[str, Any] = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bigmodel", "train", str(run_file), *words]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    assert '"step": 2' in (tmp_path / "run/metrics.jsonl").read_text()
