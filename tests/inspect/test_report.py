"""The report shows what metrics.jsonl holds, for a run that is going on, finished or odd."""

import json
import math
import subprocess
from pathlib import Path

import pytest
from matplotlib.image import imread

from bigmodel.config.settings import UserError
from bigmodel.inspect.report import loss_curve, read_curve, report, smooth, table, terminal_curve
from tests.metrics.test_run_accounting import Run, step


def write_run(directory: Path, losses: list[float], evaluations: dict[int, float] | None = None) -> Path:
    """A run whose steps take 0.5 s, a fifth of it waiting, over 90 positions and 10 of padding."""
    lines: list[dict[str, object]] = [
        {
            "kind": "step",
            "step": number,
            "loss": loss,
            "learning_rate": 1e-3,
            "targets": 90,
            "positions": 90,
            "padding": 10,
            "step_seconds": 0.5,
            "data_wait_seconds": 0.1,
        }
        for number, loss in enumerate(losses, start=1)
    ]
    for number, nats in (evaluations or {}).items():
        lines.append({"kind": "evaluation", "step": number, "nats_per_token": nats, "bits_per_byte": nats / 2})
    directory.mkdir(exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def test_the_table_adds_up(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [4.0] * 20, {20: 3.0})
    (run / "summary.json").write_text(json.dumps({"bigram_bits_per_byte": 2.5, "xz_bits_per_byte": 1.75}))
    rows = dict(line.split("  ", 1) for line in table(run).splitlines())
    assert {name.strip(): value.strip() for name, value in rows.items()} == {
        "steps": "20",
        "tokens": "1,800",
        "time in steps": "10.0 s",
        "tokens per second": "180",
        "waiting for data": "20.0 %",
        "padding": "10.0 %",
        "training loss": "4.0000 nats per label (smoothed)",
        "validation loss": "3.0000 nats per label at step 20",
        "validation": "1.5000 bits per byte",
        "bigram model": "2.5000 bits per byte",
        "xz -9": "1.7500 bits per byte",
    }


@pytest.mark.parametrize("event", ["spike", "step_skipped"])
def test_after_a_spiking_or_skipped_step_the_command_that_explains_it_is_named(tmp_path: Path, event: str) -> None:
    run = write_run(tmp_path / "run", [4.0] * 20)
    lines = [{"event": "start", "step": 0}, {"event": event, "step": 7}, {"event": event, "step": 12}]
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = f"step 12 explained  bigmodel replay {run} --step 12"
    (run / "checkpoints" / "step-00000012").mkdir(parents=True)
    assert f"{command} --checkpoint 0    # no older checkpoint: trains 11 steps again" in table(run).splitlines()
    (run / "checkpoints" / "step-00000010").mkdir()
    assert command in table(run).splitlines()


def test_the_first_step_is_explained_without_steps_before_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [4.0] * 20)
    (run / "events.jsonl").write_text(json.dumps({"event": "spike", "step": 1}) + "\n")
    explained = next(line for line in table(run).splitlines() if line.startswith("step 1 explained"))
    assert explained.endswith(f" bigmodel replay {run} --step 1 --checkpoint 0")


def test_a_run_s_odd_name_and_events_send_no_control_characters_and_bash_finds_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, recorded = tmp_path / "it's $HOME\x1b[31m", Run()
    recorded.start(0, None)
    for number in range(1, 21):
        recorded.add(step(number))
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in recorded.file))
    events = [{"event": "spike", "step": 7}, {"event": "rewind", "step": 5, "detail": "a\x1b[2J"}]
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in events))
    report(run)
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in lines)
    command = next(line.split("bigmodel replay ")[1] for line in lines if "explained" in line)
    shown = subprocess.run(["bash", "-c", f"printf '%s|' {command}"], capture_output=True, text=True, check=True)
    assert shown.stdout == f"{run}|--step|7|--checkpoint|0|"


def test_the_curve_is_what_was_recorded(tmp_path: Path) -> None:
    curve = read_curve(write_run(tmp_path / "run", [4.0, 3.0], {1: 3.5, 2: 2.5}))
    assert (curve.steps, curve.losses) == ([1, 2], [4.0, 3.0])
    assert (curve.evaluated_steps, curve.validation_losses) == ([1, 2], [3.5, 2.5])
    assert curve.bits_per_nat == 0.5
    assert curve.marks == {}


def test_a_loss_without_a_count_of_bytes_is_drawn_without_an_axis_of_bits(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [4.0, 3.0])
    evaluation = {"kind": "evaluation", "step": 2, "nats_per_token": 2.5, "bits_per_byte": None}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(evaluation) + "\n")
    assert read_curve(run).bits_per_nat is None
    assert loss_curve(run).exists()
    assert "bits per byte not counted" in table(run)


def test_smoothing_is_unbiased_looks_back_only_and_passes_over_nan() -> None:
    assert smooth([3.0] * 40) == pytest.approx([3.0] * 40)
    spike = [1.0] * 10 + [9.0] + [1.0] * 10
    assert smooth(spike)[:10] == pytest.approx([1.0] * 10)
    assert 1.0 < smooth(spike)[-1] < smooth(spike)[10] < 9.0
    assert smooth([2.0, math.nan, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert math.isnan(smooth([math.nan])[0])


@pytest.mark.parametrize(
    "losses", [[4.0], [4.0] * 3, [5.0 / n for n in range(1, 200)], [math.nan, 3.0, math.inf, 2.0], [math.nan] * 3]
)
def test_any_run_can_be_drawn(tmp_path: Path, losses: list[float]) -> None:
    run = write_run(tmp_path / "run", losses, {1: 3.0})
    height, width = imread(loss_curve(run)).shape[:2]
    assert (width, height) == (1350, 840)
    assert sorted(path.name for path in run.iterdir()) == ["loss.png", "metrics.jsonl"]
    assert all(len(line) <= 60 for line in terminal_curve(run, width=60).splitlines())


def test_the_picture_shows_the_curve_and_the_marks(tmp_path: Path) -> None:
    def colours(run: Path) -> dict[str, int]:
        pixels = (imread(loss_curve(run))[..., :3] * 255).round().astype(int).reshape(-1, 3)
        wanted = {"blue": (0x00, 0x72, 0xB2), "orange": (0xD5, 0x5E, 0x00), "grey": (0x8A, 0x8F, 0x98)}
        return {name: int((abs(pixels - colour).max(axis=1) <= 3).sum()) for name, colour in wanted.items()}

    losses = [3.0 + 5.0 / n for n in range(1, 200)]
    plain = colours(write_run(tmp_path / "plain", losses))
    run = write_run(tmp_path / "marked", losses, {100: 3.2, 199: 3.1})
    (run / "summary.json").write_text(json.dumps({"bigram_bits_per_byte": 2.0}))
    marked = colours(run)
    assert plain["blue"] > 500
    assert marked["orange"] > plain["orange"] + 100
    assert marked["grey"] > plain["grey"] + 500


def test_the_plot_in_the_terminal_falls_from_left_to_right(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [10.0 - 0.1 * n for n in range(100)])
    lines = terminal_curve(run, width=50, height=6).splitlines()
    assert lines[0] == "training loss, nats per label (smoothed)"
    plot = [line.partition("┤")[2] for line in lines[1:7]]
    first = [min(n for n, row in enumerate(plot) if row[column] != "\u2800") for column in (0, len(plot[0]) - 1)]
    assert first == [0, 5]
    assert lines[1].split()[0] == "10.00"
    assert lines[-1].split() == ["1", "step", "100"]


@pytest.mark.parametrize(("losses", "ends"), [([8.3312, 8.3318], ["8.332", "8.331"]), ([2.0, 2.0], ["2.00", "2.00"])])
def test_the_ends_of_an_axis_read_alike_only_if_they_are(tmp_path: Path, losses: list[float], ends: list[str]) -> None:
    lines = terminal_curve(write_run(tmp_path / "run", losses * 20), width=50, height=6).splitlines()
    assert [line.split()[0] for line in (lines[1], lines[6])] == ends


def test_a_run_without_a_step_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none: no such folder; give the run.directory"):
        table(tmp_path / "none")
    with pytest.raises(UserError, match=r"metrics.jsonl has no step yet; name a run directory"):
        loss_curve(tmp_path)


def test_report_prints_table_plot_and_where_the_pictures_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run()
    run.start(0, None)
    for number in (1, 2):
        run.add(step(number, phases={"forward": 0.5}))
    directory = tmp_path / "$\\run$"  # no formula for the titles
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in run.file))
    report(directory)
    printed = capsys.readouterr().out
    assert "tokens per second" in printed
    assert "training loss, nats per label" in printed
    assert "a step of rank 0" in printed
    assert f"pictures: {directory / 'loss.png'}, {directory / 'time.png'}" in printed


def test_energy_has_a_row_only_where_every_step_knows_its_own(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [4.0] * 20)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for known, expected in ((20, "3 joules per token, 0.0015 kWh of GPUs"), (19, None)):
        joules = [{"device_joules": 270.0 if step < known else None, "host_joules": None} for step in range(20)]
        told = "".join(json.dumps(line | of) + "\n" for line, of in zip(lines, joules, strict=True))
        (run / "metrics.jsonl").write_text(told)
        rows = [line.removeprefix("energy").strip() for line in table(run).splitlines() if line.startswith("energy")]
        assert rows == ([expected] if expected else [])
