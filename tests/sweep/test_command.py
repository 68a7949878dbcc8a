"""`bigmodel sweep`: rungs are trained once, the prediction is written before the target, a stop reaches the run."""

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

from bigmodel.config.settings import UserError, load_settings
from bigmodel.planning.context import vocabulary_of
from bigmodel.run_directory import write_json
from bigmodel.sweep.command import Options, finished, launched, numbers_of, outcome, sweep
from bigmodel.sweep.ladder import Rung, ladder
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
    directory = given.out / "runs" / "target"
    overrides = [*given.override, f"run.directory={json.dumps(str(directory))}"]
    write_json(given.out / "runs" / "target.json", {"loss": 4.3, "overrides": overrides})
    assert sweep(options([*LOSSES], with_target=True)) == 0
    table = json.loads((given.out / "sweep.json").read_text())
    assert table["target"]["loss"] == 4.3
    assert outcome(table).startswith(f"target: 4.3000 nats per label, predicted {table['prediction']['loss']:.4f} (")


def finish_all(options: Options) -> None:
    """Results as runs leave them."""
    settings = load_settings(options.run_file, list(options.override))
    (options.out / "runs").mkdir(parents=True)
    for rung in ladder(settings, vocabulary_of(settings), options.widths):
        directory = options.out / "runs" / rung.name
        given = [*options.override, *rung.overrides, f"run.directory={json.dumps(str(directory))}"]
        result = {
            name: getattr(rung, name) for name in ("width", "num_layers", "rate", "parameters", "tokens", "steps")
        }
        write_json(
            options.out / "runs" / f"{rung.name}.json", result | {"loss": LOSSES[rung.width], "overrides": given}
        )


def test_a_rung_with_other_settings_is_refused(options: Callable[..., Options]) -> None:
    given = options([16])
    write_json_into(given.out / "runs" / "width-16.json", {"overrides": ["model.dropout=0.5"], "loss": 3.0})
    rung = Rung(16, 1, 0.01, 100, 1000, 10, ())
    with pytest.raises(UserError, match=r"width-16.json: this rung was trained with other settings; choose another"):
        finished(given, rung, "width-16")


def write_json_into(file: Path, table: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True)
    write_json(file, table)


def test_a_failed_rung_ends_the_sweep_with_its_message(options: Callable[..., Options], tmp_path: Path) -> None:
    given = options([16])
    (given.out / "runs").mkdir(parents=True)
    broken = Rung(16, 1, 0.01, 100, 1000, 10, ("model.hidden_size=31",))
    with pytest.raises(
        UserError, match=r"broken: `bigmodel launch local` ended with 2: .*hidden_size = 31.*broken.log"
    ):
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
