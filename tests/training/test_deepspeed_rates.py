"""The rates of schedules named after DeepSpeed's are those of DeepSpeed's own classes and engine, to the last bit."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from bigmodel.config.deepspeed_config import resolve_deepspeed
from bigmodel.config.deepspeed_schedule import FOLLOWS, REQUIRED, SCHEDULERS
from bigmodel.config.settings import Settings
from bigmodel.run_directory import read_json_lines
from bigmodel.training.learning_rate import betas, learning_rate
from tests.support.ranks import command, run_ranks
from tests.support.tiny_run import write_run

STEPS = 80
RATE = 1e-3
CYCLE = {"cycle_min_lr": 1e-5, "cycle_max_lr": 3e-3, "cycle_first_step_size": 13}
RANGE = {"lr_range_test_min_lr": 1e-5, "lr_range_test_step_size": 7, "lr_range_test_step_rate": 3.7}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("WarmupLR", {}),
    ("WarmupLR", {"warmup_num_steps": 1, "warmup_max_lr": 0.7}),
    ("WarmupLR", {"warmup_num_steps": 10, "warmup_max_lr": 3e-4, "warmup_min_lr": 1e-5}),
    ("WarmupLR", {"warmup_num_steps": 7, "warmup_max_lr": 3e-4, "warmup_min_lr": 1e-5, "warmup_type": "linear"}),
    ("WarmupDecayLR", {"total_num_steps": 50, "warmup_num_steps": 10}),
    ("WarmupDecayLR", {"total_num_steps": 53, "warmup_num_steps": 11, "warmup_min_lr": 1e-5, "warmup_type": "linear"}),
    ("WarmupDecayLR", {"total_num_steps": 5, "warmup_num_steps": 11}),
    ("WarmupCosineLR", {"total_num_steps": 50, "warmup_num_steps": 10}),
    (
        "WarmupCosineLR",
        {"total_num_steps": 53, "warmup_num_steps": 11, "warmup_min_ratio": 0.13, "cos_min_ratio": 0.07},
    ),
    ("WarmupCosineLR", {"total_num_steps": 60, "warmup_num_steps": 11, "warmup_type": "linear"}),
    ("OneCycle", CYCLE),
    ("OneCycle", CYCLE | {"cycle_second_step_size": 0, "cycle_momentum": False}),
    ("OneCycle", CYCLE | {"cycle_second_step_size": 7, "cycle_first_stair_count": 4, "cycle_min_mom": 0.83}),
    (
        "OneCycle",
        CYCLE
        | {"cycle_second_step_size": 17, "cycle_second_stair_count": 3, "decay_step_size": 7, "decay_lr_rate": 0.3}
        | {"cycle_max_mom": 0.97},
    ),
    ("LRRangeTest", {}),
    ("LRRangeTest", RANGE),
    ("LRRangeTest", RANGE | {"lr_range_test_staircase": True}),
]

# As in the documentation of Hugging Face: everything follows the program that reads it.
ALL_AUTO = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
    "zero_optimization": {"stage": 2, "contiguous_gradients": True, "reduce_bucket_size": 2e8, "reduce_scatter": True},
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


def watch_deepspeed(folder: Path) -> int:
    """On a rank: rates and betas of DeepSpeed's schedulers alone, and in the updates of its engine."""
    import deepspeed
    import torch
    from deepspeed.runtime import lr_schedules

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2, 2))], lr=RATE)

    def seen(group: dict[str, Any]) -> list[Any]:
        return [group["lr"], *group["betas"]]

    alone, signatures = [], {}
    for kind, params in CASES:
        own, rows = optimizer(), []
        scheduler = getattr(lr_schedules, kind)(own, **params)
        signatures[kind] = {
            name: "required" if one.default is inspect.Parameter.empty else one.default
            for name, one in inspect.signature(type(scheduler)).parameters.items()
            if name != "optimizer"
        }
        for _ in range(STEPS):
            rows.append(seen(own.param_groups[0]))
            scheduler.step()
        alone.append(rows)

    torch.distributed.init_process_group("gloo")
    in_engine = []
    for kind, params in (CASES[2], CASES[-4]):
        own, rows = optimizer(), []
        model = torch.nn.Linear(2, 2, bias=False)
        own.param_groups[0]["params"] = list(model.parameters())
        config = {"train_batch_size": 1, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
        config |= {"bf16": {"enabled": True}, "scheduler": {"type": kind, "params": params}}
        engine, *_ = deepspeed.initialize(model=model, optimizer=own, config=config, dist_init_required=False)
        own.register_step_pre_hook(lambda one, *_, rows=rows: rows.append(seen(one.param_groups[0])))
        for _ in range(20):
            engine.backward(engine(torch.ones(1, 2, dtype=torch.bfloat16)).sum())
            engine.step()
        in_engine.append(rows)
    (folder / "seen.json").write_text(json.dumps({"alone": alone, "engine": in_engine, "signatures": signatures}))
    return 0


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("theirs")
    run_ranks(1, watch_deepspeed, folder)
    return json.loads((folder / "seen.json").read_text())


def ours(folder: Path, kind: str, params: dict[str, Any]) -> list[list[float]]:
    """The rate and betas of each step."""
    optimizer = {"type": "AdamW", "params": {"lr": RATE}}
    table = {"optimizer": optimizer, "scheduler": {"type": kind, "params": params}}
    (folder / "mine.json").write_text(json.dumps(table))
    settings = Settings.model_validate({"training": {"deepspeed": str(folder / "mine.json")}})
    _, settings = resolve_deepspeed(settings, 1)
    return [[learning_rate(step, settings), *(betas(step, settings) or (0.9, 0.999))] for step in range(STEPS)]


def test_every_rate_and_beta_of_deepspeed_s_schedulers_is_met_to_the_last_bit(theirs, tmp_path: Path) -> None:
    assert {kind for kind, _ in CASES} == set(SCHEDULERS)
    for (kind, params), rows in zip(CASES, theirs["alone"], strict=True):
        assert ours(tmp_path, kind, params) == rows, (kind, params)


def test_deepspeed_s_engine_updates_with_the_rates_of_the_same_steps(theirs, tmp_path: Path) -> None:
    for (kind, params), rows in zip((CASES[2], CASES[-4]), theirs["engine"], strict=True):
        assert len(rows) == 20
        assert ours(tmp_path, kind, params)[:20] == rows, kind


def test_two_updates_at_the_lowest_rate_come_before_a_logarithmic_warm_up(tmp_path: Path) -> None:
    found = ours(tmp_path, "WarmupLR", {"warmup_num_steps": 10, "warmup_max_lr": 1.0})
    assert [rate for rate, *_ in found[:12]] == pytest.approx(
        [0, 0, 0.30103, 0.47712, 0.60206, 0.69897, 0.77815, 0.8451, 0.90309, 0.95424, 1, 1], abs=1e-5
    )


def test_the_table_has_every_parameter_of_deepspeed_s_schedulers_with_its_default(theirs) -> None:
    for kind, scheduler in SCHEDULERS.items():
        defaults = {name: one.default for name, one in scheduler.parameters.items()}
        written = {
            name: "required" if default is REQUIRED else None if default is FOLLOWS else default
            for name, default in defaults.items()
        }
        assert written == theirs["signatures"][kind], kind


def test_a_run_with_an_all_auto_file_has_the_rates_of_deepspeed(tmp_path: Path, shards: Path) -> None:
    """Peak 0.01, 2 warm-up steps and 10 steps in all are in the run file."""
    run_file = write_run(tmp_path, shards)
    (tmp_path / "run-deepspeed.json").write_text(json.dumps(ALL_AUTO))
    run_ranks(1, command, ["train", str(run_file)], tmp_path / "printed")
    run = tmp_path / "run"
    found = [line["learning_rate"] for line in read_json_lines(run / "metrics.jsonl") if line["kind"] == "step"]
    params = {"warmup_max_lr": 0.01, "warmup_num_steps": 2, "total_num_steps": 10}
    assert found == [rate for rate, *_ in ours(tmp_path, "WarmupDecayLR", params)[:10]]
    assert found[:5] == pytest.approx([0, 0, 0.01, 0.01, 0.00875])
    effective = json.loads((run / "deepspeed.json").read_text())
    assert effective["scheduler"]["params"] == params | {"warmup_min_lr": 0.0}
    schedule = json.loads((run / "settings.json").read_text())["schedule"]
    assert (schedule["kind"], schedule["warmup"], schedule["warmup_steps"]) == ("deepspeed_linear", "log", 2)
