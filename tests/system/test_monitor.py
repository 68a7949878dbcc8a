"""`python -m tools.monitor`: a real Prometheus and Alertmanager on a run at hand, until Ctrl-C."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest

from bigmodel.launcher.network import free_port
from bigmodel.metrics.recorder import Metrics
from tests.metrics.test_recorder import STEPS, until
from tests.support.alert_rules import alerts
from tests.support.prometheus import ALERTMANAGER, PROMETHEUS
from tools.dashboards import DASHBOARDS

REPOSITORY = Path(__file__).parents[2]


def command(run: Path, *options: object) -> list[str]:
    return [sys.executable, "-m", "tools.monitor", str(run), *map(str, options)]


def refused(run: Path, *options: object, path: str = os.environ["PATH"]) -> str:
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(
        command(run, *options), cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_what_is_missing_or_taken_is_said(tmp_path: Path) -> None:
    assert "no such run directory" in refused(tmp_path / "none")
    assert "apt-get install prometheus" in refused(tmp_path, path=str(tmp_path))
    if not PROMETHEUS:
        pytest.skip("prometheus is not installed (Debian: prometheus): a port that is taken was not tried")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: Address already in use" in refused(tmp_path, "--port", port)


def api(port: int, what: str) -> Any:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/{what}", timeout=5) as answer:
            return json.load(answer)["data"]
    except OSError:
        return {}


def energy_queries() -> list[str]:
    """Of all panels. Most machines have no counter that a test may read, so the run here is given numbers."""
    panels = [panel for dashboard in DASHBOARDS.values() for _, row in dashboard.rows for panel in row]
    found = [query.text for panel in panels for query in panel.queries if "_energy_" in query.text]
    assert len(found) == 3
    return [query.replace("$run", ".+").replace("$__rate_interval", "1m") for query in found]


def answers(port: int, query: str) -> bool:
    return bool(api(port, f"query?query={quote(query)}").get("result"))


def test_a_run_is_watched_until_ctrl_c_and_the_dashboards_are_named(tmp_path: Path) -> None:
    if not PROMETHEUS or not ALERTMANAGER:
        pytest.skip("no prometheus and prometheus-alertmanager (Debian's packages): nothing was monitored")
    port, alert_port = free_port(), free_port()
    run = tmp_path / "my run"
    run.mkdir()
    with Metrics(run) as metrics:
        metrics.record_step(replace(STEPS[0], device_joules=30.0, host_joules=20.0))
        options = ("--port", port, "--alert-port", alert_port)
        started = subprocess.Popen(command(run, *options), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        printed: list[str] = []
        reader = threading.Thread(target=lambda: printed.extend(started.stdout or ()))
        reader.start()
        try:
            until(lambda: any("Ctrl-C ends it" in line for line in printed), "the addresses", 60)
            services = psutil.Process(started.pid).children()
            found = 'query?query=bigmodel_steps_total{run="my%20run"}'
            until(lambda: api(port, found).get("result"), "the run in Prometheus", 60)
            groups = api(port, "rules")["groups"]
            loaded = {rule["name"] for group in groups for rule in group["rules"] if rule["type"] == "alerting"}
            assert loaded == set(alerts())
            until(lambda: all(answers(port, query) for query in energy_queries()), "data of all panels of energy", 60)
            until(lambda: api(port, "alertmanagers").get("activeAlertmanagers"), "the Alertmanager", 60)
        finally:
            started.send_signal(signal.SIGINT)
            code = started.wait(30)
    reader.join()
    assert code == 0
    assert len(services) == 2
    assert not [service for service in services if service.is_running()]
    text = "".join(printed)
    assert f"http://127.0.0.1:{port}/alerts" in text
    assert f"http://127.0.0.1:{alert_port}" in text
    assert "my run runs on 1 node" in text
    assert all(str(REPOSITORY / f"configs/grafana/{name}.json") in text for name in DASHBOARDS)
    assert {path.name for path in (tmp_path / "monitor").glob("*.yml")} == {"prometheus.yml", "alertmanager.yml"}
