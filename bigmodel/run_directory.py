"""The run directory: the files that launcher, trainer and tools share.

    runs/tiny/
      settings.json  deepspeed.json   current values        environment.json  commit, diff, versions, variables
      data_manifest.json  of the prepared data              starts/0001.json  all of these, for each start
      checkpoints/step-00000100/      newest verified kept  metrics.jsonl     one line per step
      events.jsonl   starts, stops, skipped steps           logs/             output of the ranks, see below
      metrics_endpoint  host:port while it runs             lock              held by the running run
      incarnation.json  restart generation: the start that may publish checkpoints
      identity.json  the run's id, also in its checkpoints
      left_out.json  steps that rewinds of training.spikes leave out
      loss.png  sample.txt  summary.json                    at the end
      profile/       written by `bigmodel profile`          tensorboard/ wandb/ csv/ comet/ mlflow/  of metrics.writers
      world.json     host and device of each rank, and the common facts: commit, sources, settings, data, versions
      launch.json    the last start by the launcher         preflight.json    findings of `bigmodel launch check`
      launch.lock    held by its process                    launch.excluded   nodes a restart in a SLURM job leaves out
    runs/tiny.node-0.prometheus.json                        for Prometheus, while it runs; one per node

logs/HOST-rank-N.log is the output of rank N on HOST. Rank 0 also prints in the terminal, and so does every rank not
started by our launcher (under torchrun, or a single process). Under `launch slurm` the terminal is logs/slurm-JOB.out,
and launch.sbatch is the submitted script.

launch.json: by (local, slurm, ssh, torchrun, mpi, environment), job (SLURM's number or ""), restart (number of
requeues), hosts, node_of_rank (indices into hosts), main_address, main_port, and host, pid, pid_started of the process
that `bigmodel launch stop` may signal.

events.jsonl has lines of the trainer and these of the launcher, all with "time" in Unix seconds:
  launch          by, job, restart, world_size, hosts   a start of the ranks; the trainer's `start` follows;
                                               reached: the last step of the starts before
  start_refused   by, job, restart             a second start at once, by a job of SLURM; others leave no line
  launch_ended    cause, code, detail, step    cause: finished, stopped, user_error, failed, hang; detail: the
                                               culprit; since: time of the first death or stop request, if known;
                                               last_step_time: of the newest step line;
                                               your own watchdog may write a line with only the cause hang
  decided         action, reason               wait, restart (wait_seconds), requeue or end; excluded: bad hosts so far
  stop_requested                               by `bigmodel launch stop`
and of metrics.jsonl:
  metrics_delayed  lines, lost, seconds        it could not be written for that long, as on a full disk; lost: for ever
  writer_failed    writer, when, error         one of metrics.writers, which is not used any more
and of the watch for hanging ranks (bigmodel/metrics/hang_watch.py), which also writes a launch_ended:
  rank_hangs      rank, host, how, step, phase, seconds, limit_seconds, stack    without progress for these seconds
  rank_goes_on    rank, host                   it made progress again
and of training.attention_kernel = "fastest":
  attention_kernel  chosen, detail             the implementation of this start, and why
and these of checkpoints:
  checkpoint_failed  step, error, reason       refused or not written
  broken_state    step, ranks, detail          weights or moments that are not finite
  went_back       step, diverged, set_aside    a start after a divergence
  fresh           step                         a start with --fresh: at step 0, checkpoints were set aside
  rescued         step, rank, bytes            saved by a survivor of a dead rank
and these of the trainer that are the cause of a start's end:
  bad_device      step, fault, ranks, hosts, detail   fault: replica, nonfinite; hosts: to be excluded, [] if undecided
  rewind          step, to, first, last, detail       the steps first to last are left out; `left_out.json` has them
A launch with no launch_ended before the next launch was lost, together with its launcher: kill -9, a node failure.
Under your own sbatch script or torchrun there is no launch_ended; the trainer's `finished` or `stopped` replaces it
(`bigmodel.launcher.record.launches` reads all of these).

Guarantees: a file written by `write_atomically` is always whole, also after kill -9. Imports no torch.
"""

import fcntl
import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from bigmodel.config.json_file import read_json as read_json  # its readers import it from here
from bigmodel.config.renamed import NEW_NAMES
from bigmodel.config.secret_text import REDACTED, is_secret, without_secret_texts, without_secrets_inside
from bigmodel.config.user_error import UserError
from bigmodel.system_errors import remedy_for

EXIT_DONE = 0  # the run reached its last step
EXIT_FAILED = 1  # a bug or a machine failure
EXIT_USER = 2  # a UserError: the message has the remedy
EXIT_STOPPED = 3  # stopped by a signal and saved; the same command resumes
EXIT_REWIND = 4  # training.spikes.policy = "rewind": the same command goes on from a checkpoint before the spike
EXIT_DEVICE = 5  # a device computes or keeps wrong numbers: events.jsonl names it; the same command resumes elsewhere
AGAIN = {EXIT_REWIND: "rewind", EXIT_DEVICE: "bad_device"}  # the cause; also the kind of the trainer's event

RESTART_GENERATION = "incarnation.json"
START_LOCK = "launch.lock"
LOCK_ATTEMPTS = 5
SHOWN_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_", "NODE_", "GROUP_", "MASTER_", "SLURM_", "PBS_", "LSB_", "KUBERNETES_"),
    *("CUDA_", "NVIDIA_", "HIP_", "ROCR_", "NCCL_", "GLOO_", "UCX_", "FI_", "OMPI_", "OMP_", "MKL_", "CUBLAS_"),
    *("TORCH", "PYTORCH_", "TRITON_", "DS_", "DEEPSPEED_", "BIGMODEL_", "TOKENIZERS_", "AWS_", "PYTHONHASHSEED"),
)
CREDENTIALS_IN_URL = re.compile(r"(://)[^/@\s]*@")

Change = tuple[str, Any, Any]  # dotted name, old value, new value

# Without .json, .env and the like: they may hold credentials.
SOURCE_SUFFIXES = (".py", ".pyi", ".toml", ".sh", ".c", ".cc", ".cpp", ".h", ".cu", ".cuh")
SMALL_SOURCE_BYTES, MAX_UNTRACKED_SOURCES, MAX_UNTRACKED_NAMES = 1 << 16, 50, 1000  # recorded at every start

_held: list[IO[Any]] = []  # open lock files: each is held as long as the process lives, kill -9 included


class Restart(Exception):
    """Ends a run that goes on from a checkpoint at its next start: printed without a traceback; `exit_code`: EXIT_*."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def claim(directory: Path) -> None:
    """Create the run directory and lock it: two runs in one directory would mix their files.

    A process that no launcher of ours has started also keeps one from starting there. Raises `UserError` if another
    running process holds a lock or the directory cannot be written.
    """
    directory = Path(directory)
    make_logs(directory)
    busy = "another run is using it now; stop that one or choose another directory"
    if "LAUNCH_HOSTS" not in os.environ:
        take_lock(directory / START_LOCK, busy)
    take_lock(directory / "lock", busy)


def take_lock(path: Path, busy: str) -> IO[Any]:
    """Lock a file of a run directory until this process ends. Raises `UserError` with `busy` if another one holds it,
    or if it cannot be written."""
    directory = path.parent
    try:
        file = open(path, "a")  # noqa: SIM115 - held until the process ends
    except OSError as error:
        raise UserError(f"run.directory = {directory}: cannot be written: {error.strerror}; choose another") from None
    for attempt in range(LOCK_ATTEMPTS):  # `launch status` holds the lock for an instant
        try:
            lock(file, f"run.directory = {directory}", busy)
            break
        except UserError:
            if attempt == LOCK_ATTEMPTS - 1:
                file.close()
                raise
            time.sleep(0.05)
    _held.append(file)
    return file


def make_logs(directory: Path) -> Path:
    """The folder of the ranks' logs. Raises `UserError` if it cannot be made."""
    logs = directory / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run.directory = {directory}: cannot make {logs}: {error.strerror}; "
            "choose a folder that you can write to, for example --set run.directory=/tmp/run"
        ) from None
    return logs


def log_name(host: str, rank: int) -> str:
    return f"{host}-rank-{rank}.log"


def take_over(directory: Path) -> str:
    """Begin a new restart generation in the run directory; returns its token.

    An older process that still runs, on a machine that lost its network or its lock, then finds a different token.
    """
    token = secrets.token_hex(8)
    found = {"token": token, "host": os.uname().nodename, "process": os.getpid(), "time": time.time()}
    write_json(Path(directory) / RESTART_GENERATION, found)
    return token


def rank_zero(directory: Path) -> tuple[int, str]:
    """Process id and host of rank 0 in the current restart generation; (0, "") before the first one."""
    file = Path(directory) / RESTART_GENERATION
    if not file.exists():
        return 0, ""
    found = read_json(file)
    return found["process"], found["host"]


def require_restart_generation(directory: Path, token: str) -> None:
    """Raises `UserError` if a later start has taken the run over. An empty token is not checked."""
    if not token:
        return
    file = Path(directory) / RESTART_GENERATION
    if not file.exists():
        raise UserError(_what_is_gone(file))
    now = read_json(file)
    if now["token"] != token:
        raise UserError(
            f"{directory}: a later start, process {now['process']} on {now['host']}, has taken this run over; "
            "this one cannot save any more: stop it"
        )


def _what_is_gone(file: Path) -> str:
    directory = file.parent
    gone = f"{file} is gone" if directory.is_dir() else f"run.directory = {directory} is gone"
    return (
        f"{gone}: it was moved or deleted while the run wrote to it; nothing can be saved there any more: put it back, "
        "or restore it from a copy, and start again"
    )


def lock(file: IO[Any], name: str, busy: str = "") -> None:
    """Lock an open file until it is closed or this process ends, kill -9 included.

    If another process holds the lock: raises `UserError` "name: busy"; without `busy`, waits. A file system without
    locks is a `UserError` that begins with `name`, too.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
    except BlockingIOError:
        raise UserError(f"{name}: {busy}") from None
    except OSError as error:
        raise UserError(
            f"{name}: its file system has no locks ({error.strerror}); choose another one, or mount it with flock"
        ) from None


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write, fsync and rename: a reader finds the old file or the new one, never a part. An `OSError` names `path`."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    # Host and process id: machines that share a folder can have equal process ids.
    part = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make a rename or a new file in this folder survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    """Append one line in one write, after a line break if a full disk or a crash has cut the line before.
    `read_json_lines` skips a cut line. `UserError`: the folder is gone."""
    data = json.dumps(value).encode() + b"\n"
    try:
        with open(path, "ab+", buffering=0) as file:
            if file.seek(0, os.SEEK_END) and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                data = b"\n" + data
            while data:  # a full disk may take a part; the next write then has the error
                data = data[file.write(data) or 0 :]
    except FileNotFoundError:
        raise UserError(_what_is_gone(Path(path))) from None
    except OSError as error:  # its own may not name the file
        raise OSError(error.errno, error.strerror, str(path)) from None


def read_json_lines(path: Path, tail_bytes: int = 0) -> Iterator[dict[str, Any]]:
    """The complete lines of a JSONL file, or of its last bytes. Empty if the file does not exist."""
    if not Path(path).exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        file.seek(max(0, os.path.getsize(path) - tail_bytes) if tail_bytes else 0)
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def tokenizer_of(directory: Path) -> str:
    """sha256 of the tokenizer.json that the data of a run had at its last start; empty: not recorded."""
    record = Path(directory) / "data_manifest.json"
    found = read_json(record) if record.is_file() else {}
    return str(found.get("tokenizer_sha256", "")) if isinstance(found, dict) else ""


def record_event(directory: Path, kind: str, **details: Any) -> None:
    """Append an event with its time (Unix seconds) to events.jsonl. One that meets a full or read-only disk is printed
    instead: it must not end a run."""
    file = Path(directory) / "events.jsonl"
    try:
        append_json_line(file, {"time": time.time(), "event": kind, **details})
    except OSError as error:
        if not remedy_for(error):
            raise
        print(
            f"bigmodel: {file}: {error.strerror}; not recorded: {kind}; {remedy_for(error)}",
            file=sys.stderr,
            flush=True,
        )


def refuse_to_start_over(directory: Path) -> None:
    """For a start without a checkpoint: raises `UserError` if the run has saved one, which is then lost."""
    lines = read_json_lines(Path(directory) / "metrics.jsonl")
    if saved := [line["step"] for line in lines if line["kind"] == "checkpoint"]:
        raise UserError(
            f"{directory}: this run saved a checkpoint at step {saved[-1]}, but there is none now; put it back into "
            f"{directory}/checkpoints, or start again from step 0 with --fresh"
        )


def package_versions() -> dict[str, str]:
    """Versions of the packages that can change a run."""
    found = {}
    for name in ("torch", "deepspeed", "mosaicml-streaming", "triton", "numpy", "tokenizers", "pyarrow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe_environment(repository: Path) -> dict[str, Any]:
    """Commit, uncommitted changes, versions and variables, to repeat a run. Never fails.

    The changes include small untracked source files; `untracked` lists all untracked files except ignored ones.
    Secrets are masked.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(repository), *arguments]
        try:
            found = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10)
        except (OSError, subprocess.SubprocessError):
            return ""
        return found.stdout.strip("\n") if found.returncode <= 1 else ""  # 1: files differ

    untracked = [name for name in git("ls-files", "--others", "--exclude-standard", "-z").split("\0") if name]
    sources = [name for name in untracked if _is_small_source(Path(repository) / name)][:MAX_UNTRACKED_SOURCES]
    changes = [git("diff", "HEAD"), *(git("diff", "--no-index", "--", "/dev/null", name) for name in sources)]
    return {
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_diff": without_secret_texts("\n".join(filter(None, changes))),
        "untracked": untracked[:MAX_UNTRACKED_NAMES],
        "host": os.uname().nodename,
        "versions": package_versions(),
        "variables": shown_variables(os.environ),
    }


def _is_small_source(path: Path) -> bool:
    return path.suffix in SOURCE_SUFFIXES and os.path.isfile(path) and os.path.getsize(path) <= SMALL_SOURCE_BYTES


def shown_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that can change a run, by an allow-list of prefixes; possible secrets are masked."""
    return {
        name: REDACTED if is_secret(name, value) else _without_credentials(value)
        for name, value in sorted(environment.items())
        if name.startswith(SHOWN_VARIABLES)
    }


def _without_credentials(value: str) -> str:
    """The value without secrets and without users in URLs, which may be tokens."""
    return CREDENTIALS_IN_URL.sub(rf"\1{REDACTED}@", without_secret_texts(value))


def record_start(directory: Path, settings: dict[str, Any], deepspeed: dict[str, Any], data: Path) -> list[Change]:
    """Write the values of this start into the run directory, and keep a copy: RUN_DIR/starts/0001.json ...

    data: the prepared folder; its manifest is copied. Secrets are masked.
    Returns the changes since the previous start: settings, DeepSpeed JSON, commit and versions.
    """
    directory, repository = Path(directory), Path(__file__).parents[1]
    settings, deepspeed = without_secrets_inside(settings), without_secrets_inside(deepspeed)
    environment = describe_environment(repository)
    write_json(directory / "settings.json", settings)
    write_json(directory / "deepspeed.json", deepspeed)
    write_json(directory / "environment.json", environment)
    write_atomically(directory / "data_manifest.json", (Path(data) / "manifest.json").read_bytes())
    (directory / "starts").mkdir(exist_ok=True)
    earlier = sorted((directory / "starts").glob("*.json"))
    start = directory / "starts" / f"{len(earlier) + 1:04d}.json"
    whole = {"time": time.time(), "settings": settings, "deepspeed": deepspeed, "environment": environment}
    write_json(start, whole)
    try:
        return changes(_in_force(earlier[-1]), _in_force(start)) if earlier else []
    except UserError:  # a damaged record of an earlier start does not stop a run
        return []


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """The values that differ in two nested tables, by dotted name, except run.directory."""
    mine, its = ({NEW_NAMES.get(name, name): value for name, value in flat(table)} for table in (then, now))
    names = sorted((mine.keys() | its.keys()) - {"run.directory"})
    return [(name, mine.get(name), its.get(name)) for name in names if mine.get(name) != its.get(name)]


def recorded_changes(directory: Path) -> list[tuple[float, list[Change]]]:
    """(Unix time, changes since the start before) of each recorded start; damaged records are left out."""
    found: list[tuple[float, list[Change]]] = []
    before: dict[str, Any] | None = None
    for file in sorted((Path(directory) / "starts").glob("*.json")):
        try:
            moment, now = read_json(file)["time"], _in_force(file)
        except (UserError, KeyError, TypeError):
            continue
        found.append((moment, changes(before, now) if before is not None else []))
        before = now
    return found


def flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything in a nested table."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _in_force(start: Path) -> dict[str, Any]:
    """Settings, DeepSpeed JSON, commit and versions of a start, in one table."""
    given = read_json(start)
    names = ("commit", "versions")
    return {
        **given["settings"],
        "deepspeed": given["deepspeed"],
        **{name: given["environment"][name] for name in names},
    }
