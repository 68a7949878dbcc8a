"""The launcher's files in the run directory, from which `status`, `logs`, `stop` and the requeue policy work.

`launch.json` has the last start, the nodes of its ranks and the process to signal; `events.jsonl` gets `launch` at each
start and `launch_ended` with its cause at each end. bigmodel/run_directory.py lists all files.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigmodel.config.user_error import UserError
from bigmodel.launcher.topology import Topology
from bigmodel.run_directory import (
    AGAIN,
    START_LOCK,
    read_json,
    read_json_lines,
    record_event,
    take_lock,
    write_json,
)

if TYPE_CHECKING:
    from bigmodel.config.settings import Settings

# Causes of `launch_ended`. "lost": the end was not recorded, for example after kill -9 of all processes or a node
# failure. "hang": written by the watch of a node (bigmodel/metrics/hang_watch.py) or by one of the user. "rewind",
# "bad_device": told by the trainer.
CAUSES = ("finished", "stopped", "user_error", "failed", "lost", "hang", *AGAIN.values())


def run_directory(run: Path) -> Path:
    """The run directory of a run file, or the given directory itself."""
    if run.is_dir():
        return run
    if run.suffix == ".toml":
        from bigmodel.config.settings import load_settings  # only here: `bigmodel watch` needs no settings

        return load_settings(run).run.directory
    raise UserError(f"{run}: neither a run directory nor a run file")


def is_held(directory: Path) -> bool:
    """Whether a running run holds the directory's lock."""
    return _is_locked(directory / "lock")


def is_taken(directory: Path) -> bool:
    """Whether a run holds the directory's lock, or is being started there."""
    return is_held(directory) or _is_locked(directory / START_LOCK)


def _is_locked(path: Path) -> bool:
    """Reads only: another user may look, two may look at once, and nothing is made where no run has been."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # there is no lock yet
    return False


def refuse_second_run(directory: Path) -> None:
    """Before a start: raises `UserError` if a running run holds the directory's lock."""
    if is_held(directory):
        raise UserError(f"run.directory = {directory}: {_used_by(directory)}")


def cut_off_seconds(settings: "Settings") -> float:
    """How long a rank 0 may live on, and hold the run directory, on a host that was cut off: it waits for its peers."""
    return settings.training.collective_timeout_seconds + 60


def wait_until_free(directory: Path, seconds: float) -> None:
    """At a start after another one: wait for the end of a rank 0 that was cut off, at most so long."""
    deadline = time.monotonic() + seconds
    while is_held(directory) and time.monotonic() < deadline:
        time.sleep(1)


def take_start(directory: Path, becomes_rank: bool = False) -> None:
    """Before anything is recorded of a start: of two at once, the second raises `UserError`.

    The lock is held until this process ends, also after it has become rank 0's trainer by execve (becomes_rank).
    """
    refuse_second_run(directory)
    file = take_lock(directory / START_LOCK, _used_by(directory))
    os.set_inheritable(file.fileno(), becomes_rank)


def _used_by(directory: Path) -> str:
    where = describe_launch(read_launch(directory))
    return f"another run is using it now{where}; stop it (bigmodel launch stop {directory}) or choose another directory"


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
    place = {"world_size": topology.world_size, "hosts": list(topology.hosts)}
    record_event(directory, "launch", by=by, job=job, restart=restart, **place, **reached(directory))


def reached(directory: Path) -> dict[str, float]:
    """Facts of a `launch` event: the newest step, and its time by the clock of rank 0's machine."""
    newest = last_metrics(directory)
    return {"reached": newest.get("step", 0), "reached_time": newest.get("time", 0.0)}


def record_end(directory: Path, cause: str, code: int, detail: str = "", since: float = 0.0) -> None:
    """Write a `launch_ended` event. detail: the culprit, if any. since: as in `local.Ending`."""
    assert cause in CAUSES, cause
    if cause == "failed" and (hang := recorded_hang(directory)):
        cause, detail = "hang", hang
    newest = last_metrics(directory)
    known = {"since": since} if since else {}
    known |= {"last_step_time": newest["time"]} if "time" in newest else {}
    step = newest.get("step", 0)
    record_event(directory, "launch_ended", cause=cause, code=code, detail=detail, step=step, **known)


def recorded_hang(directory: Path) -> str:
    """The rank whose hang ended the last launch, and where it stood; empty: none did."""
    last = launches(read_json_lines(directory / "events.jsonl"))[-1:]
    return (last[0].detail or "a rank") if last and last[0].cause == "hang" else ""


@dataclass(frozen=True)
class Launch:
    """One start of a run, from events.jsonl. cause: "" if no end is recorded yet.

    step: the last step of metrics.jsonl at its end; of a lost one, at the start after it. reached: at its start, and
    when that step was (reached_time). anew: it set checkpoints aside, and `reached` is the step that it began with.
    stepped: it made a step. decided, reason, excluded: of the event `decided` after it (`bigmodel.launcher.restart`).
    """

    time: float
    by: str
    job: str
    restart: int
    cause: str = ""
    detail: str = ""
    step: int = 0
    stop_requested: bool = False
    reached: int = 0
    reached_time: float = 0.0
    anew: bool = False
    stepped: bool = False
    decided: str = ""
    reason: str = ""
    excluded: tuple[str, ...] = ()


def launches(events: Iterable[Mapping[str, Any]]) -> list[Launch]:
    """All starts of a run, the oldest first. One without an end before the next start is "lost".

    `by` is "" for a start not made by this launcher; only the trainer's events tell of it.
    """
    found: list[Launch] = []
    for event in events:
        kind = event.get("event")
        if kind == "launch":
            if found and not found[-1].cause:
                found[-1] = replace(found[-1], cause="lost", step=event.get("reached", 0))
            before = {name: event[name] for name in ("reached", "reached_time") if name in event}
            found.append(Launch(event["time"], event["by"], event["job"], event["restart"], **before))
        elif kind == "start" and (not found or found[-1].cause):
            found.append(Launch(event["time"], "", "", 0))
        elif not found:
            continue
        elif kind in ("finished", "stopped"):
            found[-1] = replace(found[-1], cause=kind, step=event.get("step", 0))
        elif kind in AGAIN.values():
            found[-1] = replace(found[-1], cause=str(kind), detail=event["detail"], step=event["step"])
        elif kind in ("fresh", "went_back") and not found[-1].cause:
            found[-1] = replace(found[-1], anew=True, reached=event["step"])
        elif kind == "stop_requested":
            found[-1] = replace(found[-1], stop_requested=True)
        elif kind == "decided":
            left_out = tuple(event.get("excluded", ()))
            found[-1] = replace(found[-1], decided=event["action"], reason=event["reason"], excluded=left_out)
        elif kind == "launch_ended":
            told = found[-1].cause in ("hang", *AGAIN.values())  # what came after it is a consequence
            known = found[-1].cause if told or found[-1].cause in ("finished", "stopped") else event["cause"]
            detail = (found[-1].detail if told else "") or event.get("detail", "")
            step = max(event.get("step", 0), found[-1].step)
            stepped = event.get("last_step_time", 0.0) not in (0.0, found[-1].reached_time)
            found[-1] = replace(found[-1], cause=known, detail=detail, step=step, stepped=stepped)
    return found


def bad_hosts(directory: Path) -> list[str]:
    """The hosts that the last launch named as bad (event `bad_device`), by the launcher's names for them."""
    ranks: list[int] = []
    for event in read_json_lines(directory / "events.jsonl"):
        if event.get("event") == "launch":
            ranks = []
        elif event.get("event") == "bad_device":
            ranks = event["ranks"] if event["hosts"] else []
    launch = read_launch(directory)
    homes = launch.get("node_of_rank", [])
    return sorted({launch["hosts"][homes[rank]] for rank in ranks if rank < len(homes)})


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
