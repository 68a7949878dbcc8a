"""Where a step's time goes: what is drawn is what was recorded, and it adds up to the step and to the run."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from bigmodel.config.settings import UserError
from bigmodel.inspect.step_time import draw_times, read_times, step_time
from bigmodel.metrics.run_accounting import CAUSES as LOST
from bigmodel.pictures import CAUSES, PHASES
from tests.metrics.test_run_accounting import Run, step

COLOURS = PHASES | CAUSES

QUICK = {"forward": 0.3, "backward": 0.5, "communication": 0.1, "evaluation": 7.0}


def write_run(directory: Path, steps: int = 20) -> tuple[Path, Run]:
    """Steps of 1 s after a start of 5 s, killed once and down for 10 s; the last step waits 4 s for data."""
    run = Run()
    run.start(0, None)
    for number in range(1, steps):
        if number == steps // 2:
            run.start(number - 1, "died", after=10.0)
        run.add(step(number, phases=QUICK))
    run.add(step(steps, lap=5.0, data_wait_seconds=4.0, phases=QUICK | {"data": 4.0}))
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in run.file))
    return directory, run


def test_phases_add_up_to_the_step_and_causes_to_the_run(tmp_path: Path) -> None:
    directory, run = write_run(tmp_path / "run")
    times = read_times(directory)
    assert times.steps == list(range(1, 21))
    assert sum(times.seconds.values()) == pytest.approx([1.0] * 19 + [5.0])
    assert times.seconds["rest"] == pytest.approx([0.1] * 20)
    assert times.causes == run.run_accounting.seconds
    assert sum(times.causes.values()) == pytest.approx(run.run_accounting.wall_seconds)


def test_steps_repeated_after_a_restart_are_drawn_by_themselves(tmp_path: Path) -> None:
    run = Run()
    run.start(0, None)
    for number in range(1, 9):
        run.add(step(number, phases=QUICK))
    run.start(4, "died", after=10.0)
    for number in range(5, 11):
        run.add(step(number, lap=2.0, phases=QUICK))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in run.file))
    times = read_times(tmp_path)
    assert times.steps == list(range(1, 11))
    assert sum(times.seconds.values()) == pytest.approx([1.0] * 4 + [2.0] * 6)
    assert times.causes["replay"] == 8.0


def test_compiling_is_taken_out_of_the_forward_pass_that_did_it(tmp_path: Path) -> None:
    run = Run()
    run.start(0, None)
    run.add(step(1, lap=9.0, compile_seconds=8.0, phases={"forward": 8.4, "backward": 0.5}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in run.file))
    seconds = {phase: float(values[0]) for phase, values in read_times(tmp_path).seconds.items()}
    assert seconds == pytest.approx(
        dict.fromkeys(PHASES, 0.0) | {"compile": 8.0, "forward": 0.4, "backward": 0.5, "rest": 0.1}
    )


def test_the_text_tells_the_mean_step_and_the_whole_run(tmp_path: Path) -> None:
    lines = step_time(write_run(tmp_path / "run")[0], width=70).splitlines()
    assert lines[0] == "a step of rank 0, mean of the last 20: 1,200.0 ms"
    told = {words[0]: words[-3:] for words in (line.split() for line in lines) if words and words[-1].endswith("%")}
    assert told["backward"] == ["500.0", "ms", "41.7%"]
    assert told["down"] == ["10.0", "s", "22.7%"]
    bars = {line.split()[0]: line.count("█") for line in lines if "%" in line}
    assert bars["backward"] == 32
    assert bars["forward"] == 19
    assert max(map(len, lines)) <= 70


def test_the_picture_has_every_phase_and_cause(tmp_path: Path) -> None:
    picture = (255 * imread(draw_times(write_run(tmp_path / "run")[0]))[..., :3]).astype(int)
    for phase in ("forward", "backward", "communication", "data", "rest"):
        colour = [int(COLOURS[phase][place : place + 2], 16) for place in (1, 3, 5)]
        assert (np.abs(picture - colour).max(-1) < 3).sum() > 500, phase
    assert [path.name for path in (tmp_path / "run").glob("*.png")] == ["time.png"]


def test_one_colour_means_one_thing_in_both_panels(tmp_path: Path) -> None:
    assert set(CAUSES) == {"productive", *LOST}
    assert len(set(COLOURS.values())) == len(COLOURS)
    picture = (255 * imread(draw_times(write_run(tmp_path / "run")[0]))[..., :3]).astype(int)
    half = len(picture) * 7 // 10
    for name, above, below in (("forward", True, False), ("productive", False, True), ("data", True, True)):
        colour = [int(COLOURS[name][place : place + 2], 16) for place in (1, 3, 5)]
        found = np.abs(picture - colour).max(-1) < 3
        assert (found[:half].sum() > 100, found[half:].sum() > 100) == (above, below), name


def test_a_run_without_a_step_is_named_and_a_step_without_phases_is_all_rest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no step yet"):
        read_times(tmp_path)
    run = Run()
    run.start(0, None)
    run.add(step(1))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in run.file))
    assert read_times(tmp_path).seconds["rest"] == pytest.approx([1.0])
