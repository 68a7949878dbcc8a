"""The comparison of decoder inputs: its forms are valid and differ, and models are scored on true inputs."""

from pathlib import Path

import numpy as np
import pytest

from bigmodel.config.settings import UserError, load_settings
from bigmodel.data.objectives.examples import Examples, Pair
from bigmodel.run_directory import write_json
from tests.support.example_batches import VOCABULARY, fragment_of, text
from tools import compare_decoder_inputs as tool


def test_every_form_is_a_valid_run_file_of_its_own() -> None:
    found = {name: load_settings(tool.RUN_FILE, tool.overrides(name, 2, 30)) for name in tool.FORMS}
    assert {one.run.seed for one in found.values()} == {2}
    forms = [(one.data.model_dump_json(), one.training.model_dump_json()) for one in found.values()]
    assert len(set(forms)) == len(tool.FORMS) == 8
    sampled = [one.training.scheduled_sampling for one in found.values() if one.training.scheduled_sampling]
    assert [one.share_at(30) for one in sampled] == [0.25] * 3
    assert [one.choice for one in sampled] == ["likeliest", "drawn", "likeliest"]


@pytest.mark.parametrize("name", [name for name in tool.FORMS if not name.startswith("target_ahead")])
def test_every_model_is_scored_on_the_same_true_inputs(name: str) -> None:
    pair = Pair(text(5), text(60))

    def inputs(form: str) -> np.ndarray:
        data = tool.with_true_inputs(load_settings(tool.RUN_FILE, tool.overrides(form, 1, 30)).data)
        examples = Examples(data, 0, VOCABULARY)
        return examples.make(fragment_of(0, pair, examples, 0), pair).tokens

    assert inputs(name).tolist() == inputs("true inputs").tolist() == pair.target[:-1].tolist()


def test_a_finished_form_is_not_trained_again(tmp_path: Path) -> None:
    """Training would fail: there is no run file."""
    known = {"loss": 3.5, "tokens_per_cpu_second": 9.0}
    for number in range(len(tool.FORMS)):
        (tmp_path / "no-30-steps").mkdir(exist_ok=True)
        write_json(tmp_path / "no-30-steps" / f"{number}-seed-1.json", known)
    assert all(tool.result_of(tmp_path / "no.toml", name, 1, 30, tmp_path) == known for name in tool.FORMS)


def test_what_cannot_be_compared_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    run_file = tool.RUN_FILE.with_name("tiny.toml")
    with pytest.raises(UserError, match=r'tiny.toml: its model.kind = "decoder" does not have all these inputs'):
        tool.compare(steps=30, seeds="1", work=tmp_path, out=tmp_path, run_file=run_file)
    with pytest.raises(UserError, match=r"--seeds 1,x: must be different whole numbers"):
        tool.compare(steps=30, seeds="1,x", work=tmp_path, out=tmp_path, run_file=tool.RUN_FILE)
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_mean_and_spread_over_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    plain = [{"loss": 3.0, "tokens_per_cpu_second": 100.0}, {"loss": 3.2, "tokens_per_cpu_second": 120.0}]
    other = [{"loss": 3.1, "tokens_per_cpu_second": 50.0}, {"loss": 3.4, "tokens_per_cpu_second": 70.0}]
    tool.show({"true inputs": plain, "masked": other}, 30)
    printed = capsys.readouterr().out
    assert "3.1000 ± 0.1000" in printed
    assert "3.2500 ± 0.1500" in printed
    assert "+0.1500 ± 0.0500" in printed
    assert "60 ± 10" in printed
