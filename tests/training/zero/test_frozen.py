"""Adapters, frozen parameters and layer-wise rates under every ZeRO stage: those of plain torch in one process."""

from typing import Any

import pytest

from bigmodel.config.settings import Settings
from tests.support.engine_worker import PACKS, launch, oracle, settings_table
from tests.support.exactness import failures, with_sequence

pytestmark = pytest.mark.timeout(300)  # all jobs run in the first test's set-up
STEPS = 4
LORA = {"lora": {"rank": 3, "alpha": 5, "dropout": 0.1}}
FREEZE = {"training": {"freeze": ["embedding", "blocks.0.*"]}}
DECAY = {"optimizer": {"layer_decay": 0.6}}
# Name -> ranks, stage, precision, and settings.
CASES: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    "adapters 1": (2, 1, "fp32", LORA),
    "adapters 2": (2, 2, "fp32", {**LORA, "optimizer": {"kind": "muon"}}),
    "adapters 3": (2, 3, "fp32", {**LORA, "persistence": 100}),
    "some adapters": (2, 3, "fp32", {"lora": {"rank": 2, "rslora": True, "targets": ["k_proj", "down_proj"]}}),
    "adapters and average": (
        2,
        1,
        "fp32",
        {**LORA, "training": {"ema_decay": 0.9, "activation_checkpointing": "full"}},
    ),
    "recomputed adapters": (2, 2, "fp32", {**LORA, "training": {"activation_checkpointing": "selective"}}),
    "frozen 1": (2, 1, "fp32", {**FREEZE, **DECAY}),
    "frozen 3": (2, 3, "fp32", {**FREEZE, "optimizer": {"kind": "adafactor", "layer_decay": 0.6}}),
    "tied and frozen": (2, 2, "fp32", {**FREEZE, "tied": True, "optimizer": {"kind": "lion"}}),
    "offloaded": (2, 2, "fp32", {**LORA, "zero": {"offload_optimizer": {"device": "cpu"}}}),
    "shared packs": (2, 1, "fp32", LORA),
    "adapters 0": (1, 0, "fp32", LORA),
    "adapters alone": (1, 3, "fp32", LORA),
    "frozen 0": (1, 0, "fp32", {**FREEZE, **DECAY}),
}
LOW = {f"bf16 {stage}": (2, stage, "bf16", LORA) for stage in (1, 2, 3)}
MOVES = [(1, 3), (3, 2), (2, 1)]  # saved at a stage, resumed at another


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("frozen")
    jobs: dict[int, dict[str, dict[str, Any]]] = {1: {}, 2: {}}
    for name, (ranks, stage, precision, more) in CASES.items():
        table = settings_table(
            folder, stage, precision, 2, **{k: dict(v) if isinstance(v, dict) else v for k, v in more.items()}
        )
        path = folder / f"{name}.safetensors"
        seen = oracle(Settings.model_validate(table), STEPS, path)
        job = {"settings": table, "steps": STEPS, "oracle": str(path), "seen": seen, "allowed": {}}
        jobs[ranks][name] = with_sequence(job, 2) if name == "shared packs" else job
    for name, (ranks, stage, precision, more) in LOW.items():
        table, where = settings_table(folder, stage, precision, PACKS, **more), str(folder / f"low-{stage}")
        jobs[ranks][name] = {"settings": table, "steps": 4, "save_at": 2, "checkpoints": where}
        jobs[ranks][f"{name} again"] = {"settings": table, "steps": 4, "resume": True, "checkpoints": where}
    for source, target in MOVES:
        where = str(folder / f"low-{source}")
        table = settings_table(folder, target, "bf16", PACKS, **LORA)
        job = {"settings": table, "steps": 3, "resume": True, "checkpoints": where}
        jobs[1 if target == 2 else 2][f"{source} to {target}"] = job
    found: dict[str, dict[str, Any]] = {}
    for ranks in (2, 1):
        outcome = launch(list(jobs[ranks].values()), ranks, folder)
        found |= {name: jobs[ranks][name] | one for name, one in zip(jobs[ranks], outcome, strict=True)}
    return found


@pytest.mark.parametrize("name", CASES)
def test_it_is_plain_torch_and_what_is_frozen_keeps_every_bit(results, name: str) -> None:
    assert failures(results[name]) == []
    assert results[name]["frozen_changed"] == []


@pytest.mark.parametrize("name", LOW)
def test_a_resumed_run_with_adapters_repeats_the_uninterrupted_one(results, name: str) -> None:
    once, again = results[name], results[f"{name} again"]
    assert again["loaded"] == once["saved"]
    assert again["digest"] == once["digest"]
    assert again["losses"] == once["losses"][2:]
    assert once["frozen_changed"] == again["frozen_changed"] == []


@pytest.mark.parametrize(("source", "target"), MOVES)
def test_a_checkpoint_with_adapters_loads_at_any_stage_and_number_of_ranks(results, source: int, target: int) -> None:
    one = results[f"{source} to {target}"]
    assert one["loaded"] == results[f"bf16 {source}"]["saved"]
    assert one["frozen_changed"] == []
