"""Restarts in place: after a failure the ranks start again on the same hosts, a spare in the place of a bad one.

`decide` is pure: causes of ends (from exit codes and the watch for hanging ranks), steps reached, and hosts that are
named as bad or do not answer, to a decision. `supervise` is the loop around it for `launch local` and `launch ssh`;
`bigmodel.launcher.slurm` asks `decide` at the end of srun. Every decision is an event `decided` with its reason. Each
start is a new restart generation (incarnation.json): a rank of an earlier one that still lives cannot publish. None
begins while rank 0 of the last one, on a host that was cut off, holds the run directory.

    ranks end --record_end--> decide --wait_before--> ranks start, from the newest checkpoint
                                 \\--> end, with the exit code of the last ranks
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bigmodel.config.user_error import UserError
from bigmodel.launcher.local import Ending, collect_signals
from bigmodel.launcher.record import Launch, bad_hosts, is_held, launches, record_end
from bigmodel.run_directory import EXIT_STOPPED, read_json_lines, record_event

FIRST_WAIT_SECONDS, MOST_WAIT_SECONDS = 5.0, 60.0  # before a restart after one, and after many without a new step
NODE_SECONDS, ASK_SECONDS = 600.0, 5.0  # for a host without a spare to come back: a server starts in minutes
WAIT_POLL_SECONDS = 0.2
LEAST_SECONDS = 60.0  # of work before a time limit: less is not worth a start
FAILURES = ("failed", "lost", "hang", "bad_device")
AGAIN_CAUSES = (*FAILURES, "rewind")


@dataclass(frozen=True)
class Decision:
    """restart: whether the ranks start again in place. hosts: those that they use then. excluded: bad ones so far."""

    restart: bool
    reason: str
    wait_seconds: float = 0.0
    hosts: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Situation:
    """What is known after the end of the ranks.

    history: the starts by this launcher or in this allocation, the oldest first. hosts: all that may be used, in their
    order; the ranks use `number` of them, the others are spares. bad: named by the last end. silent: do not answer.
    seconds_left: before the time limit's signal. stopping: a stop signal has come.
    """

    history: Sequence[Launch]
    hosts: Sequence[str]
    number: int
    bad: Sequence[str] = ()
    silent: Sequence[str] = ()
    seconds_left: float = math.inf
    stopping: bool = False


def decide(now: Situation, limit: int) -> Decision:
    """Whether to start the ranks again, where and when. Pure; `limit`: restarts in a row that bring no new step."""
    last = now.history[-1]
    named = [host for launch in now.history for host in launch.excluded]
    excluded = tuple(dict.fromkeys([*named, *now.bad, *now.silent]))
    hosts = hosts_in_use(now.hosts, now.number, excluded)
    useless = failures_without_progress(now.history, AGAIN_CAUSES)
    wait = min(MOST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (useless - 1)) if useless else 0.0
    reason = _against(now, limit, useless, wait, [host for host in hosts if host in excluded], named)
    if reason:
        return Decision(False, reason, excluded=excluded)
    left_out = [host for host in hosts_in_use(now.hosts, now.number, named) if host not in hosts]
    kept = [host for host in now.bad if host in hosts]
    words = [f"{last.cause}: it resumes from its last checkpoint"]
    words += [f"{', '.join(left_out)} left out for a spare"] if left_out else []
    words += [f"{', '.join(kept)} stays in use: no spare is left"] if kept else []
    words += [f"{useless} without a new step, of {limit}"] if useless else []
    return Decision(True, "; ".join(words), wait, hosts, excluded)


def _against(now: Situation, limit: int, useless: int, wait: float, in_use: Sequence[str], named: Sequence[str]) -> str:
    """The reason not to restart; empty: none. in_use: the bad hosts without a spare; named: those bad before."""
    last = now.history[-1]
    if last.cause in ("finished", "user_error"):
        return "the run is complete" if last.cause == "finished" else "see the error message"
    if now.stopping or last.stop_requested:
        return "a stop was requested"
    if last.cause == "stopped":
        return "it was stopped"
    if limit == 0:
        return "restart.limit = 0"
    if not any(launch.stepped for launch in now.history):
        return "no step was made since the first start: see the error above"
    if useless >= limit:
        return f"restart.limit = {limit} restarts in a row without a new step, at step {last.step}"
    if silent := [host for host in in_use if host in now.silent]:
        return f"{', '.join(silent)} does not answer, and no spare is left"
    if again := [host for host in in_use if host in now.bad and host in named]:
        return f"{', '.join(again)} is named as bad again, and no spare is left"
    if now.seconds_left < wait + LEAST_SECONDS:
        return f"{max(0.0, now.seconds_left):.0f} s are left before the time limit"
    return ""


def hosts_in_use(hosts: Sequence[str], number: int, excluded: Sequence[str]) -> tuple[str, ...]:
    """The first `number` hosts, spares in the place of excluded ones while there are any.

    >>> hosts_in_use(["a", "b", "c"], 2, ["a"]), hosts_in_use(["a", "b", "c"], 2, ["a", "c"])
    (('c', 'b'), ('a', 'b'))
    """
    spares = [host for host in hosts[number:] if host not in excluded]
    return tuple(spares.pop(0) if host in excluded and spares else host for host in hosts[:number])


def failures_without_progress(history: Sequence[Launch], causes: Sequence[str] = FAILURES) -> int:
    """Number of last launches that ended by one of the causes without passing the highest step before them, since
    checkpoints were last set aside."""
    count = 0
    for number in range(len(history) - 1, -1, -1):
        first = max((one for one in range(number + 1) if history[one].anew), default=0)
        furthest = max((launch.step for launch in history[first:number]), default=history[first].reached)
        if history[number].cause not in causes or history[number].step > furthest:
            break
        count += 1
    return count


Start = Callable[[Sequence[str], bool, list[int]], Ending]
"""Record a launch on these hosts (the second value: it is the first one) and run it; stop signals come in the list."""


def supervise(
    directory: Path,
    limit: int,
    hosts: Sequence[str],
    number: int,
    start: Start,
    held_seconds: float,
    silent: Callable[[Sequence[str]], list[str]] = lambda hosts: [],
) -> int:
    """Run the ranks on `number` of the hosts until `decide` ends it; returns the exit code.

    held_seconds: longest wait for a rank 0 that was cut off.
    silent: which of these hosts do not answer now; asked before each restart. Handles signals, so call it from the
    main thread. A signal while it waits ends it.
    """
    signals: list[int] = []
    earlier = len(_history(directory))
    used, first = tuple(hosts[:number]), True
    with collect_signals(signals):
        while True:
            ending = start(used, first, signals)
            record_end(directory, ending.cause, ending.code, ending.detail, ending.since)
            decision = _after(directory, limit, hosts, number, earlier, signals, silent)
            record_decision(directory, decision)
            if not decision.restart:
                return ending.code
            if refused := wait_before(directory, decision.wait_seconds, held_seconds, lambda: bool(signals)):
                record_decision(directory, Decision(False, refused))
                return EXIT_STOPPED if signals else ending.code
            used, first = decision.hosts, False


def _after(
    directory: Path,
    limit: int,
    hosts: Sequence[str],
    number: int,
    earlier: int,
    signals: Sequence[int],
    silent: Callable[[Sequence[str]], list[str]],
) -> Decision:
    """Decide after the ranks' end. A host that does not answer and has no spare is waited for, `NODE_SECONDS`."""
    history, bad = _history(directory)[earlier:], bad_hosts(directory)
    if not history:
        raise UserError(
            f"{directory / 'events.jsonl'} was moved or deleted while the run wrote to it; without it no restart is "
            f"decided: start again, and the run resumes from its newest checkpoint, if {directory} still has one"
        )
    gone: list[str] = []
    waits, deadline = False, time.monotonic() + NODE_SECONDS
    while True:
        decision = decide(Situation(history, hosts, number, bad, gone, stopping=bool(signals)), limit)
        found = silent(decision.hosts) if decision.restart else []
        if found:
            gone += found
        elif decision.restart or not gone or signals or time.monotonic() > deadline:
            return decision
        else:
            if not waits:
                waits = True
                record_decision(directory, replace(decision, reason=f"{decision.reason}: waiting for it"), "wait")
            time.sleep(ASK_SECONDS)
            gone = silent(gone)


def wait_before(directory: Path, seconds: float, held_seconds: float, stopped: Callable[[], bool]) -> str:
    """Wait before a restart, and until no rank of the last start holds the run directory, at most `held_seconds`.

    A rank 0 that was cut off waits for its peers until the collective timeout. Returns the reason not to restart; else
    "".
    """
    began = time.monotonic()
    while not stopped():
        passed = time.monotonic() - began
        if passed >= seconds and not is_held(directory):
            return ""
        if passed > seconds + held_seconds:
            return f"rank 0 of the last start still holds {directory}/lock after {passed:.0f} s: end it on its host"
        time.sleep(WAIT_POLL_SECONDS)
    return "stopped before the restart"


def record_decision(directory: Path, decision: Decision, action: str = "") -> None:
    """Write the event `decided`, and print it unless the end explains itself. action: restart or end if not given."""
    action = action or ("restart" if decision.restart else "end")
    wait = {"wait_seconds": decision.wait_seconds} if decision.restart else {}
    left_out = {"excluded": list(decision.excluded)} if decision.excluded else {}
    record_event(directory, "decided", action=action, reason=decision.reason, **wait, **left_out)
    if _history(directory)[-1].cause in ("finished", "stopped", "user_error"):
        return
    when = f" in {decision.wait_seconds:.0f} s" if decision.wait_seconds else ""
    words = {"restart": f"restart{when}", "end": "no restart"}.get(action, action)
    print(f"launcher: {words}: {decision.reason}", file=sys.stderr, flush=True)


def _history(directory: Path) -> list[Launch]:
    return launches(read_json_lines(directory / "events.jsonl"))
