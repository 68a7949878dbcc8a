"""The optimizer and scheduler blocks of a DeepSpeed JSON: what they become, what is refused, and with which words."""

from pathlib import Path
from typing import Any

import pytest

from bigmodel.checks.runs import short_run
from bigmodel.config.deepspeed_config import for_deepspeed, resolve_deepspeed
from bigmodel.config.deepspeed_schedule import SCHEDULERS
from bigmodel.config.settings import Settings, load_settings, settings_from_table, to_toml_table
from tests.config.test_deepspeed_config import refusal, resolve

CYCLE = {"cycle_min_lr": 1e-5, "cycle_max_lr": 1e-3}


def scheduler(kind: Any, other: dict[str, Any] | None = None, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": kind, "params": params}} | (other or {})


def optimizer(kind: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": params}}


def test_each_scheduler_becomes_a_schedule_with_all_its_settings(tmp_path: Path) -> None:
    both = scheduler("WarmupDecayLR", warmup_min_lr=1e-5, warmup_max_lr=2e-3, warmup_num_steps=20, total_num_steps=70)
    _, settings = resolve(tmp_path, both)
    schedule = settings.schedule
    assert (schedule.kind, schedule.warmup, schedule.warmup_steps) == ("deepspeed_linear", "log", 20)
    assert (schedule.lowest_rate, settings.optimizer.learning_rate, settings.training.steps) == (1e-5, 2e-3, 70)
    cycle = CYCLE | {"cycle_first_step_size": 9, "cycle_second_stair_count": 3, "decay_step_size": 5}
    _, settings = resolve(tmp_path, scheduler("OneCycle", **cycle))
    schedule = settings.schedule
    assert (schedule.rise_steps, schedule.fall_steps, schedule.rise_stairs, schedule.fall_stairs) == (9, None, 0, 3)
    assert (schedule.decay_rate, schedule.decay_interval, schedule.beta1_range) == (0.0, 5, (0.8, 0.9))
    assert settings.optimizer.beta2 == 0.99, "DeepSpeed's OneCycle sets it together with beta1"
    _, settings = resolve(tmp_path, scheduler("LRRangeTest", lr_range_test_staircase=True))
    assert (settings.optimizer.learning_rate, settings.schedule.growth, settings.schedule.staircase) == (1e-3, 1, True)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_settings_of_a_scheduler_are_read_back_from_a_run_directory(tmp_path: Path, kind: str) -> None:
    effective, settings = resolve(tmp_path, {"scheduler": {"type": kind, "params": "auto"}}, 1)
    assert "auto" not in effective["scheduler"]["params"].values()
    assert settings_from_table(to_toml_table(settings), Path("settings.json")) == settings
    again = settings.model_copy(update={"training": settings.training.model_copy(update={"deepspeed": None})})
    assert resolve_deepspeed(again, 1)[1] == again


def test_auto_takes_the_run_file_s_values_and_absent_is_deepspeed_s_default(tmp_path: Path) -> None:
    names = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")
    mine = scheduler("WarmupDecayLR", warmup_type="linear", **dict.fromkeys(names, "auto"))
    run = {"training": {"steps": 90}, "schedule": {"warmup_steps": 7}, "optimizer": {"learning_rate": 0.02}}
    effective, settings = resolve(tmp_path, mine, **run)
    assert [effective["scheduler"]["params"][name] for name in names] == [0.0, 0.02, 7, 90]
    assert (settings.schedule.warmup_steps, settings.schedule.lowest_rate) == (7, 0.0)
    _, settings = resolve(tmp_path, mine, training={"steps": 50})
    assert settings.schedule.warmup_steps == 5, "the run file's default of 100 does not fit"
    _, settings = resolve(tmp_path, scheduler("WarmupLR"), optimizer={"learning_rate": 0.02})
    assert (settings.schedule.warmup, settings.schedule.warmup_steps) == ("log", 1000)
    assert settings.optimizer.learning_rate == 0.02, "WarmupLR has no default for the highest rate"
    _, settings = resolve(tmp_path, {"scheduler": {"type": "LRRangeTest"}})
    assert settings.optimizer.learning_rate == 1e-3


def test_the_rates_of_a_scheduler_replace_that_of_the_optimizer_block_as_in_deepspeed(tmp_path: Path) -> None:
    block = optimizer("AdamW", lr=0.5)
    assert resolve(tmp_path, scheduler("WarmupLR", block, warmup_max_lr=0.1))[1].optimizer.learning_rate == 0.1
    assert resolve(tmp_path, scheduler("WarmupLR", block, warmup_max_lr="auto"))[1].optimizer.learning_rate == 0.5
    assert resolve(tmp_path, scheduler("WarmupLR", block))[1].optimizer.learning_rate == 0.5
    cosine = scheduler("WarmupCosineLR", block, total_num_steps=1000)
    assert resolve(tmp_path, cosine)[1].optimizer.learning_rate == 0.5


def test_deepspeed_gets_neither_block(tmp_path: Path) -> None:
    effective, _ = resolve(tmp_path, scheduler("WarmupLR", optimizer("AdamW", lr=0.1)))
    assert effective["scheduler"]["type"] == "WarmupLR"
    assert not {"optimizer", "scheduler"} & set(for_deepspeed(effective))


CONTRADICTIONS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        scheduler("WarmupLR"),
        {"schedule": {"kind": "cosine"}},
        'scheduler.type = "WarmupLR" is schedule.kind = "deepspeed_constant", but the run file has schedule.kind = '
        '"cosine"; remove the scheduler from the JSON, or kind from the run file',
    ),
    (
        scheduler("WarmupLR", warmup_num_steps=10),
        {"schedule": {"warmup_steps": 20}},
        "scheduler.params.warmup_num_steps = 10, but the run file has schedule.warmup_steps = 20; make them equal, or",
    ),
    (
        scheduler("WarmupLR"),
        {"schedule": {"warmup_steps": 20}},
        "scheduler.params.warmup_num_steps is absent, which is 1000 in DeepSpeed, but the run file has "
        "schedule.warmup_steps = 20",
    ),
    (
        scheduler("WarmupDecayLR", total_num_steps=70),
        {"training": {"steps": 80}},
        "scheduler.params.total_num_steps = 70, but the run file has training.steps = 80; make them equal, write "
        '"auto" in the JSON, or set kind = "deepspeed_linear" and total_steps = 70 in [schedule]',
    ),
    (
        scheduler("WarmupDecayLR", total_num_steps="auto"),
        {"optimizer": {"learning_rate": 0.1}},
        "warmup_max_lr is absent, which is 0.001 in DeepSpeed, but the run file has optimizer.learning_rate = 0.1",
    ),
    (
        scheduler("WarmupDecayLR", optimizer("AdamW", lr=0.1), total_num_steps="auto"),
        {},
        "warmup_max_lr is absent, which is 0.001 in DeepSpeed, and replaces optimizer.params.lr = 0.1",
    ),
    (
        scheduler("OneCycle", optimizer("AdamW", betas=[0.8, 0.999]), **CYCLE),
        {},
        "optimizer.params.betas[1] = 0.999, but scheduler.params.cycle_momentum is true, which sets beta2 to 0.99 "
        "(false: neither beta changes); make them equal",
    ),
    (
        scheduler("OneCycle", **CYCLE),
        {"optimizer": {"kind": "muon"}},
        'schedule.beta1_range = [0.8, 0.9] with optimizer.kind = "muon": only "adamw" or "lion" can change beta1',
    ),
    (
        scheduler("OneCycle", cycle_momentum=False, **CYCLE),
        {"schedule": {"warmup_steps": 5}},
        'warmup_steps = 5 has no effect with kind = "one_cycle"',
    ),
    (
        scheduler("WarmupLR", warmup_min_lr=0.2, warmup_max_lr=0.1),
        {},
        "schedule.lowest_rate = 0.2 exceeds optimizer.learning_rate = 0.1",
    ),
    (scheduler("WarmupLR"), {"schedule": {"unit": "tokens"}}, 'unit = "tokens" has no effect with kind = "deepspeed_'),
    (optimizer("Muon"), {"optimizer": {"kind": "muon", "matrix_scale": "match_rms_adamw"}}, "matrix_scale"),
]


@pytest.mark.parametrize(("mine", "run", "words"), CONTRADICTIONS)
def test_a_contradiction_is_one_message_that_names_both(
    tmp_path: Path, mine: dict[str, Any], run: dict[str, Any], words: str
) -> None:
    told = refusal(tmp_path, mine, **run)
    assert words in told
    assert len(told.splitlines()) == 1


REFUSED: list[tuple[dict[str, Any], str]] = [
    (scheduler("WarmupLr"), 'scheduler.type = "WarmupLr" must be one of WarmupLR, WarmupDecayLR'),
    (scheduler("CosineAnnealingLR"), "or describe the learning rate in [schedule] of the run file"),
    (scheduler(None), "scheduler.type = null must be a text"),
    (scheduler(["WarmupLR"]), 'scheduler.type = ["WarmupLR"] must be a text'),
    ({"scheduler": None}, "scheduler = null must be an object"),
    ({"scheduler": []}, "scheduler = [] must be an object"),
    ({"scheduler": "WarmupLR"}, 'scheduler = "WarmupLR" must be an object'),
    ({"scheduler": {"type": "WarmupLR", "params": 3}}, "scheduler.params = 3 must be an object"),
    ({"scheduler": {"type": "WarmupLR", "parms": {}}}, "scheduler.parms is not a key"),
    (scheduler("WarmupLR", warmup_steps=3), "scheduler.params.warmup_steps is not a key that DeepSpeed 0.19.8 knows"),
    (scheduler("WarmupCosineLR", total_num_steps=9, warmup_max_lr=0.1), "scheduler.params.warmup_max_lr is not a key"),
    (scheduler("WarmupDecayLR"), "scheduler.params.total_num_steps is missing"),
    (scheduler("OneCycle", cycle_max_lr=0.1), "scheduler.params.cycle_min_lr is missing"),
    (scheduler("WarmupLR", warmup_num_steps=0), "warmup_num_steps = 0 must be a whole number of at least 1 (or"),
    (scheduler("WarmupLR", warmup_num_steps=10.5), "warmup_num_steps = 10.5 must be a whole number"),
    (scheduler("WarmupLR", warmup_num_steps=True), "warmup_num_steps = true must be a whole number"),
    (
        scheduler("WarmupLR", warmup_max_lr="1e-3"),
        'warmup_max_lr = "1e-3" must be a number above 0 (or "auto"); write 0.001 without quotes',
    ),
    (scheduler("WarmupLR", warmup_max_lr=float("inf")), "warmup_max_lr = Infinity must be a number"),
    (scheduler("WarmupLR", warmup_max_lr=float("nan")), "warmup_max_lr = NaN must be a number"),
    (scheduler("WarmupLR", warmup_max_lr=None), "warmup_max_lr = null must be a number"),
    (
        scheduler("WarmupLR", warmup_min_lr=[0, 0]),
        'must be a number of at least 0 (or "auto"); a rate for some parameters is',
    ),
    (scheduler("WarmupLR", warmup_type="cosine"), 'warmup_type = "cosine" must be "log" or "linear" (or "auto")'),
    (scheduler("WarmupLR", last_batch_iteration=5), "last_batch_iteration = 5: a resumed run continues its schedule"),
    (scheduler("WarmupCosineLR", total_num_steps=9, cos_min_ratio=2), "at least 0 and at most 1"),
    (scheduler("OneCycle", cycle_momentum=1, **CYCLE), 'cycle_momentum = 1 must be true or false (or "auto")'),
    (scheduler("OneCycle", cycle_min_mom=0.95, **CYCLE), "cycle_min_mom = 0.95 and cycle_max_mom = 0.9 must rise"),
    (scheduler("OneCycle", decay_mom_rate=0.1, **CYCLE), "decay_mom_rate = 0.1: DeepSpeed's factor would take beta1"),
    (scheduler("LRRangeTest", lr_range_test_step_size=0), "lr_range_test_step_size = 0 must be a whole number"),
    (optimizer("OneBitAdam"), "DeepSpeed 0.19.8 no longer has it; choose one of AdamW, Lion"),
    (optimizer("Lamb"), "it scales updates by layer norms"),
    (optimizer("FusedAdam"), 'write "AdamW"; the implementation is chosen here'),
    (optimizer("SGD"), 'optimizer.type = "SGD" is not supported; choose one of'),
    (optimizer("Adam", adam_w_mode=False), "only decoupled weight decay is supported, not L2"),
    (optimizer("AdamW", bias_correction=False), "bias_correction = false must be true: moments are always corrected"),
    (optimizer("AdamW", bias_correction=1), "bias_correction = 1 must be true"),
    (optimizer("AdamW", amsgrad=True), "amsgrad = true must be false: AMSGrad is not offered"),
    (optimizer("AdamW", torch_adam="yes"), 'torch_adam = "yes" must be true or false'),
    (optimizer("AdamW", fp32_optimizer_states=False), "fp32_optimizer_states = false must be true: moments are fp32"),
    (optimizer("AdamW", max_grad_norm=1.0), "max_grad_norm: write gradient_clipping at the top of the JSON instead"),
    (optimizer("AdamW", lr="1e-3"), 'lr = "1e-3" must be a number above 0'),
    (optimizer("AdamW", lr=0), "lr = 0 must be a number above 0"),
    (optimizer("AdamW", weight_decay=-0.1), "weight_decay = -0.1 must be a number of at least 0"),
    (optimizer("AdamW", muon_lr=0.1), 'muon_lr has no effect without optimizer.type = "Muon"'),
    (optimizer("Muon", momentum=1), "momentum = 1 must be a number from 0 to below 1"),
    (optimizer("Muon", per_head_muon=True), "per_head_muon = true must be false: whole matrices are orthogonalised"),
    (
        scheduler("WarmupLR", optimizer("Muon", adam_lr=0.1), warmup_max_lr=0.1),
        "adam_lr: in DeepSpeed, scheduler.params.warmup_max_lr replaces the rate of every parameter",
    ),
]


@pytest.mark.parametrize(("mine", "words"), REFUSED)
def test_a_block_that_is_not_offered_or_wrong_says_why(tmp_path: Path, mine: dict[str, Any], words: str) -> None:
    assert words in refusal(tmp_path, mine)


def test_all_that_is_wrong_with_both_blocks_is_told_at_once(tmp_path: Path) -> None:
    mine = scheduler("WarmupLR", optimizer("Adam", lr=-1, amsgrad=True), warmup_num_steps=0, warmup_type=3)
    assert len(refusal(tmp_path, mine).splitlines()) == 5
    mine = scheduler("WarmupLR", optimizer("OneBitAdam", freeze_step=9, bias_correction=False), warmup_num_steps=0)
    assert len(refusal(tmp_path, mine).splitlines()) == 3, "parameters of an optimizer that is not offered say nothing"


def test_flags_that_change_no_result_are_accepted(tmp_path: Path) -> None:
    flags = {"torch_adam": True, "bias_correction": True, "amsgrad": False, "adam_w_mode": True, "foreach": None}
    assert resolve(tmp_path, optimizer("Adam", **flags))[1].optimizer.kind == "adamw"
    assert resolve(tmp_path, optimizer("AdamW", adam_w_mode=False))[1], "it has no effect on AdamW"
    assert resolve(tmp_path, optimizer("Adam", adam_w_mode=False, weight_decay=0))[1], "L2 of 0 is no L2"
    assert resolve(tmp_path, {"optimizer": {}, "scheduler": {}})[1]


def test_muon_of_deepspeed_keeps_its_scale_and_its_two_rates(tmp_path: Path) -> None:
    _, settings = resolve(tmp_path, optimizer("Muon", lr=0.1, muon_lr=0.04, adam_lr=0.001, ns_method="gram"))
    update = settings.optimizer
    assert (update.matrix_scale, update.learning_rate) == ("original", 0.04)
    assert update.adamw_rate_factor == pytest.approx(0.025)
    _, settings = resolve(tmp_path, optimizer("Muon", lr=0.1, muon_lr=0.05))
    assert settings.optimizer.adamw_rate_factor == pytest.approx(2), "lr is that of what AdamW updates"
    effective, settings = resolve(tmp_path, optimizer("Muon", lr="auto", adam_lr="auto", momentum="auto"))
    assert effective["optimizer"]["params"] == {"lr": 3e-4, "adam_lr": 3e-4, "momentum": 0.95}


def test_a_schedule_of_another_length_than_the_run_is_set_in_the_run_file(tmp_path: Path) -> None:
    schedule = {"kind": "deepspeed_linear", "total_steps": 70}
    mine = scheduler("WarmupDecayLR", total_num_steps=70)
    _, settings = resolve(tmp_path, mine, training={"steps": 10}, schedule=schedule)
    assert (settings.training.steps, settings.schedule.total_steps) == (10, 70)


@pytest.mark.parametrize("mine", [scheduler("WarmupDecayLR", total_num_steps=70), scheduler("OneCycle", **CYCLE)])
def test_a_check_shortens_the_run_and_keeps_the_schedule(tmp_path: Path, mine: dict[str, Any]) -> None:
    _, whole = resolve(tmp_path, mine)
    run_file = tmp_path / "run.toml"
    run_file.write_text("[training]\ndeepspeed = 'mine.json'\n")
    _, short = resolve_deepspeed(load_settings(run_file, short_run(whole, tmp_path / "check", 4, 2)), 1)
    assert short.training.steps == 4
    assert short.schedule.kind == whole.schedule.kind
    assert short.schedule.total_steps == (70 if short.schedule.kind == "deepspeed_linear" else 0)


def test_a_run_file_sets_the_same_schedules_without_a_json() -> None:
    table = {"schedule": {"kind": "one_cycle", "beta1_range": [0.9, 0.8]}}
    with pytest.raises(ValueError, match=r"beta1_range = \[0.9, 0.8\]: must be \[lowest, highest\]"):
        Settings.model_validate(table)
    with pytest.raises(ValueError, match=r"only \"adamw\" or \"lion\" can change beta1"):
        Settings.model_validate(
            {"schedule": {"kind": "one_cycle", "beta1_range": [0.8, 0.9]}, "optimizer": {"kind": "adafactor"}}
        )
    with pytest.raises(ValueError, match=r"lowest_rate = 0.1 exceeds optimizer.learning_rate = 0.0003"):
        Settings.model_validate({"schedule": {"kind": "one_cycle", "lowest_rate": 0.1}})
