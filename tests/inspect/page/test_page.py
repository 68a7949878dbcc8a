"""The page of `report --html` shows the numbers of metrics.jsonl, loads nothing, and runs no text of a run."""

import base64
import hashlib
import json
import math
import re
import time
from http.client import HTTPConnection
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from bigmodel.__main__ import app
from bigmodel.config.settings import UserError
from bigmodel.inspect.page.drawing import HeatMap, decimated, usual_top
from bigmodel.inspect.page.history import RunHistory
from bigmodel.inspect.page.page import STATIC, content, open_run, page, write_page
from bigmodel.inspect.page.serve import LiveData, make_server
from tests.metrics.test_run_accounting import Run, step

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def part(source: str, nats: float, targets: int) -> dict[str, Any]:
    return {"objective": "causal", "source": source, "nats": nats, "targets": targets, "weight": None}


def line(number: int, loss: float = 2.0, **changes: Any) -> dict[str, Any]:
    """Step `number` takes number/10 seconds, odd ones on code only; rank 1 is the slower one in every third."""
    sources = [part("code", 100 * loss, 100)] if number % 2 else [part("code", 50 * loss, 40), part("docs", loss, 60)]
    made = step(
        number,
        number / 10,
        loss=loss,
        gradient_norm=loss / 4,
        parts=sources,
        phases={"forward": number / 40, "backward": number / 20},
        memory={"resident_bytes": 1000 * number},
        slowest_rank=int(number % 3 == 0),
        slowest_rank_lag_seconds=number / 1000,
        flops={"causal": 10.0, "full": 20.0, "hardware": 30.0},
        device_joules=50.0 * number,
        largest_attention_score=number / 2,
        expert_loads={"largest": [1.5, 1 + number / 8], "entropy": [0.75, 1 / number], "router_z": number / 4}
        | {"dropped": [number, 0], "dropped_share": number / 100},
        loads_by_expert=None if number % 4 else {"1": [100, 75, 125], "2": [3 * number, 100, 300 - 3 * number]},
    )
    return made | changes


def write(directory: Path, run: Run) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in run.file))
    return directory


def killed_and_resumed(steps: int = 12) -> Run:
    """Killed after step 8, resumed from step 6 after 30 s, of which nobody knows."""
    run = Run()
    run.start(0, None)
    for number in range(1, 9):
        run.add(line(number, 8.0 / number))
    run.start(6, "died", after=30.0)
    for number in range(7, steps + 1):
        run.add(line(number, 8.0 / number))
    evaluation = {"kind": "evaluation", "step": steps, "nats_per_token": 1.5, "bits_per_byte": 0.75, "seconds": 1.0}
    run.add({**evaluation, "lap": 1.0, "parts": [part("code", 30.0, 20)], "accuracy": 0.25})
    return run


def data_of(path: Path) -> dict[str, Any]:
    """The page's data, as the browser reads them."""
    text = re.search(r'<script type="application/json" id="content">(.*?)</script>', path.read_text(), re.DOTALL)
    assert text
    return json.loads(text[1])


def blocks(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {block["name"]: block for section in data["sections"] for block in section["blocks"]}


def points(block: dict[str, Any], label: str) -> tuple[list[float], list[float]]:
    found = next(one for one in block["lines"] if one["label"] == label)
    x, y = (np.frombuffer(base64.b64decode(found[key]), kind) for key, kind in (("x", "<f8"), ("y", "<f4")))
    return x.tolist(), y.tolist()


def test_values_of_the_page_equal_metrics_jsonl(tmp_path: Path) -> None:
    run = killed_and_resumed()
    found = blocks(data_of(write_page([write(tmp_path / "run", run)], tmp_path / "page.html")))
    steps = [one for one in run.file if one["kind"] == "step"]
    assert [one["step"] for one in steps] == list(range(1, 13)), "the lines of steps to be repeated were dropped"

    def expect(block: str, label: str, values: list[tuple[int, float]]) -> None:
        x, y = points(found[block], label)
        assert x == [place for place, _ in values]
        assert y == [np.float32(value) for _, value in values]

    expect("loss", "each step", [(one["step"], one["loss"]) for one in steps])
    expect("loss", "validation", [(12, 1.5)])
    expect("loss-parts", "docs, each step", [(one["step"], one["loss"] / 60) for one in steps if one["step"] % 2 == 0])
    expect("validation-loss", "code", [(12, 1.5)])
    expect("accuracy", "accuracy", [(12, 0.25)])
    expect("throughput", "tokens", [(one["step"], 100 / (one["step"] / 10)) for one in steps])
    expect("mfu", "model, causal", [(one["step"], 10.0 / (2 * 100.0 * one["step"] / 10)) for one in steps])
    expect("step-time", "step", [(one["step"], one["step_seconds"]) for one in steps])
    expect("phases", "backward", [(one["step"], one["step"] / 20) for one in steps])
    expect("memory", "process, in main memory", [(one["step"], 1000 * one["step"]) for one in steps])
    expect("gradient-norm", "gradient norm", [(one["step"], one["gradient_norm"]) for one in steps])
    expect("mix", "docs", [(one["step"], 0.0 if one["step"] % 2 else 0.6) for one in steps])
    expect("energy", "GPUs", [(one["step"], one["step"] / 2) for one in steps])
    expect("attention-score", "Largest attention score", [(one["step"], one["step"] / 2) for one in steps])
    expect("expert-load", "most uneven layer", [(one["step"], max(1.5, 1 + one["step"] / 8)) for one in steps])
    expect("expert-load", "mean of the layers", [(one["step"], 1.25 + one["step"] / 16) for one in steps])
    expect("expert-dropped", "all layers", [(one["step"], one["step"] / 100) for one in steps])
    expect("expert-entropy", "most uneven layer", [(one["step"], min(0.75, 1 / one["step"])) for one in steps])
    expect("router-z", "router z", [(one["step"], one["step"] / 4) for one in steps])
    expect("packing", "padding", [(one["step"], 28 / 128) for one in steps])


def test_the_utilization_of_a_measured_device_does_not_jump_at_a_restart(tmp_path: Path) -> None:
    run = killed_and_resumed()
    starts = [one for one in run.file if one["kind"] == "start"]
    for start, peak in zip(starts, (100.0, 80.0), strict=True):
        start |= {"device_peak_flops": peak, "peak_is_measured": True}
    found = blocks(content([open_run(write(tmp_path / "run", run))]))
    x, shares = points(found["mfu"], "model, causal")
    assert shares == pytest.approx([10.0 / (2 * 100.0 * step / 10) for step in x])


def test_energy_is_in_the_numbers_of_the_page_where_every_step_has_it(tmp_path: Path) -> None:
    def energy(run: Run) -> list[list[str]]:
        rows = blocks(content([open_run(write(tmp_path / "run", run))]))["numbers"]["rows"]
        return [row for row in rows if row[0] == "energy"]

    run = killed_and_resumed()
    assert energy(run) == [["energy", "3.25 joules per token, 0.00108 kWh of GPUs"]]
    run.add(line(13, device_joules=None))
    assert energy(run) == []


def test_causes_add_up_to_the_wall_time_and_restarts_are_marked(tmp_path: Path) -> None:
    run = killed_and_resumed()
    found = blocks(data_of(write_page([write(tmp_path / "run", run)], tmp_path / "page.html")))
    shares: dict[str, list[float]] = {}
    for one in found["goodput"]["lines"]:
        x, shares[one["label"]] = points(found["goodput"], one["label"])
    wall = run.run_accounting.wall_seconds
    assert sum(shares.values(), start=np.zeros(len(x))) == pytest.approx(np.ones(len(x)), abs=1e-5)
    for cause, seconds in run.lost.items():
        assert np.mean(shares[cause]) * wall == pytest.approx(seconds, rel=1e-4)
    assert found["goodput"]["marks"] == pytest.approx([run.file[7]["time"] - 1000.0])
    assert found["loss"]["marks"] == [6.0]
    assert [row[0] for row in found["causes"]["rows"]][:2] == ["productive", "down"]


def test_a_file_read_at_once_gives_what_its_lines_give_one_by_one(tmp_path: Path) -> None:
    run = Run()
    run.start(0, None)
    norms = {"attention": {"weight_norm": 2.5, "update_norm": 0.1}}
    for number in range(1, 61):
        odd = {30: {"loss": math.nan, "gradient_norm": -math.inf}, 31: {"norms": norms, "z_loss": 1}, 32: {"parts": []}}
        odd |= {33: {"expert_loads": None}, 36: {"loads_by_expert": {"0": [7]}}}
        more = {"spent": {"checkpoint": 0.1 * number}, "data_wait_seconds": 1 / (2 + number), "compile_seconds": 0.001}
        more["lap"] = 0.5 + 1 / number
        run.add(line(number, **{"loss": 8.0 / number} | more | odd.get(number, {})))
        if number in (20, 45):
            run.add({"kind": "checkpoint", "step": number, "bytes": 3, "seconds": 0.5, "lap": 0.5})
    run.add(line(61, skipped=True))
    run.start(58, "died", after=3.0)
    for number in range(59, 300):
        run.add(line(number, lap=0.6, phases={"forward": 1.0, "communication": None}))
    run.add(line(300, lap=900.0))
    folder = write(tmp_path / "run", run)
    whole = (
        (folder / "metrics.jsonl")
        .read_bytes()
        .replace(b'"kind": "step", ', b"")
        .replace(b'{"step"', b'{"kind": "step", "step"')
    )
    lines = whole.splitlines(keepends=True)
    lines.insert(12, lines[12][:100] + b"\n")
    (folder / "metrics.jsonl").write_bytes(b"".join(lines))
    at_once = open_run(folder)
    (folder / "metrics.jsonl").write_bytes(b"")
    single = open_run(folder)
    for text in lines:
        with open(folder / "metrics.jsonl", "ab") as file:
            file.write(text)
        single.update()
    assert at_once.num_steps == single.num_steps == 300
    names = single.names("")
    assert sorted(at_once.names("")) == sorted(names)
    assert all(np.array_equal(at_once.column(name), single.column(name), equal_nan=True) for name in names)
    assert [step for step, _ in single.loads_by_expert] == [step for step, _ in at_once.loads_by_expert]
    assert str(single.loads_by_expert) == str(at_once.loads_by_expert)
    assert [*dict(single.loads_by_expert)[36]] == [0]
    assert at_once.seconds == single.seconds
    for one, other in zip(at_once.seconds_over_time(), single.seconds_over_time(), strict=True):
        assert np.array_equal(one, other)
    assert at_once.others == single.others


def test_no_time_is_missing_before_a_restart_that_drops_steps(tmp_path: Path) -> None:
    run = Run()
    run.start(0, None)
    for number in range(1, 9):
        run.add(line(number))
    run.add({"kind": "end", "ending": "failed", "lap": 0.5})
    run.start(2, "failed")  # steps 3 to 8 are not in the file any more, the end still is
    run.add(line(3))
    found = blocks(content([open_run(write(tmp_path / "run", run))]))["goodput"]
    shares = np.sum([points(found, one["label"])[1] for one in found["lines"]], axis=0)
    assert shares == pytest.approx(np.ones(len(shares)), abs=1e-5)


@pytest.mark.parametrize("lines", [5, 12])  # fewer than 8 are read one by one, more as a table
def test_the_heat_map_has_each_rank_s_longest_lag(tmp_path: Path, lines: int) -> None:
    found = blocks(data_of(write_page([write(tmp_path / "run", killed_and_resumed())], tmp_path / "page.html")))
    block = found["lag"]
    cells = np.frombuffer(base64.b64decode(block["cells"]), "<f4").reshape(12, 2)
    assert cells.tolist() == [
        [0.0 if number % 3 == 0 else np.float32(number / 1000), np.float32(number / 1000) if number % 3 == 0 else 0.0]
        for number in range(1, 13)
    ]
    run = Run()
    run.start(0, None)
    for number in range(1, lines + 1):
        lags = (
            {"lag_ms": [3.0, -1.0, 0.0, float(number)]} if number % 2 else {"lag_ms": [5.0, 4.0], "lag_ranks": [3, 1]}
        )
        run.add(line(number, slowest_rank=3, slowest_rank_lag_seconds=0.0, **lags))
    block = blocks(content([open_run(write(tmp_path / "ranks", run))]))["lag"]
    cells = 1000 * np.frombuffer(base64.b64decode(block["cells"]), "<f4").reshape(lines, 4)
    assert cells == pytest.approx(
        np.array([[3, 0, 0, number] if number % 2 else [0, 4, 0, 5] for number in range(1, lines + 1)])
    )


def test_of_more_ranks_than_rows_neighbours_share_one() -> None:
    ranks, steps = np.arange(1000.0) % 200, np.arange(1.0, 1001.0)
    many = HeatMap("lag", "", "", 200, steps, [(ranks, steps)]).encoded(1)
    cells = np.frombuffer(base64.b64decode(many["cells"]), "<f4").reshape(240, -1)
    assert (many["height"], cells.shape[1], cells.max()) == (4, 50, 1000.0)


def test_a_heat_map_has_the_load_of_each_layer_s_fullest_expert(tmp_path: Path) -> None:
    block = blocks(content([open_run(write(tmp_path / "run", killed_and_resumed()))]))["experts"]
    cells = np.frombuffer(base64.b64decode(block["cells"]), "<f4").reshape(12, 2)
    assert cells.tolist() == [[0.5, number / 8] for number in range(1, 13)]
    assert (block["row"], block["rows"], block["height"]) == ("layer", 2, 1)


@pytest.mark.parametrize("lines", [5, 12])  # fewer than 8 are read one by one, more as a table
def test_layers_with_experts_are_those_of_the_model(tmp_path: Path, lines: int) -> None:
    run = Run()
    run.start(0, None)
    for number in range(1, lines + 1):
        made = line(number)
        run.add(made | {"expert_loads": {**made["expert_loads"], "first_layer": 2}})
    block = blocks(content([open_run(write(tmp_path / "run", run))]))["experts"]
    cells = np.frombuffer(base64.b64decode(block["cells"]), "<f4").reshape(lines, 4)
    assert not cells[:, :2].any()
    assert cells[:, 2:].tolist() == [[0.5, number / 8] for number in range(1, lines + 1)]


def test_a_heat_map_has_each_expert_of_the_layer_that_is_most_uneven_at_the_end(tmp_path: Path) -> None:
    block = blocks(content([open_run(write(tmp_path / "run", killed_and_resumed()))]))["expert-loads"]
    cells = np.frombuffer(base64.b64decode(block["cells"]), "<f4").reshape(3, 3)
    assert cells.tolist() == np.float32([[0.12, 1, 2.88], [0.24, 1, 2.76], [0.36, 1, 2.64]]).tolist()
    assert (block["title"], block["row"], block["rows"]) == ("Load of each expert, layer 2", "expert", 3)
    long = Run()
    long.start(0, None)
    for number in range(1, 1201):
        long.add(line(number, loads_by_expert=None if number % 4 else {"3": [number % 7] * 70}))
    page = blocks(content([open_run(write(tmp_path / "long", long))]))["expert-loads"]
    assert (page["rows"], page["height"], len(page["cells"])) == (70, 2, 240 * 35 * 4 * 4 // 3)


def test_a_run_without_experts_has_no_plots_of_them(tmp_path: Path) -> None:
    run = Run()
    run.start(0, None)
    for number in range(1, 21):
        run.add(line(number, expert_loads=None, loads_by_expert=None))
    titles = [section["title"] for section in content([open_run(write(tmp_path / "run", run))])["sections"]]
    assert "Learning" in titles
    assert "Experts" not in titles


def test_the_key_of_a_plot_begins_with_the_lines_in_view(tmp_path: Path) -> None:
    found = blocks(content([open_run(write(tmp_path / "run", killed_and_resumed()))]))
    keys = [(one["label"], one["shown"]) for one in found["mfu"]["lines"]]
    assert keys == [
        ("hardware, operations computed", True),
        ("model, causal", True),
        ("model, as if without a mask", False),
    ]


def test_decimation_keeps_each_bucket_s_extremes_and_both_ends() -> None:
    places, values = decimated(np.arange(6.0), np.array([0.0, 1, 9, 2, 0, 3]), 2)
    assert (places.tolist(), values.tolist()) == ([0, 2, 4, 5], [0, 9, 0, 3])
    x, y = np.arange(100_000.0), np.sin(np.arange(100_000.0))
    y[[17, 54_321, 99_998]] = (-40.0, 60.0, 50.0)
    places, values = decimated(x, y, 500)
    assert len(places) <= 1002
    assert {17.0, 54_321.0, 99_998.0, 0.0, 99_999.0} <= set(places.tolist())
    assert np.array_equal(y[places.astype(int)], values)
    assert all(
        values[(places >= 200 * n) & (places < 200 * (n + 1))].max() == y[200 * n : 200 * (n + 1)].max()
        for n in range(500)
    )


def test_a_zoom_has_all_points_of_its_steps_and_the_others_as_before(tmp_path: Path) -> None:
    x, y = np.arange(10_000.0), np.random.default_rng(1).random(10_000)
    places, values = decimated(x, y, 100, (5000.0, 5100.0))
    assert np.array_equal(y[places.astype(int)], values)
    assert places[(places >= 5000) & (places <= 5100)].tolist() == list(range(5000, 5101))
    assert len(places) <= 101 + 2 * 202
    assert (places[0], places[-1]) == (0.0, 9999.0)
    assert np.array_equal(decimated(x, y, 9000, (-5.0, 1e9))[0], x)
    assert len(decimated(x[:0], y[:0], 100, (0.0, 1.0))[0]) == 0
    run = killed_and_resumed()
    near = blocks(content([open_run(write(tmp_path / "run", run))], (2.0, 3.0)))
    assert points(near["loss"], "each step")[0] == list(range(1, 13))


def test_single_peaks_are_left_out_of_the_first_view_only() -> None:
    calm = np.linspace(1.0, 2.0, 1000)
    assert usual_top([calm]) is None
    peak = np.where(np.arange(1000) == 500, 90.0, calm)
    assert usual_top([peak]) == pytest.approx(2.24, abs=0.01)


def test_values_that_are_not_finite_are_left_out_and_listed(tmp_path: Path) -> None:
    run = killed_and_resumed()
    run.add(line(13, math.nan, gradient_norm=math.inf))
    run.add(line(14))
    path = write_page([write(tmp_path / "run", run)], tmp_path / "page.html")
    found = blocks(data_of(path))
    assert points(found["loss"], "each step")[0] == [*range(1, 13), 14]
    assert next(row for row in found["worst"]["rows"] if row[0] == "13")[1:4] == ["nan", "inf", "not finite"]


def test_the_worst_steps_have_their_documents_and_the_command_that_explains_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", killed_and_resumed())
    skipped = {"event": "step_skipped", "step": 5, "reason": "spike", "documents": [["code", 3, 17, 0, 250]]}
    (folder / "events.jsonl").write_text(json.dumps(skipped) + "\n")
    rows = blocks(content([open_run(folder)]))["worst"]["rows"]
    assert next(row for row in rows if row[0] == "5") == [
        *(
            "5",
            "1.6",
            "0.4",
            "step skipped: spike",
            "code 3:17, tokens 0 to 250",
            f"bigmodel replay {folder} --step 5 --checkpoint 0",
        )
    ], "no checkpoint is kept: replay refuses the command without one"
    largest = ["1", "8", "2", "one of the largest gradient norms", f"bigmodel seen {folder} --step 1"]
    assert rows[0][:5] == largest, "no event has its documents"


def test_no_text_of_a_run_is_html_and_only_the_page_s_own_scripts_run(tmp_path: Path) -> None:
    folder = write(tmp_path / "<script>alert(3)<" / "b>", killed_and_resumed())
    (folder / "sample.txt").write_text(HOSTILE)
    (folder / "settings.json").write_text(json.dumps({"run": {"note": HOSTILE}}))
    (folder / "events.jsonl").write_text(json.dumps({"event": HOSTILE, "step": 1, "time": 1.0}) + "\n")
    path = write_page([folder], tmp_path / "page.html")
    text = path.read_text()
    assert text.count("<script") == text.count("</script>") == 3
    assert "alert(" not in re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.DOTALL)
    assert blocks(data_of(path))["sample"]["text"] == HOSTILE
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy
    own = [
        hashlib.sha256(script.encode()).digest() for script in re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    ]
    allowed = re.findall(r"'sha256-([^']*)'", policy[1].partition("script-src")[2])
    assert allowed == [base64.b64encode(digest).decode() for digest in own]
    assert "connect-src 'none'" in policy[1]
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text), "nothing is loaded from a network"


def test_several_runs_lie_in_one_plot_and_equal_names_are_told_apart(tmp_path: Path) -> None:
    folders = [write(tmp_path / name / "run", killed_and_resumed(steps)) for name, steps in (("a", 10), ("b", 14))]
    found = blocks(content([open_run(folder) for folder in folders]))
    assert [one["label"] for one in found["throughput"]["lines"]] == ["run (1)", "run (2)"]
    assert len({one["colour"] for one in found["throughput"]["lines"]}) == 2
    assert len(points(found["throughput"], "run (2)")[0]) == 14
    assert {"phases of run (1)", "phases of run (2)"} <= set(found)
    assert found["numbers"]["columns"] == ["", "run (1)", "run (2)"]


def test_what_was_appended_is_read_and_a_restarted_run_is_read_anew(tmp_path: Path) -> None:
    run = Run()
    run.start(0, None)
    run.add(line(1))
    folder = write(tmp_path / "run", run)
    history = RunHistory(folder)
    assert history.update()
    assert not history.update()
    second = json.dumps({**line(2), "time": run.now + 0.2}) + "\n"
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(second[:50])
    history.update()
    assert history.column("step").tolist() == [1.0], "half a line is left for later"
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(second[50:])
    assert history.update()
    assert history.column("nats/causal/docs").tolist() == pytest.approx([math.nan, 2.0 / 60], nan_ok=True)
    run.start(1, "died", after=5.0)
    (folder / "new").write_text("".join(json.dumps(one) + "\n" for one in run.file))
    (folder / "new").replace(folder / "metrics.jsonl")
    assert history.update()
    assert (history.num_steps, len(history.starts())) == (1, 2)


def test_the_last_line_of_a_run_that_goes_on_is_no_end_of_an_earlier_start(tmp_path: Path) -> None:
    run = Run()
    run.start(0, None)
    run.add(line(1))
    run.add({"kind": "end", "ending": "finished", "lap": 1.0})
    run.start(1, "finished", after=60.0)
    run.add(line(2))
    numbers = dict(blocks(content([open_run(write(tmp_path / "run", run))]))["numbers"]["rows"])
    assert numbers["last line"] == time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(run.now))
    assert "ended" not in numbers


def test_changes_between_starts_and_settings_are_listed(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", killed_and_resumed())
    (folder / "starts").mkdir()
    environment = {"commit": "c", "versions": {}}
    for number, rate in enumerate((0.1, 0.2), 1):
        start = {"time": 100.0 * number, "settings": {"optimizer": {"learning_rate": rate}}, "deepspeed": {}}
        (folder / "starts" / f"000{number}.json").write_text(json.dumps(start | {"environment": environment}))
    (folder / "settings.json").write_text(json.dumps({"optimizer": {"learning_rate": 0.2}}))
    found = blocks(content([open_run(folder)]))
    assert [row[2:] for row in found["changes"]["rows"]] == [
        ["the first start", "", ""],
        ["optimizer.learning_rate", "0.1", "0.2"],
    ]
    assert found["settings"]["rows"] == [["optimizer.learning_rate", "0.2"]]


def test_the_server_gives_the_page_and_only_new_data(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", killed_and_resumed())
    server = make_server([folder], "127.0.0.1", 0)
    Thread(target=server.serve_forever, daemon=True).start()
    try:

        def get(path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
            connection = HTTPConnection(*server.server_address[:2], timeout=20)
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

        status, _, body = get("/")
        assert (status, b"connect-src 'self'" in body) == (200, True)
        status, headers, body = get("/data.json")
        assert blocks(json.loads(body))["numbers"]["rows"][0] == ["steps", "12"]
        assert get("/data.json", **{"If-None-Match": headers["ETag"]})[0] == 304
        status, headers, body = get("/data.json?from=2&to=3")
        assert (status, "loss" in blocks(json.loads(body))) == (200, True)
        assert get("/data.json?from=2&to=3", **{"If-None-Match": headers["ETag"]})[0] == 304
        assert get("/data.json?from=2", **{"If-None-Match": headers["ETag"]})[0] == 400
        assert get("/settings.json")[0] == 404
        assert get("/data.json", Host="elsewhere.example")[0] == 403, "a name pointed here by another site"
    finally:
        server.shutdown()
        server.server_close()


def test_live_data_follow_the_run(tmp_path: Path) -> None:
    run = killed_and_resumed()
    live = LiveData([write(tmp_path / "run", run)])
    live.rest = 0.0
    before, tag = live.latest()
    assert live.latest()[1] == tag
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**line(13), "time": run.now + 1.3}) + "\n")
    after, new_tag = live.latest()
    assert new_tag != tag
    assert [blocks(data)["numbers"]["rows"][0][1] for data in (before, after)] == ["12", "13"]


def test_a_page_is_served_of_a_run_that_has_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", lambda server: None)
    (tmp_path / "my.toml").write_text(f'[run]\ndirectory = "{tmp_path}/new"\n[data]\ndirectory = "data"\n')
    answer = CliRunner().invoke(app, ["report", str(tmp_path / "my.toml"), "--serve"], catch_exceptions=False)
    assert f"{tmp_path}/new: not started yet; the page shows it as soon as it begins" in answer.output
    live = LiveData([tmp_path / "new"])
    live.rest = 0.0
    before, _ = live.latest()
    assert blocks(before)["numbers"]["rows"][0] == ["steps", "none yet"]
    write(tmp_path / "new", killed_and_resumed())
    after, _ = live.latest()
    assert blocks(after)["numbers"]["rows"][0] == ["steps", "12"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "--html", "/proc/nothing/page.html"], "--html /proc/nothing/page.html: cannot be written"),
        (["RUN/none", "--html", "page.html"], "none: no such folder; give the run.directory of a training run"),
        (["RUN", "RUN", "--html", "page.html", "--serve"], "--html and --serve: one of them writes the page"),
        (["FILE", "--serve"], "page.html: no such folder; give the run.directory of a training run"),
        (["RUN", "RUN"], "2 runs without --html or --serve; give one"),
        (["EMPTY", "--html", "page.html"], "metrics.jsonl has no step yet; name a run directory"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, words: list[str], message: str) -> None:
    places = {"RUN": str(write(tmp_path / "run", killed_and_resumed())), "EMPTY": str(tmp_path)}
    places["FILE"] = str(tmp_path / "page.html")
    (tmp_path / "page.html").touch()
    given = [re.sub("RUN|EMPTY|FILE", lambda found: places[found[0]], word) for word in words]
    with pytest.raises(UserError, match=re.escape(message)):
        CliRunner().invoke(app, ["report", *given], standalone_mode=False, catch_exceptions=False)


def test_too_many_runs_and_a_taken_port_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", killed_and_resumed())
    with pytest.raises(UserError, match="13 runs on one page; give at most 12"):
        content([open_run(folder)] * 13)
    server = make_server([folder], "127.0.0.1", 0)
    port = server.server_address[1]
    with pytest.raises(UserError, match=f"--host 127.0.0.1 --port {port}: Address already in use; choose another port"):
        make_server([folder], "127.0.0.1", port)
    server.server_close()


def test_uplot_is_the_file_that_its_readme_names() -> None:
    named = dict(
        re.findall(r"^\| `(uplot[^`]*)` .*`([0-9a-f]{64})` \|$", (STATIC / "README.md").read_text(), re.MULTILINE)
    )
    assert named == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in STATIC.glob("uplot*")}


def test_a_page_of_a_long_run_stays_small(tmp_path: Path) -> None:
    run = Run()
    run.start(0, None)
    noise = np.random.default_rng(1).normal(size=4000).tolist()
    for number in range(1, 4001):
        run.add(line(number, 3.0 + noise[number - 1]))
    data = content([open_run(write(tmp_path / "run", run))])
    text = page(data)
    assert len(text) < 1_500_000
    x, y = points(blocks(data)["loss"], "each step")
    assert len(x) < 3100
    assert (min(y), max(y)) == (np.float32(3.0 + min(noise)), np.float32(3.0 + max(noise)))
