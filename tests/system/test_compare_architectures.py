"""tools/compare_architectures.py: equal parameters, the same data, and runs that go on where they were cut."""

from pathlib import Path

import pytest
import torch

from bigmodel.config.settings import UserError, load_settings
from tests.support.tiny_run import write_run
from tools.compare_architectures import CONSTANT, KINDS, Contender, compare, equal_points, loss_at, parameters, sized


def test_every_model_has_the_parameters_of_the_transformer_within_2_percent(shards: Path, tmp_path: Path) -> None:
    base = load_settings(write_run(tmp_path, shards), CONSTANT)
    sizes = [parameters(sized(kind, base, 400), base, 400) for kind in KINDS]
    assert sizes == pytest.approx([sizes[0]] * len(KINDS), rel=0.02)


def test_a_comparison_goes_on_where_it_was_cut(shards: Path, tmp_path: Path) -> None:
    base = load_settings(write_run(tmp_path, shards), CONSTANT)
    first, whole = Contender("gru", base, tmp_path), Contender("gru", base, tmp_path)
    while len(first.points) < 2:
        first.train(first.points[-1][1] + 1e-9 if first.points else 1e-9, 1, 1)
    again = Contender("gru", base, tmp_path)
    assert (again.step, again.points) == (first.step, first.points)
    again.train(again.points[-1][1] + 1e-9, 1, 1)
    assert again.points[:2] == first.points
    for steps in range(1, again.step + 1):  # without a cut
        whole.train(1e-9 + (whole.points[-1][1] if whole.points else 0.0), 1, 1)
        assert whole.step == steps
    assert [point[::2] for point in whole.points] == [point[::2] for point in again.points]
    for mine, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_other_kinds_and_models_of_other_settings_are_refused(shards: Path, tmp_path: Path) -> None:
    run_file = write_run(tmp_path, shards)
    base = load_settings(run_file, CONSTANT)
    Contender("rnn", base, tmp_path).save()
    other = base.model_copy(update={"optimizer": base.optimizer.model_copy(update={"learning_rate": 0.5})})
    with pytest.raises(UserError, match=r"rnn.pt: was trained with other settings; give another --work"):
        Contender("rnn", other, tmp_path)
    lstm = tmp_path / "lstm.toml"
    lstm.write_text('model = { kind = "lstm", hidden_size = 8 }\n')
    with pytest.raises(UserError, match=r'lstm.toml: its model.kind = "lstm" is not a transformer that'):
        compare(seconds=1, every=1, sequences=1, work=tmp_path, out=tmp_path, run_file=lstm)


def test_losses_are_compared_where_every_model_has_been() -> None:
    found = {"a": {"points": [(100, 2.0, 6.0), (200, 4.0, 5.0)]}, "b": {"points": [(150, 9.0, 7.0)]}}
    assert equal_points(found) == (150, 4.0)
    assert loss_at(found["a"]["points"], 0, 150) == 5.5
    assert loss_at(found["a"]["points"], 1, 4.0) == 5.0
