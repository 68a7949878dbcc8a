"""The rungs of a ladder: sizes and lengths by the rule, and settings that can be trained."""

from pathlib import Path
from typing import Any

import pytest

from bigmodel.config.settings import Settings, UserError, load_settings
from bigmodel.sweep.ladder import ladder, sized, target_of

TABLE: dict[str, Any] = {
    "model": {
        "num_layers": 6, "hidden_size": 128, "num_heads": 8, "num_kv_heads": 4, "intermediate_size": 344,
        "tied_embeddings": True, "mup_base_width": 32,
    },
    "schedule": {"kind": "wsd", "warmup_steps": 100, "decay_steps": 400},
    "training": {"steps": 2000, "global_batch_size": 4},
    "data": {"sequence_length": 512, "max_document_length": 256},
}  # fmt: skip


def settings_with(**changes: Any) -> Settings:
    sections = {name: TABLE.get(name, {}) | changes.get(name, {}) for name in {**TABLE, **changes}}
    return Settings.model_validate(sections)


def test_sizes_are_in_proportion_and_heads_are_equally_large() -> None:
    model = sized(settings_with().model, 48)
    assert (model.hidden_size, model.num_heads, model.resolved_head_dim) == (48, 3, 16)
    assert (model.num_kv_heads, model.intermediate_size, model.num_layers) == (1, 128, 2)
    assert sized(settings_with().model, 64).num_layers == 3
    assert sized(settings_with().model, 16).num_layers == 1
    assert sized(settings_with().model, 16, fixed_depth=True).num_layers == 6
    assert sized(settings_with().model, 112).num_kv_heads == 7  # 3.5 are wanted; 7 heads divide by 1 and 7


def test_each_rung_has_the_targets_tokens_per_parameter_and_shares_of_the_schedule() -> None:
    settings = settings_with()
    target, rungs = target_of(settings, 1024), ladder(settings, 1024, [64, 32])
    assert [rung.width for rung in rungs] == [32, 64]
    for rung in rungs:
        assert rung.tokens / rung.parameters == pytest.approx(target.tokens / target.parameters, rel=0.01)
        assert rung.tokens == rung.steps * 2048
        assert f"schedule.warmup_steps={rung.steps * 100 // 2000}" in rung.overrides
        assert f"schedule.decay_steps={rung.steps * 400 // 2000}" in rung.overrides
    assert rungs[0].compute == 6 * rungs[0].parameters * rungs[0].tokens
    assert target.compute > 8 * rungs[-1].compute


def test_a_rung_without_an_end_is_refused() -> None:
    with pytest.raises(UserError, match=r"--tokens-per-parameter 1e\+300: .* steps of width 64; a rung has at most"):
        ladder(settings_with(), 1024, [64], [1e300])


def test_the_overrides_of_a_rung_are_its_sizes(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        "[model]\nhidden_size = 128\nnum_heads = 8\nnum_layers = 6\nmup_base_width = 32\n"
        '[schedule]\nkind = "cosine"\nwarmup_steps = 100\n[training]\nsteps = 2000\n'
    )
    settings = load_settings(file, [])
    for rung in ladder(settings, 1024, [32, 64], [5, 20], [1e-3, 2e-3]):
        one = load_settings(file, list(rung.overrides))
        assert one.model == sized(settings.model, rung.width)
        assert (one.training.steps, one.optimizer.learning_rate) == (rung.steps, rung.rate)
    assert len(ladder(settings, 1024, [32, 64], [5, 20], [1e-3, 2e-3])) == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": {"rank": 4, "targets": ["query"]}}, r"lora.rank = 4: rungs train all weights; leave it out"),
        ({"training": {"batch_ramp": [(10, 8)]}}, r"training.batch_ramp = .*: a rung has one batch size"),
        ({"evaluation": {"at_end": False}}, r"evaluation.at_end = false: .* set it to true"),
    ],
)
def test_a_ladder_that_is_not_defined_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        target_of(settings_with(**changes), 1024)


@pytest.mark.parametrize("schedule", ["one_cycle", "deepspeed_cosine"])
def test_a_schedule_that_is_not_cut_in_proportion_is_refused(schedule: str) -> None:
    settings = Settings.model_validate(TABLE | {"schedule": {"kind": schedule}})
    with pytest.raises(UserError, match=rf'schedule.kind = "{schedule}": warm-up and decay .* use one of cosine, wsd'):
        target_of(settings, 1024)


@pytest.mark.parametrize("width", [24, 128, 256])
def test_a_width_without_whole_heads_or_below_no_target_is_refused(width: int) -> None:
    with pytest.raises(
        UserError, match=rf"--widths {width}: must be below model.hidden_size = 128 and a multiple of 16"
    ):
        ladder(settings_with(), 1024, [width])


def test_a_ladder_without_rungs_is_refused() -> None:
    with pytest.raises(UserError, match="--widths is empty: give hidden sizes below the target's"):
        ladder(settings_with(), 1024, [])
