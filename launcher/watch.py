"""Status, logs and stopping of a run, from its run directory.

Reads the files of trainer and launcher there (`bigmodel.launcher.record`), and SLURM's queue for a SLURM job. Works on
any machine with access to the directory, except `stop` without SLURM: it must run on the run's own machine."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bigmodel.config.user_error import UserError
from bigmodel.launcher.record import Launch, is_held, is_taken, last_metrics, launches, process_start, read_launch
from bigmodel.launcher.squeue import queue_state
from bigmodel.run_directory import rank_zero, read_json, read_json_lines, record_event
from bigmodel.sizes import counted_noun

RANK_LOG = re.compile(r"(?P<host>.+)-rank-(?P<rank>\d+)\.log")
FOLLOW_SECONDS = 0.5


def status(directory: Path) -> dict[str, Any]:
    """The status of a run as plain values. state: queued, starting, running, ending, or the cause of its last end."""
    _require(directory)
    events = list(read_json_lines(directory / "events.jsonl"))
    launch, history, metrics = read_launch(directory), launches(events), last_metrics(directory)
    world = _world(directory, launch, history)
    settings = directory / "settings.json"
    seconds = metrics.get("step_seconds", 0.0)
    state = _state(directory, launch, history[-1] if history else None)
    return {
        "state": state,
        "by": launch.get("by", "") if not history or history[-1].by else "",
        "job": launch.get("job", ""),
        "hosts": list(dict.fromkeys(world)),
        "ranks": len(world),
        "step": metrics.get("step", 0),
        "steps": read_json(settings)["training"]["steps"] if settings.exists() else 0,
        "loss": metrics.get("loss"),
        "tokens_per_second": metrics["positions"] / seconds if seconds else 0.0,
        "last_step_time": metrics.get("time", 0.0),
        "slow_rank": _slow_rank(metrics, world) if state == "running" else None,
        "hanging_ranks": hanging(events) if state == "running" else [],
        "restarts": [
            {"time": start.time, "after": end.cause, "detail": end.detail, "step": end.step, "reason": end.reason}
            for end, start in pairwise(history)
        ],
        "last_end": {"cause": history[-1].cause, "detail": history[-1].detail} if history and history[-1].cause else {},
        "decision": _decision(history),
    }


def _decision(history: Sequence[Launch]) -> dict[str, str]:
    """The newest decision on a restart."""
    made = [launch for launch in history if launch.decided][-1:]
    return {"action": made[0].decided, "reason": made[0].reason} if made else {}


def _world(directory: Path, launch: dict[str, Any], history: Sequence[Launch]) -> list[str]:
    """The host of each rank: of the launcher's start, else from the trainer's world.json; empty: not known yet."""
    file = directory / "world.json"
    if (launch and (not history or history[-1].by)) or not file.exists():
        return [launch["hosts"][node] for node in launch.get("node_of_rank", [])]
    return [rank["host"] for rank in read_json(file)["ranks"]]


def _slow_rank(metrics: dict[str, Any], world: Sequence[str]) -> dict[str, Any] | None:
    if not metrics.get("slow_rank"):
        return None
    rank, excess = metrics["slow_rank"]
    return {"rank": rank, "host": world[rank] if rank < len(world) else "", "excess": excess}


def hanging(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The `rank_hangs` events of ranks that have not gone on, since the last start."""
    found: dict[int, dict[str, Any]] = {}
    for event in events:
        kind = event.get("event")
        if kind in ("launch", "start"):
            found = {}
        elif kind == "rank_hangs":
            found[event["rank"]] = event
        elif kind == "rank_goes_on":
            found.pop(event["rank"], None)
    return list(found.values())


def print_status(found: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    job = f" job {found['job']}" if found["job"] else ""
    nodes = (
        f"{counted_noun(found['ranks'], 'rank')} on {', '.join(found['hosts'][:8])}{' ...' * (len(found['hosts']) > 8)}"
    )
    rows = [
        ("state", f"{found['state']}{_told(found)}"),
        ("started by", f"{found['by']}{job}" if found["by"] else "not by the launcher"),
        ("world", nodes if found["hosts"] else "not known yet"),
        ("step", f"{found['step']} of {found['steps']}"),
        ("loss", f"{found['loss']:.4f}" if found["loss"] is not None else "none yet"),
        ("speed", f"{found['tokens_per_second']:,.0f} tokens/s"),
        ("last step", _ago(found["last_step_time"])),
        ("restarts", str(len(found["restarts"]))),
    ]
    if slow := found["slow_rank"]:
        rows.append(
            ("slow", f"rank {slow['rank']} on {slow['host']} works {slow['excess']:.0%} longer than the others")
        )
    for one in found["hanging_ranks"]:
        where = f"{one['phase']} of step {one['step']}" if one["phase"] else f"step {one['step']}"
        rows.append(("hangs", f"rank {one['rank']} on {one['host']} {one['how']} in {where}, {_ago(one['time'])}"))
    if decision := found["decision"]:
        rows.append(("decision", f"{decision['action']}: {decision['reason']}"))
    for row in rows:
        table.add_row(*row)
    for restart in found["restarts"][-5:]:
        when = datetime.fromtimestamp(restart["time"]).strftime("%d %b %H:%M:%S")
        detail = f" ({restart['detail']})" if restart["detail"] else ""
        reason = f": {restart['reason']}" if restart["reason"] else ""
        table.add_row("", f"{when}  after {restart['after']}{detail} at step {restart['step']}{reason}")
    Console(highlight=False, markup=False, emoji=False, soft_wrap=True).print(table)


def print_logs(directory: Path, lines: int, ranks: Sequence[int], follow: bool) -> None:
    """Print the last lines of every rank's log, labelled with node and rank; follow: then new lines, until Ctrl-C."""
    _require(directory)
    offsets: dict[Path, int] = {}
    first = True
    try:
        while first or follow:
            for log in _logs(directory, ranks):
                text, offsets[log.path] = _read_from(log.path, offsets.get(log.path, 0))
                shown = text.splitlines()[-lines:] if first else text.splitlines()
                for line in shown:
                    print(f"{log.label} {line}", flush=follow)
            first = False
            if follow:
                time.sleep(FOLLOW_SECONDS)
    except KeyboardInterrupt:
        pass
    if not offsets:
        jobs = sorted(str(path) for path in (directory / "logs").glob("slurm-*.out"))
        print(f"no logs yet: no rank has started; see {', '.join(jobs) or 'the terminal that started it'}")


def stop(directory: Path, now: bool) -> str:
    """Make a run save and stop (now: kill it); returns a message. Raises `UserError` if it does not run here."""
    _require(directory)
    launch = read_launch(directory)
    job = launch.get("job", "")
    state = queue_state(job)
    if state:
        record_event(directory, "stop_requested")
        return _stop_job(job, state, now)
    if not is_taken(directory):
        raise UserError(f"{directory}: no run is using it now; nothing to stop")
    if job:
        raise UserError(f"{directory}: belongs to job {job}, which squeue does not list here; use a login node")
    pid, host, here = launch.get("pid", 0), launch.get("host", ""), os.uname().nodename
    if not pid or (host == here and process_start(pid) != launch["pid_started"]):
        pid, host = rank_zero(directory)  # started by another launcher: signal rank 0, and all ranks stop together
    if not pid:
        raise UserError(f"{directory}: the run is starting; try again in a moment")
    if host != here:
        raise UserError(f"{directory}: was started on {host}; run this there")
    try:
        os.kill(pid, 0)
        record_event(directory, "stop_requested")
    except PermissionError:
        raise UserError(
            f"{directory}: process {pid} is another user's, who alone can stop it (ps -p {pid} -o user)"
        ) from None
    os.kill(pid, signal.SIGTERM)
    if now:  # launcher and trainer kill at the second signal
        time.sleep(0.2)
        os.kill(pid, signal.SIGTERM)
    return f"asked process {pid} on {host} to {'end at once' if now else 'save and stop'}"


def _stop_job(job: str, state: str, now: bool) -> str:
    waiting = not state.startswith("RUNNING")
    command = ["scancel", job] if now or waiting else ["scancel", "--signal=TERM", job]  # steps only, not the script
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise UserError(f"{' '.join(command)}: {answer.stderr.strip()}")
    if now or waiting:
        return f"job {job} ({state}) is cancelled"
    return f"asked job {job} to save and stop; it will not be requeued"


def _require(directory: Path) -> None:
    if not (directory / "events.jsonl").exists() and not (directory / "launch.json").exists():
        raise UserError(f"{directory}: not a run directory: it has neither launch.json nor events.jsonl")


def _lives(launch: dict[str, Any]) -> bool:
    """Whether the launcher, or rank 0 without one, is a process of this machine."""
    return launch.get("host") == os.uname().nodename and process_start(launch.get("pid", 0)) == launch["pid_started"]


def _state(directory: Path, launch: dict[str, Any], last: Launch | None) -> str:
    cause = last.cause if last else ""
    again = "restarting" if last and last.decided in ("restart", "wait") else ""
    if is_held(directory):
        return "running" if not cause else "ending"
    queued = queue_state(launch.get("job", ""))
    if queued.startswith("PENDING"):
        return f"queued: {queued}"
    if queued.startswith(("RUNNING", "CONFIGURING", "COMPLETING")):
        return again or ("ending" if cause else "starting")
    if cause:
        return again if again and _lives(launch) else cause
    return "starting" if _lives(launch) else "lost"


def _told(found: dict[str, Any]) -> str:
    detail = found["last_end"].get("detail", "")
    return f": {detail}" if detail and found["state"] == found["last_end"]["cause"] else ""


def _ago(moment: float) -> str:
    return f"{max(0.0, time.time() - moment):,.0f} s ago" if moment else "none yet"


@dataclass(frozen=True)
class _Log:
    path: Path
    label: str


def _logs(directory: Path, ranks: Sequence[int]) -> Iterator[_Log]:
    """Logs in the order of ranks. Output of SLURM and of its batch script is in logs/slurm-JOB.out."""
    folder = directory / "logs"
    found = [(match, path) for path in folder.glob("*.log") if (match := RANK_LOG.fullmatch(path.name))]
    for match, path in sorted(found, key=lambda pair: int(pair[0]["rank"])):
        rank = int(match["rank"])
        if not ranks or rank in ranks:
            yield _Log(path, f"[{match['host']} rank {rank}]")


def _read_from(path: Path, offset: int) -> tuple[str, int]:
    """Complete lines from `offset` on, and the new offset; every state of a progress bar becomes a line."""
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read()
    end = data.rfind(b"\n") + 1
    return data[:end].decode("utf-8", errors="replace").replace("\r", "\n"), offset + end
