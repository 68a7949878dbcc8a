"""The dashboards are what the generator makes, and complete; their queries ask for metrics that are exported.

A real Prometheus answers every query in tests/system/test_watched_run.py.
"""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from bigmodel.metrics.metric_table import METRICS, full_name
from tests.support.alert_rules import RULES
from tools.dashboards import DASHBOARDS

FOLDER = Path(__file__).parents[2] / "configs/grafana"
FILES = sorted(FOLDER.glob("*.json"))


def panels(file: Path) -> list[dict[str, Any]]:
    return [panel for panel in json.loads(file.read_text())["panels"] if panel["type"] != "row"]


def test_the_files_are_those_of_the_generator() -> None:
    if importlib.util.find_spec("grafana_foundation_sdk") is None:
        pytest.skip("grafana-foundation-sdk is not installed (pip install bigmodel[dev]): the files were not compared")
    from tools.write_dashboards import texts

    found = {file.name: file.read_text() for file in FILES}
    assert found == texts(), "run python -m tools.write_dashboards"


def test_there_is_a_file_for_each_dashboard() -> None:
    assert {file.stem for file in FILES} == set(DASHBOARDS)
    assert {"overview", "ranks", "data", "learning", "goodput", "fleet", "nodes"} == set(DASHBOARDS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_panel_has_title_unit_description_source_and_place(file: Path) -> None:
    dashboard = json.loads(file.read_text())
    variables = {one["name"]: one for one in dashboard["templating"]["list"]}
    assert list(variables) == ["source", "run", "node"]
    assert [one["type"] for one in variables.values()] == ["datasource", "query", "query"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    places = set()
    for panel in panels(file):
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "$source"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        assert all('run=~"$run"' in target["expr"] for target in panel["targets"])
        at = panel["gridPos"]
        covered = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in covered) < 24
        assert not covered & places
        places |= covered


def test_queries_ask_for_exported_metrics_and_recorded_rules() -> None:
    queries = " ".join(target["expr"] for file in FILES for panel in panels(file) for target in panel["targets"])
    names = set(re.findall(r"(?<![\w:])bigmodel_[a-z0-9_]+", queries))
    assert len(names) > 50
    assert names <= {full_name(metric) for metric in METRICS}
    assert set(re.findall(r"(?:run|rank):[\w:]+", queries)) <= set(re.findall(r"record: (\S+)", RULES.read_text()))
