"""The metrics endpoint of a node: its exporter process, run by local rank 0, and its published address.

In: a run directory and the folder of the ranks' records. Opens the socket and passes it to
bigmodel/metrics/exporter.py, so that early requests wait instead of failing; restarts the exporter if it ended; writes
the address for people and for Prometheus' file_sd. Guarantees: the address is the same at every start if its port is
free; the exporter of an earlier start is ended first; `close` ends the exporter and removes all its files.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

from bigmodel.config.settings import MetricsSettings, UserError
from bigmodel.metrics.hang_watch import Limits
from bigmodel.metrics.rank_record import folders_of, remove_stale, start_ticks
from bigmodel.run_directory import write_atomically, write_json

CLOSING_SECONDS = 5.0  # time for the kernel to free the port of a killed process


class MetricsEndpoint:
    """The endpoint of one node and all of its `ranks`. `start` it when `folder` has records; `close` it at the end.

    The exporter ends by itself after the last rank of its node, also if all were killed. Raises `UserError` on node 0
    if the address cannot be opened; other nodes then take a free port.
    """

    def __init__(
        self,
        directory: Path,
        folder: Path,
        node: int,
        ranks: range,
        settings: MetricsSettings,
        limits: Limits = Limits(),  # noqa: B008 - immutable
    ) -> None:
        self._folder, self._looked = folder, 0.0
        self._process: subprocess.Popen[bytes] | None = None
        ended = self._end_earlier(directory, node)
        port = settings.port or _port_of(directory, node)
        may_differ = node > 0 or not settings.port
        self._socket = _listen(settings.host, port, may_differ, CLOSING_SECONDS if ended else 0.0)
        self.endpoint = f"{_advertised(settings.host)}:{self._socket.getsockname()[1]}"
        name = f"{directory.name}.node-{node}.prometheus.json"
        self._published = [directory.with_name(name), *([directory / "metrics_endpoint"] if node == 0 else [])]
        labels = {"job": "bigmodel", "run": directory.name, "node": str(node), "host": socket.gethostname()}
        labels["ranks"] = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
        if "SLURM_JOB_ID" in os.environ:
            labels["slurm_job_id"] = os.environ["SLURM_JOB_ID"]
        self._target = {"targets": [self.endpoint], "labels": labels}
        self._page = {
            "run_directory": str(directory),
            "endpoint": self.endpoint,
            "published": [str(path) for path in self._published],
            "limits": limits,
        }

    def start(self) -> None:
        write_json(self._folder / "page.json", self._page)
        self._spawn()
        write_json(self._published[0], [self._target])
        for path in self._published[1:]:
            write_atomically(path, self.endpoint + "\n")

    def revive(self) -> None:
        """Restart the exporter if it has ended; checks at most every five seconds."""
        if time.monotonic() - self._looked > 5.0:
            self._looked = time.monotonic()
            if self._process is not None and self._process.poll() is not None and self._folder.exists():
                said = (self._folder / "exporter.log").read_text(errors="replace").splitlines()[-1:] or ["nothing"]
                how = f"ended with exit code {self._process.returncode}; its last line: {said[0]}"
                print(f"bigmodel: the metrics exporter {how}; it is restarted", file=sys.stderr, flush=True)
                self._spawn()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()  # it ignores other signals and has no state to save
            self._process.wait()
            self._process = None
        self._socket.close()
        for path in self._published:
            path.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _spawn(self) -> None:
        given = [self._socket.fileno(), errors := os.dup(2)]
        command = [sys.executable, "-m", "bigmodel.metrics.exporter", str(self._folder), *map(str, given)]
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        with open(self._folder / "exporter.log", "ab") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=given,
                start_new_session=True,  # a signal to a rank's process group must not end the exporter of all ranks
            )
        os.close(errors)
        write_atomically(self._folder / "exporter.pid", f"{self._process.pid} {start_ticks(self._process.pid)}")

    def _end_earlier(self, directory: Path, node: int) -> bool:
        """End the exporter of an earlier, killed start to free its port; returns whether there was one."""
        ended = False
        for folder in folders_of(directory, node):
            file = folder / "exporter.pid"
            if folder != self._folder:
                try:
                    pid, began = file.read_text().split()
                except FileNotFoundError:  # the exporter has just ended by itself
                    continue
                ended = True
                if str(start_ticks(int(pid))) == began:
                    os.kill(int(pid), signal.SIGKILL)  # it has no state to save, and may hang
                deadline = time.monotonic() + 5.0
                while str(start_ticks(int(pid))) == began and time.monotonic() < deadline:
                    time.sleep(0.02)
        remove_stale(directory, node, keep=self._folder)
        return ended


def _port_of(directory: Path, node: int) -> int:
    """The default port: 20,000 to 31,999, below Linux' ephemeral ports. It is the same at every start, so that
    Prometheus has one instance over all restarts."""
    return 20_000 + zlib.crc32(f"{directory}|{node}".encode()) % 12_000


def _listen(host: str, port: int, port_may_differ: bool, patience_seconds: float) -> socket.socket:
    """`patience_seconds`: a process that is ending closes its port only with its last thread."""
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            return _try_to_listen(host, port)
        except UserError:
            if time.monotonic() > deadline:
                if not port_may_differ:
                    raise
                return _try_to_listen(host, 0)
            time.sleep(0.02)


def _try_to_listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise UserError(_address_problem(port, host, error)) from None
    return listener


def _advertised(host: str) -> str:
    """The host name for clients: the machine's own name if the socket listens on every address."""
    name = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
    return f"[{name}]" if ":" in name else name


def _address_problem(port: int, host: str, error: OSError) -> str:
    return (
        f"metrics.host = {host!r}, metrics.port = {port}: the metrics endpoint cannot listen there: "
        f"{error.strerror or error}; choose another address, or any free port with --set metrics.port=0"
    )
