"""The alerts ask for what the exporter has: every counter is there with 0 before its first event."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigmodel.metrics.health import Gpus
from bigmodel.metrics.recorder import Metrics
from bigmodel.run_directory import read_json_lines
from tests.metrics.test_health import Driver
from tests.metrics.test_recorder import samples

RULES = Path(__file__).parents[2] / "configs/prometheus/rules.yml"
OF_RUN = {  # counters that alerts ask increase() of, and all their labels
    "steps_skipped": [("not_finite",), ("spike",), ("left_out",)],
    "spikes": [("loss",), ("gradient_norm",)],
    "checkpoint_failures": [("disk_full",), ("permission",), ("io_error",), ("not_finite",)],
    "restarts": [("stopped",), ("finished",), ("died",), ("hang",), ("failed",)],
}
OF_DEVICE = {"device_xid_errors": [("3",)], "device_ecc_errors": [("3", "corrected"), ("3", "uncorrected")]}


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def test_every_counter_whose_increase_an_alert_asks_for_has_its_labels_here() -> None:
    asked = {name for rule in alerts().values() for name in re.findall(r"increase\(bigmodel_(\w+)_total", rule["expr"])}
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
