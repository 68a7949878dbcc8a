"""All ranks of a run on this machine, started and ended together.

In: a command and a topology. Out: an exit code (`bigmodel.run_directory.EXIT_*`). Guarantees that no rank is left
running, however the run ends: if one rank dies, the others are ended; after Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2
(SLURM's before a time limit) all ranks save first; a
kill -9 of the launcher kills the ranks through the kernel (Linux's parent-death signal). Costs a sleeping thread that
checks the ranks 20 times a second. Never imports torch.

    running --a rank dies--> SIGTERM to the rest --grace_seconds--> SIGKILL
       \\-----a stop signal--> SIGTERM to all, they save --save_seconds or a second signal--> SIGKILL

Every rank logs to `HOST-rank-N.log`; rank 0's output is also shown here (`bigmodel.rank_log`).

This file also runs one of several nodes started over ssh (`control_pipe`): standard input is then the control pipe
with the orders of the remote launcher, "stop" (save and stop) or "end" (a peer died). The end of the pipe, for example
because that launcher was killed, also means "end".
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from bigmodel.launcher.binding import processors_to_bind
from bigmodel.launcher.devices import device_variables
from bigmodel.launcher.record import recorded_hang
from bigmodel.launcher.standby import Program, Standbys, spawn
from bigmodel.launcher.topology import Topology, rank_environment
from bigmodel.rank_log import ARRANGED, open_outputs, terminal_variables, wait_for
from bigmodel.run_directory import AGAIN, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USER, log_name

GRACE_SECONDS = 15.0  # for ranks whose peer died: they wait in a collective that cannot end, and cannot save
SAVE_SECONDS = 600.0  # for ranks that save and stop: a checkpoint of a large model takes minutes
POLL_SECONDS = 0.05
TAIL_LINES = 20
CRASHES = [-getattr(signal, name) for name in ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL")]
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # the last two: SLURM's
CRASH = re.compile(r"^(?P<error>Fatal Python error: [^\n]*)\n.*?(?P<stack>^Current thread .*?)\n\n", re.M | re.S)
END = 0  # among the received signals: the order "end" from the control pipe


class Ending(NamedTuple):
    """The end of a launch: exit code, cause (`bigmodel.launcher.record.CAUSES`), and the culprit if any.

    since: Unix time of the first death or stop request; 0: unknown.
    """

    code: int
    cause: str
    detail: str = ""
    since: float = 0.0


@dataclass
class Rank:
    """One process. `ended`: its exit status as in subprocess, a code or minus a signal; None: it runs."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    ended: int | None = None

    def signal(self, number: int) -> None:
        """Signal the rank's process group, which includes its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


@dataclass
class Supervision:
    """State of the ranks of one launch."""

    ranks: list[Rank]
    tees: list[subprocess.Popen[bytes]] = field(default_factory=list)  # of output shown here
    signals: list[int] = field(default_factory=list)
    stopping: bool = False  # a stop signal has come
    culprit: Rank | None = None  # the first rank that died
    died_stopping: bool = False  # the culprit died after the stop signal
    killed_early: bool = False  # no rank died, but a second signal or the deadline interrupted the saving
    abandoned: bool = False  # the order "end" came: a failure on another node
    world_size: int = 0
    deadline: float = float("inf")  # time of the SIGKILL
    since: float = 0.0  # Unix time of the first death or stop request
    standbys: Standbys | None = None

    @property
    def running(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank.ended is None]


def run(
    command: Sequence[str],
    topology: Topology,
    logs: Path,
    *,
    node: int = 0,
    variables: Mapping[str, str] | None = None,
    binding: str = "none",
    control_pipe: bool = False,
    grace_seconds: float = GRACE_SECONDS,
    save_seconds: float = SAVE_SECONDS,
    signals: list[int] | None = None,
    standbys: Standbys | None = None,
) -> Ending:
    """Run `command` once per rank of a node until all have ended.

    Exit code 0: every rank returned 0. 2 (user error) and 3 (stopped and saved): the code of a rank. 1: a rank died;
    its number, exit status and last log lines are printed to standard error. Handles signals, so call it from the main
    thread. `logs` is created if needed; logs are appended to. `variables` are set for every rank; `binding` is the
    `kind` of `bigmodel.launcher.binding.divide`. `signals` gets the numbers of stop signals. `standbys` become ranks
    at a restart; the caller closes them.
    """
    logs.mkdir(parents=True, exist_ok=True)
    supervision = Supervision([], signals=[] if signals is None else signals, world_size=topology.world_size)
    supervision.standbys = standbys
    with collect_signals(supervision.signals):
        if control_pipe:
            threading.Thread(target=_listen, args=(supervision.signals,), daemon=True).start()
        try:
            for number in topology.ranks_of(node):
                environment = local_environment(topology, number, variables or {})
                supervision.ranks.append(_start(command, topology, number, logs, environment, binding, supervision))
            _supervise(supervision, grace_seconds, save_seconds)
        finally:
            _kill_all(supervision.running)
            wait_for(supervision.tees)
    return _verdict(supervision, logs.parent)._replace(since=supervision.since)


def trainer_command(run_file: Path, overrides: Sequence[str]) -> list[str]:
    """The command of every rank, with the launcher's interpreter."""
    settings = [word for override in overrides for word in ("--set", override)]
    return [sys.executable, "-m", "bigmodel", "train", str(run_file), *settings]


def launch_environment(topology: Topology, rank: int, variables: Mapping[str, str]) -> dict[str, str]:
    """Variables of a rank: `variables`, its rank numbers, and a PATH that begins with this interpreter's folder.

    The PATH is for ninja: DeepSpeed calls it by name, and it lies beside the interpreter of a virtual environment that
    may not be activated.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = {**variables, **rank_environment(topology, rank, cores, {**os.environ, **variables})}
    programs = os.path.dirname(sys.executable)
    path = os.environ.get("PATH", os.defpath)
    return found if programs in path.split(os.pathsep) else {**found, "PATH": programs + os.pathsep + path}


def local_environment(topology: Topology, rank: int, variables: Mapping[str, str]) -> dict[str, str]:
    """`launch_environment` and the GPUs, for a rank on this machine. Raises `UserError` if it has too few GPUs."""
    found = launch_environment(topology, rank, variables)
    inherited = {**os.environ, **found}
    return {**found, **device_variables(os.listdir("/dev"), topology.local_size(rank), topology.host(rank), inherited)}


def _start(
    command: Sequence[str],
    topology: Topology,
    number: int,
    logs: Path,
    environment: Mapping[str, str],
    binding: str,
    supervision: Supervision,
) -> Rank:
    """Start a rank. The tee processes of its output are added to those of `supervision`."""
    log, shown = logs / log_name(topology.host(number), number), number == 0
    log_start = log.stat().st_size if log.exists() else 0
    variables = {**os.environ, **environment, **ARRANGED, **(terminal_variables(os.environ) if shown else {})}
    processors = processors_to_bind(binding, topology.local_rank(number), topology.local_size(number), variables)
    output, errors, added = open_outputs(log, shown)
    supervision.tees += added
    program = Program(command, variables, frozenset(processors or ()))
    try:
        if supervision.standbys:
            process = supervision.standbys.start(number, program, output, errors)
        else:
            process = spawn(program, output, errors)
    finally:
        os.close(output)
        os.close(errors)
    return Rank(number, process, log, log_start)


def _listen(signals: list[int]) -> None:
    """Turn the orders on standard input into signals; its end is the order "end"."""
    while orders := os.read(sys.stdin.fileno(), 4096):  # not sys.stdin.read: its lock would outlive this thread
        signals += [signal.SIGTERM if order == b"stop" else END for order in orders.split()]
    signals.append(END)


@contextmanager
def collect_signals(received: list[int]) -> Iterator[None]:
    """Append stop signals to a list while the ranks run; restore the old handlers afterwards.

    A signal that was ignored at our start (SIGHUP under nohup) stays ignored.
    """

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    heeded = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _supervise(supervision: Supervision, grace_seconds: float, save_seconds: float) -> None:
    handled = 0
    while supervision.running:
        _collect_the_ended(supervision, grace_seconds, save_seconds)
        while handled < len(supervision.signals):
            _on_signal(supervision, supervision.signals[handled], grace_seconds, save_seconds)
            handled += 1
        if time.monotonic() > supervision.deadline:
            _end_early(supervision)
        if supervision.standbys and supervision.running and supervision.deadline == float("inf"):
            supervision.standbys.prepare()
        time.sleep(POLL_SECONDS)


def _collect_the_ended(supervision: Supervision, grace_seconds: float, save_seconds: float) -> None:
    ended = [rank for rank in supervision.running if _has_ended(rank)]
    died = [rank for rank in ended if rank.ended not in (EXIT_DONE, EXIT_STOPPED)]
    now = time.monotonic()
    if any(rank.ended == EXIT_STOPPED for rank in ended):  # all ranks stop at the same step: the rest ends soon
        supervision.deadline = min(supervision.deadline, now + save_seconds)
    if died:
        supervision.deadline = min(supervision.deadline, now + grace_seconds)
    if died and supervision.culprit is None:
        # Several deaths in one poll: a peer's death causes an error, so the rank killed by a signal died first.
        supervision.culprit = min(died, key=lambda rank: (_status(rank) > 0, rank.number))
        supervision.died_stopping = supervision.stopping
        supervision.since = supervision.since or time.time()
        if not supervision.stopping:
            _signal_all(supervision.running, signal.SIGTERM)


def _on_signal(supervision: Supervision, number: int, grace_seconds: float, save_seconds: float) -> None:
    if not supervision.running or supervision.abandoned:
        return
    supervision.since = supervision.since or time.time()
    if number == END:
        supervision.abandoned = True
        supervision.deadline = min(supervision.deadline, time.monotonic() + grace_seconds)
        _signal_all(supervision.running, signal.SIGTERM)
        return
    if supervision.stopping:
        _end_early(supervision)
        return
    supervision.stopping = True
    supervision.deadline = min(supervision.deadline, time.monotonic() + save_seconds)
    ranks = "1 rank" if len(supervision.running) == 1 else f"{len(supervision.running)} ranks"
    _say(f"\n{signal.Signals(number).name}: asked {ranks} to save and stop; once more kills without saving")
    _signal_all(supervision.running, signal.SIGTERM)


def _end_early(supervision: Supervision) -> None:
    supervision.killed_early = bool(supervision.running) and supervision.culprit is None
    _kill_all(supervision.running)


def _has_ended(rank: Rank) -> bool:
    """Poll without reaping, so that the process group's id is still ours when its remaining members are killed."""
    if os.waitid(os.P_PID, rank.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return False
    rank.signal(signal.SIGKILL)
    rank.ended = rank.process.wait()
    return True


def _signal_all(ranks: list[Rank], number: int) -> None:
    for rank in ranks:
        rank.signal(number)


def _kill_all(ranks: list[Rank]) -> None:
    _signal_all(ranks, signal.SIGKILL)
    for rank in ranks:
        rank.ended = rank.process.wait()


def _verdict(supervision: Supervision, directory: Path) -> Ending:
    culprit = supervision.culprit
    if supervision.abandoned:
        saved = all(_status(rank) in (EXIT_DONE, EXIT_STOPPED) for rank in supervision.ranks)
        return Ending(EXIT_STOPPED, "stopped") if saved else Ending(EXIT_FAILED, "failed", "another node failed")
    if supervision.killed_early:
        _say("killed before every rank had saved; the run resumes from its last checkpoint")
        return Ending(EXIT_FAILED, "failed", "killed before every rank had saved")
    if culprit is None:
        code = max(_status(rank) for rank in supervision.ranks)  # EXIT_DONE or EXIT_STOPPED
        return Ending(code, "finished" if code == EXIT_DONE else "stopped")
    if supervision.died_stopping and _status(culprit) == -signal.SIGTERM:
        _say("stopped before every rank could save; the run resumes from its last checkpoint, if it has one")
        return Ending(EXIT_STOPPED, "stopped", "before every rank could save")
    return _blame(culprit, supervision, directory)


def _blame(culprit: Rank, supervision: Supervision, directory: Path) -> Ending:
    """Print the known facts on the first rank that died."""
    user_error = _status(culprit) == EXIT_USER
    world = supervision.world_size
    death = f"rank {culprit.number} of {world} {_how(_status(culprit))}"
    first = supervision.ranks[0]
    if _status(culprit) in AGAIN:  # every rank ends with it, and rank 0 has printed the reason
        return Ending(_status(culprit), AGAIN[_status(culprit)], death)
    if user_error and first.number == 0 and _status(first) == EXIT_USER:
        return Ending(EXIT_USER, "user_error", death)  # it has already printed its message here
    others = ["", "; the other rank was ended", "; the other ranks were ended"][min(len(supervision.ranks) - 1, 2)]
    if _status(culprit) == -signal.SIGKILL and (hang := recorded_hang(directory)):
        _say(f"{hang}{others}; its stack: events.jsonl")
        return Ending(EXIT_FAILED, "hang", hang)
    _say(death + others)
    if _status(culprit) in CRASHES:
        _say(f"its stacks: {culprit.log}")
    if culprit.number:  # rank 0's lines are shown already
        _say(f"last lines of {culprit.log}:")
        for line in _tail(culprit.log, culprit.log_start):
            _say(f"  | {line}")
    return Ending(EXIT_USER, "user_error", death) if user_error else Ending(EXIT_FAILED, "failed", death)


def _status(rank: Rank) -> int:
    assert rank.ended is not None, f"rank {rank.number} has not ended"
    return rank.ended


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with exit code {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    out_of_memory = " (the kernel does that when memory runs out: see dmesg)" if status == -signal.SIGKILL else ""
    return f"was killed by {name}{out_of_memory}"


def _tail(log: Path, start: int) -> list[str]:
    """The last lines of this launch in a log, or the Python stack of its crash; reads at most 256 kB."""
    try:
        with open(log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - (1 << 18)))
            text = file.read().decode("utf-8", errors="replace")
    except OSError as error:  # the run directory is gone
        return [f"({error.strerror})"]
    if crash := CRASH.search(text):  # the frames of C come after it
        return [crash["error"], *crash["stack"].splitlines()[:TAIL_LINES]]
    return text.splitlines()[-TAIL_LINES:] or ["(no output)"]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
