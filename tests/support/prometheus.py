"""A real Prometheus and a real Alertmanager for tests, on free ports, and a receiver of what the Alertmanager sends."""

import json
import shutil
import subprocess
import threading
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bigmodel.launcher.network import free_port

PROMETHEUS, ALERTMANAGER = shutil.which("prometheus"), shutil.which("prometheus-alertmanager")


class Prometheus:
    """A Prometheus that scrapes the runs of `folder` and evaluates `rules` every `interval`. `stop` it."""

    def __init__(self, folder: Path, rules: Path, interval: str = "500ms", alertmanager_port: int = 0) -> None:
        self.port = free_port()
        configuration: dict[str, Any] = {
            "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
            "rule_files": [str(rules)],
            "scrape_configs": [
                {
                    "job_name": "bigmodel",
                    "file_sd_configs": [{"files": [f"{folder}/*.prometheus.json"], "refresh_interval": "500ms"}],
                }
            ],
        }
        if alertmanager_port:
            target = {"targets": [f"127.0.0.1:{alertmanager_port}"]}
            configuration["alerting"] = {"alertmanagers": [{"static_configs": [target]}]}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        self._process = subprocess.Popen(
            [
                str(PROMETHEUS),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{self.port}",
                "--log.level=warn",
            ],
            stderr=subprocess.DEVNULL,
        )

    def ask(self, query: str, at: float | None = None) -> dict[str, float]:
        """An instant query: the label values of each series, joined, -> its value. at: Unix time; None: now."""
        moment = {} if at is None else {"time": at}
        try:
            result = self._get("query?" + urllib.parse.urlencode({"query": query, **moment}))["result"]
        except OSError:  # it starts
            return {}
        return {
            "|".join(value for name, value in sorted(one["metric"].items()) if name != "__name__"): float(
                one["value"][1]
            )
            for one in result
        }

    def alerts(self) -> list[dict[str, str]]:
        """The labels of the alerts that fire now."""
        try:
            return [alert["labels"] for alert in self._get("alerts")["alerts"] if alert["state"] == "firing"]
        except OSError:
            return []

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/{path}", timeout=10) as answer:
            return json.load(answer)["data"]


class Told(NamedTuple):
    """An alert as it was sent. status: firing or resolved."""

    status: str
    labels: dict[str, str]
    annotations: dict[str, str]


class Alertmanager:
    """An Alertmanager that sends each change of an alert at once to `told`. `stop` it."""

    def __init__(self, folder: Path) -> None:
        self.port, self.told = free_port(), list[Told]()
        told = self.told

        class Receiver(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                told.extend(Told(one["status"], one["labels"], one["annotations"]) for one in sent["alerts"])
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._receiver = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
        threading.Thread(target=self._receiver.serve_forever, args=(0.1,), daemon=True).start()
        at_once = {"group_by": ["..."], "group_wait": "0s", "group_interval": "200ms", "repeat_interval": "1h"}
        hook = {"url": f"http://127.0.0.1:{self._receiver.server_port}/", "send_resolved": True}
        (folder / "alertmanager.yml").write_text(
            yaml.safe_dump(
                {
                    "route": {"receiver": "test", **at_once},
                    "receivers": [{"name": "test", "webhook_configs": [hook]}],
                }
            )
        )
        self._process = subprocess.Popen(
            [
                str(ALERTMANAGER),
                f"--config.file={folder / 'alertmanager.yml'}",
                f"--storage.path={folder / 'alertmanager'}",
                f"--web.listen-address=127.0.0.1:{self.port}",
                "--cluster.listen-address=",
                "--log.level=error",
            ],
            stderr=subprocess.DEVNULL,
        )

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._receiver.shutdown()
        self._receiver.server_close()
