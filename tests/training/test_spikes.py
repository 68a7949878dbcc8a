"""Spikes: what is one, and where a rewind leads."""

import json
import math
from pathlib import Path
from random import Random

import pytest

from bigmodel.config.settings import SpikeSettings, UserError
from bigmodel.training.checkpoint.saver import manifest_of
from bigmodel.training.spikes import (
    Rewind,
    Spikes,
    declare,
    is_trained_on,
    plan_rewind,
    read_rewinds,
    remove_trained_on,
)

SETTINGS = SpikeSettings(window=32)
REWINDS = SpikeSettings(policy="rewind", left_out_steps=10)


def test_a_spike_is_told_from_noise_also_after_spikes() -> None:
    random, spikes = Random(1), Spikes(SETTINGS, {})
    for step in range(1, 400):
        loud = step >= 100 and step % 5 == 0  # a fifth of the window: the median does not follow
        found = spikes.see(random.gauss(2.0, 0.1), 900.0 if loud else random.gauss(1.0, 0.05))
        assert [spike.signal for spike in found] == ["gradient_norm"] * loud, step
    assert str(found[0] if found else spikes.see(4.0, 1.0)[0]).startswith("loss 4, usually ")


def test_a_level_that_lasts_is_the_usual() -> None:
    spikes = Spikes(SETTINGS, {})
    found = [len(spikes.see(2.0 if step < 40 else 3.0, 1.0)) for step in range(100)]
    assert found[40] == 1
    assert sum(found) == 16, "half of the window"


def test_a_resumed_run_judges_as_the_uninterrupted_one() -> None:
    random, whole = Random(2), Spikes(SETTINGS, {})
    values = [(random.gauss(2.0, 0.3), math.exp(random.gauss(0.0, 1.0))) for _ in range(120)]
    judged = [whole.see(*pair) for pair in values]
    assert any(judged)
    half = Spikes(SETTINGS, {})
    for pair in values[:60]:
        half.see(*pair)
    resumed = Spikes(SETTINGS, json.loads(json.dumps(half.state())))
    assert [resumed.see(*pair) for pair in values[60:]] == judged[60:]
    assert resumed.state() == whole.state()


@pytest.mark.parametrize(
    ("saved", "found"),
    [
        ([100, 200], Rewind(250, 200, 241)),
        ([100, 200, 245], Rewind(250, 200, 241)),  # 245 was trained on left out steps
        ([245, 248], Rewind(250, 245, 246)),  # nothing older: fewer are left out
        ([240, 241], Rewind(250, 240, 241)),
        ([250, 300], None),
        ([], None),
    ],
)
def test_a_rewind_goes_back_before_the_left_out_steps(saved: list[int], found: Rewind | None) -> None:
    assert plan_rewind(250, saved, REWINDS) == found


def test_a_run_that_spikes_after_each_rewind_ends() -> None:
    earlier = [Rewind(at, 200, at - 9) for at in (230, 240, 245)]
    assert plan_rewind(250, [100, 200], REWINDS, earlier[:2]) == Rewind(250, 200, 241)
    with pytest.raises(UserError, match=r"max_rewinds = 3: the run went back to step 200 that often, and spikes again"):
        plan_rewind(250, [100, 200], REWINDS, earlier)
    with pytest.raises(ValueError, match="left_out_steps = 32 must be below window = 32"):
        SpikeSettings(policy="rewind", window=32, left_out_steps=32)


def test_checkpoints_that_know_a_rewind_stay(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    for step, left_out in ((200, []), (245, []), (260, [{"at": 250, "to": 200, "first": 241}])):
        path = checkpoints / f"step-{step:08d}"
        path.mkdir(parents=True)
        (path / "manifest.json").write_bytes(manifest_of({}, 1))
        (path / "state.json").write_text(json.dumps({"state": {"step": step, "left_out": left_out}}))
    declare(tmp_path, Rewind(250, 200, 241))
    rewinds = read_rewinds(tmp_path)
    assert rewinds == [Rewind(250, 200, 241)]
    remove_trained_on(checkpoints, rewinds)
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "step-00000200", "step-00000245.partial-rewound", "step-00000260"
    ]  # fmt: skip
    assert [step for step in (240, 241, 249, 250, 300) if is_trained_on(step, rewinds)] == [241, 249]
