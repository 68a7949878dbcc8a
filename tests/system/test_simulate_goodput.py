"""The simulated month: the closed form, a walk from save to save, spares, and costs read from a run directory."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer

from bigmodel.planning.save_interval import expected_ratio
from bigmodel.run_directory import append_json_line, read_json
from tests.metrics.test_run_accounting import Run, step
from tools import simulate_goodput
from tools.goodput_facts import DAY, FACTS, RATES, costs_of, designs, facts_from
from tools.goodput_model import Design, Failures, draw_failures, simulate, spares_needed

HOUR, MONTH = 3600.0, 30 * DAY
PLAIN = Design(pause=60.0, write=60.0, detect=20.0, restart=100.0)
BACKGROUND = replace(PLAIN, pause=2.0)


def failures_at(*times: float, node: float = 0.0) -> Failures:
    """One month with failures at these times, none of them a hang, all or none with their node."""
    row = np.array([times])
    return Failures(row, np.ones_like(row), np.full_like(row, node), np.ones_like(row))


# ---- the closed form ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", [PLAIN, BACKGROUND])
@pytest.mark.parametrize("mean_hours", [0.5, 8.0])
def test_the_mean_of_many_months_is_the_closed_form(design: Design, mean_hours: float) -> None:
    intervals = np.array([30.0, 200.0, 1000.0, 5000.0])
    seconds = 700 * mean_hours * HOUR
    outcome = simulate(design, draw_failures(mean_hours * HOUR, seconds, 48), intervals, seconds)
    error = outcome.ratio.std(axis=0, ddof=1) / math.sqrt(48)
    assert (error < 0.004).all()
    for interval, ratio, one in zip(intervals, outcome.ratio.mean(axis=0), error, strict=True):
        expected = expected_ratio(interval, design.pause, design.write, 120.0, mean_hours * HOUR)
        assert ratio == pytest.approx(expected, abs=4 * one + 1e-4), interval


def test_the_closed_form_is_daly_s_and_its_best_interval_is_young_s() -> None:
    """Pause 60 s, recovery 120 s, a failure each 8 h: Young has sqrt(2 * 60 * 28,800) = 1,859 s."""
    mean = 8 * HOUR
    daly = 1859 / (mean * math.exp(120 / mean) * math.expm1((1859 + 60) / mean))
    assert expected_ratio(1859.0, 60.0, 60.0, 120.0, mean) == pytest.approx(daly, rel=1e-12)
    intervals = np.arange(1000.0, 3000.0, 50.0)
    outcome = simulate(PLAIN, draw_failures(mean, 12 * MONTH, 64), intervals, 12 * MONTH)
    assert intervals[outcome.ratio.mean(axis=0).argmax()] == pytest.approx(1859, abs=250)


# ---- a walk from save to save -------------------------------------------------------------------------------------


def walked(design: Design, times: list[float], interval: float, seconds: float) -> float:
    """The ratio by small steps: work, pause, write, one after the other; without hangs, nodes and a store."""
    now = saved = 0.0
    for failure in [*times, math.inf]:
        work, durable, writing = saved, saved, []
        while now < min(failure, seconds):
            end = min(now + interval, failure, seconds)
            work, now = work + end - now, end
            if now < min(failure, seconds):
                writing.append((now + design.write, work))
                now = max(now + design.pause, now + design.write - interval)  # one save at a time
        durable = max([durable, *(at_work for written, at_work in writing if written <= failure)])
        if failure >= seconds:
            return work / seconds
        saved, now = durable, failure + design.detect + design.restart
    raise AssertionError


@pytest.mark.parametrize("design", [PLAIN, BACKGROUND])
def test_the_arithmetic_between_failures_is_a_walk_from_save_to_save(design: Design) -> None:
    seconds, intervals = 5 * DAY, np.array([17.0, 301.0, 2003.0])
    failures = draw_failures(1.1 * HOUR, seconds, 5, seed=7)
    assert (np.diff(failures.times) < 120).any()  # some failures come during a recovery
    outcome = simulate(design, failures, intervals, seconds)
    for month, times in enumerate(failures.times):
        for number, interval in enumerate(intervals):
            expected = walked(design, [time for time in times if time < seconds], interval, seconds)
            assert outcome.ratio[month, number] == pytest.approx(expected, abs=1e-9)


def test_all_seconds_have_a_cause_under_every_design() -> None:
    mean = RATES["llama3"].mean_seconds(100_000)
    for design in designs(FACTS, 100_000, mean).values():
        outcome = simulate(design, draw_failures(mean, MONTH, 3), np.array([20.0, 200.0, 2000.0]), MONTH, 50.0)
        assert outcome.ratio + sum(outcome.lost.values()) == pytest.approx(np.ones((3, 3)), abs=1e-9)
        assert min(share.min() for share in outcome.lost.values()) >= 0
        assert outcome.ratio.min() > 0.1


def test_an_example_by_hand() -> None:
    """Interval 100, pause 10, write 30. Saves begin at 100, 210, 320 ...; the failure at 235 is during the second's
    write, so 100 remain of 200 + 15; training goes on at 235 + 5 + 40 = 280 for 220 more: 100, pause, 100, pause."""
    design = Design(pause=10.0, write=30.0, detect=5.0, restart=40.0)
    outcome = simulate(design, failures_at(235.0), np.array([100.0]), 500.0)
    assert outcome.ratio[0, 0] == pytest.approx(300 / 500)
    lost = {cause: float(share[0, 0]) * 500 for cause, share in outcome.lost.items()}
    assert lost == pytest.approx({"save": 40.0, "replay": 115.0, "detect": 5.0, "wait": 0.0, "restart": 40.0})


# ---- spares and the store -----------------------------------------------------------------------------------------


def test_a_second_failure_waits_where_the_only_spare_is_used() -> None:
    """The spare takes over at once; the failed node is back after 1,000 s, another node from outside after 300."""
    design = replace(PLAIN, node_share=0.5, node_wait=300.0, spares=1, repair=1000.0)
    for second, waited in ((500.0, 300.0), (900.0, 200.0), (1200.0, 0.0)):
        outcome = simulate(design, failures_at(100.0, second), np.array([50.0]), 5000.0)
        assert outcome.lost["wait"][0, 0] * 5000 == pytest.approx(waited)
    unharmed = simulate(design, failures_at(100.0, 500.0, node=1.0), np.array([50.0]), 5000.0)
    assert unharmed.lost["wait"][0, 0] == 0
    assert spares_needed(16.0) == 28


def test_a_failure_that_takes_the_copies_goes_back_to_the_store() -> None:
    """Copies each 10 s, the store each 100 s of work; the failure at 255 takes the copies in one of the months."""
    design = Design(0.0, 1.0, 0.0, 5.0, lost_share=0.5, store_interval=100.0, store_write=20.0, store_restart=50.0)
    both = Failures(*(np.array([[one], [other]]) for one, other in ((255.0, 255.0), (1, 1), (1, 1), (0.6, 0.4))))
    outcome = simulate(design, both, np.array([10.0]), 1000.0)
    assert outcome.lost["replay"][:, 0] * 1000 == pytest.approx([5.0, 55.0])
    assert outcome.lost["restart"][:, 0] * 1000 == pytest.approx([5.0, 50.0])


# ---- costs, facts, the command ------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two starts: a save of step 2 during step 3, a failure in step 5 seen after 0.5 s, all ended 4 s later."""
    books = Run()
    books.start(0, None)
    for number in (1, 2, 3):
        books.add(step(number, 2.0))
    books.add({"kind": "checkpoint", "step": 2, "bytes": 10, "seconds": 0.25, "lap": 0.25})
    books.add(step(4, 2.0, data_wait_seconds=1.0))
    died = books.now + 0.5
    books.start(2, "died", after=5.0)
    books.add(step(3, 2.0))
    for line in books.file:
        append_json_line(tmp_path / "metrics.jsonl", line)
    end = {"event": "launch_ended", "cause": "failed", "code": 1, "since": died, "time": died + 4.0}
    append_json_line(tmp_path / "events.jsonl", end)
    return tmp_path


def test_costs_are_read_from_a_run_directory(run: Path) -> None:
    costs = costs_of(run)
    assert (costs.pauses, costs.writes, costs.detections) == ([0.25], [2.25], [4.0])
    assert costs.restarts == pytest.approx([5.5])  # 0.5 s until the process begins, 5 s until its first step
    assert costs.starts == pytest.approx([5.0, 5.0])
    assert costs.step == 2.0
    facts = facts_from(run, {"start": 7.0})
    assert (facts["detect"].value, facts["detect"].kind) == (4.0, "measured")
    assert (facts["start"].value, facts["start"].kind) == (7.0, "given")


def test_the_published_rates_are_those_of_their_sources() -> None:
    assert RATES["llama3"].mean_seconds(16_384) / HOUR == pytest.approx(54 * 24 / 419)
    assert RATES["rsc1"].mean_seconds(131_072) / 60 == pytest.approx(13.5)  # the source says 14 minutes
    assert RATES["rsc1-1024"].mean_seconds(1024) / HOUR == pytest.approx(7.9)


def test_the_command_writes_numbers_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulate_goodput.main("9600", None, "llama3", [], 10.0, 4, 0.97, tmp_path)
    saved = read_json(tmp_path / "simulate_goodput.json")
    ratios = {one["design"]: one["ratio"] for one in saved["results"]}
    assert list(ratios) == sorted(ratios, key=ratios.__getitem__) == list(simulate_goodput.COLOURS)
    assert ratios["spares"] > 0.97
    assert [one["design"] for one in saved["results"] if one["built"]] == ["plain", "background", "in place", "spares"]
    assert saved["facts"]["node_share"]["kind"] == "published"
    assert (tmp_path / "simulate_goodput.png").read_bytes()[:4] == b"\x89PNG"
    assert "419 unexpected interruptions" in capsys.readouterr().out
    json.dumps(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": "9600,few"}, "--gpus few: give whole numbers above 0, with commas between them"),
        ({"gpus": "0"}, "--gpus 0: give whole numbers above 0"),
        ({"rates": "llama"}, "--rates llama: choose one of llama3, rsc1, rsc1-1024"),
        ({"set_": ["node_wait"]}, "--set node_wait: write NAME=NUMBER"),
        ({"set_": ["nodes=3"]}, "--set nodes=3: no such fact; choose one of parameters"),
        ({"set_": ["detect=-1"]}, "--set detect=-1: give a number of at least 0"),
        ({"set_": ["store_bandwidth=0"]}, "--set store_bandwidth=0: nothing could be saved; give a number above 0"),
        ({"set_": ["node_share=78"]}, "--set node_share=78: give a share of all failures, from 0 to 1"),
    ],
)
def test_a_wrong_option_is_one_line(
    changes: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"gpus": "9600", "run": None, "rates": "llama3", "set_": [], "days": 1.0, "seeds": 2, "goal": 0.97}
    with pytest.raises(typer.Exit) as ending:
        simulate_goodput.main(**arguments | changes, out=tmp_path)
    assert ending.value.exit_code == 2
    printed = capsys.readouterr().out
    assert message in printed
    assert printed.count("\n") == 1
