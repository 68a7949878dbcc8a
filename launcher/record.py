"""The launcher's files in the run directory, from which `status`, `logs`, `stop` and the requeue policy work.

`launch.json` has the last start, the nodes of its ranks and the process to signal; `events.jsonl` gets `launch` at each
start and `launch_ended` with its cause at each end. bigmodel/run_directory.py lists all files.
"""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bigmodel.config.settings import UserError, load_settings
from bigmodel.launcher.topology import Topology
from bigmodel.run_directory import lock, read_json, record_event, write_json

# Causes of `launch_ended`. "lost": the end was not recorded, for example after kill -9 of all processes or a node
# failure. "hang": written by a watchdog of the user.
CAUSES = ("finished", "stopped", "user_error", "failed", "lost", "hang")


def run_directory(run: Path) -> Path:
    """The run directory of a run file, or the given directory itself."""
    if run.is_dir():
        return run
    if run.suffix == ".toml":
        return load_settings(run).run.directory
    raise UserError(f"{run}: neither a run directory nor a run file")


def is_held(directory: Path) -> bool:
    """Whether a running run holds the directory's lock."""
    try:
        with open(directory / "lock", "a") as file:
            lock(file, str(directory), "held")
    except UserError:
        return True
    except OSError:
        return False  # the directory does not exist yet
    return False


def refuse_second_run(directory: Path) -> None:
    """Before a start: raises `UserError` if a running run holds the directory's lock."""
    if is_held(directory):
        where = describe_launch(read_launch(directory))
        raise UserError(
            f"run.directory = {directory}: another run is using it now{where}; stop it (bigmodel launch stop "
            f"{directory}) or choose another directory"
        )


def read_launch(directory: Path) -> dict[str, Any]:
    """launch.json; {} if the launcher has not started the run."""
    file = directory / "launch.json"
    return read_json(file) if file.exists() else {}


def describe_launch(launch: dict[str, Any]) -> str:
    if not launch:
        return ""
    job = f", job {launch['job']}" if launch.get("job") else ""
    return f" ({launch['by']}{job}, rank 0 on {launch['host']})"


def record_launch(
    directory: Path, topology: Topology, by: str, *, job: str = "", restart: int = 0, launcher: bool = False
) -> None:
    """Write launch.json and a `launch` event. Call it once per start, on rank 0's machine.

    launcher: this process waits for the ranks and may be signalled; else it becomes rank 0 itself.
    """
    write_json(
        directory / "launch.json",
        {
            "by": by,
            "job": job,
            "restart": restart,
            "hosts": list(topology.hosts),
            "node_of_rank": list(topology.nodes),
            "main_address": topology.main_address,
            "main_port": topology.main_port,
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "pid_started": process_start(os.getpid()),
            "pid_is": "launcher" if launcher else "rank 0",
        },
    )
    hosts = list(topology.hosts)
    record_event(directory, "launch", by=by, job=job, restart=restart, world_size=topology.world_size, hosts=hosts)


def record_end(directory: Path, cause: str, code: int, detail: str = "", since: float = 0.0) -> None:
    """Write a `launch_ended` event. detail: the culprit, if any. since: as in `local.Ending`."""
    assert cause in CAUSES, cause
    step = last_metrics(directory).get("step", 0)
    known = {"since": since} if since else {}
    record_event(directory, "launch_ended", cause=cause, code=code, detail=detail, step=step, **known)


@dataclass(frozen=True)
class Launch:
    """One start of a run, from events.jsonl. cause: "" if no end is recorded yet.

    step: the last step of metrics.jsonl at its end, if the end was recorded.
    """

    time: float
    by: str
    job: str
    restart: int
    cause: str = ""
    detail: str = ""
    step: int = 0
    stop_requested: bool = False


def launches(events: Iterable[Mapping[str, Any]]) -> list[Launch]:
    """All starts of a run, the oldest first. One without an end before the next start is "lost".

    `by` is "" for a start not made by this launcher; only the trainer's events tell of it.
    """
    found: list[Launch] = []
    for event in events:
        kind = event.get("event")
        if kind == "launch":
            if found and not found[-1].cause:
                found[-1] = replace(found[-1], cause="lost")
            found.append(Launch(event["time"], event["by"], event["job"], event["restart"]))
        elif kind == "start" and (not found or found[-1].cause):
            found.append(Launch(event["time"], "", "", 0))
        elif not found:
            continue
        elif kind in ("finished", "stopped"):
            found[-1] = replace(found[-1], cause=kind, step=event.get("step", 0))
        elif kind == "stop_requested":
            found[-1] = replace(found[-1], stop_requested=True)
        elif kind == "launch_ended":
            known = found[-1].cause if found[-1].cause in ("finished", "stopped", "hang") else event["cause"]
            step = event.get("step", found[-1].step)
            found[-1] = replace(found[-1], cause=known, detail=event.get("detail", ""), step=step)
    return found


def last_metrics(directory: Path) -> dict[str, Any]:
    """The newest step line of metrics.jsonl, or {}. Reads its last 64 kB."""
    try:
        with open(directory / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        with suppress(ValueError):
            value = json.loads(line)
            if value.get("kind") == "step":
                return dict(value)
    return {}


def process_start(pid: int) -> int:
    """Start time of a process on this machine, in ticks since boot; unique together with its id. 0: it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[19])
