"""SLURM: the sbatch script of a run, its submission, and the decision at the job's end.

`render` and `decide` are pure: text from settings, a decision from events. The script starts one srun task per rank,
each running `launch exec`; after them `launch ended` records the cause and may requeue the job. The cause comes from
the run directory, not from srun's exit code: with --kill-on-bad-exit that is the code of the first rank to end, a race.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bigmodel.config.secret_text import without_secret_texts
from bigmodel.config.settings import UserError
from bigmodel.launcher import restart as in_place
from bigmodel.launcher.cluster import Cluster, ContainerSettings, RequeueSettings, near
from bigmodel.launcher.hostlist import expand_hosts
from bigmodel.launcher.record import (
    Launch,
    bad_hosts,
    is_taken,
    launches,
    reached,
    read_launch,
    record_end,
    refuse_second_run,
)
from bigmodel.launcher.restart import failures_without_progress
from bigmodel.launcher.squeue import queue_state
from bigmodel.run_directory import (
    AGAIN,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_USER,
    make_logs,
    read_json_lines,
    record_event,
    write_atomically,
    write_json,
)

RESTART_HERE = 75  # exit code of `launch ended`: run srun again in this allocation
EXCLUDED = "launch.excluded"  # in the run directory: the nodes that a restart in place leaves out


@dataclass(frozen=True)
class Job:
    """The parts of a job's command lines, and its folders."""

    run_file: Path
    directory: Path  # the run directory, absolute
    workdir: Path
    cluster: Cluster
    cluster_file: Path | None
    overrides: Sequence[str] = ()
    options: Sequence[str] = ()
    python: str = sys.executable

    def launcher(self, command: str, python: str = "") -> str:
        """A `bigmodel launch COMMAND RUN.toml ...` line for a shell."""
        words = [python or self.python, "-m", "bigmodel", "launch", command, str(self.run_file)]
        words += ["--cluster", str(self.cluster_file)] if self.cluster_file else []
        words += [word for override in self.overrides for word in ("--set", override)]
        return shlex.join(words)


def render(job: Job) -> str:
    """The sbatch script."""
    lines = ["#!/bin/bash", "# Written by `bigmodel launch slurm`. `sbatch` of this file submits the run again."]
    lines += [f"#SBATCH {option}" for option in _options(job)]
    lines += ["", f"cd {shlex.quote(str(job.workdir))} || exit 1"]
    lines += [f"module load {shlex.quote(module)}" for module in job.cluster.slurm.modules]
    lines += list(job.cluster.slurm.setup)
    if job.cluster.check.before_start:
        failed = [f"    {job.launcher('ended')} --code 1 --preflight", "    exit"]
        lines += ["", "# Check the nodes first.", f"if ! {job.launcher('check')}; then", *failed, "fi"]
    lines += _restarting(job) if job.cluster.restart.limit else _once(job)
    return "\n".join(lines) + "\n"


def _once(job: Job) -> list[str]:
    options = "".join(f" {option}" for option in job.options)
    return [
        "",
        "# One task per rank; if one fails, srun ends the others.",
        f"{_srun(job)}{options}",
        "code=$?",
        "",
        "# Record why it ended; requeue it as set in the cluster file.",
        f"{job.launcher('ended')} --code $code",
    ]


def _restarting(job: Job) -> list[str]:
    again = [option for option in job.options if option != "--fresh"]  # checkpoints are moved aside once
    excluded = shlex.quote(str(job.directory / EXCLUDED))
    spares = bool(job.cluster.restart.spare_nodes)
    return [
        "",
        "# One task per rank; if one fails, srun ends the others. `ended` records why, and restarts them here, or",
        "# requeues the job, as set in the cluster file.",
        f"options={shlex.quote(' '.join(job.options))}",
        *([f"rm -f {excluded}"] if spares else []),
        "while :; do",
        *([f"    excluded=$(cat {excluded} 2>/dev/null)"] if spares else []),
        *(f"    {line}" for line in f"{_srun(job)} $options".splitlines()),
        f"    {job.launcher('ended')} --code $? --in-place",
        "    code=$?",
        f"    [ $code = {RESTART_HERE} ] || exit $code",
        f"    options={shlex.quote(' '.join(again))}",
        "done",
    ]


def submit(job: Job) -> str:
    """Submit the job; returns its number. Raises `UserError` for a job that SLURM would refuse or never start."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch: not found on this machine; use a login node of the cluster")
    _know_partition(job.cluster.slurm.partition, job.cluster.nodes + job.cluster.restart.spare_nodes)
    _refuse_queued(job.directory)
    refuse_second_run(job.directory)
    make_logs(job.directory)
    script = job.directory / "launch.sbatch"
    text = render(job)
    write_atomically(script, text)
    if without_secret_texts(text) != text:  # SLURM needs it whole: --set options, variables of the cluster file
        script.chmod(0o600)
    answer = _run(["sbatch", "--parsable", str(script)], job.workdir)
    if answer.returncode:
        raise UserError(f"sbatch refused {script}: {answer.stderr.strip()}")
    number = answer.stdout.strip().partition(";")[0]
    if read_launch(job.directory).get("job") != number:  # else rank 0 has written it already
        write_json(job.directory / "launch.json", {"by": "slurm", "job": number, "hosts": [], "host": "the queue"})
    return number


@dataclass(frozen=True)
class Decision:
    cause: str
    requeue: bool
    reason: str


def decide(history: Sequence[Launch], code: int, policy: RequeueSettings) -> Decision:
    """Whether to requeue after the last launch of `history`, whose srun returned `code`. Pure.

    A failure counts against `no_progress_limit` unless the launch passed the highest step of all earlier launches.
    """
    last = history[-1] if history else Launch(0, "slurm", "", 0)
    cause = last.cause or ("user_error" if code == EXIT_USER else "failed")
    if cause in ("finished", "user_error"):
        return Decision(cause, False, "the run is complete" if cause == "finished" else "see the error message")
    if last.stop_requested:
        return Decision(cause, False, "a stop was requested")
    if last.restart >= policy.limit:
        return Decision(cause, False, f"requeue.limit = {policy.limit} is reached")
    if cause in ("failed", "hang", "bad_device") and failures_without_progress(history) > policy.no_progress_limit:
        return Decision(
            cause,
            False,
            f"more than requeue.no_progress_limit = {policy.no_progress_limit} failures in a row at step {last.step}",
        )
    return Decision(cause, True, "it resumes from its last checkpoint")


def ended(
    directory: Path,
    cluster: Cluster,
    code: int,
    preflight: bool,
    environment: Mapping[str, str],
    held_seconds: float = 0.0,
) -> int:
    """Inside a job: record its end, requeue it according to the policy; returns the job's exit code.

    held_seconds: above 0, the script runs srun again after the code `RESTART_HERE`; longest wait for a rank 0 that was
    cut off. Raises `UserError` outside of a job.
    """
    job = environment.get("SLURM_JOB_ID", "")
    if not job:
        raise UserError("ended: SLURM_JOB_ID is not set; use it at the end of an sbatch script, after srun")
    make_logs(directory)
    restart = int(environment.get("SLURM_RESTART_COUNT", "0"))
    history = launches(read_json_lines(directory / "events.jsonl"))
    if not history or history[-1].decided or (history[-1].job, history[-1].restart) != (job, restart):
        # rank 0 did not get far enough to write it
        if code == EXIT_USER and is_taken(directory):
            record_event(directory, "start_refused", by="slurm", job=job, restart=restart)
            print("launcher: user_error; not requeued: another run is using the run directory", flush=True)
            return EXIT_USER
        place = {"world_size": 0, "hosts": [], **reached(directory)}
        record_event(directory, "launch", by="slurm", job=job, restart=restart, **place)
    cause = decide(launches(read_json_lines(directory / "events.jsonl")), code, cluster.requeue).cause
    detail = "preflight" if preflight else "" if cause in ("finished", "stopped") else f"srun ended with {code}"
    record_end(directory, cause, code, detail)
    not_here = ""
    if held_seconds and not preflight:
        history = launches(read_json_lines(directory / "events.jsonl"))
        here = [launch for launch in history if (launch.job, launch.restart) == (job, restart)]
        not_here = _restart_here(directory, cluster, job, here, environment, held_seconds)
        if not not_here:
            return RESTART_HERE
    history = launches(read_json_lines(directory / "events.jsonl"))  # a stop may have been requested
    decision = decide(history, code, cluster.requeue)
    reason = decision.reason + (f"; not in place: {not_here}" if not_here not in ("", decision.reason) else "")
    print(f"launcher: {decision.cause}; {'requeued' if decision.requeue else 'not requeued'}: {reason}", flush=True)
    bad = sorted({host for launch in history for host in launch.excluded} | set(bad_hosts(directory)))
    left_out = {"excluded": bad} if bad else {}
    record_event(directory, "decided", action="requeue" if decision.requeue else "end", reason=reason, **left_out)
    if decision.requeue:
        _requeue(job, cluster, bad, environment.get("SLURM_JOB_PARTITION", ""))
    codes = {"finished": 0, "stopped": EXIT_STOPPED, "user_error": EXIT_USER}
    codes |= {again: number for number, again in AGAIN.items()}
    return codes.get(decision.cause, EXIT_FAILED)


def _restart_here(
    directory: Path,
    cluster: Cluster,
    job: str,
    history: Sequence[Launch],
    environment: Mapping[str, str],
    held_seconds: float,
) -> str:
    """Decide on a restart in place, and wait before it. Returns the reason if there is none, else ""."""
    nodes = expand_hosts(environment["SLURM_JOB_NODELIST"])
    used = [host for host in read_launch(directory).get("hosts", []) if host in nodes]  # SLURM chose them
    hosts = list(dict.fromkeys([*used, *nodes]))
    left = _seconds_left(job) - cluster.slurm.signal_seconds
    silent = _silent_nodes(environment["SLURM_JOB_NODELIST"])
    bad = bad_hosts(directory)
    now = in_place.Situation(history, hosts, cluster.nodes, bad, silent, left)
    decision = in_place.decide(now, cluster.restart.limit)
    if not decision.restart:
        return decision.reason
    if cluster.restart.spare_nodes:
        unused = [host for host in hosts if host not in decision.hosts]
        write_atomically(directory / EXCLUDED, ",".join(unused))
    in_place.record_decision(directory, decision)

    def stopped() -> bool:
        return launches(read_json_lines(directory / "events.jsonl"))[-1].stop_requested

    return in_place.wait_before(directory, decision.wait_seconds, held_seconds, stopped)


def _seconds_left(job: str) -> float:
    """Seconds to the job's time limit; infinite without one, or if SLURM does not answer."""
    days, _, clock = _run(["squeue", "-h", "-j", job, "-o", "%L"], Path.cwd()).stdout.strip().rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in parts):  # UNLIMITED, INVALID
        return float("inf")
    seconds = 0
    for part in parts:
        seconds = 60 * seconds + int(part)
    return 86400 * int(days or 0) + seconds


def _silent_nodes(nodes: str) -> list[str]:
    """Those that are down or do not answer to SLURM."""
    lines = _run(["sinfo", "-h", "-N", "-n", nodes, "-o", "%N %T"], Path.cwd()).stdout.splitlines()
    states = dict(line.split() for line in lines)
    return [node for node, state in states.items() if state.endswith("*") or state.startswith(("down", "fail"))]


def _requeue(job: str, cluster: Cluster, bad: Sequence[str], partition: str) -> None:
    """Requeue this job, without the bad nodes. SLURM excludes nodes of a pending job only, and ends us meanwhile."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # SIGKILL follows after KillWait, 30 s
    answer = _run(["scontrol", "requeue", job], Path.cwd())
    if answer.returncode:
        print(f"launcher: scontrol requeue: {answer.stderr.strip()}", flush=True)
        return
    nodes = set(_run(["sinfo", "-h", "-N", "-p", partition, "-o", "%N"], Path.cwd()).stdout.split())
    if bad and len(nodes - set(bad)) < cluster.nodes + cluster.restart.spare_nodes:
        print(f"launcher: {', '.join(bad)} not excluded: partition {partition} has no other node", flush=True)
    elif bad:
        left_out = ",".join(filter(None, [cluster.slurm.exclude, *bad]))
        _run(["scontrol", "update", f"job={job}", f"ExcNodeList={left_out}"], Path.cwd())


def idle_hosts(partition: str) -> list[str]:
    """Idle hosts of a partition (empty: of any). Raises `UserError` if there are none."""
    command = ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N", *(["-p", partition] if partition else [])]
    if shutil.which("sinfo") is None:
        raise UserError("sinfo: not found on this machine; set hosts in the cluster file, or use a login node")
    _know_partition(partition)
    hosts = sorted(set(_run(command, Path.cwd()).stdout.split()))
    if not hosts:
        raise UserError(
            f"slurm.partition = {partition!r}: none of its nodes is idle; see sinfo, or set hosts in the cluster file"
        )
    return hosts


def _options(job: Job) -> list[str]:
    slurm, cluster = job.cluster.slurm, job.cluster
    given = [
        ("job-name", job.directory.name),
        ("nodes", cluster.nodes + cluster.restart.spare_nodes),
        ("ntasks-per-node", cluster.ranks_on_node),
        (slurm.gpu_option, _gpus(cluster)),
        ("cpus-per-task", slurm.cpus_per_rank),
        ("mem", slurm.memory),
        ("partition", slurm.partition),
        ("account", slurm.account),
        ("qos", slurm.qos),
        ("reservation", slurm.reservation),
        ("constraint", slurm.constraint),
        ("exclude", slurm.exclude),
        ("time", slurm.time_limit),
        ("output", job.directory / "logs" / "slurm-%j.out"),
        ("open-mode", "append"),
        ("signal", f"TERM@{slurm.signal_seconds}" if slurm.signal_seconds else ""),
    ]
    options = [f"--{name}={value}" for name, value in given if value]
    options += ["--exclusive"] if slurm.exclusive else []
    options += ["--requeue" if cluster.requeue.limit else "--no-requeue"]
    options += ["--no-kill"] if cluster.restart.spare_nodes else []  # the allocation outlives a failed node
    return options + list(slurm.options)


def _gpus(cluster: Cluster) -> str:
    if not cluster.gpus_per_node:
        return ""
    return f"{'gpu:' if cluster.slurm.gpu_option == 'gres' else ''}{cluster.gpus_per_node}"


def _srun(job: Job) -> str:
    container, slurm = job.cluster.container, job.cluster.slurm
    words = ["srun", "--kill-on-bad-exit=1"]
    words += [f"--cpus-per-task={slurm.cpus_per_rank}"] if slurm.cpus_per_rank else []  # sbatch's is not inherited
    words += container_options(container, job.workdir)
    nodes, spares = job.cluster.nodes, job.cluster.restart.spare_nodes
    words += [f"--nodes={nodes}", f"--ntasks={nodes * job.cluster.ranks_on_node}"] if spares else []
    words += slurm.srun_options
    left_out = " ${excluded:+--exclude=$excluded}" if spares else ""
    python = container.python if container.image else ""
    return f"{shlex.join(words)}{left_out} \\\n    {job.launcher('exec', python)}"


def container_options(container: ContainerSettings, workdir: Path) -> list[str]:
    """Options of srun for tasks in the image, with the Pyxis plugin; empty without an image."""
    if not container.image:
        return []
    mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
    place = f"--container-workdir={container.workdir or workdir}"
    return [f"--container-image={container.image}", "--no-container-mount-home", *mounts, place]


def _know_partition(partition: str, nodes: int = 1) -> None:
    """Raises `UserError` for an unknown or too small partition: its job would wait forever."""
    answer = _run(["sinfo", "-h", "-o", "%P %D"], Path.cwd())
    if answer.returncode:
        raise UserError(f"sinfo: SLURM does not answer: {answer.stderr.strip()}")
    sizes: Counter[str] = Counter()
    default = ""
    for line in answer.stdout.splitlines():
        name, count = line.split()
        default = name[:-1] if name.endswith("*") else default
        sizes[name.removesuffix("*")] += int(count)
    if partition and partition not in sizes:
        raise UserError(f"slurm.partition = {partition!r}: no such partition; {near(partition, sorted(sizes))}")
    name = partition or default
    if name and nodes > sizes[name]:
        raise UserError(f"nodes = {nodes}: partition {name!r} has only {sizes[name]} nodes; lower it")


def _refuse_queued(directory: Path) -> None:
    job = read_launch(directory).get("job", "")
    state = queue_state(job)
    if state and not state.startswith("COMPLET"):
        raise UserError(
            f"run.directory = {directory}: job {job} of this run is already queued ({state}); stop it (bigmodel "
            f"launch stop {directory}) or choose another directory"
        )


def _run(command: Sequence[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(list(command), cwd=folder, env=os.environ, capture_output=True, text=True, check=False)
