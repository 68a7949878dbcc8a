"""Compare: the first step at which two runs differ, in what, and a picture of both."""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from bigmodel.__main__ import app
from bigmodel.config.settings import UserError
from bigmodel.inspect.compare import Difference, compare, first_difference, setting_differences
from tests.support.tiny_run import write_run

STEP = {"targets": 90, "positions": 90, "documents": 3, "padding": 6, "learning_rate": 0.1, "skipped": False}


def run(folder: Path, name: str, losses: list[float], seed: int = 1, **at_end: object) -> Path:
    path = folder / name
    path.mkdir()
    lines = [
        STEP
        | {"kind": "step", "step": number, "loss": loss, "gradient_norm": loss / 2, "step_seconds": number * len(name)}
        for number, loss in enumerate(losses, 1)
    ]
    lines[-1] |= at_end
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "settings.json").write_text(json.dumps({"run": {"seed": seed, "directory": name}}))
    return path


def test_equal_runs_are_equal_though_one_is_longer_and_slower(tmp_path: Path, capsys) -> None:
    one, two = run(tmp_path, "one", [3.0, 2.0, 1.5]), run(tmp_path, "$\\other$", [3.0, 2.0])  # no formula
    assert compare(one, two, tmp_path / "both.png") is None
    assert "equal to the last bit in all 2 steps" in capsys.readouterr().out
    assert (tmp_path / "both.png").stat().st_size > 10_000


def ink_below(png: Path) -> int:
    """Dark pixels in the lower panel, without its left and bottom axes."""
    pixels = imread(png)[..., :3].max(axis=-1)
    return int((pixels[640:760, 150:] < 0.35).sum())


def test_a_single_step_that_differs_is_seen_in_the_lower_panel(tmp_path: Path) -> None:
    losses = [3.0 - number / 100 for number in range(50)]
    other = [loss + 1e-6 * (number == 25) for number, loss in enumerate(losses)]
    drawn = {}
    for name, second in (("same", losses), ("other", other)):
        one, two = run(tmp_path, f"{name}-1", losses), run(tmp_path, f"{name}-2", second)
        compare(one, two, tmp_path / f"{name}.png")
        drawn[name] = ink_below(tmp_path / f"{name}.png")
    assert drawn["same"] == 0, "it says in grey that no loss differs"
    assert drawn["other"] > 20


def test_without_png_neither_compare_nor_show_writes_a_picture(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, run_file = run(tmp_path, "one", [3.0]), run(tmp_path, "two", [3.0]), write_run(tmp_path, shards)
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shown = [["show", name, str(run_file)] for name in ("data", "batch", "memory")]
    for words in [["compare", str(one), str(two)], *shown]:
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "here"])


def test_the_first_difference_is_told_by_step_name_and_size(tmp_path: Path, capsys) -> None:
    one = run(tmp_path, "one", [3.0, 2.0, 1.5, 1.0])
    two = run(tmp_path, "two", [3.0, 2.0, 1.5000000000000002, 0.5], seed=2)
    found = compare(one, two, tmp_path / "both.png")
    assert found == Difference(3, "loss", 1.5, 1.5000000000000002)
    printed = capsys.readouterr().out
    assert "first differ at step 3, in loss: 1.5 and 1.5000000000000002" in printed
    assert "setting run.seed: 1 and 2" in printed
    assert setting_differences(one, two) == [("run.seed", 1, 2)]


def test_both_curves_in_the_terminal_have_the_same_axes(tmp_path: Path, capsys) -> None:
    one, two = run(tmp_path, "one", [4.0, 3.0, 2.0, 1.0]), run(tmp_path, "two", [3.0, 2.0])
    compare(one, two, tmp_path / "both.png")
    lines = capsys.readouterr().out.splitlines()
    ends = [[line for line in lines if line.rstrip().endswith("step 4")], [line for line in lines if "4.00 ┤" in line]]
    assert [len(some) for some in ends] == [2, 2]
    assert lines[lines.index(str(two)) + 2].strip("4.0 ┤\u2800") == "", "the shorter run starts below the top"


def test_other_data_is_told_before_another_loss_and_nan_equals_nan(tmp_path: Path) -> None:
    one = run(tmp_path, "one", [float("nan"), 2.0])
    two = run(tmp_path, "two", [float("nan"), 1.0], documents=4)
    assert first_difference(one, two) == (Difference(2, "documents", 3, 4), 2)


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none: not a run directory"):
        compare(tmp_path / "none", run(tmp_path, "one", [1.0]), tmp_path / "both.png")
