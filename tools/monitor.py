"""A local Prometheus on runs of this machine: rules, alerts, and where the dashboards go.

    python -m tools.monitor configs/tiny.toml      # or make monitor RUN=configs/tiny.toml

In: a run file or a run directory. It need not have started yet; other runs of the same folder are watched as well. Out:
Prometheus, and Alertmanager where it is installed, with configs/prometheus/rules.yml, until Ctrl-C. What they keep lies
in the folder `monitor` beside the run and is there at the next start. Nobody is notified: the alerts show on the pages
of both. Exit codes: 0 ended by Ctrl-C, 1 one of them ended by itself, 2 something to correct.
"""

import glob
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from bigmodel.config.settings import UserError, load_settings
from bigmodel.run_directory import EXIT_DONE, EXIT_FAILED
from bigmodel.sizes import counted_noun
from tools.dashboards import DASHBOARDS

CONFIGS = Path(__file__).parents[1] / "configs"
READY_SECONDS, END_SECONDS = 60.0, 10.0
ALERTMANAGER = "route: {receiver: nobody}\nreceivers: [{name: nobody}]\n"


class Service(NamedTuple):
    """A program that runs until it is ended. url: of its page; log: of its output."""

    name: str
    url: str
    command: list[str]
    log: Path


def monitor(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run file or run directory")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="of Prometheus")] = 9090,
    alert_port: Annotated[int, typer.Option(min=1, max=65535, help="of Alertmanager")] = 9093,
) -> None:
    """Watch the runs of a folder with a local Prometheus until Ctrl-C."""
    directory = directory_of(run)
    prometheus = shutil.which("prometheus")
    if not prometheus:
        raise UserError(
            "prometheus is not on the PATH; install it: apt-get install prometheus prometheus-alertmanager, or a "
            "release from prometheus.io/download"
        )
    alertmanager = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
    folder = directory.parent / "monitor"
    folder.mkdir(parents=True, exist_ok=True)
    for number, option in ((port, "--port"), *([(alert_port, "--alert-port")] if alertmanager else [])):
        refuse_taken(number, option)
    services = services_of(folder, prometheus, alertmanager, port, alert_port)
    write_configuration(folder, directory.parent, alert_port if alertmanager else None)
    sys.exit(keep(services, lambda: tell(directory, folder, services)))


def directory_of(run: Path) -> Path:
    """The run directory of a run file, or the directory itself. Raises `UserError`."""
    directory = load_settings(run).run.directory if run.suffix == ".toml" else run
    if run.suffix != ".toml" and not run.is_dir():
        raise UserError(f"{run}: no such run directory; give the run file of a run that has not started yet")
    return Path(directory).resolve()


def refuse_taken(port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(
                f"{option} {port}: {error.strerror}; end the program that has this port, or choose another"
            ) from None


def write_configuration(folder: Path, runs: Path, alert_port: int | None) -> None:
    """prometheus.yml and alertmanager.yml. JSON is YAML, and quotes paths."""
    configuration = {
        "global": {"scrape_interval": "5s", "evaluation_interval": "5s"},
        "rule_files": [str(CONFIGS / "prometheus/rules.yml")],
        "scrape_configs": [
            {
                "job_name": "bigmodel",
                "file_sd_configs": [{"files": [str(runs / "*.prometheus.json")], "refresh_interval": "5s"}],
            }
        ],
    }
    if alert_port is not None:
        target = {"static_configs": [{"targets": [f"127.0.0.1:{alert_port}"]}]}
        configuration["alerting"] = {"alertmanagers": [target]}
    (folder / "prometheus.yml").write_text(json.dumps(configuration, indent=1) + "\n")
    (folder / "alertmanager.yml").write_text(ALERTMANAGER)


def services_of(folder: Path, prometheus: str, alertmanager: str | None, port: int, alert_port: int) -> list[Service]:
    found = [
        Service(
            "Prometheus",
            f"http://127.0.0.1:{port}",
            [
                prometheus,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'prometheus'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            folder / "prometheus.log",
        )
    ]
    if alertmanager:
        command = [
            alertmanager,
            f"--config.file={folder / 'alertmanager.yml'}",
            f"--storage.path={folder / 'alertmanager'}",
            f"--web.listen-address=127.0.0.1:{alert_port}",
            "--cluster.listen-address=",
        ]
        found.append(Service("Alertmanager", f"http://127.0.0.1:{alert_port}", command, folder / "alertmanager.log"))
    return found


def keep(services: Sequence[Service], when_ready: Callable[[], None]) -> int:
    """Run the services until SIGINT or SIGTERM, or until one of them ends; the exit code."""
    ended: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: ended.append(number))
    running = [start(service) for service in services]
    try:
        deadline, told = time.monotonic() + READY_SECONDS, False
        while not ended:
            for service, process in zip(services, running, strict=True):
                if process.poll() is not None:
                    said = (service.log.read_text(errors="replace").splitlines() or ["nothing"])[-1]
                    print(f"monitor: {service.name} ended with exit code {process.returncode}: {said}", file=sys.stderr)
                    return EXIT_FAILED
            if not told and (all(map(is_ready, services)) or time.monotonic() > deadline):
                when_ready()
                told = True
            time.sleep(0.2)
        return EXIT_DONE
    finally:
        end(running)


def start(service: Service) -> "subprocess.Popen[bytes]":
    with open(service.log, "wb") as log:
        # a session of its own: Ctrl-C reaches this program only, which ends both in order
        return subprocess.Popen(
            service.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def is_ready(service: Service) -> bool:
    try:
        with urllib.request.urlopen(f"{service.url}/-/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def end(running: "Sequence[subprocess.Popen[bytes]]") -> None:
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def tell(directory: Path, folder: Path, services: Sequence[Service]) -> None:
    """What is watched, and where to look."""
    lines = [f"{service.name:<14}{service.url}" for service in services]
    lines[0] += f"    alerts: {services[0].url}/alerts"
    if len(services) == 1:
        lines.append("Alertmanager  not installed (apt-get install prometheus-alertmanager): alerts show in Prometheus")
    nodes = len(list(directory.parent.glob(f"{glob.escape(directory.name)}.node-*.prometheus.json")))
    state = f"runs on {counted_noun(nodes, 'node')}" if nodes else "does not run now; it is found when it starts"
    lines.append(f"runs          {directory.parent}: {directory.name} {state}")
    lines.append(
        f"Grafana       add a data source of type Prometheus with {services[0].url}; then Dashboards, New, Import:"
    )
    width = max(map(len, DASHBOARDS)) + len(".json")
    for name, dashboard in DASHBOARDS.items():
        lines.append(
            f"              {CONFIGS / 'grafana' / name}.json{' ' * (width - len(name) - 5)}  {dashboard.description}"
        )
    lines.append(f"Ctrl-C ends it; measurements stay in {folder}")
    print("\n".join(lines), flush=True)


def main() -> None:
    try:
        typer.run(monitor)
    except UserError as error:
        print(f"monitor: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
