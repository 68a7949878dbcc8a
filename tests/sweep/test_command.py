"""`bigmodel sweep`: rungs are trained once, the prediction is written before the target, a stop reaches the run."""

import fcntl
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bigmodel.config.settings import Settings, UserError, load_settings, to_toml_table
from bigmodel.planning.context import vocabulary_of
from bigmodel.run_directory import write_json
from bigmodel.sweep.command import Options, finished, launched, numbers_of, outcome, sweep, wait_for_rest
from bigmodel.sweep.ladder import Rung, ladder, target_of
from tests.support.tiny_run import write_run

LOSSES = {16: 5.0, 24: 4.6, 32: 4.4}


@pytest.fixture
def options(tmp_path: Path, shards: Path) -> Callable[..., Options]:
    """Of a sweep over a run file of width 40 with heads of 8 channels."""
    run_file = write_run(tmp_path, shards)
    wide = ["model.hidden_size=40", "model.num_heads=5", "model.num_kv_heads=1", "evaluation.at_end=true"]

    def make(widths: list[int], **changes: Any) -> Options:
        given = {"only_print": False, "with_target": False} | changes
        return Options(run_file, wide, widths, [], [], tmp_path / "out", 1, **given)

    return make


def test_a_rung_is_trained_and_not_repeated(options: Callable[..., Options], capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep(options([16])) == 0
    out = options([16]).out
    (rung,) = json.loads((out / "sweep.json").read_text())["rungs"]
    assert (rung["width"], rung["num_layers"]) == (16, 1)
    assert 4 < rung["loss"] < 8
    assert (out / "sweep.png").exists()
    said = capfd.readouterr().out
    assert "rungs of 1 layer, target of 2: one layer cannot continue a repetition" in said
    assert "1 rung: a law needs 3, and 4 to give an interval" in said
    assert "no law: it needs 3 finished sizes" in said
    log = out / "runs" / f"layers-1-width-16-steps-{rung['steps']}-rate-0.01.log"
    size = log.stat().st_size
    assert sweep(options([16])) == 0
    assert log.stat().st_size == size > 0


def test_what_is_finished_makes_the_law_and_the_prediction(
    options: Callable[..., Options], capfd: pytest.CaptureFixture[str]
) -> None:
    given = options([*LOSSES], only_print=True)
    assert sweep(given) == 0
    assert not given.out.exists()
    assert "the rungs take" in capfd.readouterr().out
    finish_all(given)
    assert sweep(options([*LOSSES])) == 0
    table = json.loads((given.out / "sweep.json").read_text())
    assert [rung["loss"] for rung in table["rungs"]] == [*LOSSES.values()]
    assert table["prediction"]["loss"] < 4.4
    assert table["prediction"]["interval"] is None
    assert "no interval: the law has as many numbers as there are runs" in capfd.readouterr().out


def test_a_file_in_the_place_of_the_folder_is_refused_before_anything_runs(options: Callable[..., Options]) -> None:
    given = options([16], only_print=True)
    given.out.write_text("")
    for out in given.out, given.out / "sweep":
        with pytest.raises(UserError, match=r"--out .*: .*out is a file; choose another folder"):
            sweep(replace(given, out=out))


def test_a_targets_loss_is_compared_with_the_prediction(options: Callable[..., Options]) -> None:
    given = options([*LOSSES])
    finish_all(given)
    settings = load_settings(given.run_file, list(given.override))
    finish(given, target_of(settings, vocabulary_of(settings)), "target", 4.3)
    assert sweep(options([*LOSSES], with_target=True)) == 0
    table = json.loads((given.out / "sweep.json").read_text())
    assert table["target"]["loss"] == 4.3
    assert outcome(table).startswith(f"target: 4.3000 nats per label, predicted {table['prediction']['loss']:.4f} (")


def finish_all(options: Options) -> list[Path]:
    """Results as runs leave them; their files."""
    settings = load_settings(options.run_file, list(options.override))
    (options.out / "runs").mkdir(parents=True)
    return [finish(options, rung, rung.name, LOSSES[rung.width]) for rung in rungs_of(options, settings)]


def rungs_of(options: Options, settings: Settings) -> list[Rung]:
    return ladder(settings, vocabulary_of(settings), options.widths)


def finish(options: Options, rung: Rung, name: str, loss: float | None) -> Path:
    directory = options.out / "runs" / name
    given = [*options.override, *rung.overrides, f"run.directory={json.dumps(str(directory))}"]
    names = ("width", "num_layers", "rate", "parameters", "tokens", "steps")
    result = {name: getattr(rung, name) for name in names} | {"loss": loss}
    file = options.out / "runs" / f"{name}.json"
    write_json(file, result | {"settings": to_toml_table(load_settings(options.run_file, given))})
    return file


def test_a_rung_with_other_settings_is_refused(options: Callable[..., Options]) -> None:
    """Also where the run file itself has changed."""
    given = options([*LOSSES])
    file = finish_all(given)[0]
    given.run_file.write_text(given.run_file.read_text().replace("dropout = 0.1", "dropout = 0.5"))
    with pytest.raises(
        UserError, match=rf"{file}: this rung was trained with model.dropout = 0.1, and now it is 0.5; choose another"
    ):
        sweep(given)


@pytest.mark.parametrize("wrong", [{"loss": "low"}, {"parameters": None}, {"settings": None}], ids=str)
def test_a_rung_of_another_version_is_refused(options: Callable[..., Options], wrong: dict[str, Any]) -> None:
    given = options([*LOSSES])
    file = finish_all(given)[0]
    write_json(file, json.loads(file.read_text()) | wrong)
    with pytest.raises(UserError, match=rf"{file}: not a finished rung of this version's `bigmodel sweep`; delete it"):
        sweep(given)
    file.write_text('{"loss": 4.')
    with pytest.raises(UserError, match=rf"{file}: not a finished rung of this version's `bigmodel sweep`; delete it"):
        sweep(given)


def test_one_sweep_at_a_time_works_on_a_folder(options: Callable[..., Options]) -> None:
    given = options([*LOSSES])
    given.out.mkdir()
    with open(given.out / "sweep.lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=rf"{given.out}: another sweep works on it; wait, or choose another --out"):
            sweep(given)


def test_a_folder_that_cannot_be_made_is_refused(options: Callable[..., Options]) -> None:
    given = options([*LOSSES])
    given.out.write_text("a file")
    with pytest.raises(UserError, match=rf"--out {given.out}: {given.out} is a file; choose another folder"):
        sweep(given)


def test_settings_that_another_version_does_not_have_are_no_change(options: Callable[..., Options]) -> None:
    given = options([*LOSSES])
    file = finish_all(given)[0]
    done = json.loads(file.read_text())
    del done["settings"]["model"]["norm_epsilon"]
    write_json(file, done | {"settings": done["settings"] | {"of_later": 1}})
    assert sweep(given) == 0


def test_a_loss_that_is_not_finite_is_said_and_not_in_the_law(
    options: Callable[..., Options], capfd: pytest.CaptureFixture[str]
) -> None:
    given = options([*LOSSES])
    finish_all(given)[0].unlink()
    rung = rungs_of(given, load_settings(given.run_file, list(given.override)))[0]
    finish(given, rung, rung.name, None)
    assert sweep(given) == 0
    said = capfd.readouterr().out
    assert f"{rung.name}: its validation loss is not finite; the law is without it" in said
    assert "no law: it needs 3 finished sizes" in said
    assert "law" not in json.loads((given.out / "sweep.json").read_text())


def test_a_run_that_outlived_its_sweep_is_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with open(tmp_path / "lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        timer = threading.Timer(0.2, fcntl.flock, (held, fcntl.LOCK_UN))
        timer.start()
        assert wait_for_rest(tmp_path)
        timer.join()
        assert "a killed sweep has left this run alive; waiting for its end" in capfd.readouterr().out
        fcntl.flock(held, fcntl.LOCK_EX)
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        assert not wait_for_rest(tmp_path)
        timer.join()
    assert f"this run goes on; to stop it: bigmodel launch stop {tmp_path}" in capfd.readouterr().out


def test_a_failed_rung_ends_the_sweep_with_its_message(options: Callable[..., Options], tmp_path: Path) -> None:
    given = options([16])
    (given.out / "runs").mkdir(parents=True)
    broken = Rung(16, 1, 0.01, 100, 1000, 10, ('data.directory="absent"',))
    with pytest.raises(UserError, match=r"broken: `bigmodel launch local` ended with 2: .*absent.*broken.log"):
        finished(given, broken, "broken")


def test_sigterm_reaches_the_run_which_saves(tmp_path: Path) -> None:
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(3)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    log = tmp_path / "log"

    def stop() -> None:
        while not (log.exists() and "ready" in log.read_text()):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    assert launched([sys.executable, "-c", program], log) == 3
    assert log.read_text() == "ready\nsaved\n"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("text", "whole", "what"),
    [
        ("32,32", True, "whole numbers"),
        ("0.5", True, "whole numbers"),
        ("a", False, "numbers"),
        ("0", False, "numbers"),
    ],
)
def test_numbers_are_different_and_above_0(text: str, whole: bool, what: str) -> None:
    with pytest.raises(UserError, match=rf"--widths {text}: must be different {what} above 0, separated by commas"):
        numbers_of("--widths", text, whole)
    assert numbers_of("--rates", "1e-3,2e-3") == [0.001, 0.002]
    assert numbers_of("--rates", "") == []
