"""The alerts ask for what the exporter has, before the first event too; each has its section in the runbook."""

import itertools
import json
import re
from pathlib import Path

import pytest

from bigmodel.metrics.health import Gpus
from bigmodel.metrics.recorder import Metrics
from bigmodel.run_directory import read_json_lines
from tests.metrics.test_health import Driver
from tests.metrics.test_recorder import samples
from tests.support.alert_rules import alerts, shortened

RUNBOOK = Path(__file__).parents[2] / "docs/alerts.md"
OF_RUN = {  # counters that alerts ask increase() of, and all their labels
    "steps_skipped": [("not_finite",), ("spike",), ("left_out",)],
    "spikes": [("loss",), ("gradient_norm",)],
    "checkpoint_failures": [("disk_full",), ("permission",), ("io_error",), ("not_finite",)],
    "restarts": [("stopped",), ("finished",), ("died",), ("hang",), ("failed",)],
}
OF_DEVICE = {"device_xid_errors": [("3",)], "device_ecc_errors": [("3", "corrected"), ("3", "uncorrected")]}


def test_every_counter_whose_increase_an_alert_asks_for_has_its_labels_here() -> None:
    asked = {
        name
        for rule in alerts().values()
        for asked in re.findall(r"increase\((.*?)\[", rule["expr"])
        for name in re.findall(r"bigmodel_(\w+)_total", asked)
    }
    assert asked == {*OF_RUN, *OF_DEVICE}


@pytest.mark.parametrize("kept", ["nothing", "a run of an earlier version"])
def test_counters_of_the_run_are_there_with_0_before_the_first_event(tmp_path: Path, kept: str) -> None:
    if kept != "nothing":
        with Metrics(tmp_path):
            pass
        lines = list(read_json_lines(tmp_path / "metrics.jsonl"))
        for line in lines:
            if line["kind"] == "start":
                line["carried"]["counts"] = {"steps": 0, "restarts|died": 2}
                del line["carried"]["seconds"]["compile"]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with Metrics(tmp_path) as metrics:
        found = samples(metrics.endpoint)
    for name, labels in OF_RUN.items():
        expected = dict.fromkeys(("|".join((f"{name}_total", *one)) for one in labels), 0.0)
        if name == "restarts" and kept != "nothing":
            expected |= {"restarts_total|died": 2.0, "restarts_total|finished": 1.0}
        assert {key: value for key, value in found.items() if key.startswith(f"{name}_total|")} == expected


def test_counters_of_a_device_are_there_at_the_first_reading() -> None:
    found = Gpus(Driver()).samples([{"rank": 3, "gpu": "GPU-a"}])
    for name, labels in OF_DEVICE.items():
        assert [tuple(row[0]) for row in found[name]] == labels
    assert list(itertools.chain(*(row[1:] for row in found["device_xid_errors"]))) == [0]


def test_each_alert_has_a_section_of_the_runbook_and_each_section_an_alert() -> None:
    known = alerts()
    sections = re.findall(r"^## (\w+)\n\n(page|warn)\. ", RUNBOOK.read_text(), re.MULTILINE)
    assert len(re.findall(r"^## ", RUNBOOK.read_text(), re.MULTILINE)) == len(sections)
    assert sections == [(name, rule["labels"]["severity"]) for name, rule in known.items()]
    for name, rule in known.items():
        assert rule["annotations"]["runbook_url"] == f"docs/alerts.md#{name.lower()}"


def test_a_count_in_an_alert_is_a_whole_number() -> None:
    """increase() extrapolates: 5 events are 5.04."""
    for name, rule in alerts().items():
        if "increase(" in rule["expr"] and "$value" in rule["annotations"]["summary"]:
            assert rule["expr"].count("floor(increase(") == rule["expr"].count("increase("), name


def test_shorter_times_change_nothing_else() -> None:
    rule = alerts()["BigmodelDiskFull"]
    short = shortened(rule, 240)
    assert short["expr"] == "predict_linear(bigmodel_disk_free_bytes[15000ms], 4 * 3600 / 240) < 0"
    assert short["for"] == "2500ms"
    assert {**short, "expr": 0, "for": 0} == {**rule, "expr": 0, "for": 0}
    for name, rule in alerts().items():  # no time is left as it was
        assert not re.search(
            r"[\[:]\d+[smh]\b|\b\d{3,}\b(?<!3600)(?!ms)", shortened(rule, 240)["expr"].replace("/ 240", "")
        ), name
